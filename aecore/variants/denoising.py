"""The denoising autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from aecore.variants.base import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from aecore.core.types import Terms
    from aecore.models.protocol import Autoencoder


class Denoising(Objective):
    """Reconstructs the clean input from a corrupted one (Vincent et al. 2010, eq. 8).

    The noise is there only while the layer itself is trained; the layer above is fed clean codes.
    """

    paper: ClassVar = "Vincent et al., JMLR 11 (2010) 3371-3408"
    kind: Literal["denoising"] = "denoising"
    noise: Literal["gaussian", "masking", "salt_and_pepper"] = "masking"
    """Corruption of the input."""
    level: Annotated[float, Field(ge=0)] = 0.25
    """Standard deviation of gaussian noise, else the share of features corrupted."""

    @model_validator(mode="after")
    def _a_share_is_at_most_one(self) -> Self:
        if self.noise != "gaussian" and self.level > 1:
            raise ValueError(f"variant.level: {self.level:g} is no share of the features; use 0 to 1 with {self.noise}")
        return self

    def loss(self, model: Autoencoder, x: Tensor) -> Terms:
        from aecore.models.corruption import corrupt

        return {"reconstruction": model.reconstruction_loss(model.encode(corrupt(x, self.noise, self.level)), x)}
