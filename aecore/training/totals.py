"""Sums of loss terms over batches, and their means over rows."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aecore.core.errors import DivergenceError
from aecore.core.types import Terms
from aecore.training.team import Team


class Totals:
    """Sums over batches, by name, kept on the device in double precision; adding to them never waits for the device.

    The values are scalars or, for several fits trained as one, vectors with one number per fit. The sums are updated in
    place: thousands of small tensors that outlive the large ones around them would fragment the heap.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Terms, weight: int) -> None:
        """Add values times their weight; weight 0 only adds their names."""
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(value, dtype=torch.float64)
            if weight:
                self.sums[name].add_(value.detach(), alpha=weight)

    def clear(self) -> None:
        """Set the sums to zero and keep their names."""
        for total in self.sums.values():
            total.zero_()

    def means(self, rows: int, team: Team) -> dict[str, Any]:
        """Return the sums of the whole team divided by all its rows; waits for the device.

        Args:
            rows: this worker's rows; there may be none, but the names must be those of the other workers.

        Returns:
            A number per name or, for several fits, a list.
        """
        if not self.sums:
            return {}
        count = torch.tensor(rows, dtype=torch.float64, device=next(iter(self.sums.values())).device)
        team.sum([*self.sums.values(), count])
        return {name: (total / count).tolist() for name, total in self.sums.items()}


def check_finite(values: Mapping[str, Tensor | float], where: str, saved: str) -> None:
    """Raise for the first value that is not finite.

    Args:
        where: the epoch and batch, for the message.
        saved: text about checkpoints, for the message.

    Raises:
        DivergenceError: a value is not finite; the message names it.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            name = name if "/" in name else f"train/{name}"
            raise DivergenceError(f"{name} is {float(value)} {where}: lower the learning rate or set clip{saved}")
