"""The contractive autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveInt

from aecore.core.errors import InputError
from aecore.core.scalars import is_zero
from aecore.variants.base import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from aecore.core.types import Terms
    from aecore.models.protocol import Autoencoder
    from aecore.models.spec import LayerSpec


class Contractive(Objective):
    """Reconstructs from a code that hardly moves with the input: reconstruction + weight * ||J||_F^2, where J is the
    Jacobian of the encoder (Rifai et al., ICML 2011, eq. 2)."""

    paper: ClassVar = "Rifai et al., ICML 2011"
    kind: Literal["contractive"] = "contractive"
    weight: NonNegativeFloat = 0.1
    """Weight of the squared Frobenius norm, in units of the reconstruction term."""
    probes: PositiveInt | None = 1
    """Random directions a row that estimate the norm where it has no closed form (all but one dense layer); null
    computes it exactly, at the price of a pass for each code."""

    def build(self, layer: LayerSpec, number: int) -> LayerSpec:
        if layer.normalization == "batch":
            raise InputError(
                "network.normalization: batch makes a code depend on the other rows, so it has no Jacobian of its own; "
                "use layer or none with variant contractive"
            )
        return layer

    def loss(self, model: Autoencoder, x: Tensor) -> Terms:
        from aecore.models.jacobian import squared_norm

        terms = {"reconstruction": model.reconstruction_loss(model.encode(x), x)}
        if not is_zero(self.weight):
            terms["contraction"] = self.weight * squared_norm(model, x, self.probes).mean()
        return terms
