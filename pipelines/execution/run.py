"""Computing a graph of stages: as chained Ray tasks, or here in this process. Both keep and restore alike."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from aecore.config.specs import LoadSpec
from aecore.core.errors import InputError, OutageError
from aecore.core.imports import fast_imports
from aecore.data.dataset import load
from aecore.data.splits import Arrays
from aecore.data.stream import ReadPieces, Stream, open_stream, read_in_turn
from aecore.models.storage import Result
from aecore.training.checkpoint import Checkpoints
from pipelines.cluster.connection import _import_ray, start_ray
from pipelines.cluster.nodes import check_reach
from pipelines.cluster.reading import spread
from pipelines.cluster.resources import Resources, Share
from pipelines.cluster.share import refuse_what_is_not_here, share_of
from pipelines.graph.stage import Stage
from pipelines.host.environment import store_is_empty, submission_id
from pipelines.host.scratch import scratch

if TYPE_CHECKING:
    from ray import ObjectRef

    from pipelines.store.runs import Tracker
    from pipelines.store.stage_run import StageRun


Tell = Callable[[Stage, int, dict[str, float]], None]
"""Called once an epoch of a stage's training with its number, from 1, and its metrics."""
LIVE_SECONDS = 30.0
"""A stage that takes longer logs its epochs as they come."""
_LOG_SECONDS, _SAY_SECONDS = 2.0, 1.0
_LOG_LAST_SECONDS = 5.0
"""How long the end of a stage waits for its last log."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
"""Seconds before a stage's second attempt, doubled for each further one, and at most."""


class Outcome(NamedTuple):
    """A stage that is finished."""

    run_id: str
    metrics: dict[str, float]
    restored: bool


def compute(
    stages: Sequence[Stage], tracker: "Tracker", parent: str, resources: Resources, say: Callable[[str], None],
    study: bool = False,
) -> dict[str, Outcome]:  # fmt: skip
    """Finish every stage, restoring those that are finished already; Ray starts only if one is not, and stays up.

    The driver keeps each result as it comes, while the stages behind it are computed already.

    Args:
        stages: what is wanted; what these stand on is computed only where it is needed.
        parent: the MLflow run under which the stages' runs are nested.
        say: told once for each stage that is restored.
        study: whether these are stages of a study.

    Returns:
        What became of each stage, by name.
    """
    found = {stage.key: tracker.find(stage.key) for stage in stages}
    outcomes: dict[str, Outcome] = {}
    for stage in stages:
        if run_id := found[stage.key]:
            outcomes[stage.key] = Outcome(run_id, tracker.metrics(run_id), True)
            if left := checkpoints_of(stage, tracker.uri, resources):
                left.clear()  # a driver may have been killed between the commit and this
            say(f"{stage.name}: restored")
    missing = [stage for stage in stages if stage.key not in outcomes]
    if missing:
        refuse_what_is_not_here(resources)
        start_ray()
        import ray

        check_reach(tracker.uri, resources.storage_path)
        read = [spec for stage in missing for s in (stage, *stage.parents()) if isinstance(spec := s.spec, LoadSpec)]
        streamed = any(spec.data.in_memory == "never" for spec in read)
        share = share_of(resources, streamed)._replace(study=study)
        tracker.client.set_tag(parent, "ray.job_id", ray.get_runtime_context().get_job_id())
        submitted: dict[str, tuple[ObjectRef, ObjectRef]] = {}
        waiting = {_submit(stage, tracker, parent, share, submitted)[1]: stage for stage in missing}
        try:
            while waiting:
                (ref,), _ = ray.wait(list(waiting))  # the first that is ready, and so none before what it stands on
                stage = waiting.pop(ref)
                try:
                    record = ray.get(ref)
                except ray.exceptions.OutOfMemoryError as error:
                    if stage.key in share.halved:
                        _fail(stage, tracker, parent)
                        raise MemoryError(
                            f"{stage.name}: its node ran out of memory with batches in halves, too; lower batch_size "
                            "or the widths, or set data.in_memory never"
                        ) from error
                    _say(f"warning: {stage.name}: its node ran out of memory; once more, with batches in halves")
                    share = share._replace(halved=share.halved | {stage.key})
                    again = [stage, *(other for other in waiting.values() if _stands_on(other, stage))]
                    for other in (s for one in again for s in (one, *one.parents()) if s in again or not s.kept):
                        submitted.pop(other.key, None)
                    waiting = {ref: other for ref, other in waiting.items() if other not in again}
                    waiting |= {_submit(s, tracker, parent, share, submitted)[1]: s for s in again}
                    continue
                except ray.exceptions.RayError:
                    _fail(stage, tracker, parent)
                    raise
                outcomes[stage.key] = _keep(stage, tracker, parent, record)
        except BaseException:
            for ref in waiting:  # nothing may open a run any more when the job's are closed
                ray.cancel(ref, force=True)
            raise
    return {stage.name: outcomes[stage.key] for stage in stages}


