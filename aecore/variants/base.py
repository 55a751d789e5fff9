"""The base class of all variants."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from aecore.core.fingerprint import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from aecore.core.types import Activation, Terms
    from aecore.models.autoencoder import Autoencoder
    from aecore.models.spec import LayerSpec


class Objective(Frozen, ABC):
    """A variant of the autoencoder: the changes that it makes to a layer, and the loss that it minimises."""

    paper: ClassVar[str]
    """The papers that introduced the variant, with their years."""

    @property
    def code_activation(self) -> Activation | None:
        """The activation of the bottleneck if the network names none; None stands for the other layers' activation."""
        return None

    def build(self, layer: LayerSpec, number: int) -> LayerSpec:
        """Return the layer that the network describes with the changes that this variant needs.

        Args:
            number: the layer's place in the stack, where layer 1 reads the data.

        Raises:
            InputError: the variant is not defined for such a layer.
        """
        return layer

    @abstractmethod
    def loss(self, model: Autoencoder, x: Tensor) -> Terms:
        """Return the weighted terms of the loss for rows `x` (batch, *in_shape), scalars averaged over the batch."""
