"""Types that several rooms share. This module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Activation = Literal["relu", "sigmoid", "tanh", "gelu", "elu", "linear"]
LikelihoodKind = Literal["gaussian", "bernoulli", "continuous_bernoulli", "categorical"]
Noise = Literal["gaussian", "masking", "salt_and_pepper"]
Detector = Literal["knn", "iforest", "lof", "pca"]
"""A detector of anomalies from scikit-learn, see `aecore.anomaly.detectors`."""
Precision = Literal["fp32", "tf32", "bf16"]
Task = Literal["classify", "reconstruct"]

Shape = tuple[int, ...]
"""The shape of one row: (channels, height, width) of an image or of convolutional codes, (features,) of a vector."""

Terms = dict[str, "Tensor"]
"""The weighted terms of a loss by name, each a scalar; the loss is their sum, and each is logged under its name."""


def describe_shape(shape: Shape) -> str:
    """Say in words what rows of this shape are: images with their height, width and channels, or vectors."""
    if len(shape) != 3:
        return f"vectors of {' x '.join(map(str, shape))} {'feature' if shape == (1,) else 'features'}"
    channels, height, width = shape
    order = "" if height == width else " (height x width)"
    return f"images of {height} x {width} pixels{order} with {channels} {'channel' if channels == 1 else 'channels'}"


def is_zero(number: float | Tensor) -> bool:
    """Say whether a hyperparameter is the number 0, without waiting for the device.

    Where several fits are trained together as one (`aecore.training.fused`), a hyperparameter in which they differ is a
    tensor. None of the tensor's elements is 0, so the answer is then False.
    """
    return isinstance(number, float | int) and number == 0
