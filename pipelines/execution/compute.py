"""The one way in which stages are computed: restored if they are finished, else computed, logged and committed.

A chained task, a trial of a study and the first member of a worker group all compute their stages here.
"""

import gc
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

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
from pipelines.execution.journal import Computed, Journal, Opened
from pipelines.graph.stage import Stage
from pipelines.host.messages import one_line, say

if TYPE_CHECKING:
    from aecore.stages.context import Context
    from pipelines.store.runs import Tracker

Results = dict[str, Any]
"""Results by the keys of stages: a `Computed` for each stage that MLflow keeps, and the rows of the data."""


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


def compute_stages(works: Sequence[Work], everywhere: bool = False) -> list[Computed | Exception]:
    """Compute stages in this process, log their epochs and commit their results; then free the GPU's memory.

    On a GPU, several training stages that differ in numbers alone are trained together as one (see
    `aecore.training.fused`). If a stage fails, the others go on.

    Args:
        works: One stage or several; all have the same share of the machine.
        everywhere: Train several stages together as one on a CPU as well; for tests.

    Returns:
        The finished stage, or the exception with which it failed, in the order of `works`.
    """
    with redirect_stdout(sys.stderr), ExitStack() as stack:
        # before the journals' threads import MLflow: two imports at once may each find a package half made
        with fast_imports():
            for work in works:
                work.stage.function()
        if works[0].assignment.share.gpus and not gc.get_freeze_count():
            gc.freeze()  # modules, for the most part; not searching them after each stage saves 0.2 s
        stack.callback(_leave_device, works[0].assignment.share)
        journals = [stack.enter_context(Journal(work.stage, work.assignment)) for work in works]
        outcomes = _outcomes(works, journals, everywhere)
        endings = [journal.close(outcome) for journal, outcome in zip(journals, outcomes, strict=True)]
        _end_if_unusable(endings)
        return endings


def compute_graphs(
    stages: Sequence[Stage],
    assignments: Sequence[Assignment],
    results: Results,
    everywhere: bool = False,
    up_to_last: bool = False,
) -> list[Computed | Opened | Exception]:
    """Compute stages and all stages whose results they need in this process, all graphs step by step side by side.

    A stage that several graphs share is computed once. Training stages at the same step are trained together as one
    where `compute_stages` can do so. The runs of the stages of a graph are nested in the run of its last stage.

    Args:
        stages: The last stage of each graph.
        assignments: One for each graph.
        results: Results that exist already, the data among them; the results that are computed here are added.
        up_to_last: Leave the last stages to be computed elsewhere; their runs stay open.

    Returns:
        The last stage of each graph, finished, or the exception with which this stage or a stage before it failed. With
        `up_to_last` the open run of the last stage stands for a stage that is left.
    """
    finished: list[Computed | Exception | None] = [restored(*pair) for pair in zip(stages, assignments, strict=True)]
    wanted = [pair for pair, one in zip(zip(stages, assignments, strict=True), finished, strict=True) if one is None]
    failures: dict[str, Exception] = {}
    with redirect_stdout(sys.stderr), ExitStack() as stack:
        journals = [stack.enter_context(Journal(*pair)) for pair in wanted]
        nested = [
            replace(assignment, parent=journal.run_id, run_id=None, tags={})
            for journal, (_, assignment) in zip(journals, wanted, strict=True)
        ]
        for step in zip_longest(*(stages_below(stage) for stage, _ in wanted)):
            works: dict[str, Work] = {}
            for stage, assignment in zip(step, nested, strict=True):
                if stage is None or stage.key in results or stage.key in failures:
                    continue
                if failure := _failure_below(stage, failures):
                    failures[stage.key] = failure
                else:
                    works.setdefault(stage.key, Work(stage, assignment, _inputs(stage, results)))
            for key, ending in finish(list(works.values()), everywhere).items():
                if isinstance(ending, Exception):
                    failures[key] = ending
                else:
                    results[key] = ending
        outcomes: list[Computed | Opened | Exception] = []
        for (stage, assignment), journal in zip(wanted, journals, strict=True):
            outcome: Result | Exception | None = _failure_below(stage, failures)
            if outcome is None and up_to_last:
                outcomes.append(Opened(journal.run_id))
                continue
            if outcome is None:
                (outcome,) = _outcomes([Work(stage, assignment, _inputs(stage, results))], [journal])
            outcomes.append(journal.close(outcome))
    computed = iter(outcomes)
    return [next(computed) if one is None else one for one in finished]


