"""Chained Ray tasks: the driver submits stages, waits for them, and submits lost stages again."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from aecore.config.specs import LoadSpec
from aecore.core.errors import OutageError, TakenOverError
from pipelines.cluster.connection import start_ray
from pipelines.cluster.nodes import check_reach
from pipelines.cluster.placement import options_of, options_of_a_controller
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share, check_this_machine, share_of
from pipelines.execution.assignment import Assignment, assign, checkpoint_folder, checkpoints_of
from pipelines.execution.compute import (
    Work,
    compute_stage,
    import_for_evaluation,
    inputs_of,
    load_rows,
    restored,
)
from pipelines.execution.journal import Computed
from pipelines.execution.team import compute_in_team, is_trained_by_team
from pipelines.graph.needs import device_memory, reads_from_disk
from pipelines.graph.stage import Stage
from pipelines.host.messages import one_line, say

if TYPE_CHECKING:
    from ray import ObjectRef

    from pipelines.store.runs import Tracker

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
"""Seconds of pause before the second attempt at a stage, doubled for each further attempt, and the longest pause."""


class Outcome(NamedTuple):
    """The run and the metrics of a finished stage, and whether the stage was restored instead of computed."""

    run_id: str
    metrics: dict[str, float]
    restored: bool


def compute(
    stages: Sequence[Stage],
    tracker: "Tracker",
    parent: str,
    resources: Resources,
    tell: Callable[[str], None],
    failures: dict[str, Exception] | None = None,
) -> dict[str, Outcome]:
    """Restore the stages that are finished already and compute the others; Ray starts only if a stage is missing.

    If a stage fails, the stages that need its result are not computed. All others are; then the error is raised.

    Args:
        stages: The wanted stages, each after the stages whose results it needs. Inputs that are not listed, such as the
            data, are computed where needed.
        parent: The MLflow run in which the runs of the stages are nested.
        tell: Called with a line for each stage that is restored.
        failures: In a study takes the errors of stages that fail, by key; nothing is raised then.

    Returns:
        The outcome of each finished stage, by the stage's name.
    """
    outcomes: dict[str, Outcome] = {}
    folder = checkpoint_folder(tracker.uri, resources.storage_path)
    for stage in stages:
        if finished := tracker.finished(stage.key):
            outcomes[stage.key] = Outcome(*finished, restored=True)
            if folder is not None:  # the worker may have been killed between the commit and the clearing
                checkpoints_of(stage, folder).clear()
            tell(f"{stage.name}: restored")
    missing = [stage for stage in stages if stage.key not in outcomes]
    if missing:
        check_this_machine(resources)
        start_ray()
        import ray

        check_reach(tracker.uri, resources.storage_path)
        tracker.client.set_tag(parent, "ray.job_id", ray.get_runtime_context().get_job_id())
        job, tags = tracker.origin_of(parent)
        assignment = assign(tracker, parent, Share(0, 1), resources, failures is not None)
        chain = _Chain(tracker, replace(assignment, job=job, tags=tags), resources)
        outcomes |= chain.run(missing)
        if failures is not None:
            failures |= chain.errors
        elif chain.errors:
            raise next(iter(chain.errors.values()))
    return {stage.name: outcomes[stage.key] for stage in stages if stage.key in outcomes}


class _Chain:
    """The tasks of a job: which are submitted, which are waited for, and which are to be tried again."""

    def __init__(self, tracker: "Tracker", assignment: Assignment, resources: Resources) -> None:
        self.tracker, self.assignment, self.resources = tracker, assignment, resources
        self.submitted: dict[str, ObjectRef] = {}
        """References to results, by the keys of stages."""
        self.waiting: dict[ObjectRef, Stage] = {}
        """Wanted stages that run or wait for their inputs, each after the stages whose results it needs."""
        self.paused: list[tuple[float, list[Stage]]] = []
        """Stages to be submitted, and when (monotonic seconds)."""
        self.shares: dict[str, Share] = {}
        """Shares by the keys of stages. A further attempt has the share of the first, although the node with the last
        GPU may be lost: then Ray waits for another."""
        self.attempts: Counter[str] = Counter()
        self.errors: dict[str, Exception] = {}
        """The errors of stages that failed, by key."""
        self.halved: set[str] = set()
        """Keys of stages that ran out of their node's memory: their batches are cut in two."""

    def run(self, stages: Sequence[Stage]) -> dict[str, Outcome]:
        """Return the outcomes of stages by key. If a stage fails, its error is noted in `errors`, and all stages that
        do not need its result are finished."""
        import ray

        outcomes: dict[str, Outcome] = {}
        self.paused = [(0.0, list(stages))]
        try:
            self._submit_what_is_due()
            self._warm_up_evaluation(stages)
            while self.waiting or self.paused:
                self._submit_what_is_due()
                pause = self._seconds_to_next()
                if not self.waiting:
                    time.sleep(pause or 0.0)
                    continue
                ready, _ = ray.wait(list(self.waiting), timeout=pause)
                for reference in ready:  # the first that is ready: inputs come before the stages that need them
                    stage = self.waiting.pop(reference)
                    try:
                        run_id, result = ray.get(reference)
                        outcomes[stage.key] = Outcome(run_id, result.metrics, False)
                    except Exception as error:
                        cause = cause_of(error)
                        if isinstance(cause, TakenOverError):
                            raise cause from error  # the job's runs belong to another driver now
                        if final := self._try_again([stage, *self._take_behind(stage)], cause):
                            self.errors[stage.key] = final
        except BaseException:
            for reference in self.waiting:  # nothing may open a run any more when the job closes its runs
                ray.cancel(reference, force=True)
            raise
        return outcomes

    def _take_behind(self, stage: Stage) -> list[Stage]:
        """Take the stages that need the result of `stage` out of those that wait and those that pause; return them."""
        behind = [other for other in self.waiting.values() if _stands_on(other, stage)]
        self.waiting = {reference: other for reference, other in self.waiting.items() if other not in behind}
        for _, stages in self.paused:
            behind += [other for other in stages if _stands_on(other, stage)]
        self.paused = [(at, [other for other in stages if other not in behind]) for at, stages in self.paused]
        self.paused = [(at, stages) for at, stages in self.paused if stages]
        return behind

    def _submit_what_is_due(self) -> None:
        now = time.monotonic()
        due = [stages for at, stages in self.paused if at <= now]
        self.paused = [(at, stages) for at, stages in self.paused if at > now]
        for stage in (stage for stages in due for stage in stages):
            self.waiting[self._submit(stage)] = stage

    def _seconds_to_next(self) -> float | None:
        """Return the seconds until the next paused stage is to be submitted; None if no stage is paused."""
        return max(0.0, min(at for at, _ in self.paused) - time.monotonic()) if self.paused else None

    def _try_again(self, stages: list[Stage], error: Exception) -> Exception | None:
        """Plan another attempt at `stages[0]`, which failed, and at the other `stages`, which need its result.

        Returns:
            None, or the error to raise where another attempt would not help or the attempts are used up.
        """
        first, pause = stages[0], 0.0
        if isinstance(error, _ray_exceptions().OutOfMemoryError):
            if first.key in self.halved:
                self._fail(first, error)
                return MemoryError(
                    f"{first.name}: its node ran out of memory with batches in halves, too; lower batch_size or the "
                    "widths, or set data.in_memory never"
                )
            self.halved.add(first.key)
            say(f"warning: {first.name}: its node ran out of memory; it is tried once more with batches in halves")
        elif may_pass(error) and self.attempts[first.key] < self.resources.retries:
            self.attempts[first.key] += 1
            pause = min(_FIRST_PAUSE * 2 ** (self.attempts[first.key] - 1), _LONGEST_PAUSE)
            number = self.attempts[first.key] + 1
            say(f"warning: {first.name}: attempt {number} begins in {pause:g} s ({one_line(error, 100)})")
        else:
            self._fail(first, error)
            return error
        running = {stage.key for stage in self.waiting.values()}
        self.submitted = {key: reference for key, reference in self.submitted.items() if key in running}
        self.paused.append((time.monotonic() + pause, stages))
        return None

    def _submit(self, stage: Stage) -> "ObjectRef":
        """Start the task of a stage and the tasks of its inputs; return the reference to the stage's result."""
        import ray

        if stage.key not in self.submitted:
            finished = restored(stage, self.assignment) if stage.kept else None
            self.submitted[stage.key] = self._start(stage) if finished is None else ray.put(finished)
        return self.submitted[stage.key]

    def _start(self, stage: Stage) -> "ObjectRef":
        inputs = [self._submit(parent) for parent in stage.parents()]
        if isinstance(stage.spec, LoadSpec):
            options = options_of(Share(0, 1), self.resources) | {"name": stage.kind}
            return as_task(load_rows).options(**options).remote(stage.spec)
        if stage.key not in self.shares:
            self.shares[stage.key] = share_of(self.resources, device_memory(stage), reads_from_disk(stage))
        share = self.shares[stage.key]
        assignment = replace(self.assignment, share=share, parts=2 if stage.key in self.halved else 1)
        if is_trained_by_team(stage, self.resources):  # the team's members reserve CPUs and devices themselves
            options = options_of_a_controller() | {"name": stage.kind}
            return as_task(compute_in_team).options(**options).remote(stage, assignment, self.resources, inputs)
        options = options_of(share, self.resources) | {"name": stage.kind}
        return as_task(_compute_task).options(**options).remote(stage, assignment, *inputs)

    def _warm_up_evaluation(self, stages: Sequence[Stage]) -> None:
        """Where GPUs train, let a worker import meanwhile what the evaluation needs, which takes seconds: Ray gives no
        task without a GPU to a worker that had one. A node with few CPUs needs them for the training."""
        if any(stage.trains and share_of(self.resources, device_memory(stage)).gpus for stage in stages):
            share = share_of(self.resources, None)
            if share.cpus > 1 and not all(stage.trains for stage in stages):
                options = options_of(Share(0, 1), self.resources) | {"name": "imports"}
                as_task(import_for_evaluation).options(**options).remote()

    def _fail(self, stage: Stage, error: Exception) -> None:
        """Mark the MLflow run of a stage as failed where its worker died before it did so. If the worker died before it
        opened the run, open the run first, so that the failure is visible."""
        with suppress(OutageError):  # the error itself matters more than that MLflow cannot record it
            hasty = self.tracker._replace(patience=0.0)
            hasty.fail(stage.key, one_line(error, 500))
            if not hasty.run_id_of(stage.key):
                own = self.assignment
                hasty.open_run(stage, own.parent, job=own.job, tags=own.tags).fail(error)