def run_here(
    stage: Stage, tracker: "Tracker", parent: str, share: "Share | None" = None, done: dict[str, Any] | None = None,
    tell: Tell | None = None,
) -> Any:  # fmt: skip
    """The same graph folded in this process, for those who are inside a task already, on their share.

    Args:
        done: results by key; what is made here is added.
        tell: given inside a trial.
    """
    done = {} if done is None else done
    if stage.key not in done:
        run_id = tracker.find(stage.key) if stage.kept else None
        result = restore(run_id, tracker) if run_id else None
        done[stage.key] = result or _compute_here(stage, tracker, parent, share or Share(0, 1, 0), done, tell)
    return done[stage.key]


def _compute_here(
    stage: Stage, tracker: "Tracker", parent: str, share: "Share", done: dict[str, Any], tell: Tell | None
) -> Any:
    inputs = [run_here(s, tracker, parent, share, done, tell) for s in stage.parents()]
    try:
        result, record = _execute(stage, (tracker.uri, tracker.experiment_id), parent, share, *inputs, tell=tell)
    except Exception:
        if stage.kept:
            _fail(stage, tracker, parent)
        raise
    if stage.kept:
        _keep(stage, tracker, parent, record)
    return result


def run_trial(
    stage: Stage,
    tracker: "Tracker",
    parent: str,
    tags: dict[str, str],
    share: "Share",
    done: dict[str, Any],
    tell: Tell,
) -> Result:
    """A study's trial, in this process: the stages that `stage` stands on get runs nested in its own."""
    run = tracker.open_run(stage, parent, tags={**tags, **_where()})
    try:
        inputs = [run_here(s, tracker, run.run_id, share, done, tell) for s in stage.parents()]
        _, record = _execute(stage, (tracker.uri, tracker.experiment_id), run.run_id, share, *inputs)
        if not tracker.find(stage.key):
            run.commit(record.result)
    except Exception as error:
        run.fail(error)
        raise
    return record.result


def _keep(stage: Stage, tracker: "Tracker", parent: str, record: "Record") -> Outcome:
    try:
        run_id = tracker.find(stage.key)  # by another job meanwhile: what is finished stays as it is
        if run_id is None:
            if record.run_id is None:
                run = tracker.open_run(stage, parent, tags=record.tags, started_at=record.began)
            else:
                run = _run_of_this_attempt(tracker, record.run_id, record.tags or {})
            run.log(record.points)
            run.commit(record.result, record.served)
            run_id = run.run_id
    except OutageError as error:
        kept = f", and is kept in {record.checkpoints.place}" if record.checkpoints else ""
        raise OutageError(f"{stage.name} is computed{kept}, but not published: {error}") from error
    if record.checkpoints is not None:
        record.checkpoints.clear()
    return Outcome(run_id, record.result.metrics, False)


def _fail(stage: Stage, tracker: "Tracker", parent: str) -> None:
    hasty = tracker._replace(patience=0.0)  # what happened is more than that it cannot be written down
    with contextlib.suppress(OutageError):
        if not hasty.find(stage.key):
            running = hasty.runs({"stage.key": stage.key}, "RUNNING", 1)
            run = _run_of_this_attempt(hasty, running[0].info.run_id) if running else hasty.open_run(stage, parent)
            run.close("FAILED")


def _run_of_this_attempt(tracker: "Tracker", run_id: str, tags: Mapping[str, str] | None = None) -> "StageRun":
    from pipelines.store.stage_run import StageRun

    if tags:
        tracker.log_summary(run_id, {}, tags)
    return StageRun(tracker, run_id, metrics=tracker.metrics(run_id))


def restore(run_id: str, tracker: "Tracker") -> Result | None:
    """A finished stage's result, or None where its artifacts are lost, so that it is computed again."""
    from pipelines.store.errors import LostResultError

    try:
        return tracker.restore(run_id)
    except LostResultError as error:
        _say(f"warning: run {run_id} is finished, but its result is lost ({error}); to be computed again")
        return None


