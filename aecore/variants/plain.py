"""The autoencoder without a penalty."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from aecore.fingerprint import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from aecore.networks import Autoencoder, Terms


class Plain(Frozen):
    """Reconstruction alone; what keeps it from the identity map is the bottleneck (or dropout, or weight decay)."""

    kind: Literal["plain"] = "plain"

    def loss(self, model: Autoencoder, x: Tensor) -> Terms:
        """Terms of the objective for x of shape (batch, *in_shape)."""
        return {"reconstruction": model.reconstruction_loss(x, x)}
