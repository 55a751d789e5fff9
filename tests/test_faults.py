"""Whatever call to MLflow fails, however: a command ends committed once, or in one line and nothing lost."""

import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, TEMPORARILY_UNAVAILABLE
from requests import HTTPError

from aecore.config.experiment import Fit
from aecore.core.errors import OutageError
from aecore.models.storage import Result
from aecore.stages.context import Context
from pipelines.cluster.share import Share
from pipelines.execution.assignment import Assignment
from pipelines.execution.journal import Journal
from pipelines.graph.stage import Stage
from pipelines.store import client as store_client
from pipelines.store import lease, patience
from pipelines.store import runs as store_runs
from pipelines.store.runs import Tracker
from tests.faults import Faulty, MemoryClient, Schedule
from tests.here import run_here

SCHEDULES = 200
EPOCHS = 3
WEIGHTS = {"first": np.arange(4.0), "second": np.arange(4.0) + 6}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(patience, "LONGEST_WAIT", 0.002)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(store_runs, "git_commit", lambda: "unknown")
    monkeypatch.setattr(store_runs, "system_metrics", lambda uri, run_id: nullcontext())
    monkeypatch.setattr("pipelines.execution.journal._LOG_SECONDS", 0.01)


def disturb(monkeypatch: pytest.MonkeyPatch, client: Any, schedule: Schedule) -> None:
    faulty = Faulty(client, schedule)
    monkeypatch.setattr(store_client, "MlflowClient", lambda tracking_uri: faulty if schedule.on else client)
    files_at = store_client.Store.files_at

    def faulty_files_at(store: store_client.Store, uri: str) -> Any:
        files = files_at(store, uri)
        return Faulty(files, schedule, Path(uri.removeprefix("file://"))) if schedule.on else files

    monkeypatch.setattr(Tracker, "files_at", faulty_files_at)


