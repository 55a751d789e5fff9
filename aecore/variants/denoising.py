"""The denoising autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from aecore.variants.base import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from aecore.core.types import Terms
    from aecore.models.autoencoder import Autoencoder


class Denoising(Objective):
    """The denoising autoencoder of Vincent et al. (2010) reconstructs the clean input from a corrupted copy of it.

    It minimises the reconstruction term of x, given the code of the corrupted x (eq. 8). The input is corrupted only
    while the layer itself is trained; the layer above reads codes of clean inputs. Masking and salt-and-pepper noise
    assume that 0 and 1 are the ends of a feature's range.
    """

    paper: ClassVar = "Vincent et al., JMLR 11 (2010) 3371-3408"
    kind: Literal["denoising"] = "denoising"
    noise: Literal["gaussian", "masking", "salt_and_pepper"] = "masking"
    """Noise that denoising puts on the input: gaussian adds normal noise, masking sets features to 0, salt_and_pepper
    to 0 or 1."""
    level: Annotated[float, Field(ge=0)] = 0.25
    """Level of denoising's noise: the standard deviation of gaussian noise in units of the features, otherwise the
    share of features that are corrupted, from 0 to 1."""

    @model_validator(mode="after")
    def _check_share(self) -> Self:
        if self.noise != "gaussian" and self.level > 1:
            raise ValueError(
                f"variant.level: {self.level:g} is not a share of the features; use 0 to 1 with {self.noise} noise"
            )
        return self

    def loss(self, model: Autoencoder, x: Tensor) -> Terms:
        from aecore.models.corruption import corrupt

        return {"reconstruction": model.reconstruction_loss(model.encode(corrupt(x, self.noise, self.level)), x)}
