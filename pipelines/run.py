"""Computing a graph of stages: as chained Ray tasks, or here in this process. Both keep and restore alike."""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt

from aecore.config import Precision
from aecore.data import load
from aecore.errors import InputError
from aecore.fingerprint import Frozen
from aecore.specs import LoadSpec, Numerics
from aecore.storage import Result
from pipelines.stage import Stage

if TYPE_CHECKING:
    from ray import ObjectRef

    from pipelines.tracking import Tracker

_MOST_DEFAULT_CPUS = 8
"""Layers of usual size gain nothing from more threads."""


class Resources(Frozen):
    """How and where to compute. Not part of any key, but for `precision` and `compile`, which reach the numbers."""

    gpus: Annotated[float | None, Field(ge=0)] = None
    """GPUs a stage, fractions allowed; null takes 1 where the cluster has GPUs, else 0."""
    cpus: PositiveInt | None = None
    """CPUs a stage, and its threads; null takes all of the smallest node, at most 8."""
    precision: Precision = "fp32"
    """Arithmetic of training: fp32, tf32 (CUDA only), or bf16 autocast."""
    compile: bool = False
    """Compile the training step with torch.compile; its start-up takes half a minute."""
    retries: NonNegativeInt = 3
    """Times a stage is computed again after its worker or node was lost."""

    @property
    def numerics(self) -> Numerics:
        """The part that reaches the numbers."""
        return Numerics(precision=self.precision, compile=self.compile)


class Outcome(NamedTuple):
    """A stage that is finished."""

    run_id: str
    metrics: dict[str, float]
    restored: bool


class _Restored(NamedTuple):
    """Stands for the result of a finished stage until a task wants it."""

    run_id: str


def compute(
    stages: Sequence[Stage], tracker: "Tracker", parent: str, resources: Resources, say: Callable[[str], None]
) -> dict[str, Outcome]:
    """Finish every stage, restoring those that are finished already; Ray starts only if one is not.

    Args:
        stages: what is wanted; what these stand on is computed only where it is needed.
        parent: the MLflow run under which the stages' runs are nested.
        say: told once for each stage that is restored.

    Returns:
        What became of each stage, by name.
    """
    found = {stage.name: tracker.find(stage.key) for stage in stages}
    outcomes = {name: Outcome(run_id, tracker.metrics(run_id), True) for name, run_id in found.items() if run_id}
    for name in outcomes:
        say(f"{name}: restored")
    missing = [stage for stage in stages if stage.name not in outcomes]
    if missing:
        import ray

        with cluster(resources) as share:
            tracker.client.set_tag(parent, "ray.job_id", ray.get_runtime_context().get_job_id())
            submitted: dict[str, tuple[ObjectRef, ObjectRef]] = {}
            waiting = {_submit(stage, tracker, parent, share, submitted)[1]: stage.name for stage in missing}
            while waiting:
                ready, _ = ray.wait(list(waiting))
                for ref in ready:
                    run_id, metrics = ray.get(ref)
                    outcomes[waiting.pop(ref)] = Outcome(run_id, metrics, False)
    return {stage.name: outcomes[stage.name] for stage in stages}


def run_here(stage: Stage, tracker: "Tracker", parent: str) -> Result:
    """The same graph folded in this process, for those who are inside a task already."""
    if stage.kept and (run_id := tracker.find(stage.key)):
        return tracker.restore(run_id)
    inputs = [run_here(s, tracker, parent) for s in stage.parents()]
    return _execute(stage, tracker, parent, _Share(0, 1, 0), *inputs)[0]


class _Share(NamedTuple):
    """What each stage gets of the cluster."""

    gpus: float
    cpus: int
    retries: int


