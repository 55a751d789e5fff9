"""What becomes of a stage whose worker, node or driver is lost, with a Ray made up; kills of real ones: test_chaos."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray.train import WorkerGroupError

from aecore.config.experiment import Fit
from aecore.core.errors import DivergenceError, TakenOverError
from aecore.models.storage import Result
from aecore.stages.context import Context
from pipelines.cluster.nodes import Node
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share
from pipelines.execution.assignment import Assignment, checkpoints_of
from pipelines.execution.chain import _Chain, _compute_task, as_task, compute
from pipelines.execution.journal import Computed, Journal
from pipelines.execution.team import what_happened
from pipelines.graph.stage import Stage
from pipelines.host.scratch import all_temporary, me, scratch
from pipelines.store.runs import Tracker

ROOT = Path(__file__).parents[1]


class Ref:
    """An object in a Ray of one process: a value, or what its task or those before it raised."""

    def __init__(self, value: Any) -> None:
        self.value = value


class TaskError(ray.exceptions.RayTaskError):
    """What Ray raises for an error of a task."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class FakeRay:
    """Runs each task at once; `faults` says with what the next attempts at a task end before it begins, by its name."""

    exceptions = ray.exceptions

    def __init__(self, faults: dict[str, list[Exception]]) -> None:
        self.faults = faults
        self.ran: list[str] = []
        self.cancelled = 0

    def is_initialized(self) -> bool:
        return False

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_job_id=lambda: "job")

    def wait(self, refs: list[Ref], timeout: float | None) -> tuple[list[Ref], list[Ref]]:
        return refs[:1], refs[1:]

    def cancel(self, ref: Ref, force: bool) -> None:
        self.cancelled += 1

    def put(self, value: Any) -> Ref:
        return Ref(value)

    def get(self, ref: Ref) -> Any:
        if isinstance(ref.value, BaseException):
            raise ref.value
        return ref.value

    def remote(self, **options: Any) -> Any:
        def with_options(**more: Any) -> Any:
            return SimpleNamespace(remote=lambda stage, *rest: self.task(fn_of[0], stage, *rest))

        fn_of: list[Any] = []

        def wrap(fn: Any) -> Any:
            fn_of.append(fn)
            return SimpleNamespace(options=with_options)

        return wrap

    def task(self, fn: Any, stage: Stage, *rest: Any) -> Ref:
        values = [part.value if isinstance(part, Ref) else part for part in rest]
        failed = next((value for value in values if isinstance(value, Exception)), None)
        if failed is None and self.faults.get(stage.name):
            failed = self.faults[stage.name].pop(0)
        if failed is not None:
            return Ref(failed)
        self.ran.append(stage.name)
        try:
            return Ref(fn(stage, *values))
        except Exception as error:
            return Ref(TaskError(error))