def finish(works: Sequence[Work], everywhere: bool = False) -> dict[str, Computed | Exception]:
    """Restore the stages that are finished and compute the others in this process.

    Args:
        everywhere: See `compute_stages`.

    Returns:
        Each stage finished, or the exception with which it failed, by the stage's key.
    """
    finished: dict[str, Computed | Exception] = {}
    for work in works:
        if computed := restored(work.stage, work.assignment):
            finished[work.stage.key] = computed
    missing = [work for work in works if work.stage.key not in finished]
    together = missing and all(work.stage.trains for work in missing)
    for group in [missing] if together else [[work] for work in missing]:
        outcomes = compute_stages(group, everywhere)
        finished |= {work.stage.key: outcome for work, outcome in zip(group, outcomes, strict=True)}
    return finished


def train_along(work: Work) -> None:
    """Train a stage as a member of a team other than the first member: nothing is logged or committed here."""
    import torch

    torch.set_num_threads(work.assignment.share.cpus)
    work.stage.function()(work.stage.spec, _context(work, lambda epoch, metrics: None), **work.inputs)


def _leave_device(share: Share) -> None:
    """Give the memory of the GPU back after a stage; the process keeps it for the next stage, and CUDA's own memory."""
    if share.gpus:
        from aecore.training.memory import free_device_memory

        free_device_memory()


def _end_if_unusable(endings: Sequence[Computed | Exception]) -> None:
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


def restore(run_id: str, tracker: "Tracker") -> Result | None:
    """Return the result of a finished stage, or None if its artifacts are lost: the stage is computed again."""
    from pipelines.store.errors import LostResultError

    try:
        return tracker.restore(run_id)
    except LostResultError as error:
        say(f"warning: run {run_id} is finished, but its result is lost ({error}); it will be computed again")
        return None


def restored(stage: Stage, assignment: Assignment) -> Computed | None:
    """Return a stage that is finished; None if it is not, or if its artifacts are lost."""
    from pipelines.store.runs import Tracker

    tracker = Tracker(*assignment.store)
    run_id = tracker.find(stage.key)
    result = restore(run_id, tracker) if run_id else None
    if not (run_id and result):
        return None
    if checkpoints := assignment.checkpoints(stage):
        checkpoints.clear()  # whoever computed the stage may have died between the commit and this
    return Computed(run_id, result)


def _inputs(stage: Stage, results: Results) -> dict[str, Any]:
    return inputs_of(stage, [results[parent.key] for parent in stage.parents()])


def _failure_below(stage: Stage, failures: Mapping[str, Exception]) -> Exception | None:
    return next((failures[parent.key] for parent in stage.parents() if parent.key in failures), None)


def _outcomes(
    works: Sequence[Work], journals: Sequence[Journal], everywhere: bool = False
) -> list[Result | Exception]:  # fmt: skip
    """Return the result of each stage, or the exception that its function raised."""
    with fast_imports():
        import torch

    torch.set_num_threads(works[0].assignment.share.cpus)
    contexts = [_try(partial(_context, work, journal.report)) for work, journal in zip(works, journals, strict=True)]
    if any(isinstance(context, Exception) for context in contexts):  # the device is the same for all
        return contexts
    if len(works) > 1 and all(work.stage.trains for work in works):
        return _train_as_one(works, contexts, everywhere)
    return [
        _try(partial(work.stage.function(), work.stage.spec, context, **work.inputs))
        for work, context in zip(works, contexts, strict=True)
    ]


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


def _context(work: Work, report: Callable[[int, dict[str, float]], None]) -> "Context":
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