def start_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names, else start an embedded one; does nothing the second time."""
    embedded = not os.environ.get("RAY_ADDRESS")
    if embedded:
        # the embedded cluster shares this environment; Ray would build each worker another one
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's workers yield to everything else by default, which costs threads that wait for each other a third
        os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    if not ray.is_initialized():
        options: dict[str, Any] = (
            {"address": "local", "include_dashboard": False, "num_cpus": os.cpu_count()} if embedded else {}
        )
        handler = signal.getsignal(signal.SIGTERM)
        ray.init(logging_level=logging.WARNING, **options)
        signal.signal(signal.SIGTERM, handler)  # Ray sets one that exits without a word


@contextlib.contextmanager
def cluster(resources: Resources) -> Iterator["_Share"]:
    """A cluster for the block; yields the share of each stage.

    Raises:
        InputError: no node has what was asked for.
    """
    start_ray()
    import ray

    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = {kind: max(node.get(kind, 0) for node in nodes) for kind in ("GPU", "CPU")}
        gpus = resources.gpus if resources.gpus is not None else min(1.0, most["GPU"])
        workers = [node["CPU"] for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= gpus]
        cpus = resources.cpus or int(min([_MOST_DEFAULT_CPUS, *workers]))
        for field, asked, kind in (("gpus", gpus, "GPU"), ("cpus", cpus, "CPU")):
            if asked > most[kind]:
                raise InputError(
                    f"resources.{field}: {asked:g} asked for a stage, the largest node has {most[kind]:g}; ask for less"
                )
        yield _Share(gpus, cpus, resources.retries)
    finally:
        ray.shutdown()


def _submit(
    stage: Stage, tracker: "Tracker", parent: str, share: _Share, submitted: "dict[str, tuple[ObjectRef, ObjectRef]]"
) -> "tuple[ObjectRef, ObjectRef]":
    """Start a stage's task, and those it waits for; its result and (run id, metrics) as references."""
    import ray

    if stage.key not in submitted:
        inputs: list[Any] = []
        for other in stage.parents():
            run_id = tracker.find(other.key) if other.kept and other.key not in submitted else None
            inputs.append(_Restored(run_id) if run_id else _submit(other, tracker, parent, share, submitted)[0])
        options: dict[str, Any] = {
            "name": stage.name,
            "num_returns": 2,
            "num_cpus": share.cpus if stage.kept else 1,
            "num_gpus": share.gpus if stage.kept else 0,
            "max_retries": share.retries,
        }
        submitted[stage.key] = ray.remote(**options)(_execute).remote(stage, tracker, parent, share, *inputs)
    return submitted[stage.key]


def _execute(stage: Stage, tracker: "Tracker", parent: str, share: _Share, *inputs: Any) -> tuple[Any, Any]:
    """The body of a stage's task: compute, keep, return the result and (run id, metrics)."""
    with contextlib.redirect_stdout(sys.stderr):
        if isinstance(stage.spec, LoadSpec):
            return load(stage.spec.data, stage.spec.facts), None
        import torch

        from aecore import stages

        torch.set_num_threads(share.cpus)
        named = _by_parameter(stage, [tracker.restore(i.run_id) if isinstance(i, _Restored) else i for i in inputs])
        fn: Any = getattr(stages, stage.fn)
        device = torch.device("cuda" if share.gpus and torch.cuda.is_available() else "cpu")
        with tracker.stage_run(stage, parent) as run:
            progress = _Progress(stage.name)

            def report(epoch: int, metrics: dict[str, float]) -> None:
                run.report(epoch, metrics)
                progress(epoch, metrics)

            if stage.fn == "finetune":
                result = _in_ray_train(partial(fn, stage.spec, **named), device, report)
            else:
                result = fn(stage.spec, stages.Run(device, report), **named)
            run.commit(result)
            progress.done()
        # pictures and the example are kept by now; what goes on to other stages are the weights
        return replace(result, figures={}, example=None), (run.run_id, result.metrics)


def _in_ray_train(fn: Callable[..., Result], device: Any, report: Callable[[int, dict[str, float]], None]) -> Result:
    """`fn` as a Ray Train loop, in local mode: one device, in this process."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from aecore import stages

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it prints every report

    def tell(epoch: int, metrics: dict[str, float]) -> None:
        report(epoch, metrics)
        ray.train.report({"epoch": epoch, **metrics})

    def loop() -> Result:
        return fn(stages.Run(device, tell))

    trainer: Any = TorchTrainer(loop, scaling_config=ray.train.ScalingConfig(num_workers=0))  # type: ignore[arg-type]
    return trainer.fit().return_value  # its hints know of no loop that returns something


def _by_parameter(stage: Stage, values: list[Any]) -> dict[str, Any]:
    """The values of `stage.parents()`, in the shape of `stage.inputs`."""
    rest = iter(values)
    return {
        name: [next(rest) for _ in given] if isinstance(given, tuple) else next(rest)
        for name, given in stage.inputs.items()
    }


class _Progress:
    """A line on stderr about once a second, and at the end."""

    def __init__(self, name: str) -> None:
        self.name, self.began, self.said, self.last = name, time.monotonic(), 0.0, ""

    def __call__(self, epoch: int, metrics: dict[str, float]) -> None:
        shown = {name: value for name, value in metrics.items() if name in ("train/loss", "val/loss", "val/error")}
        self.last = f"{self.name}: epoch {epoch}  " + "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        if time.monotonic() - self.said > 1:
            print(self.last, file=sys.stderr, flush=True)
            self.said, self.last = time.monotonic(), ""

    def done(self) -> None:
        if self.last:
            print(self.last, file=sys.stderr, flush=True)
        print(f"{self.name}: done in {time.monotonic() - self.began:.1f} s", file=sys.stderr, flush=True)
