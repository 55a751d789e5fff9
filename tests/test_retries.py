"""What becomes of a stage whose worker, node or driver is lost, with a Ray made up; kills of real ones: test_chaos."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from aecore.config.experiment import Fit
from aecore.models.storage import Result
from aecore.stages.context import Context
from pipelines.cluster.resources import Resources, Share
from pipelines.execution.run import _execute, checkpoints_of, compute
from pipelines.graph.stage import Stage
from pipelines.host.scratch import all_temporary, me, scratch
from pipelines.store.runs import Tracker

ROOT = Path(__file__).parents[1]


class Ref:
    """An object in a Ray of one process: a value, or what its task or those before it raised."""

    def __init__(self, value: Any) -> None:
        self.value = value


class FakeRay:
    """Runs each task at once; `full` names those that run out of memory, and how often."""

    exceptions = ray.exceptions

    def __init__(self, full: dict[str, int]) -> None:
        self.full = full
        self.ran: list[str] = []

    def is_initialized(self) -> bool:
        return False

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_job_id=lambda: "job")

    def wait(self, refs: list[Ref]) -> tuple[list[Ref], list[Ref]]:
        return refs[:1], refs[1:]

    def cancel(self, ref: Ref, force: bool) -> None:
        pass

    def put(self, value: Any) -> Ref:
        return Ref(value)

    def get(self, ref: Ref) -> Any:
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def remote(self, **options: Any) -> Any:
        return lambda fn: SimpleNamespace(remote=lambda stage, *rest: self.task(fn, stage, *rest))

    def task(self, fn: Any, stage: Stage, *rest: Any) -> tuple[Ref, Ref]:
        values = [part.value if isinstance(part, Ref) else part for part in rest]
        failed = next((value for value in values if isinstance(value, Exception)), None)
        if failed is None and self.full.get(stage.name, 0) > 0:
            self.full[stage.name] -= 1
            failed = ray.exceptions.OutOfMemoryError("killed")
        if failed is not None:
            return Ref(failed), Ref(failed)
        self.ran.append(stage.name)
        result, record = fn(stage, *values)
        return Ref(result), Ref(record)


Job = Callable[..., tuple[FakeRay, dict[str, Any]]]
FIRST = Stage("first", "stages.first", Fit(epochs=1))
SECOND = Stage("second", "stages.second", Fit(epochs=2), {"below": FIRST})
OTHER = Stage("other", "stages.other", Fit(epochs=3))


@pytest.fixture
def job(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    def train(spec: Fit, run: Context, below: Result | None = None) -> Result:
        run.report(1, {"train/loss": 1.0, "seconds": 0.1, "time": 1.0, "parts": run.parts})
        return Result({}, {"w": np.arange(3.0) + (0 if below is None else below.weights["w"])}, {})

    def work(name: str, full: dict[str, int]) -> tuple[FakeRay, dict[str, Any]]:
        fake = FakeRay(full)
        monkeypatch.setitem(sys.modules, "ray", fake)
        monkeypatch.setattr(Stage, "function", lambda stage: train)
        monkeypatch.setattr("pipelines.execution.run.start_ray", lambda: None)
        monkeypatch.setattr("pipelines.execution.run.check_reach", lambda store, path: None)
        monkeypatch.setattr(
            "pipelines.execution.run.share_of", lambda *_, **__: Share(0, 1, 3, storage_path=str(tmp_path))
        )
        graph = [Stage(s.name, s.fn + name, s.spec, s.inputs) for s in (FIRST, OTHER)]
        graph.insert(1, Stage(SECOND.name, SECOND.fn + name, SECOND.spec, {"below": graph[0]}))
        with tracker.job_run("test", name, {}, {}) as top:
            found = compute(graph, tracker, top, Resources(), lambda line: None)
        return fake, {name: tracker.client.get_run(outcome.run_id) for name, outcome in found.items()}

    return work


@pytest.mark.parametrize("full", ["first", "second"])
def test_a_stage_whose_node_runs_out_of_memory_is_tried_once_more_in_halves(
    full: str, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, runs = job(f"halves {full}", {full: 1})
    assert sorted(fake.ran) == ["first", "other", "second"]
    parts = {name: run.data.metrics["parts"] for name, run in runs.items()}
    assert parts == {name: 2.0 if name == full else 1.0 for name in ("first", "second", "other")}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert f"warning: {full}: its node ran out of memory; once more, with batches" in capsys.readouterr().err


def test_then_it_fails_with_the_remedy(job: Job, tracker: Tracker) -> None:
    with pytest.raises(MemoryError, match=r"^second: its node ran out of memory with batches in halves, too; lower "):
        job("full", {"second": 2})
    (top,) = tracker.search("tags.`stage.key` = 'full'", 10)
    below = tracker.search(f"tags.`mlflow.parentRunId` = '{top.info.run_id}'", 10)
    assert {run.data.tags["mlflow.runName"]: run.info.status for run in below}["second"] == "FAILED"


def test_a_later_attempt_waits_longer_and_computes_nothing_that_is_kept(
    job: Job, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    _, runs = job("again", {})
    stage = Stage(FIRST.name, FIRST.fn + "again", FIRST.spec)
    before = runs["first"]
    monkeypatch.setattr("pipelines.execution.run.time.sleep", slept.append)
    store = tracker.uri, tracker.experiment_id
    for attempt in (1, 2, 3, 9):
        monkeypatch.setattr("pipelines.execution.run._attempt", lambda attempt=attempt: attempt)
        monkeypatch.setattr(Stage, "function", lambda stage: pytest.fail("computed again"))
        result, record = _execute(stage, store, "parent", Share(0, 1, 3))
        assert np.array_equal(result.weights["w"], np.arange(3.0)) and record.run_id == before.info.run_id
    assert slept == [1.0, 2.0, 4.0, 30.0]
    after = tracker.client.get_run(before.info.run_id)
    assert after.info.status == "FINISHED" and after.data.tags["attempts"] == "1"


def test_what_a_driver_left_between_the_commit_and_the_end_goes(job: Job, tracker: Tracker, tmp_path: Path) -> None:
    job("left", {})
    stage, resources = Stage(FIRST.name, FIRST.fn + "left", FIRST.spec), Resources(storage_path=str(tmp_path))
    place = checkpoints_of(stage, tracker.uri, resources)
    assert place is not None
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
    sizes: list[int] = []
    client = SimpleNamespace(log_batch=lambda run_id, metrics: sizes.append(len(metrics)))
    monkeypatch.setattr("pipelines.store.client.MlflowClient", lambda tracking_uri: client)
    run.log([(epoch, epoch, {name: 0.0 for name in "abcdefg"}) for epoch in range(1, 301)])
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
