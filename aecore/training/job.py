"""The input of a fit, `Job`, and its output, `Fitted`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aecore.config.experiment import Fit
from aecore.core.types import Precision
from aecore.data.stream import Shuffled
from aecore.training.checkpoint import Checkpoints
from aecore.training.numerics import RandomState
from aecore.training.objective import Objective
from aecore.training.team import ALONE, Team

Report = Callable[[int, dict[str, float]], None]
"""Called once per epoch with its number, from 1, and its metrics."""


def no_report(epoch: int, metrics: dict[str, float]) -> None:
    """Do nothing with an epoch's metrics."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """The input of a fit: the objective with its model, the rows, the settings and the device."""

    objective: Objective
    """The function that training minimises; it holds the model that is trained."""
    train: tuple[Tensor, ...] | Shuffled
    """Tensors of equal length, cut into batches together, or the rows of a stream."""
    validation: tuple[Tensor, ...]
    """Tensors of the validation rows, of equal length."""
    spec: Fit
    seed: int
    """Decides the order of the rows and the noise of validation."""
    device: torch.device
    precision: Precision = "fp32"
    compile: bool = False
    """Whether the loss is compiled by `torch.compile`."""
    monitor: str = "loss"
    """The validation metric by which the best epoch is chosen: `loss`, or the name of a term or sum of the objective.
    Smaller is better; the loss breaks ties."""
    scoring_rows: int = 2048
    """Rows of a batch of validation."""
    report: Report = no_report
    """Called after each epoch; in a team, only the first worker's report has an effect."""
    team: Team = ALONE
    """The workers that train this model together, each with all rows."""
    checkpoints: Checkpoints | None = None
    """The checkpoints that the fit goes on from and writes: when one is due after an epoch, and after the last."""
    parts: int = 1
    """Number of parts into which a batch is cut from the start, so that it fits into memory."""
    device_share: float = 1.0
    """Share of the device's memory that the fit plans with; the rest belongs to other processes."""
    random: RandomState | None = None
    """The random state in which training begins; None for the present one."""

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.objective.model

    @property
    def is_simple(self) -> bool:
        """Whether the fit has one worker, rows in memory and no compiled loss, in whatever precision. Only then are
        CUDA graphs used and fits trained as one: a stream is limited by its reading."""
        return self.team.size == 1 and not self.compile and not isinstance(self.train, Shuffled)

    @property
    def in_memory(self) -> tuple[Tensor, ...]:
        """The training tensors of a fit that is not streamed."""
        assert not isinstance(self.train, Shuffled)
        return self.train

    @property
    def rows(self) -> int:
        """The number of training rows."""
        return len(self.train) if isinstance(self.train, Shuffled) else len(self.train[0])

    @property
    def batch_rows(self) -> int:
        """The number of rows of a whole batch."""
        return min(self.spec.batch_size, self.rows)

    def steps_before(self, epoch: int) -> int:
        """Return the number of steps in the epochs before one, which is counted from 1."""
        if self.spec.steps is not None:
            return (epoch - 1) * self.spec.steps // self.spec.epochs
        return (epoch - 1) * math.ceil(self.rows / self.spec.batch_size)

    def steps_in(self, epoch: int) -> int:
        """Return the number of steps in an epoch, which is counted from 1."""
        return self.steps_before(epoch + 1) - self.steps_before(epoch)


class Fitted(NamedTuple):
    """The history of a fit and its best epoch; the trained model is left in the job."""

    history: list[dict[str, float]]
    """The metrics of each epoch."""
    best_epoch: int
    """The epoch, from 1, whose weights the model has."""
