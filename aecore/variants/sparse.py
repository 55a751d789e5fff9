"""The sparse autoencoder."""

from __future__ import annotations

from math import ceil, prod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from aecore.core.errors import InputError
from aecore.core.types import is_zero
from aecore.models.divergences import kl_to_rate
from aecore.variants.base import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from aecore.core.types import Activation, Terms
    from aecore.models.autoencoder import Autoencoder
    from aecore.models.spec import LayerSpec


class Sparse(Objective):
    """The sparse autoencoder reconstructs its input from a code in which few units are active at a time.

    There are three ways to make the code sparse. `l1` adds `weight` times the sum of the absolute codes of a row. `kl`
    adds `weight` times the divergence of each unit's mean activation over the batch from `rate` (Ng, CS294A lecture
    notes, sec. 3); it assumes sigmoid codes, as an activation outside (0, 1) is not a rate. `topk` keeps the `k`
    largest codes of a row and has no penalty (Makhzani & Frey, ICLR 2014).
    """

    paper: ClassVar = "Ng, CS294A (2011); Makhzani & Frey, ICLR 2014"
    kind: Literal["sparse"] = "sparse"
    penalty: Literal["l1", "kl", "topk"] = "l1"
    """How sparse makes its code sparse: l1 penalises absolute codes, kl mean activations that differ from a target rate
    (for sigmoid codes), and topk keeps the largest codes only."""
    weight: NonNegativeFloat = 0.1
    """Weight of the penalty, in units of the reconstruction term: of l1 or kl for sparse, of the squared Frobenius norm
    of the encoder's Jacobian for contractive."""
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Target of each unit's mean activation over a batch, between 0 and 1 (only for sparse with kl)."""
    k: PositiveFloat = 0.1
    """Codes that stay active in each row (only for sparse with topk): a share of the units if below 1, else a number of
    units."""
    alpha: Annotated[float, Field(ge=1)] = 1.0
    """Factor on k for the codes that a trained encoder emits; the decoder always reads k of them (only for sparse with
    topk)."""

    @property
    def code_activation(self) -> Activation | None:
        return "sigmoid" if self.penalty == "kl" else None

    def build(self, layer: LayerSpec, number: int) -> LayerSpec:
        if self.penalty == "kl" and layer.activation != "sigmoid":
            raise InputError(
                f"variant.penalty: kl needs codes in (0, 1), layer {number} has {layer.activation}; "
                "set --network.activation sigmoid, or --variant.penalty l1 or topk"
            )
        if self.penalty == "kl" and layer.dropout:
            raise InputError(
                "variant.penalty: kl needs codes in (0, 1), and dropout scales them beyond 1; set pretrain.dropout 0"
            )
        if self.penalty != "topk":
            return layer
        units = prod(layer.code_shape)
        k = ceil(self.k * units) if self.k < 1 else int(self.k)
        if k > units:
            raise InputError(f"variant.k: {k} codes are more than the {units} that layer {number} has; keep fewer")
        return layer.model_copy(update={"top_k": k, "top_k_encoding": round(min(units, self.alpha * k))})

    def loss(self, model: Autoencoder, x: Tensor) -> Terms:
        code = model.encode(x)
        terms = {"reconstruction": model.reconstruction_loss(code, x)}
        if self.penalty == "l1" and not is_zero(self.weight):
            terms["l1"] = self.weight * code.float().abs().sum() / len(code)
        elif self.penalty == "kl" and not is_zero(self.weight):
            terms["kl"] = self.weight * kl_to_rate(code, self.rate)
        return terms
