"""Data-parallel training: several workers, one model, each global batch split between them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Team(NamedTuple):
    """This worker among those that train the same model; by default the only one.

    Every worker sees the same permutation and takes each `size`-th row of a batch, so that the team takes the steps
    that one worker would, up to the order of sums. What differs: noise and dropout are drawn by each worker for its own
    rows, and what a variant or batch normalisation computes of a whole batch, each computes of its part.
    """

    rank: int = 0
    size: int = 1

    def part(self, index: Tensor) -> Tensor:
        """This worker's rows of a batch."""
        return index[self.rank :: self.size] if self.size > 1 else index

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over the team, in place, in one message."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        for tensor, part in zip(tensors, together.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


ALONE = Team()
