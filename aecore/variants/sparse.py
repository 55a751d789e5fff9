"""The sparse autoencoder."""

from __future__ import annotations

from math import ceil, prod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from aecore.core.errors import InputError
from aecore.core.scalars import is_zero
from aecore.models.divergences import kl_to_rate
from aecore.variants.base import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from aecore.core.types import Activation, Terms
    from aecore.models.protocol import Autoencoder
    from aecore.models.spec import LayerSpec


class Sparse(Objective):
    """Reconstructs from a code of which little is active at a time.

    `l1` adds the sum of absolute codes. `kl` holds each unit's mean activation over the batch at `rate` (Ng, CS294A
    lecture notes, sec. 3), for sigmoid codes alone: an activation outside (0, 1) is no rate. `topk` keeps the `k`
    largest codes of a row and needs no weight (Makhzani & Frey, ICLR 2014).
    """

    paper: ClassVar = "Ng, CS294A (2011); Makhzani & Frey, ICLR 2014"
    kind: Literal["sparse"] = "sparse"
    penalty: Literal["l1", "kl", "topk"] = "l1"
    """What makes the code sparse: l1 of the codes, kl to a target rate (sigmoid codes), or topk."""
    weight: NonNegativeFloat = 0.1
    """Weight of l1 or kl, in units of the reconstruction term."""
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Target mean activation of each unit (kl)."""
    k: PositiveFloat = 0.1
    """Codes kept active (topk): a share of the units below 1, else a number."""
    alpha: Annotated[float, Field(ge=1)] = 1.0
    """Factor on k when encoding for others; the decoder always reads k (topk)."""

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
                "variant.penalty: kl needs codes in (0, 1), dropout scales them beyond; set pretrain.dropout 0"
            )
        if self.penalty != "topk":
            return layer
        units = prod(layer.code_shape)
        k = ceil(self.k * units) if self.k < 1 else int(self.k)
        if k > units:
            raise InputError(f"variant.k: {k} codes kept of the {units} that layer {number} has; keep fewer")
        return layer.model_copy(update={"top_k": k, "top_k_encoding": round(min(units, self.alpha * k))})

    def loss(self, model: Autoencoder, x: Tensor) -> Terms:
        code = model.encode(x)
        terms = {"reconstruction": model.reconstruction_loss(code, x)}
        if self.penalty == "l1" and not is_zero(self.weight):
            terms["l1"] = self.weight * code.abs().sum() / len(code)
        elif self.penalty == "kl" and not is_zero(self.weight):
            terms["kl"] = self.weight * kl_to_rate(code, self.rate)
        return terms
