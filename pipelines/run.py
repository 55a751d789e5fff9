"""Computing a graph of stages: as chained Ray tasks, or here in this process. Both keep and restore alike."""

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self, cast
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from aecore.checkpoint import Checkpoints
from aecore.config import Precision
from aecore.data import Arrays, load
from aecore.errors import InputError, OutageError
from aecore.fingerprint import Frozen
from aecore.imports import quickly
from aecore.specs import LoadSpec, Numerics
from aecore.storage import Result
from aecore.stream import Spread, Stream, in_turn, open_stream
from pipelines.scratch import scratch
from pipelines.stage import Stage, store_is_empty, submission_id
from pipelines.streaming import spread

if TYPE_CHECKING:
    from ray import ObjectRef

    from pipelines.tracking import StageRun, Tracker

Tell = Callable[[Stage, int, dict[str, float]], None]
"""Called once an epoch of a stage's training with its number, from 1, and its metrics."""
LIVE_SECONDS = 30.0
"""A stage that takes longer logs its epochs as they come."""
_LOG_SECONDS, _SAY_SECONDS = 2.0, 1.0
_LOG_LAST_SECONDS = 5.0
"""How long the end of a stage waits for its last log."""
_ADDRESS_SECONDS = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
"""Seconds before a stage's second attempt, doubled for each further one, and at most."""
_MOST_DEFAULT_CPUS = 8
"""Layers of usual size gain nothing from more threads."""


class Resources(Frozen):
    """How and where to compute. Not part of any key, but for `precision` and `compile`, which reach the numbers."""

    gpus: Annotated[float | None, Field(ge=0)] = None
    """GPUs a stage, fractions allowed; null takes 1 where the cluster has GPUs, else 0."""
    cpus: PositiveInt | None = None
    """CPUs a stage, and its threads; null takes all of the smallest node, at most 8."""
    workers: PositiveInt = 1
    """Workers that train each stage together, each with `gpus` and `cpus`; more than one take half a minute to
    start."""
    min_workers: PositiveInt | None = None
    """Fewest workers that may train a stage while the cluster has no room for all of them; null waits for all."""
    max_concurrent: PositiveInt | None = None
    """Trials of a study at once; null runs as many as the cluster holds."""
    storage_path: str | None = None
    """Folder or URI that all nodes can write, for what is in progress; null keeps it in `checkpoints/` beside a local
    MLflow store or, with a remote one and no cluster, in the working directory, and nowhere on a cluster: a stage that
    loses its worker then starts over."""
    checkpoint_every: PositiveFloat = 30.0
    """Seconds between two checkpoints of a stage, at the end of an epoch."""
    precision: Precision = "fp32"
    """Arithmetic of training: fp32, tf32 (CUDA only), or bf16 autocast."""
    compile: bool = False
    """Compile the training step with torch.compile; its start-up takes half a minute."""
    retries: NonNegativeInt = 3
    """Times a stage is computed again after its worker or node was lost, or a connection failed."""
    mlflow_patience: NonNegativeFloat = 600.0
    """Seconds to wait for an MLflow that does not answer; then the job fails, and what it computed is kept in its
    checkpoints. Training itself never waits."""

    @model_validator(mode="after")
    def _fewest_below_most(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"resources.min_workers: {self.min_workers} is more than resources.workers {self.workers}; swap them"
            )
        return self

    @property
    def folder(self) -> str:
        """The driver's, where Ray is embedded and so on the same disk."""
        return "" if os.environ.get("RAY_ADDRESS") else str(Path.cwd())

    @property
    def numerics(self) -> Numerics:
        """The part that reaches the numbers."""
        return Numerics(precision=self.precision, compile=self.compile)


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
    run = tracker.open_run(stage, parent, more={**tags, **_where()})
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
            run = tracker.open_run(stage, parent, record.began, record.run_id, record.tags)
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
            hasty.open_run(stage, parent).close("FAILED")


def restore(run_id: str, tracker: "Tracker") -> Result | None:
    """A finished stage's result, or None where its artifacts are lost, so that it is computed again."""
    from pipelines.tracking import LostResultError

    try:
        return tracker.restore(run_id)
    except LostResultError as error:
        _say(f"warning: run {run_id} is finished, but its result is lost ({error}); to be computed again")
        return None


class Share(NamedTuple):
    """What each stage gets of the cluster."""

    gpus: float
    cpus: int
    retries: int
    workers: int = 1
    min_workers: int | None = None
    storage_path: str | None = None
    checkpoint_every: float = 30.0
    folder: str = ""
    """The driver's, where Ray is embedded and so on the same disk."""
    study: bool = False
    """Many short stages for a comparison: without Ray Train's start-up."""
    halved: frozenset[str] = frozenset()
    """Keys of stages that ran out of their node's memory: their batches are cut in two."""
    fit: Callable[..., Any] | None = None
    """Trains in place of `aecore.fit.fit`: see `aecore.fused`. It never leaves its process."""


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
    with quickly():
        from pipelines.tracking import connect  # MLflow takes seconds to import, and its store once more

        return connect(create=create)


