"""Hyperparameters that are numbers in one fit and tensors when several fits train as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def is_zero(number: float | Tensor) -> bool:
    """Say whether a weight or level is the number 0, without waiting for the device.

    Where several fits train as one (`aecore.training.fused`), a hyperparameter in which they differ is a tensor. None
    of its elements is 0, so the answer is then False.
    """
    return isinstance(number, float | int) and number == 0
