"""The one way in which stages are computed: restored if they are finished, else computed, logged and committed.

A chained task and the first member of a worker group compute a stage here. A trial of a study computes its stages
alike, but keeps all of them in one run, see `trial`.
"""

import gc
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from aecore.config.specs import LoadSpec
from aecore.core.imports import fast_imports
from aecore.data.dataset import load
from aecore.data.splits import Arrays
from aecore.data.stream import Stream, open_stream, read_in_turn
from aecore.models.storage import Result
from pipelines.cluster.device import device_of
from pipelines.cluster.reading import spread
from pipelines.cluster.share import Share
from pipelines.execution.assignment import Assignment
from pipelines.execution.journal import Computed, Journal
from pipelines.graph.stage import Stage
from pipelines.host.messages import one_line, say

if TYPE_CHECKING:
    from aecore.stages.context import Context
    from pipelines.store.runs import Tracker

T = TypeVar("T")
Report = Callable[[int, dict[str, float]], None]
"""Takes the number of an epoch, from 1, and its metrics."""


class Work(NamedTuple):
    """A stage with its assignment and the results that it needs: enough to restore or compute the stage."""

    stage: Stage
    assignment: Assignment
    inputs: Mapping[str, Any]
    """The arguments of the stage's function, by parameter; `inputs_of` makes them from results."""


def load_rows(spec: LoadSpec) -> Arrays | Stream:
    """Return the rows of a data set: read into memory, or opened to be read from disk each epoch."""
    if spec.data.in_memory == "never":
        return open_stream(spec.data, spec.facts, spread)
    return load(spec.data, spec.facts)


def inputs_of(stage: Stage, values: Sequence[Any]) -> dict[str, Any]:
    """Return the results `values` of `stage.parents()` by the parameters of the stage's function."""
    rest = iter(value.result if isinstance(value, Computed) else value for value in values)
    return {
        name: [next(rest) for _ in parents] if isinstance(parents, tuple) else next(rest)
        for name, parents in stage.inputs.items()
    }


def compute_stage(work: Work) -> Computed:
    """Compute a stage in this process, log its epochs and commit its result; then free the GPU's memory.

    Raises:
        Exception: Whatever the stage fails with.
    """
    with redirect_stdout(sys.stderr), ExitStack() as stack:
        # before the journal's thread imports MLflow: two imports at once may each find a package half made
        import_functions([work.stage], work.assignment.share)
        stack.callback(leave_device, work.assignment.share)
        journal = stack.enter_context(Journal(work.stage, work.assignment))
        (outcome,) = outcomes_of([work], [journal.report])
        ending = journal.close(outcome)
        end_if_unusable([ending])
    if isinstance(ending, Exception):
        raise ending
    return ending


def import_functions(stages: Iterable[Stage], share: Share) -> None:
    """Import the functions of stages, and what they import."""
    with fast_imports():
        for stage in stages:
            stage.function()
    if share.gpus and not gc.get_freeze_count():
        gc.freeze()  # modules, for the most part; not searching them after each stage saves 0.2 s


def outcomes_of(
    works: Sequence[Work], reports: Sequence[Report], everywhere: bool = False
) -> list[Result | Exception]:  # fmt: skip
    """Return the result of each stage, or the exception that its function raised.

    On a GPU, several training stages that differ in numbers alone are trained together as one (see
    `aecore.training.fused`). If a stage fails, the others go on.

    Args:
        works: One stage or several; all have the same share of the machine.
        reports: Called after each epoch, one for each stage.
        everywhere: Train several stages together as one on a CPU as well; for tests.
    """
    with fast_imports():
        import torch

    torch.set_num_threads(works[0].assignment.share.cpus)
    contexts = [_try(partial(_context, work, report)) for work, report in zip(works, reports, strict=True)]
    if any(isinstance(context, Exception) for context in contexts):  # the device is the same for all
        return contexts
    if len(works) > 1 and all(work.stage.trains for work in works):
        return _train_as_one(works, contexts, everywhere)
    return [
        _try(partial(work.stage.function(), work.stage.spec, context, **work.inputs))
        for work, context in zip(works, contexts, strict=True)
    ]


