"""Names for types that several rooms share. This module does not import torch."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Activation = Literal["relu", "sigmoid", "tanh", "gelu", "elu", "linear"]
LikelihoodKind = Literal["gaussian", "bernoulli", "continuous_bernoulli", "categorical"]
Noise = Literal["gaussian", "masking", "salt_and_pepper"]
Precision = Literal["fp32", "tf32", "bf16"]
Task = Literal["classify", "reconstruct"]

Shape = tuple[int, ...]
"""The shape of one row: (channels, height, width) of an image or of convolutional codes, (features,) of a vector."""

Terms = dict[str, "Tensor"]
"""The terms of an objective by name, scalars that are already weighted: the objective is their sum, and each is logged
under its name."""
