"""Numbers that may be tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def is_zero(number: float | Tensor) -> bool:
    """Whether a weight or level is 0, known without looking on the device: fits that are trained as one (see
    `aecore.fused`) have a tensor where their numbers differ, none of which is 0."""
    return isinstance(number, float | int) and number == 0
