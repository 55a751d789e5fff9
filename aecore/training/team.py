"""Data-parallel training: several workers train one model, and each batch is divided among them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Team(NamedTuple):
    """This worker's place among the workers that train the same model; by default it is the only worker.

    Every worker sees the same permutation and takes each `size`-th row of a batch, so that the team takes the steps
    that one worker would take, up to the order of sums. Two things differ. Each worker draws noise and dropout for its
    own rows. Batch normalisation, or a variant that looks at a whole batch, looks at each worker's part.
    """

    rank: int = 0
    size: int = 1

    def part(self, index: Tensor) -> Tensor:
        """Return this worker's rows of a batch; there may be none."""
        return index[self.rank :: self.size] if self.size > 1 else index

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over the team, in place, in one message.

        All workers have to call this method together, with tensors of the same shapes in the same order.
        """
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        for tensor, part in zip(tensors, together.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def average_statistics(self, model: nn.Module, rows: int) -> None:
        """Average the running statistics of normalisations over the workers that have trained.

        Args:
            rows: the rows that this worker has trained on; the statistics of a worker without rows do not count.
        """
        statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if self.size == 1 or not statistics:
            return
        workers = torch.tensor(float(rows > 0), device=statistics[0].device)
        if not rows:
            for buffer in statistics:
                buffer.zero_()
        self.sum([*statistics, workers])
        for buffer in statistics:
            buffer /= workers


ALONE = Team()