FULL = ray.exceptions.OutOfMemoryError("killed")
LOST = ray.exceptions.WorkerCrashedError()
Job = Callable[..., tuple[FakeRay, dict[str, Any]]]
FIRST = Stage("first", "stages.pretrain_layer", Fit(epochs=1))
SECOND = Stage("second", "stages.pretrain_layer", Fit(epochs=2), {"below": FIRST})
OTHER = Stage("other", "stages.pretrain_layer", Fit(epochs=3))


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses of the driver, in which no time passes."""
    clock, pauses = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        pauses.append(round(seconds, 3))
        clock[0] += seconds

    fake = SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0])
    monkeypatch.setattr("pipelines.execution.chain.time", fake)
    return pauses


def graph_of(name: str) -> list[Stage]:
    """Two stages on each other and one beside them, with keys of their own for each name."""
    seed = sum(map(ord, name))
    first, second, other = (
        Stage(s.name, s.fn, s.spec.model_copy(update={"batch_size": seed + 1})) for s in (FIRST, SECOND, OTHER)
    )
    return [first, Stage(second.name, second.fn, second.spec, {"below": first}), other]


@pytest.fixture
def job(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> Iterator[Job]:
    def train(spec: Fit, context: Context, below: Result | None = None, beside: Result | None = None) -> Result:
        if spec.weight_decay:
            raise ValueError("wrong")
        context.report(1, {"train/loss": 1.0, "seconds": 0.1, "time": 1.0, "parts": context.parts})
        return Result({}, {"w": np.arange(3.0) + (0 if below is None else below.weights["w"])}, {})

    def work(name: str, faults: dict[str, list[Exception]], wrong: str = "") -> tuple[FakeRay, dict[str, Any]]:
        fake = FakeRay(faults)
        monkeypatch.setitem(sys.modules, "ray", fake)
        as_task.cache_clear()
        monkeypatch.setattr(Stage, "function", lambda stage: train)
        monkeypatch.setattr("pipelines.execution.chain.start_ray", lambda: None)
        monkeypatch.setattr("pipelines.execution.chain.check_reach", lambda store, path: None)
        monkeypatch.setattr("pipelines.execution.chain.share_of", lambda *_, **__: Share(0, 1))
        monkeypatch.setattr("pipelines.cluster.placement.possible_nodes", lambda: [Node({"CPU": 1})])
        graph = graph_of(name)
        if wrong:
            (spoilt,) = [stage for stage in graph if stage.name == wrong]
            object.__setattr__(spoilt, "spec", spoilt.spec.model_copy(update={"weight_decay": 1.0}))
        resources = Resources(storage_path=str(tmp_path))
        with tracker.job_run("test", name, {}, {}) as top:
            outcomes = compute(graph, tracker, top, resources, lambda line: None)
        return fake, {name: tracker.client.get_run(outcome.run_id) for name, outcome in outcomes.items()}

    yield work
    as_task.cache_clear()


def statuses(tracker: Tracker, name: str) -> dict[str, str]:
    """Status of each stage's run, by name, of the job of this name."""
    (top,) = tracker.search(f"tags.`stage.key` = '{name}'")
    below = tracker.search(f"tags.`mlflow.parentRunId` = '{top.info.run_id}'")
    return {run.data.tags["stage.name"]: run.info.status for run in below}


