"""Layers on top of each other, unrolled into one deep autoencoder."""

from collections.abc import Iterator, Sequence
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from aecore.core.types import LikelihoodKind
from aecore.models import likelihood
from aecore.models.layers import Layer


class Stack(nn.Module):
    """Layers on top of each other, unrolled: encoders upward, then decoders downward (Hinton & Salakhutdinov 2006)."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(cast(Sequence[Layer], self.layers))  # ModuleList does not say what it holds

    @property
    def first(self) -> Layer:
        """The layer that reads the data."""
        return next(iter(self))

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Of the bottleneck."""
        return list(self)[-1].spec.code_shape

    @property
    def likelihood(self) -> LikelihoodKind:
        """Of the data."""
        return self.first.spec.likelihood

    def encode(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        for layer in self:
            x = layer.encode(x)
        return x

    def posterior(self, x: Float[Tensor, "batch ..."]) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:
        """Mean and log-variance of q(code | x), where the last layer is stochastic."""
        *lower, last = self
        for layer in lower:
            x = layer.encode(x)
        return last.posterior(x)

    def decode(self, code: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Parameters of the likelihood of the data."""
        for layer in reversed(list(self)[1:]):
            code = layer.mean(code)
        return self.first.decode(code)

    def mean(self, code: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The reconstruction that `code` stands for, in the space of the data."""
        return likelihood.mean(self.likelihood, self.decode(code))

    def reconstruct(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return self.mean(self.encode(x))

    def reconstruction_loss(
        self, code: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, ""]:
        """The reconstruction term of `target` given its code."""
        return likelihood.reconstruction_loss(self.likelihood, self.decode(code), target)