def open_store(
    resources: Resources, create: bool = True, ready: bool = True, warm: bool = True
) -> "Tracker | None":  # fmt: skip
    """The store of results. Unless `ready` is false a cluster is connected to before MLflow is imported, or, where the
    store is new, so that nothing can be restored, Ray starts meanwhile.

    Args:
        warm: see `start_ray`.

    Returns:
        None where there is no store yet and `create` is false.

    Raises:
        InputError: the store cannot be reached, or lies in a folder that is thrown away; or Ray is about to start
            without what `resources` ask for.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if submission_id() and (not uri or (uri.startswith("sqlite:") and not uri.startswith("sqlite:////"))):
        raise InputError(
            f"MLFLOW_TRACKING_URI: {uri or 'not set'}, so the results would be thrown away with the submitted job's "
            "folder; name a server in the job's env_vars, http://HOST:5000"
        )
    new, connecting = store_is_empty(), None
    if create and ready and os.environ.get("RAY_ADDRESS"):
        try:
            start_ray(warm)  # takes no time, and a worker loads torch while MLflow is imported here
        except Exception:
            if new:
                raise  # else all may be restored, which needs no Ray; whoever does need it meets this again
    elif create and ready and new:
        refuse_what_is_not_here(resources)
        _import_ray()  # not beside MLflow: each might find half made what both import
        connecting = ThreadPoolExecutor(1).submit(_connect, create)
        start_ray(warm)
    tracker = connecting.result() if connecting else _connect(create)
    return tracker and tracker._replace(patience=resources.mlflow_patience)


def _connect(create: bool) -> "Tracker | None":
    with fast_imports():
        from pipelines.store.connection import connect  # MLflow takes seconds to import, and its store once more

        return connect(create=create)


def _submit(
    stage: Stage, tracker: "Tracker", parent: str, share: Share, submitted: "dict[str, tuple[ObjectRef, ObjectRef]]"
) -> "tuple[ObjectRef, ObjectRef]":
    """Start a stage's task, and those it waits for; its result and its record as references."""
    import ray

    if stage.key not in submitted:
        inputs: list[ObjectRef] = []
        for other in stage.parents():
            run_id = tracker.find(other.key) if other.kept and other.key not in submitted else None
            if run_id and (result := restore(run_id, tracker)):
                restored = ray.put(result)
                submitted[other.key] = restored, restored
            inputs.append(_submit(other, tracker, parent, share, submitted)[0])
        team = _is_trained_by_a_team(stage, share)  # which gets its devices itself
        options: dict[str, Any] = {
            "name": stage.name,
            "num_returns": 2,
            "num_cpus": 0 if team else share.cpus if stage.kept else 1,
            "num_gpus": share.gpus if stage.kept and not team else 0,
            "max_retries": share.retries,
            # the network's faults pass; what is wrong with data, mathematics or a disk does not
            "retry_exceptions": [ConnectionError, TimeoutError],
        }
        store = tracker.uri, tracker.experiment_id
        # in a list, references stay references
        more = {"references": inputs} if team else {}
        submitted[stage.key] = ray.remote(**options)(_execute).remote(stage, store, parent, share, *inputs, **more)
    return submitted[stage.key]


def checkpoints_of(stage: Stage, store: str, resources: "Resources | Share") -> Checkpoints | None:
    """Where a stage keeps how far it is, if anywhere."""
    place, folder = resources.storage_path, resources.folder
    if place is None and store.startswith("sqlite:///"):
        place = str(Path(store.removeprefix("sqlite:///")).parent / "checkpoints")
    elif place is None and folder:
        place = f"{folder}/checkpoints"
    return Checkpoints(f"{place}/{stage.key}", resources.checkpoint_every) if place is not None else None


def _stands_on(stage: Stage, other: Stage) -> bool:
    return any(parent.key == other.key or _stands_on(parent, other) for parent in stage.parents())


def _is_trained_by_a_team(stage: Stage, share: Share) -> bool:
    return share.workers > 1 and hasattr(stage.spec, "fit")


def load_rows(spec: LoadSpec) -> "Arrays | Stream":
    """The data, as stages take them."""
    if spec.data.in_memory == "never":
        return open_stream(spec.data, spec.facts, spread)
    return load(spec.data, spec.facts)


def _spread_of(share: Share) -> ReadPieces:
    # trials side by side read for themselves
    return read_in_turn if share.study else spread


