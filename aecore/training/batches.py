"""Batches: the order of the rows in an epoch, and a worker's part of each batch."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aecore.core.errors import InputError
from aecore.core.fingerprint import derive_seed
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
    least, rows = fewest_rows(job.model) * job.team.size, job.batch_rows
    if rows < least and least > job.team.size:
        raise InputError(
            f"batch_size: batches of {rows} rows are too small for batch normalisation, which needs two for each of "
            f"{job.team.size} workers; raise batch_size to {least}, or use network.normalization layer or none"
        )


def epoch_of(job: Job, epoch: int, shuffle: torch.Generator) -> Iterator[Part]:
    """Yield this worker's parts of the batches of an epoch, which is counted from 1; their order is drawn from
    `shuffle` or, where `steps` are set, follows from the job's seed."""
    if not isinstance(job.train, Shuffled):
        order = row_order(job, epoch, shuffle, 2 * (job.team.size if fewest_rows(job.model) > 1 else 1))
        yield from batches(job.train, order, job.batch_rows, job.device, job.team)
    elif job.spec.steps is None:
        yield from _pass_of(job, job.train, shuffle)
    else:
        steps = job.steps_in(epoch)
        while steps:
            before = steps
            for part in islice(_pass_of(job, job.train, shuffle, whole=job.team.size == 1), steps):
                yield part
                steps -= 1
            if steps == before:
                raise InputError("batch_size: workers get too few rows for a batch; use fewer resources.workers")


def _pass_of(job: Job, rows: Shuffled, shuffle: torch.Generator, whole: bool = False) -> Iterator[Part]:
    """Yield this worker's parts of the batches of a pass over a stream, or of `whole` batches alone."""
    seed, least = int(torch.randint(2**62, (), generator=shuffle)), fewest_rows(job.model)
    parts = rows.batches(
        job.spec.batch_size, seed, job.team.rank, job.team.size, least=least if least > 1 else 0,
        fewest=job.batch_rows if whole else 2,
    )  # fmt: skip
    for part, share in parts:
        yield Part(tuple(torch.from_numpy(values).to(job.device) for values in part), share)


def row_order(job: Job, epoch: int, shuffle: torch.Generator, least: int = 2) -> Tensor:
    """Return the order of the rows of an epoch, which is counted from 1 and cut into batches."""
    if job.spec.steps is None:
        return permutation(job.rows, job.batch_rows, shuffle, least)
    return _cut_of_passes(job, epoch)


def _cut_of_passes(job: Job, epoch: int) -> Tensor:
    """Return the rows of the steps of an epoch, cut from one shuffled pass over all rows after the other.

    An epoch begins where the last one ended, so no row is drawn twice before each has been drawn once. The order of a
    pass follows from the job's seed and the number of the pass, so that a fit goes on without a record of its passes.
    """
    start, stop = (job.steps_before(number) * job.batch_rows for number in (epoch, epoch + 1))
    first = start // job.rows
    generators = (
        torch.Generator().manual_seed(derive_seed(job.seed, "pass", number))
        for number in range(first, -(-stop // job.rows))
    )
    order = torch.cat([torch.randperm(job.rows, generator=generator) for generator in generators])
    return order[start - first * job.rows : stop - first * job.rows]


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
