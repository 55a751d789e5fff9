"""Where a stage runs and whom it tells."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from aecore.data.splits import Arrays, Split
from aecore.data.stream import ReadPieces, Stream, read_in_turn
from aecore.training.checkpoint import Checkpoints
from aecore.training.fit import Fitted, Report, fit
from aecore.training.team import ALONE, Team


class Run(NamedTuple):
    """Where a stage runs and whom it tells; nothing here reaches the numbers."""

    device: torch.device = torch.device("cpu")
    report: Report = lambda epoch, metrics: None
    team: Team = ALONE
    checkpoints: Checkpoints | None = None
    spread: ReadPieces = read_in_turn
    parts: int = 1
    """Into how many a batch is cut whose gradients are added up, where memory lacks."""
    fit: Callable[..., Fitted] = fit
    """The training loop, or what has several stages go through it as one: see `aecore.fused`."""


def held(data: Arrays | Stream) -> Arrays:
    """The rows that lie in memory: all, or the sample of a larger set."""
    return data.sample if isinstance(data, Stream) else data


def all_test_rows(data: Arrays | Stream, run: Run) -> Iterable[Split]:
    """Also of a larger set, in chunks."""
    return run.spread(data.reader("test"), data.pieces) if isinstance(data, Stream) else [data.test]
