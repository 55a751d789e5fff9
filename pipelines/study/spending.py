"""What a study has spent: beside what was forecast, and against the limits of its budget."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aecore.evaluation.trial import Trial
from pipelines.cluster.share import Share
from pipelines.study.cost import ALL, HOUR, SHARED, Cost, Forecast
from pipelines.study.schema import Budget

_BESIDES = "starts, lost attempts"
"""Label of what was held beside the trials: by workers that started or committed, and by attempts that were killed."""


class CostRow(NamedTuple):
    """A line of the table of costs: what was forecast and what was spent, in words."""

    label: str
    forecast: str
    spent: str


def cost_rows(forecast: Forecast, spent: Mapping[str, Cost], seconds: float) -> list[CostRow]:
    """Return the table of what was forecast and what was spent, for the report and the console.

    Args:
        spent: See `spent_by_row`.
        seconds: The wall time of the job.
    """
    labels = [row.label for row in forecast.rows]
    rows = {label: spent.get(label, Cost()) for label in labels}
    besides = spent[ALL] + sum(rows.values(), Cost()) * -1
    lines = [CostRow(row.label, _in_words(row.cost), _in_words(rows[row.label])) for row in forecast.rows]
    lines.append(CostRow(_BESIDES, "", _in_words(Cost(max(0.0, besides.cpu_seconds), max(0.0, besides.gpu_seconds)))))
    lines.append(CostRow(ALL, _in_words(forecast.total.cost), _in_words(spent[ALL])))
    return [*lines, CostRow("wall time", _clock(forecast.total.seconds), _clock(seconds))]


def cost_report(forecast: Forecast, spent: Mapping[str, Cost], seconds: float) -> dict[str, Any]:
    """Return what was forecast and what was spent, for the last line of the job; for the arguments see `cost_rows`."""
    return {
        "forecast": {"seconds": round(forecast.total.seconds, 1), **forecast.total.cost.hours()},
        "spent": {"seconds": round(seconds, 1), **spent[ALL].hours()},
    }


def spent_by_row(trials: Sequence[Trial], shared: Cost, held: Cost) -> dict[str, Cost]:
    """Return what trials have cost by study row, and what was held for all of them.

    Args:
        trials: The trials that were not finished before, however they ended.
        shared: What the stages that several trials share have cost.
        held: What was held from the cluster, which is more than the trials have told: workers also start and commit,
            and an attempt that was killed has told nothing.
    """
    spent = {SHARED: shared, ALL: held}
    for trial in trials:
        spent[trial.row] = spent.get(trial.row, Cost()) + Cost(trial.cpu_seconds, trial.gpu_seconds)
    return spent


@dataclass
class Spending:
    """What a study has spent on trials and stages, by all commands so far, and whether its budget is used up.

    It counts what is held: the driver says when it gives a share of the cluster to a task and when the task ends,
    however it ends. So attempts that fail and workers that are lost count.
    """

    budget: Budget
    spent: Cost = field(default_factory=Cost)
    """What earlier commands spent, and the tasks of this one that have ended."""
    clock: Callable[[], float] = time.monotonic
    running: dict[str, tuple[Share, float]] = field(default_factory=dict)
    """The share of each running task, and when it began."""
    earlier: Cost = field(init=False)
    """What earlier commands spent."""

    def __post_init__(self) -> None:
        self.earlier = self.spent

    def begin(self, task: str, share: Share) -> None:
        """Count a task from now on."""
        self.end(task)
        self.running[task] = share, self.clock()

    def end(self, task: str) -> None:
        """Count a task until now; do nothing if it does not run."""
        if task in self.running:
            share, began = self.running.pop(task)
            self.add(Cost.of(share, self.clock() - began))

    def add(self, cost: Cost) -> None:
        """Count what was not begun and ended here."""
        self.spent += cost

    def total(self) -> Cost:
        """Return what is spent until now, by running tasks too."""
        now = self.clock()
        return sum((Cost.of(share, now - began) for share, began in self.running.values()), self.spent)

    def of_this_command(self) -> Cost:
        """Return what is spent until now by this command alone."""
        return self.total() + self.earlier * -1

    def exhausted(self) -> str | None:
        """Return which part of the budget is used up, as the error of the trials that it ends; None while none is."""
        total = self.total()
        limits = {"CPU": (self.budget.cpu_hours, total.cpu_seconds), "GPU": (self.budget.gpu_hours, total.gpu_seconds)}
        for name, (limit, spent) in limits.items():
            if limit is not None and spent >= limit * HOUR:
                field = f"budget.{name.lower()}_hours"
                return f"the study's {name}-hours were spent; raise {field} above {limit:g} and start it again"
        return None

    def metrics(self) -> dict[str, float]:
        """Return what is spent as metrics of the study's run, from which `after` goes on."""
        total = self.total()
        return {"spent/cpu_seconds": total.cpu_seconds, "spent/gpu_seconds": total.gpu_seconds}

    @classmethod
    def after(cls, budget: Budget, metrics: Mapping[str, float]) -> "Spending":
        """Return the spending of a study whose run has these metrics of earlier commands."""
        spent = Cost(metrics.get("spent/cpu_seconds", 0.0), metrics.get("spent/gpu_seconds", 0.0))
        return cls(budget, spent)


def _in_words(cost: Cost) -> str:
    words = f"{cost.cpu_seconds / HOUR:.3g} CPU-hours"
    return f"{words}, {cost.gpu_seconds / HOUR:.3g} GPU-hours" if cost.gpu_seconds else words


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
