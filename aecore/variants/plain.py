"""The autoencoder without a penalty."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from aecore.variants.base import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from aecore.core.types import Terms
    from aecore.models.autoencoder import Autoencoder


class Plain(Objective):
    """The plain autoencoder of Hinton & Salakhutdinov (2006) minimises the reconstruction term alone.

    It assumes that something else keeps the network from the identity map: a bottleneck, dropout or weight decay.
    """

    paper: ClassVar = "Hinton & Salakhutdinov, Science 313 (2006); Bengio et al., NIPS 2006"
    kind: Literal["plain"] = "plain"

    def loss(self, model: Autoencoder, x: Tensor) -> Terms:
        return {"reconstruction": model.reconstruction_loss(model.encode(x), x)}
