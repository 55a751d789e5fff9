"""Measuring the trained trials of a study on CPUs, beside the trials that still train on GPUs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aecore.config.specs import LoadSpec
from pipelines.cluster.placement import options_of
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share
from pipelines.execution.assignment import Assignment, Opened
from pipelines.execution.chain import as_task, cause_of
from pipelines.execution.trial import compute_trials
from pipelines.graph.stage import Stage
from pipelines.host.messages import one_line
from pipelines.study.plan import TrialPlan

if TYPE_CHECKING:
    from ray import ObjectRef

_GRACE_SECONDS = 60.0


@dataclass
class Measuring:
    """The tasks that measure trained trials, a CPU each, so that no trial holds a GPU while it is measured."""

    assignment: Assignment
    resources: Resources
    data: "list[ObjectRef]"
    """The reference to the data, in a list."""
    pending: "dict[ObjectRef, TrialPlan]" = field(default_factory=dict)

    def start(self, plan: TrialPlan, opened: Opened) -> None:
        """Submit the task that measures a trial, whose run is open and holds the trained stages."""
        share = Share(0, 1)
        assignment = replace(self.assignment, share=share, tags=plan.tags(), opened=opened)
        options = options_of(share, self.resources) | {"name": plan.stage.kind}
        self.pending[as_task(_measure).options(**options).remote(plan.stage, assignment, self.data)] = plan

    def wait(self, deadline: float | None) -> Iterator[tuple[str, Exception]]:
        """Wait for the tasks; yield the keys of the trials that could not be measured, each with the reason.

        Args:
            deadline: When the study's time is up, in monotonic seconds. What is trained then is still measured, for at
                most a minute.
        """
        import ray
        from ray.exceptions import GetTimeoutError

        for reference, plan in list(self.pending.items()):
            left = None if deadline is None else max(0.0, deadline + _GRACE_SECONDS - time.monotonic())
            try:
                ray.get(reference, timeout=left)
            except GetTimeoutError:
                return
            except Exception as error:
                yield plan.stage.key, error
            del self.pending[reference]

    @contextmanager
    def cancelled_at_the_end(self) -> Iterator["Measuring"]:
        """Cancel the tasks that still run when the block ends: nothing may write to a run that the job then closes."""
        import ray

        try:
            yield self
        finally:
            for reference in self.pending:
                ray.cancel(reference, force=True)


def reason_of(error: Exception) -> str:
    """Return one line for the error with which a trial ended, without the traceback that Ray puts around it."""
    cause = cause_of(error)
    lines = str(cause).strip().splitlines() or [""]
    return one_line(f"{type(cause).__name__}: {lines[-1]}", 300)


def _measure(stage: Stage, assignment: Assignment, data: "list[ObjectRef]") -> None:
    """Compute the last stage of a trial whose other stages are trained, in a Ray task."""
    import ray

    load = next(parent for parent in stage.parents() if isinstance(parent.spec, LoadSpec))
    (outcome,) = compute_trials([stage], [assignment], {load.key: ray.get(data[0])})
    if isinstance(outcome, Exception):
        raise outcome
