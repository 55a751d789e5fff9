"""What all variants have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from aecore.core.fingerprint import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from aecore.core.types import Activation, Terms
    from aecore.models.protocol import Autoencoder
    from aecore.models.spec import LayerSpec


class Objective(Frozen, ABC):
    """A way to train an autoencoder: what it asks of the layer, and what it minimises."""

    paper: ClassVar[str]
    """Where it comes from."""

    @property
    def code_activation(self) -> Activation | None:
        """The bottleneck's activation where the network names none; None takes that of the other layers."""
        return None

    def build(self, layer: LayerSpec, number: int) -> LayerSpec:
        """The layer that is trained by this objective, made of the one that the network describes.

        Args:
            number: the layer's place in the stack; layer 1 reads the data.

        Raises:
            InputError: the objective is not defined for such a layer.
        """
        return layer

    @abstractmethod
    def loss(self, model: Autoencoder, x: Tensor) -> Terms:
        """Terms of the objective for x of shape (batch, *in_shape); each a mean over the batch."""
