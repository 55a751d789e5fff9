"""Measuring the trained trials of a study on CPUs, beside the trials that still train on GPUs."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from aecore.config.specs import LoadSpec
from pipelines.cluster.placement import options_of_measuring
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share
from pipelines.execution.assignment import Assignment, Opened
from pipelines.execution.chain import as_task
from pipelines.execution.journal import Computed
from pipelines.execution.trial import compute_trials
from pipelines.graph.stage import Stage
from pipelines.study.cost import Cost
from pipelines.study.plan import TrialPlan

if TYPE_CHECKING:
    from ray import ObjectRef

_GRACE_SECONDS = 60.0


class Measures(NamedTuple):
    """What a task has measured of a trial, and what measuring it has cost."""

    metrics: dict[str, float]
    cost: Cost


Measured = tuple[TrialPlan, Measures | Exception]
"""A trial, and its measures or the error with which measuring it failed."""


@dataclass
class Measuring:
    """The tasks that measure trained trials, a CPU each, so that no trial holds a GPU while it is measured."""

    assignment: Assignment
    resources: Resources
    rows: "Mapping[str, ObjectRef]"
    """The references to the rows of the data sets, by name."""
    pending: "dict[ObjectRef, TrialPlan]" = field(default_factory=dict)

    @cached_property
    def _options(self) -> dict[str, Any]:
        return options_of_measuring(self.resources)  # once: it asks Ray for its nodes

    def start(self, plan: TrialPlan, opened: Opened) -> None:
        """Submit the task that measures a trial, whose run is open and holds the trained stages."""
        share = Share(0, 1)
        assignment = replace(self.assignment, share=share, tags=plan.tags(), opened=opened)
        options = self._options | {"name": plan.stage.kind}
        self.pending[as_task(_measure).options(**options).remote(plan.stage, assignment, [self.rows[plan.data]])] = plan

    def take_ended(self, seconds: float = 0.0) -> Iterator[Measured]:
        """Yield the trials whose measuring has ended.

        Args:
            seconds: How long to wait for the first of them.
        """
        import ray

        if not self.pending:
            return
        ready, _ = ray.wait(list(self.pending), timeout=seconds)
        if ready:
            ready, _ = ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0)
        for reference in ready:
            plan = self.pending.pop(reference)
            try:
                yield plan, ray.get(reference)
            except Exception as error:
                yield plan, error

    def take_rest(self, deadline: float | None) -> Iterator[Measured]:
        """Wait for the tasks that are left, and yield the trials.

        Args:
            deadline: When the study's time is up, in monotonic seconds. What is trained then is still measured, for at
                most a minute.
        """
        while self.pending:
            left = 3600.0 if deadline is None else deadline + _GRACE_SECONDS - time.monotonic()
            if left <= 0:
                return
            yield from self.take_ended(left)

    @contextmanager
    def cancelled_at_the_end(self) -> Iterator["Measuring"]:
        """Cancel the tasks that still run when the block ends: nothing may write to a run that the job then closes."""
        import ray

        try:
            yield self
        finally:
            for reference in self.pending:
                ray.cancel(reference, force=True)


def _measure(stage: Stage, assignment: Assignment, data: "list[ObjectRef]") -> Measures:
    """Compute the last stage of a trial whose other stages are trained, in a Ray task.

    Args:
        data: The reference to the rows of the trial's data set, in a list, where it stays a reference.
    """
    import ray

    began = time.monotonic()

    load = next(parent for parent in stage.parents() if isinstance(parent.spec, LoadSpec))
    (outcome,) = compute_trials([stage], [assignment], {load.key: ray.get(data[0])})
    if isinstance(outcome, Exception):
        raise outcome
    assert isinstance(outcome, Computed)
    return Measures(outcome.result.metrics, Cost.of(assignment.share, time.monotonic() - began))
