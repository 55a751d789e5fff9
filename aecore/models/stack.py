"""Layers on top of each other, unrolled into one deep autoencoder."""

from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn

from aecore.models import likelihood
from aecore.models.autoencoder import Autoencoder, Batch
from aecore.models.layers import Layer


class Stack(Autoencoder):
    """Layers unrolled into one autoencoder (Hinton & Salakhutdinov 2006): rows pass the encoders upward to the code of
    the last layer, the bottleneck, and codes pass the decoders downward to the data."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.input_spec = layers[0].spec
        self.code_shape = layers[-1].spec.code_shape

    def __iter__(self) -> Iterator[Layer]:
        return iter(cast(Sequence[Layer], self.layers))  # ModuleList's type doesn't name the type of its elements

    @property
    def first(self) -> Layer:
        """The layer that reads the data."""
        return next(iter(self))

    def filled(self, x: Batch) -> Batch:
        return self.first.filled(x)

    def encode(self, x: Batch) -> Batch:
        for layer in self:
            x = layer.encode(x)
        return x

    def posterior(self, x: Batch) -> tuple[Batch, Batch]:
        *lower, last = self
        for layer in lower:
            x = layer.encode(x)
        return last.posterior(x)

    def decode(self, code: Batch) -> Batch:
        for layer in reversed(list(self)[1:]):
            code = layer.mean(code)
        return self.first.decode(code)

    def mean(self, code: Batch) -> Batch:
        spec = self.input_spec
        return likelihood.mean(spec.likelihood, self.decode(code), spec.blocks)