def start_ray(warm: bool = False) -> None:
    """Connect to the cluster that RAY_ADDRESS names, else start an embedded one; does nothing the second time.

    Args:
        warm: let one worker of a single, idle machine load torch, for the first stage; which gains something if
            the driver has other things to do before. Ray Tune has workers of its own.

    Raises:
        InputError: no cluster answers there.
    """
    _import_ray()
    import ray

    embedded = not os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        options: dict[str, Any] = (
            {"address": "local", "include_dashboard": False, "num_cpus": os.cpu_count()} if embedded else {}
        )
        handler = signal.getsignal(signal.SIGTERM)
        _check_address(os.environ.get("RAY_ADDRESS", ""))
        with _alone() if embedded else contextlib.nullcontext():
            ray.init(logging_level=logging.WARNING, **options)
        signal.signal(signal.SIGTERM, handler)  # Ray sets one that exits without a word
        if warm and len(nodes := _nodes()) == 1:
            cpus = nodes[0]["CPU"]
            if embedded or ray.available_resources().get("CPU") == cpus:
                # takes all CPUs, so that the first stage waits for it and then finds a worker that has torch
                ray.remote(num_cpus=cpus)(_warm).remote()


def _import_ray() -> None:
    """With the settings that it reads when it is imported."""
    if not os.environ.get("RAY_ADDRESS"):
        # the embedded cluster shares this environment; Ray would build each worker another one
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's workers yield to everything else by default, which costs threads that wait for each other a third
        os.environ.setdefault("RAY_worker_niceness", "0")
        # nor workers that nobody asked for, which import Ray beside all that has to
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # where a node runs out of memory, Ray would try the same again for ever
    os.environ.setdefault("RAY_task_oom_retries", "0")
    with quickly():
        importlib.import_module("ray")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Ray starts without the autoscaler's monitor and the dashboard's server, which have nothing to do on one machine.
    They cost two imports of Ray at the start, beside all that has to be imported, and a second at the end."""
    node: Any = importlib.import_module("ray._private.node").Node  # Any: its hints know of nothing that is left out
    started = node.start_monitor, node.start_api_server
    node.start_monitor = node.start_api_server = lambda self, **options: None
    try:
        yield
    finally:
        node.start_monitor, node.start_api_server = started


def _check_address(address: str) -> None:
    """Whether anyone listens where a cluster is said to be: Ray itself would ask for minutes and then say little."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        if parts.port and parts.hostname:
            socket.create_connection((parts.hostname, parts.port), timeout=_ADDRESS_SECONDS).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"RAY_ADDRESS: no answer from {address} ({error}); name HOST:PORT of a Ray head, or unset it for a Ray of "
            "this job's own"
        ) from error


def _warm() -> None:
    """Import in a worker what every stage needs, while the driver does other things."""
    with quickly():
        importlib.import_module("aecore.stages")


def _nodes() -> list[dict[str, float]]:
    """Resources of each node that is up or, if these are more, that the autoscaler may bring up."""
    import ray

    up = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    config = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config else ()
    may = [dict(group.resources) for group in groups for _ in range(group.max_count)]
    return [{"CPU": 0, **node} for node in max(up, may, key=len)]


