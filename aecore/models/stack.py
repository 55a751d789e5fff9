"""Layers on top of each other, unrolled into one deep autoencoder."""

from collections.abc import Iterator, Sequence
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from aecore.core.types import LikelihoodKind, Shape
from aecore.models import likelihood
from aecore.models.autoencoder import Autoencoder
from aecore.models.layers import Layer


class Stack(Autoencoder):
    """Layers unrolled into one autoencoder (Hinton & Salakhutdinov 2006): rows pass the encoders upward to the code of
    the last layer, the bottleneck, and codes pass the decoders downward to the data."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(cast(Sequence[Layer], self.layers))  # the type of ModuleList doesn't name its elements'

    @property
    def first(self) -> Layer:
        """The layer that reads the data."""
        return next(iter(self))

    @property
    def code_shape(self) -> Shape:
        """The shape of the bottleneck's code, without the batch."""
        return list(self)[-1].spec.code_shape

    @property
    def likelihood(self) -> LikelihoodKind:
        return self.first.spec.likelihood

    def encode(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        for layer in self:
            x = layer.encode(x)
        return x

    def posterior(self, x: Float[Tensor, "batch ..."]) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:
        *lower, last = self
        for layer in lower:
            x = layer.encode(x)
        return last.posterior(x)

    def decode(self, code: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        for layer in reversed(list(self)[1:]):
            code = layer.mean(code)
        return self.first.decode(code)

    def mean(self, code: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return likelihood.mean(self.likelihood, self.decode(code))
