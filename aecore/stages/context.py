"""Where a stage runs, what it reports to, and how it reads rows."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from aecore.data.splits import Arrays, Split
from aecore.data.stream import ReadPieces, Stream, read_in_turn
from aecore.training.checkpoint import Checkpoints
from aecore.training.job import Report, no_report
from aecore.training.team import ALONE, Team

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Context:
    """A stage's device, report, team and checkpoints; nothing here changes the numbers."""

    device: torch.device = CPU
    report: Report = no_report
    """Called after each epoch of training."""
    team: Team = ALONE
    """The workers that train together."""
    checkpoints: Checkpoints | None = None
    """The checkpoints that training goes on from and writes."""
    spread: ReadPieces = read_in_turn
    """Reads the pieces of a data set that is larger than memory."""
    device_share: float = 1.0
    """Share of the device's memory that the stage plans with; the rest belongs to other processes."""
    parts: int = 1
    """Number of parts into which a batch is cut to fit into memory; the gradients of the parts are added up."""


def rows_in_memory(data: Arrays | Stream) -> Arrays:
    """Return the rows that are held in memory: all of them, or the sample of a larger set."""
    return data.sample if isinstance(data, Stream) else data


def all_test_rows(data: Arrays | Stream, context: Context) -> Iterable[Split]:
    """Return all test rows in chunks, also those of a set that is larger than memory."""
    return context.spread(data.reader("test"), data.pieces) if isinstance(data, Stream) else [data.test]
