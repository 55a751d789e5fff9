"""The autoencoder that a variant's loss is computed on: one layer or a whole stack."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from aecore.core.types import LikelihoodKind
from aecore.models import likelihood


class Autoencoder(nn.Module, ABC):
    """A model that maps rows x (batch, *in_shape) to codes (batch, *code_shape) and back."""

    @property
    @abstractmethod
    def likelihood(self) -> LikelihoodKind:
        """The reconstruction term of the rows that the model reads."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Return the codes of `x`, (batch, *code_shape)."""

    @abstractmethod
    def posterior(self, x: Float[Tensor, "batch ..."]) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:
        """Return the mean and the log-variance of q(code | x), each (batch, *code_shape).

        Only a model whose last layer is stochastic has a posterior.
        """

    @abstractmethod
    def decode(self, code: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Return the parameters of the likelihood of the rows: (batch, *in_shape) of means for gaussian and of logits
        for the others, with categorical in (batch, levels, *in_shape)."""

    @abstractmethod
    def mean(self, code: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Return the reconstruction that `code` stands for, (batch, *in_shape)."""

    def reconstruct(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Return `x` after encoding and decoding, (batch, *in_shape)."""
        return self.mean(self.encode(x))

    def reconstruction_loss(
        self, code: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, ""]:
        """Return the reconstruction term of `target` (batch, *in_shape) given its code: a sum over features, averaged
        over the batch."""
        return likelihood.reconstruction_loss(self.likelihood, self.decode(code), target)