@pytest.mark.parametrize("full", ["first", "second"])
def test_a_stage_whose_node_runs_out_of_memory_is_tried_once_more_in_halves(
    full: str, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, runs = job(f"halves {full}", {full: [FULL]})
    assert sorted(fake.ran) == ["first", "other", "second"]
    parts = {name: run.data.metrics["parts"] for name, run in runs.items()}
    assert parts == {name: 2.0 if name == full else 1.0 for name in ("first", "second", "other")}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert f"warning: {full}: its node ran out of memory; it is tried once more with batches" in capsys.readouterr().err


def test_then_it_fails_with_the_remedy(job: Job, tracker: Tracker) -> None:
    with pytest.raises(MemoryError, match=r"^second: its node ran out of memory with batches in halves, too; lower "):
        job("full", {"second": [FULL, FULL]})
    assert statuses(tracker, "full") == {"first": "FINISHED", "second": "FAILED", "other": "FINISHED"}


def test_the_batches_of_a_team_are_halved_too(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def in_team(stage: Stage, assignment: Assignment, resources: Resources, references: list[Ref]) -> Computed:
        seen.append(assignment.parts)
        return _compute_task(stage, assignment, *(reference.value for reference in references))

    monkeypatch.setattr("pipelines.execution.chain.compute_in_team", in_team)
    monkeypatch.setattr("pipelines.execution.chain.is_trained_by_team", lambda stage, resources: stage.name == "other")
    _, runs = job("team", {"other": [FULL]})
    assert seen == [2] and runs["other"].data.metrics["parts"] == 2.0


@pytest.mark.parametrize("fault", [LOST, ray.exceptions.NodeDiedError("gone"), ConnectionError("reset")])
def test_what_is_lost_is_tried_again_after_growing_pauses_in_the_driver(
    fault: Exception, job: Job, slept: list[float]
) -> None:
    fake, runs = job(f"lost {type(fault).__name__}", {"first": [fault, fault, fault]})
    assert sorted(fake.ran) == ["first", "other", "second"]
    assert slept == [1.0, 2.0, 4.0]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_after_so_many_retries_it_fails_and_what_does_not_stand_on_it_is_finished(job: Job, tracker: Tracker) -> None:
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        job("lost for good", {"first": [LOST] * 4})
    assert statuses(tracker, "lost for good") == {"first": "FAILED", "other": "FINISHED"}


def test_what_is_wrong_is_not_tried_again_and_ends_no_unrelated_stage(
    job: Job, tracker: Tracker, slept: list[float]
) -> None:
    with pytest.raises(ValueError, match=r"^wrong$"):
        job("wrong", {}, wrong="first")
    assert statuses(tracker, "wrong") == {"first": "FAILED", "other": "FINISHED"} and slept == []


def test_a_stage_behind_one_that_pauses_and_one_that_fails_does_not_begin(
    job: Job, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, other = graph_of("two inputs")
    object.__setattr__(other, "spec", other.spec.model_copy(update={"weight_decay": 1.0}))
    both = Stage("both", first.fn, Fit(epochs=9), {"below": first, "beside": other})
    monkeypatch.setattr(sys.modules[__name__], "graph_of", lambda name: [first, other, both])
    with pytest.raises(ValueError, match=r"^wrong$"):
        job("two inputs", {"first": [LOST]})
    assert statuses(tracker, "two inputs") == {"first": "FINISHED", "other": "FAILED"}


def test_a_driver_that_was_taken_over_leaves_the_runs_to_the_other(job: Job, tracker: Tracker) -> None:
    with pytest.raises(TakenOverError):
        job("taken", {"first": [TaskError(TakenOverError("another driver has taken this job over"))]})
    assert "first" not in statuses(tracker, "taken")


class LostMemberError(Exception):
    """The loss of a member as Ray Train reports it."""

    def __init__(self, failure: Exception) -> None:
        self.health_check_failure = failure


@pytest.mark.parametrize(
    ("failures", "kind"),
    [
        ([RuntimeError("connection closed by peer"), LostMemberError(LOST)], ray.exceptions.WorkerCrashedError),
        ([RuntimeError("closed"), LostMemberError(FULL)], ray.exceptions.OutOfMemoryError),
        ([LostMemberError(LOST), DivergenceError("train/loss is nan")], DivergenceError),
        ([ValueError("wrong")], ValueError),
    ],
)
def test_what_ends_a_team_is_its_own_error_or_the_loss_of_a_member(failures: list[Exception], kind: type) -> None:
    error = WorkerGroupError("failed", dict(enumerate(failures)))
    assert isinstance(what_happened(error), kind)


def test_an_epoch_that_is_reported_twice_is_logged_once(tracker: Tracker) -> None:
    with tracker.job_run("test", "twice", {}, {}) as top:
        run = tracker.open_run(Stage("twice", "stages.pretrain_layer", Fit()), top)
        run.log([(1, 1, {"seconds": 1.0}), (2, 2, {"seconds": 2.0}), (1, 3, {"seconds": 3.0})])
    history = tracker.client.get_metric_history(run.run_id, "seconds")
    assert sorted(point.step for point in history) == [1, 2]


def test_the_last_epochs_before_a_failure_are_logged(tracker: Tracker) -> None:
    stage = Stage("diverged", "stages.pretrain_layer", Fit(epochs=7))
    assignment = Assignment(store=tuple(tracker), parent="parent", share=Share(0, 1))
    with Journal(stage, assignment) as journal:
        assert journal.run_id
        for epoch in (1, 2):
            journal.report(epoch, {"seconds": 1.0, "time": float(epoch)})
        journal.close(DivergenceError("train/loss is nan"))
    history = tracker.client.get_metric_history(journal.run_id, "seconds")
    assert [point.step for point in history] == [1, 2]


def test_an_interrupted_driver_cancels_its_tasks(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes: list[FakeRay] = []

    def interrupt(self: FakeRay, refs: list[Ref], timeout: float | None) -> Any:
        fakes.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeRay, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        job("interrupted", {})
    assert fakes[0].cancelled == 3


def test_a_later_attempt_computes_nothing_that_is_finished(
    job: Job, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is lost after its commit, before Ray has its result."""
    _, runs = job("again", {})
    before = runs["first"]
    stage = graph_of("again")[0]
    chain = _Chain(tracker, Assignment(store=tuple(tracker), parent="parent", share=Share(0, 1)), Resources())
    monkeypatch.setattr(Stage, "function", lambda stage: pytest.fail("computed again"))
    outcomes = chain.run([stage])
    assert outcomes[stage.key].run_id == before.info.run_id
    after = tracker.client.get_run(before.info.run_id)
    assert after.info.status == "FINISHED" and after.data.tags["attempts"] == "1"


def test_what_a_worker_left_between_the_commit_and_the_end_goes(job: Job, tracker: Tracker, tmp_path: Path) -> None:
    job("left", {})
    stage, resources = graph_of("left")[0], Resources(storage_path=str(tmp_path))
    place = checkpoints_of(stage, str(tmp_path))
    place.save(1, {}, {})
    compute([stage], tracker, "parent", resources, lambda line: None)
    assert not Path(place.place).exists()


def test_how_long_an_attempt_took_is_no_second_point(tracker: Tracker) -> None:
    stage = Stage("durations", "stages.durations", Fit())
    with tracker.job_run("test", "durations", {}, {}) as top:
        run = tracker.open_run(stage, top)
        for seconds in (1.5, 0.5):
            tracker.log_summary(run.run_id, {"train_seconds": seconds, "best/loss": 0.25}, {})
        run.close("FINISHED")
    for name, value in (("train_seconds", 1.5), ("best/loss", 0.25)):
        assert [p.value for p in tracker.client.get_metric_history(run.run_id, name)] == [value]


def test_a_job_whose_driver_died_before_its_params_gets_them(tracker: Tracker) -> None:
    tracker.client.create_run(tracker.experiment_id, tags={"stage.key": "params", "job": "test"})
    for _ in range(2):
        with tracker.job_run("test", "params", {}, {"seed": 3}) as top:
            assert tracker.client.get_run(top).data.params == {"seed": "3"}


def test_epochs_are_logged_whole(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracker.job_run("test", "whole", {}, {}) as top:
        run = tracker.open_run(Stage("whole", "stages.whole", Fit()), top)
        run.log([(1, 1, {"a": 0.0})])  # the params go with the first epochs
    sizes: list[int] = []
    client = SimpleNamespace(log_batch=lambda run_id, metrics, *rest: sizes.append(len(metrics)))
    monkeypatch.setattr("pipelines.store.client.MlflowClient", lambda tracking_uri: client)
    run.log([(epoch, epoch, {name: 0.0 for name in "abcdefg"}) for epoch in range(2, 302)])
    assert sizes == [994, 994, 112]  # of at most 1000


def test_temporary_files_of_the_killed_go_with_the_next_and_those_of_the_living_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import tempfile, time
from pipelines.host.scratch import all_temporary
with all_temporary():
    print(tempfile.mkdtemp(), flush=True)
    time.sleep(60)
"""
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        assert theirs.is_dir() and theirs.parent.parent == tmp_path
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with all_temporary(), tempfile.NamedTemporaryFile() as file:
            assert theirs.is_dir() and Path(file.name).parent.name.startswith(f"diabolo+{me().replace(' ', '+')}")
        assert tempfile.tempdir == str(tmp_path) and list(tmp_path.iterdir()) == [theirs.parent]
        process.send_signal(signal.SIGKILL)
    (tmp_path / "diabolo+elsewhere+1+1.0+abc").mkdir()
    with scratch() as own:
        assert {path.name for path in tmp_path.iterdir()} == {own.name, "diabolo+elsewhere+1+1.0+abc"}
