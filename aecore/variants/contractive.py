"""The contractive autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveInt

from aecore.core.errors import InputError
from aecore.core.types import is_zero
from aecore.variants.base import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from aecore.core.types import Terms
    from aecore.models.autoencoder import Autoencoder
    from aecore.models.spec import LayerSpec


class Contractive(Objective):
    """The contractive autoencoder of Rifai et al. (ICML 2011) reconstructs its input from a code that hardly moves when
    the input does.

    It minimises the reconstruction term plus `weight` times ||J||_F^2, the squared Frobenius norm of the Jacobian of
    the encoder at the input (eq. 2). It assumes that the code of a row does not depend on the other rows, so that batch
    normalisation is refused.
    """

    paper: ClassVar = "Rifai et al., ICML 2011"
    kind: Literal["contractive"] = "contractive"
    weight: NonNegativeFloat = 0.1
    """Weight of the penalty, in units of the reconstruction term: of l1 or kl for sparse, of the squared Frobenius norm
    of the encoder's Jacobian for contractive."""
    probes: PositiveInt | None = 1
    """Number of random directions per row by which contractive estimates the norm. Only a single dense layer has a
    closed form and needs none. null computes the norm exactly, which costs a backward pass per unit of the code."""

    def build(self, layer: LayerSpec, number: int) -> LayerSpec:
        if layer.normalization == "batch":
            raise InputError(
                "network.normalization: batch makes the code of a row depend on the other rows, so that the row has no "
                "Jacobian of its own; use layer or none with the contractive variant"
            )
        return layer

    def loss(self, model: Autoencoder, x: Tensor) -> Terms:
        from aecore.models.jacobian import squared_norm

        terms = {"reconstruction": model.reconstruction_loss(model.encode(x), x)}
        if not is_zero(self.weight):
            terms["contraction"] = self.weight * squared_norm(model, x, self.probes).mean()
        return terms
