"""The autoencoder that a variant's loss is computed on: one layer or a whole stack."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from aecore.models import likelihood
from aecore.models.spec import LayerSpec

Batch = Float[Tensor, "batch ..."]
"""A tensor with one entry per row of a batch, such as rows, codes, or the parameters of a likelihood."""


class Autoencoder(nn.Module, ABC):
    """A model that maps rows x (batch, *in_shape) to codes (batch, *code_shape) and back."""

    input_spec: LayerSpec
    """The spec of the layer that reads the rows, with the likelihood of these."""

    @abstractmethod
    def filled(self, x: Batch) -> Batch:
        """Return `x` as the encoder reads it: with a value in place of each one that is missing."""

    @abstractmethod
    def encode(self, x: Batch) -> Batch:
        """Return the codes of `x`, (batch, *code_shape)."""

    @abstractmethod
    def posterior(self, x: Batch) -> tuple[Batch, Batch]:
        """Return mean and log-variance of q(code | x), each (batch, *code_shape); the last layer must be stochastic."""

    @abstractmethod
    def decode(self, code: Batch) -> Batch:
        """Return the parameters of the likelihood of the rows: means for gaussian, else logits; of shape (batch,
        *in_shape) or, for categorical, (batch, levels, *in_shape)."""

    @abstractmethod
    def mean(self, code: Batch) -> Batch:
        """Return the reconstruction that `code` stands for, (batch, *in_shape)."""

    def reconstruct(self, x: Batch) -> Batch:
        """Return `x` after encoding and decoding, (batch, *in_shape)."""
        return self.mean(self.encode(x))

    def reconstruction_loss(self, code: Batch, target: Batch) -> Float[Tensor, ""]:
        """Return the reconstruction term of `target` (batch, *in_shape) given its code: a sum over features, averaged
        over the batch. Missing values of the target are left out of the sum."""
        spec = self.input_spec
        return likelihood.reconstruction_loss(spec.likelihood, self.decode(code), target, spec.blocks, spec.missing)