@cache
def as_task(function: Callable[..., Any]) -> Any:
    """Return a function as a Ray task, defined once.

    Ray does not try a task again by itself: the driver does, after a pause in which the stage holds no device. A worker
    with a GPU goes on to the next stage. By default (`max_calls` 1) Ray ends such a worker after each task, to free the
    device's memory; then every stage would start a process, import torch and MLflow, and make a CUDA context. Instead,
    each stage frees the memory itself.
    """
    import ray

    return ray.remote(max_retries=0, max_calls=0)(function)


def _compute_task(stage: Stage, assignment: Assignment, *inputs: Any) -> Computed:
    """Compute a stage in a Ray task and return it finished."""
    return compute_stage(Work(stage, assignment, inputs_of(stage, inputs)))


def cause_of(error: Exception) -> Exception:
    """Return the exception that a task raised. Ray wraps it, more than once if it passed through several processes."""
    while isinstance(error, _ray_exceptions().RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    return error


def may_pass(error: Exception) -> bool:
    """Return whether another attempt may succeed, because a worker, a node or a connection was lost. Errors in data,
    mathematics or a disk would come again."""
    ray = _ray_exceptions()
    lost = ray.WorkerCrashedError, ray.RayActorError, ray.NodeDiedError, ray.LocalRayletDiedError, ray.ObjectLostError
    return isinstance(error, (*lost, ConnectionError, TimeoutError))


def _ray_exceptions() -> Any:
    import ray

    return ray.exceptions


def _stands_on(stage: Stage, other: Stage) -> bool:
    return any(parent.key == other.key or _stands_on(parent, other) for parent in stage.parents())