def check_reach(store: str, storage_path: str | None, field: str = "resources.storage_path") -> None:
    """Whether all nodes of the cluster can write to the store and to where checkpoints go.

    Args:
        field: the setting that names the second, for the message.

    Raises:
        InputError: one of them is a file of a single machine.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if max(len(nodes), len(_nodes())) == 1:
        return
    if store.startswith(("sqlite:", "file:", "/")):
        raise InputError(
            f"MLFLOW_TRACKING_URI: {store} is a file of one machine and the cluster has several nodes; start "
            "`mlflow server` where all of them reach it and name that, http://HOST:5000"
        )
    if storage_path is None or "://" in storage_path:
        return
    folder = Path(storage_path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch(folder) as mark:
            sees = ray.remote(num_cpus=0, max_retries=0)(os.path.exists)
            seen = [
                sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                    mark
                )
                for node in nodes
            ]
            blind = [n["NodeManagerHostname"] for n, found in zip(nodes, ray.get(seen), strict=True) if not found]
    except OSError as error:
        raise InputError(f"{field}: cannot write to {folder} ({error.strerror}); move it") from None
    if blind:
        raise InputError(
            f"{field}: {folder} is another folder on {', '.join(sorted(set(blind)))}; name one on a "
            "file system that all nodes mount, or a URI such as s3://BUCKET/diabolo"
        )


def refuse_what_is_not_here(resources: Resources) -> None:
    """Where Ray would be an embedded one, raise what `share_of` would once it had started."""
    if os.environ.get("RAY_ADDRESS") or ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        return
    import pynvml

    try:
        pynvml.nvmlInit()
        gpus = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        gpus = 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len(list(filter(None, visible.split(",")))))
    share_of(resources, nodes=[{"CPU": os.cpu_count() or 1, "GPU": gpus}])


def share_of(resources: Resources, streamed: bool = False, nodes: list[dict[str, float]] | None = None) -> Share:
    """What each stage gets of the cluster that Ray is connected to, or of these nodes.

    Args:
        streamed: a CPU is left, where there is more than one, for those who read the data.

    Raises:
        InputError: no node has what was asked for.
    """
    nodes = nodes or _nodes()
    gpus = resources.gpus if resources.gpus is not None else min(1.0, max(node.get("GPU", 0) for node in nodes))
    fitting = [node for node in nodes if node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= 1]
    if not fitting:
        most = max(node.get("GPU", 0) for node in nodes)
        raise InputError(f"resources.gpus: {gpus:g} asked for a stage, the largest node has {most:g}; ask for less")
    free = sum(node["CPU"] for node in fitting) // resources.workers
    most = min(_MOST_DEFAULT_CPUS, free, *(node["CPU"] for node in fitting))
    cpus = resources.cpus or max(1, int(most) - streamed)
    most = max(node["CPU"] for node in fitting)
    if cpus > most:
        beside = f" beside {gpus:g} GPUs" if gpus else ""
        raise InputError(
            f"resources.cpus: {cpus} asked for a stage, the largest node has {most:g}{beside}; ask for less"
        )
    share = Share(
        gpus, cpus, resources.retries, resources.workers, resources.min_workers, resources.storage_path,
        resources.checkpoint_every, resources.folder,
    )  # fmt: skip
    fewest = share.min_workers or share.workers
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        total = sum(node.get(name, 0) for node in nodes)
        if each * fewest > total:
            raise InputError(
                f"resources.workers: {fewest} with {each:g} {name}s each asked for, the cluster has {total:g}; "
                "ask for fewer or for less"
            )
    return share


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


def _spread_of(share: Share) -> Spread:
    # trials side by side read for themselves
    return in_turn if share.study else spread


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
        with quickly():
            import torch

            from aecore import stages

        torch.set_num_threads(share.cpus)
        device = torch.device("cuda" if share.gpus and torch.cuda.is_available() else "cpu")
        fn: Any = partial(stage.function(), stage.spec, **_by_parameter(stage, inputs))
        checkpoints = checkpoints_of(stage, store[0], share)
        if references is not None:
            record = _in_worker_group(stage, store, parent, share, references)
        else:
            with _Recorder(stage, store, parent, tell) as recorder:
                parts = 2 if stage.key in share.halved else 1
                run = stages.Run(
                    device, recorder.report, checkpoints=checkpoints, spread=_spread_of(share), parts=parts
                )
                if share.fit is not None:
                    run = run._replace(fit=share.fit)
                whole = stage.fn == "stages.finetune" and not share.study
                result = _in_ray_train(partial(fn, run)) if whole else fn(run)
            record = Record(result, None, recorder.points, recorder.began, recorder.run_id, checkpoints, _where())
        result = record.result
        if result.example is not None:
            from aecore.pyfunc import Model

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
    from pipelines.tracking import Tracker

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
                        from pipelines.tracking import Tracker, system_metrics

                        self.run = Tracker(*self.store).open_run(self.stage, self.parent, self.began)
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
    with quickly():
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

    from aecore import stages
    from aecore.parallel import Team

    torch.set_num_threads(share.cpus)
    context = ray.train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    inputs = _by_parameter(stage, ray.get(list(references)))
    checkpoints = checkpoints_of(stage, store[0], share)
    run = stages.Run(get_device(), team=team, checkpoints=checkpoints, spread=_spread_of(share))
    if team.rank:
        stage.function()(stage.spec, run, **inputs)
        return None
    with _Recorder(stage, store, parent, None) as recorder:
        result = stage.function()(stage.spec, run._replace(report=recorder.report), **inputs)
    return Record(result, None, recorder.points, recorder.began, recorder.run_id, run.checkpoints, _where())


def _by_parameter(stage: Stage, values: Sequence[Any]) -> dict[str, Any]:
    """The values of `stage.parents()`, in the shape of `stage.inputs`."""
    rest = iter(values)
    return {
        name: [next(rest) for _ in given] if isinstance(given, tuple) else next(rest)
        for name, given in stage.inputs.items()
    }
