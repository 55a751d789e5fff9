"""Batches: the order of the rows in an epoch, and a worker's part of each batch."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aecore.core.errors import InputError
from aecore.data.stream import Shuffled
from aecore.training.job import Job
from aecore.training.team import Team


class Part(NamedTuple):
    """This worker's part of a batch."""

    tensors: tuple[Tensor, ...]
    """The part's rows and labels, on the device; an empty part of a stream has no tensors."""
    share: float
    """The part's share of the rows of the batch; 0 if it is empty."""

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.tensors[0]) if self.tensors else 0


def fewest_rows(model: nn.Module) -> int:
    """Return the fewest rows of a part of a batch that can train `model`: two for batch normalisation, else one."""
    return 2 if any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules()) else 1


def check_batch_size(job: Job) -> None:
    """Raise if batches are too small for batch normalisation.

    Raises:
        InputError: a worker of the team would get a single row of a batch.
    """
    least, rows = fewest_rows(job.model) * job.team.size, min(job.spec.batch_size, job.rows)
    if rows < least and least > job.team.size:
        raise InputError(
            f"batch_size: batches of {rows} rows are too small for batch normalisation, which needs two for each of "
            f"{job.team.size} workers; raise batch_size to {least}, or use network.normalization layer or none"
        )


def epoch_of(job: Job, shuffle: torch.Generator) -> Iterator[Part]:
    """Yield this worker's parts of the batches of an epoch, in an order drawn from `shuffle`."""
    spec, least = job.spec, fewest_rows(job.model)
    if isinstance(job.train, Shuffled):
        seed = int(torch.randint(2**62, (), generator=shuffle))
        fewest = least if least > 1 else 0
        for part, share in job.train.batches(spec.batch_size, seed, job.team.rank, job.team.size, least=fewest):
            yield Part(tuple(torch.from_numpy(values).to(job.device) for values in part), share)
        return
    order = permutation(job.rows, spec.batch_size, shuffle, 2 * (job.team.size if least > 1 else 1))
    yield from batches(job.train, order, spec.batch_size, job.device, job.team)


def permutation(rows: int, batch_size: int, shuffle: torch.Generator, least: int = 2) -> Tensor:
    """Return the order of the rows in an epoch, without a last batch of fewer than `least` rows."""
    last = rows % batch_size
    return torch.randperm(rows, generator=shuffle)[: rows - (last if last < least < rows else 0)]


def batches(
    tensors: tuple[Tensor, ...], order: Tensor, batch_size: int, device: torch.device, team: Team
) -> Iterator[Part]:
    """Yield this worker's parts of the batches, on `device`.

    The tensors stay where they are, on the device or in host memory, and as they are (uint8 stays uint8): batches are
    cut there, and only batches travel.
    """
    order = order.to(tensors[0].device)
    for index in order.split(batch_size):
        own = team.part(index)
        yield Part(tuple(t.index_select(0, own).to(device) for t in tensors), len(own) / len(index))