def train_along(work: Work) -> None:
    """Train a stage as a member of a team other than the first member: nothing is logged or committed here."""
    import torch

    torch.set_num_threads(work.assignment.share.cpus)
    work.stage.function()(work.stage.spec, _context(work, lambda epoch, metrics: None), **work.inputs)


def leave_device(share: Share) -> None:
    """Give the memory of the GPU back after a stage; the process keeps it for the next stage, and CUDA's own memory."""
    if share.gpus:
        from aecore.training.memory import free_device_memory

        free_device_memory()


def end_if_unusable(endings: Sequence[object]) -> None:
    """End this process where CUDA has failed in it, since nothing can use the GPU from it any more. The driver tries
    again what a lost worker has left, in another process."""
    import torch

    for ending in endings:
        if isinstance(ending, torch.AcceleratorError):
            say(f"error: CUDA failed, which ends this worker ({one_line(ending, 300)})")
            sys.stderr.flush()
            os._exit(1)


def import_for_evaluation() -> None:
    """Import what stages need that use no GPU."""
    with fast_imports():
        for name in ("aecore.stages.evaluate", "pipelines.store.runs", "sklearn.linear_model", "sklearn.manifold"):
            importlib.import_module(name)


def stages_below(stage: Stage) -> Iterator[Stage]:
    """Yield all stages whose results a stage needs, directly or through others: each once, after its own inputs."""
    seen: set[str] = set()

    def below(one: Stage) -> Iterator[Stage]:
        for parent in one.parents():
            if parent.key not in seen:
                yield from below(parent)
                seen.add(parent.key)
                yield parent

    return below(stage)


def restore(run_id: str, tracker: "Tracker", key: str = "") -> Result | None:
    """Return the result of a finished stage, or None if its artifacts are lost: the stage is computed again.

    Args:
        key: The stage's key, where the run is that of a trial; see `Tracker.restore`.
    """
    return unless_lost(run_id, lambda: tracker.restore(run_id, key))


def unless_lost(run_id: str, read: Callable[[], T]) -> T | None:
    """Return what `read` returns, or None, after a warning, if the artifacts of the run are lost."""
    from pipelines.store.errors import LostResultError

    try:
        return read()
    except LostResultError as error:
        say(f"warning: run {run_id} is finished, but its result is lost ({error}); it will be computed again")
        return None


def restored(stage: Stage, assignment: Assignment) -> Computed | None:
    """Return a stage that is finished; None if it is not, or if its artifacts are lost."""
    from pipelines.store.runs import Tracker

    tracker = Tracker(*assignment.store)
    run_id = tracker.find(stage.key)
    result = restore(run_id, tracker, stage.key) if run_id else None
    if not (run_id and result):
        return None
    if checkpoints := assignment.checkpoints(stage):
        checkpoints.clear()  # whoever computed the stage may have died between the commit and this
    return Computed(run_id, result)


def _train_as_one(
    works: Sequence[Work], contexts: "Sequence[Context]", everywhere: bool
) -> list[Result | Exception]:  # fmt: skip
    from aecore.stages.training import Training, train_as_one

    failures: dict[int, Exception] = {}

    def prepared() -> "Iterator[Training]":
        for number, (work, context) in enumerate(zip(works, contexts, strict=True)):
            training = _try(partial(work.stage.preparation(), work.stage.spec, context, **work.inputs))
            if isinstance(training, Exception):
                failures[number] = training
            else:
                yield training

    trained = iter(train_as_one(prepared(), everywhere))
    return [failures[number] if number in failures else next(trained) for number in range(len(works))]


def _try(call: Callable[[], Any]) -> Any:
    """Return what `call` returns, or the exception that it raises; interruptions pass through.

    The exception lets go of what was computed, so that it holds no memory of a device.
    """
    try:
        return call()
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        return error


def _context(work: Work, report: Report) -> "Context":
    from aecore.stages.context import Context
    from aecore.training.team import ALONE

    assignment = work.assignment
    # a trial that holds a share of a GPU also computes stages that use none
    share = assignment.share if work.stage.trains else Share(0, assignment.share.cpus)
    return Context(
        device=device_of(share, assignment.fake_gpus),
        report=report,
        team=assignment.team or ALONE,
        checkpoints=assignment.checkpoints(work.stage),
        spread=read_in_turn if assignment.reads_alone else spread,
        device_share=share.gpus or 1.0,
        parts=assignment.parts,
    )