class Pipeline:
    """Two stages that train as `fit` does, only faster, and count their epochs."""

    def __init__(self, seed: int, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = str(folder)
        self.first = Stage("first", "stages.pretrain_layer", Fit(epochs=EPOCHS, batch_size=seed + 1))
        self.second = Stage("second", "stages.pretrain_layer", Fit(epochs=EPOCHS), {"below": self.first})
        self.trained: Counter[str] = Counter()
        patch.setattr(Stage, "function", lambda stage: self.train)

    def train(self, spec: Fit, run: Context, below: Result | None = None) -> Result:
        name, places = "first" if below is None else "second", run.checkpoints
        assert places is not None
        kept = places.load()
        history = kept[0]["history"] if kept else []
        for number, metrics in enumerate(history, 1):
            run.report(number, dict(metrics))
        for number in range(len(history) + 1, EPOCHS + 1):
            self.trained[name] += 1
            history.append({"train/loss": 1 / number, "seconds": 0.001, "time": time.time()})
            run.report(number, dict(history[-1]))
            places.save(number, {"history": history}, {})
        weights = {"w": np.arange(4.0) + (0 if below is None else below.weights["w"].sum())}
        return Result({"name": name}, weights, {"best/loss": 1 / EPOCHS}, {"curve": b"a png"})

    @property
    def keys(self) -> dict[str, str]:
        return {"first": self.first.key, "second": self.second.key, "job": f"job {self.first.key}"}

    def command(self, tracker: Tracker) -> Result:
        with tracker.job_run("test", self.keys["job"], {}, {"seed": 0}) as top:
            result = run_here(self.second, tracker, top, folder=self.folder)
            tracker.log_summary(top, {"test/error": 0.25}, {"run.second": "x"})
        return result


def runs(tracker: Tracker, key: str, condition: str = "") -> list[Any]:
    return tracker.search(f"tags.`stage.key` = '{key}'{condition}", 10)


def points(tracker: Tracker, run: Any) -> list[tuple[str, int]]:
    history = tracker.direct.get_metric_history
    return sorted((name, m.step) for name in run.data.metrics for m in history(run.info.run_id, name))


def survive(pipeline: Pipeline, tracker: Tracker, schedule: Schedule) -> int:
    """The same command until it is done, at most six times, and once undisturbed; how often it failed."""
    failures = 0
    for attempt in range(6):
        schedule.on = True
        try:
            pipeline.command(tracker)
        except OutageError as error:
            assert "\n" not in str(error)
            failures += 1
        schedule.on = False
        for name in ("first", "second"):
            # at most one, and whole
            for run in runs(tracker, pipeline.keys[name], " and attributes.status = 'FINISHED'"):
                assert np.array_equal(tracker.restore(run.info.run_id).weights["w"], WEIGHTS[name])
        if failures <= attempt:
            break
    assert np.array_equal(pipeline.command(tracker).weights["w"], WEIGHTS["second"])
    curves = [(name, epoch) for name in ("seconds", "train/loss") for epoch in range(1, EPOCHS + 1)]
    for name, key in pipeline.keys.items():
        (run,) = runs(tracker, key)
        assert run.info.status == "FINISHED"
        assert points(tracker, run) == ([("test/error", 0)] if name == "job" else [("best/loss", 0), *curves])
    # a lost connection costs no training step
    assert pipeline.trained == {"first": EPOCHS, "second": EPOCHS}
    assert not lease.existing_leases(tracker)
    return failures


@pytest.mark.parametrize("ten", range(0, SCHEDULES, 10))
def test_schedules_of_faults(
    ten: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = 0
    for seed in range(ten, ten + 10):
        patient = seed % 2 == 0
        folder, schedule = tmp_path / str(seed), Schedule(seed, *((2, 14) if patient else (20, 90)))
        memory = MemoryClient(folder / "artifacts")
        disturb(monkeypatch, memory, schedule)
        # every other one gives up at once
        tracker = Tracker("fake://", "0", patience=0.05 if patient else 0.0)
        survive(Pipeline(seed, folder / "checkpoints", monkeypatch), tracker, schedule)
        failed += schedule.failed
    assert failed > 20
    capsys.readouterr()


@pytest.mark.parametrize("seed", range(4))
def test_schedules_of_faults_of_a_real_store(
    seed: int, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, schedule = tracker.direct, Schedule(seed, 5, 40)
    disturb(monkeypatch, client, schedule)
    survive(Pipeline(seed, tmp_path, monkeypatch), tracker._replace(patience=0.0 if seed % 2 else 1.0), schedule)


def test_the_store_in_memory_is_like_the_real_one(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, pictures = Pipeline(99, tmp_path / "checkpoints", monkeypatch), []
    memory = MemoryClient(tmp_path / "artifacts")
    for real in (True, False):
        if not real:
            monkeypatch.setattr(store_client, "MlflowClient", lambda tracking_uri: memory)
        pipeline.command(tracker)
        found = {name: runs(tracker, key) for name, key in pipeline.keys.items()}
        assert [len(them) for them in found.values()] == [1, 1, 1]
        pictures.append({
            name: (
                run.info.status, points(tracker, run), run.data.params, run.data.metrics,
                {tag: value for tag, value in run.data.tags.items() if tag not in ("mlflow.parentRunId", "lease")},
                [item.path for item in tracker.direct.list_artifacts(run.info.run_id, "result")],
            )
            for name, (run,) in found.items()
        })  # fmt: skip
    assert pictures[0] == pictures[1]


def test_points_that_cannot_be_logged_wait_and_training_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, down = MemoryClient(tmp_path / "artifacts"), [True]

    class Hanging:
        def __getattr__(self, name: str) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                if down[0]:
                    time.sleep(0.2)
                    raise ConnectionError("timed out")
                return getattr(memory, name)(*args, **options)

            return call

    monkeypatch.setattr(store_client, "MlflowClient", lambda tracking_uri: Hanging())
    stage, tracker = Stage("slow", "stages.slow", Fit(epochs=6)), Tracker("fake://", "0")
    with Journal(stage, Assignment(store=tuple(tracker), parent="parent", share=Share(0, 1))) as journal:
        began = time.monotonic()
        for epoch in range(1, 4):
            journal.report(epoch, {"train/loss": 1 / epoch, "seconds": 0.1, "time": epoch})
        assert time.monotonic() - began < 0.1
        time.sleep(0.5)
        down[0] = False
        deadline = time.monotonic() + 10
        journal.report(4, {"train/loss": 0.25, "seconds": 0.1, "time": 4})
        while journal.points:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert capsys.readouterr().err.count("its epochs are kept, to be logged later (MLflow at fake://") == 1
    (run,) = memory.runs.values()
    assert journal.run_id == run.info.run_id
    history = memory.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.timestamp) for m in history] == [(n, 1000 * n) for n in (1, 2, 3, 4)]


def test_only_what_may_pass_is_waited_for(tracker: Tracker) -> None:
    may_pass = [
        MlflowException("QueuePool limit of size 5 overflow 10 reached", error_code=BAD_REQUEST),
        MlflowException("API request failed"), MlflowException("locked", TEMPORARILY_UNAVAILABLE), TimeoutError(),
        ConnectionError(), OSError(28, "no space"), HTTPError(response=SimpleNamespace(status_code=503)),
    ]  # fmt: skip
    may_not = [
        MlflowException("bad", BAD_REQUEST), ValueError(), PermissionError(), FileNotFoundError(), OSError(30, ""),
        HTTPError(response=SimpleNamespace(status_code=403)),
    ]  # fmt: skip
    for error in [*may_pass, *may_not]:
        tries: list[int] = []

        def call(error: Exception = error, tries: list[int] = tries) -> int:
            tries.append(1)
            if len(tries) < 3:
                raise error
            return 7

        if error in may_pass:
            assert tracker._replace(patience=5.0).wait_for(call) == 7
        else:
            with pytest.raises(type(error)):
                tracker._replace(patience=5.0).wait_for(call)


def test_at_the_end_of_patience_the_place_is_told_and_nothing_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, down = MemoryClient(tmp_path / "artifacts"), [True]

    files_at = store_client.Store.files_at

    def refusing(store: store_client.Store, uri: str) -> Any:
        if down[0]:
            raise ConnectionError("refused")
        return files_at(store, uri)

    monkeypatch.setattr(store_client, "MlflowClient", lambda tracking_uri: memory)
    monkeypatch.setattr(Tracker, "files_at", refusing)
    pipeline, tracker = Pipeline(0, tmp_path / "checkpoints", monkeypatch), Tracker("fake://", "0", patience=0.1)
    with pytest.raises(OutageError, match=r"^first is computed, and is kept in .*/checkpoints/\w+, but not") as error:
        pipeline.command(tracker)
    assert "has not answered for 0.1 s (refused); the same command goes on" in str(error.value)
    assert {run.info.status for run in tracker.search()} == {"FAILED"}
    down[0] = False
    pipeline.command(tracker)
    assert {run.info.status for run in tracker.search()} == {"FINISHED"}
    assert pipeline.trained == {"first": EPOCHS, "second": EPOCHS}