def _execute(
    stage: Stage, store: tuple[str, str], parent: str, share: Share, *inputs: Any, tell: Tell | None = None,
    references: "Sequence[ObjectRef] | None" = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The body of a stage's task: its result, for the stages behind it, and its record, for the driver to keep.

    Args:
        tell: given inside a trial; what it raises ends the stage.
        references: to the inputs, for the workers of a team.
    """
    with contextlib.redirect_stdout(sys.stderr):
        if attempt := _attempt():
            pause = min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
            _say(f"{stage.name}: attempt {attempt + 1} in {pause:g} s")
            time.sleep(pause)
        if isinstance(stage.spec, LoadSpec):
            return load_rows(stage.spec), None
        # what was lost with its node after it was kept is not computed, let alone kept, again
        if attempt and (restored := _kept_before(stage, store)):
            return restored
        with fast_imports():
            import torch

            from aecore.stages.context import Context

        torch.set_num_threads(share.cpus)
        device = torch.device("cuda" if share.gpus and torch.cuda.is_available() else "cpu")
        fn: Any = partial(stage.function(), stage.spec, **_by_parameter(stage, inputs))
        checkpoints = checkpoints_of(stage, store[0], share)
        if references is not None:
            record = _in_worker_group(stage, store, parent, share, references)
        else:
            with _Recorder(stage, store, parent, tell) as recorder:
                parts = 2 if stage.key in share.halved else 1
                run = Context(
                    device=device, report=recorder.report, checkpoints=checkpoints, spread=_spread_of(share),
                    parts=parts,
                )  # fmt: skip
                whole = stage.fn == "stages.finetune" and not share.study
                result = _in_ray_train(partial(fn, run)) if whole else fn(run)
            record = Record(result, None, recorder.points, recorder.began, recorder.run_id, checkpoints, _where())
        result = record.result
        if result.example is not None:
            from aecore.serving.model import Model

            record = record._replace(served=Model(result).predict(result.example))
        # what goes on to other stages are the weights
        return replace(result, figures={}, example=None), record


def _attempt() -> int:
    """How often Ray has tried this task before."""
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return 0
    return sys.modules["ray"]._private.worker.global_worker.core_worker.get_current_task_attempt_number()


def _kept_before(stage: Stage, store: tuple[str, str]) -> "tuple[Result, Record] | None":
    """A finished stage's result and record, as `_execute` gives them."""
    from pipelines.store.runs import Tracker

    tracker = Tracker(*store)
    with contextlib.suppress(OutageError):  # then it is computed, which costs time and nothing else
        if (run_id := tracker.find(stage.key)) and (result := restore(run_id, tracker)):
            return result, Record(result, None, [], 0, run_id)
    return None


class Point(NamedTuple):
    """The metrics of one epoch."""

    epoch: int
    milliseconds: int
    """Unix time."""
    metrics: dict[str, float]


class Record(NamedTuple):
    """What a finished stage hands to the driver to keep."""

    result: Result
    served: Any
    """What the model makes of `result.example`."""
    points: list[Point]
    """Epochs that have not been logged yet."""
    began: int
    """Unix time, milliseconds."""
    run_id: str | None
    """The run that the stage has opened itself."""
    checkpoints: Checkpoints | None = None
    """What the finished stage needs no more."""
    tags: Mapping[str, str] | None = None
    """Where the stage ran."""


def _where() -> dict[str, str]:
    """Tags that name the node of this process, if it is a node's."""
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return {}
    return {"ray.node_id": sys.modules["ray"].get_runtime_context().get_node_id()}


class _Recorder:
    """Takes a stage's reports: tells them on stderr, and leaves them to the driver to log.

    A stage that takes long logs them itself as they come; a short one is spared the import of MLflow, which takes
    longer than it.
    """

    def __init__(self, stage: Stage, store: tuple[str, str], parent: str, tell: Tell | None) -> None:
        self.stage, self.store, self.parent, self.tell = stage, store, parent, tell
        self.points: list[Point] = []
        self.began = round(time.time() * 1000)
        self.run: StageRun | None = None
        self.thread: threading.Thread | None = None
        self.fresh, self.ended = threading.Event(), threading.Event()
        self.said = self.started = time.monotonic()
        self.line = ""

    @property
    def run_id(self) -> str | None:
        return self.run.run_id if self.run else None

    def report(self, epoch: int, metrics: dict[str, float]) -> None:
        metrics = dict(metrics)
        self.points.append(Point(epoch, round(1000 * metrics.pop("time")), metrics))
        self.fresh.set()
        shown = {name: value for name, value in metrics.items() if name in ("train/loss", "val/loss", "val/error")}
        self.line = f"{self.stage.name}: epoch {epoch}  " + "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        now = time.monotonic()
        if now - self.said > _SAY_SECONDS or epoch == 1:
            _say(self.line)
            self.said, self.line = now, ""
        if self.thread is None and now - self.started > LIVE_SECONDS:
            self.thread = threading.Thread(target=self._log, args=[self.points], daemon=True)
            self.thread.start()
        if self.tell is not None:
            self.tell(self.stage, epoch, metrics)

    def _log(self, points: list[Point]) -> None:
        """In a thread of its own, so that training never waits: what cannot be logged stays for the next time."""
        told = False
        with contextlib.ExitStack() as open:
            while True:
                try:
                    if self.run is None:
                        from pipelines.store.runs import Tracker
                        from pipelines.store.system_metrics import system_metrics

                        self.run = Tracker(*self.store).open_run(self.stage, self.parent, started_at=self.began)
                        open.enter_context(system_metrics(self.store[0], self.run.run_id))
                    count = len(points)
                    self.run.log(points[:count])
                    del points[:count]
                except Exception as error:
                    if not told:
                        reason = " ".join(str(error).split())[:160]
                        _say(f"warning: {self.stage.name}: its epochs are kept, to be logged later ({reason})")
                        told = True
                if self.ended.wait(_LOG_SECONDS):
                    return
                self.fresh.wait()
                self.fresh.clear()

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *error: Any) -> None:
        self.ended.set()
        self.fresh.set()
        if self.thread is not None:
            interrupted = error[0] is not None and not issubclass(error[0], Exception)
            self.thread.join(0.0 if interrupted else _LOG_LAST_SECONDS)
            self.points = list(self.points)  # should it still hang, what it logs too is the same point to MLflow
        if self.line:
            _say(self.line)
        _say(f"{self.stage.name}: {'failed' if error[0] else 'done'} after {time.monotonic() - self.started:.1f} s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _in_ray_train(fn: Callable[[], Result]) -> Result:
    """`fn` as a Ray Train loop, in local mode: one device, in this process.

    Nothing is reported to Ray Train, where it would go nowhere and cost the import of Ray Tune.
    """
    with fast_imports():
        import ray.train
        from ray.train.torch import TorchTrainer

    loop = cast(Any, lambda: fn())  # the trainer's hints know of no loop that returns something
    return cast(Any, TorchTrainer(loop, scaling_config=ray.train.ScalingConfig(num_workers=0)).fit()).return_value


def _in_worker_group(
    stage: Stage, store: tuple[str, str], parent: str, share: Share, references: "Sequence[ObjectRef]"
) -> "Record":
    """A training stage as a Ray Train loop of several workers, each with all rows and its part of every batch."""
    import ray.train
    from ray.train.torch import TorchTrainer

    # Any: the trainer's hints know of no loop that returns something
    loop: Any = partial(_work, stage, store, parent, share, list(references))
    # Any: the hints don't know of (fewest, most)
    workers: Any = (share.min_workers, share.workers) if share.min_workers else share.workers
    with scratch() as folder:
        trainer = TorchTrainer(
            loop,
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers, use_gpu=share.gpus > 0,
                resources_per_worker={"CPU": share.cpus, "GPU": share.gpus},
            ),
            run_config=ray.train.RunConfig(
                name=stage.key[:16], storage_path=share.storage_path or str(folder),
                failure_config=ray.train.FailureConfig(max_failures=share.retries),
            ),
        )  # fmt: skip
        try:
            return cast(Any, trainer.fit()).return_value
        except ray.train.WorkerGroupError as error:
            # what a worker raised is what happened; a lost one counts for less
            raise min(error.worker_failures.values(), key=lambda e: isinstance(e, ray.exceptions.RayError)) from error


def _work(
    stage: Stage, store: tuple[str, str], parent: str, share: Share, references: "Sequence[ObjectRef]"
) -> "Record | None":
    """What each worker of a team does; the first one's record is the stage's."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    from aecore.training.team import Team

    torch.set_num_threads(share.cpus)
    context = ray.train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    inputs = _by_parameter(stage, ray.get(list(references)))
    checkpoints = checkpoints_of(stage, store[0], share)
    from aecore.stages.context import Context

    run = Context(device=get_device(), team=team, checkpoints=checkpoints, spread=_spread_of(share))
    if team.rank:
        stage.function()(stage.spec, run, **inputs)
        return None
    with _Recorder(stage, store, parent, None) as recorder:
        result = stage.function()(stage.spec, replace(run, report=recorder.report), **inputs)
    return Record(result, None, recorder.points, recorder.began, recorder.run_id, run.checkpoints, _where())


def _by_parameter(stage: Stage, values: Sequence[Any]) -> dict[str, Any]:
    """The values of `stage.parents()`, in the shape of `stage.inputs`."""
    rest = iter(values)
    return {
        name: [next(rest) for _ in given] if isinstance(given, tuple) else next(rest)
        for name, given in stage.inputs.items()
    }
