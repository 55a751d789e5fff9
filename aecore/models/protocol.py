"""What a variant's loss may ask of a model, be it one layer or a whole stack."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from aecore.core.types import LikelihoodKind


@runtime_checkable
class Autoencoder(Protocol):
    """What a variant's loss may ask of a model: one layer or a whole stack."""

    @property
    def likelihood(self) -> LikelihoodKind: ...
    def encode(self, x: Tensor) -> Tensor: ...
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]: ...
    def mean(self, code: Tensor) -> Tensor: ...
    def reconstruction_loss(self, code: Tensor, target: Tensor) -> Tensor: ...
