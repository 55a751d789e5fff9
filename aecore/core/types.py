"""Names of types that several rooms share. Nothing here imports torch."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Activation = Literal["relu", "sigmoid", "tanh", "gelu", "elu", "linear"]
LikelihoodKind = Literal["gaussian", "bernoulli", "continuous_bernoulli", "categorical"]
Noise = Literal["gaussian", "masking", "salt_and_pepper"]
Precision = Literal["fp32", "tf32", "bf16"]
Task = Literal["classify", "reconstruct"]

Shape = tuple[int, ...]
"""(channels, height, width) of an image or of convolutional codes, (features,) of a vector."""

Terms = dict[str, "Tensor"]
"""Weighted terms of an objective, scalars: the objective is their sum, each is logged under its name."""
