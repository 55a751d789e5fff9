"""One job, one driver at a time: real processes on one store, killed in the middle; and how they end when told to."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from aecore.core.errors import TakenOverError
from pipelines.store import tracking
from pipelines.store.tracking import Tracker, connect
from tests.faults import MemoryClient

ROOT = Path(__file__).parents[1]
DRIVER = """
import json, os, sys, time
from pathlib import Path
from jobs import cli
from pipelines.store import tracking
from pipelines.store.tracking import connect

uri, what = sys.argv[1:]
tracking._POLL_SECONDS = 0.2
tracker = connect(uri, "test")._replace(patience=5.0)
inside, count = Path("inside"), Path("count")

def count_up():
    for _ in range(2):
        with tracker.job_run("test", "race", {}, {}):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # nobody else is in
            number = int(count.read_text())
            time.sleep(0.1)
            count.write_text(str(number + 1))
            inside.unlink()

def sleep():
    with tracker.job_run("test", "sleep", {}, {}) as top:
        tracker.client.create_run(tracker.experiment_id, tags={"mlflow.parentRunId": top, "stage.key": "below"})
        class Hanging:
            def __init__(self, **kwargs):
                pass
            def __getattr__(self, name):
                time.sleep(60)
        if what == "hang":
            tracking.MlflowClient = Hanging
        if what == "down":
            class Refusing(Hanging):
                def __getattr__(self, name):
                    def refuse(*args, **kwargs):
                        raise ConnectionError("refused")
                    return refuse
            tracking.MlflowClient = Refusing
        Path(f"{os.getpid()}.ready").touch()
        if what == "down":
            tracker._replace(patience=0.5).find("key")
        time.sleep(60)

cli.main("test", lambda: count_up() if what == "count" else sleep())
"""


class Driver:
    """A process that works on a job."""

    def __init__(self, tracker: Tracker, folder: Path, what: str) -> None:
        self.folder = folder
        env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        with (folder / f"{what}.err").open("a") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, tracker.uri, what], cwd=folder, text=True, stdout=subprocess.PIPE,
                stderr=stderr, env={**env, "PYTHONPATH": str(ROOT), "GIT_COMMIT": "x"},
            )  # fmt: skip

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 120
        while not (self.folder / f"{self.process.pid}.ready").exists():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=120)
        return json.loads(out.splitlines()[-1]) if out else {}


@contextmanager
def drivers(tracker: Tracker, folder: Path, *whats: str) -> Iterator[list[Driver]]:
    started = [Driver(tracker, folder, what) for what in whats]
    try:
        yield started
    finally:
        for driver in started:
            driver.process.kill()
            driver.process.communicate()


def status(tracker: Tracker, key: str) -> str:
    (run,) = tracker._search(f"tags.`stage.key` = '{key}'", 10)
    return run.info.status


def leases(tracker: Tracker) -> list[str]:
    return [model.name for model in tracker.client.search_registered_models("name LIKE 'diabolo.lease.%'")]


def test_of_several_drivers_one_holds_the_job_at_a_time(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    with drivers(tracker, tmp_path, "count", "count", "count") as three:
        for driver in three:
            driver.end()
            assert driver.process.returncode == 0, (tmp_path / "count.err").read_text()
    assert (tmp_path / "count").read_text() == "6" and status(tracker, "race") == "FINISHED"
    assert leases(tracker) == []


def test_who_waits_says_so_and_takes_over_from_the_dead(tracker: Tracker, tmp_path: Path) -> None:
    with drivers(tracker, tmp_path, "sleep") as (holder,):
        holder.wait_until_ready()
        with drivers(tracker, tmp_path, "sleep") as (waiter,):
            deadline = time.monotonic() + 60
            while "works on the same test: waiting" not in (tmp_path / "sleep.err").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert (
                f"another driver ({socket.gethostname()} {holder.process.pid} " in (tmp_path / "sleep.err").read_text()
            )
            time.sleep(1)
            assert not (tmp_path / f"{waiter.process.pid}.ready").exists()
            holder.process.kill()
            killed = time.monotonic()
            waiter.wait_until_ready()
            assert time.monotonic() - killed < 3  # 0.3 s on a quiet machine
            # what the dead one left open is closed, and what is open is the new one's
            assert len(leases(tracker)) == 1 and status(tracker, "sleep") == "RUNNING"
            waiter.process.send_signal(signal.SIGTERM)
            assert waiter.end()["status"] == "killed"
    assert status(tracker, "sleep") == "KILLED" and leases(tracker) == []
    assert (tmp_path / "sleep.err").read_text().count("waiting until it has ended") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_is_killed_within_two_seconds(number: signal.Signals, tracker: Tracker, tmp_path: Path) -> None:
    with drivers(tracker, tmp_path, "sleep") as (driver,):
        driver.wait_until_ready()
        time.sleep(0.5)
        below = [run.info.run_id for run in tracker._search("tags.`stage.key` = 'below'", 10)]
        began = time.monotonic()
        driver.process.send_signal(number)
        while status(tracker, "sleep") != "KILLED":
            assert time.monotonic() - began < 2
            time.sleep(0.01)
        assert driver.end()["status"] == "killed" and driver.process.returncode == 130
        assert time.monotonic() - began < 4
    assert {tracker.client.get_run(run_id).info.status for run_id in below} == {"KILLED"}
    assert leases(tracker) == []


def test_told_to_end_it_ends_though_mlflow_hangs(tracker: Tracker, tmp_path: Path) -> None:
    with drivers(tracker, tmp_path, "hang") as (driver,):
        driver.wait_until_ready()
        began = time.monotonic()
        driver.process.send_signal(signal.SIGTERM)
        assert driver.end()["status"] == "killed" and driver.process.returncode == 130
        assert time.monotonic() - began < 2.5  # the process's end included
    assert status(tracker, "sleep") == "RUNNING"
    with tracker.job_run("test", "another", {}, {}):  # the next driver closes it
        assert status(tracker, "sleep") == "KILLED" and len(leases(tracker)) == 1


def test_without_mlflow_it_fails_in_one_line_at_the_end_of_its_patience(tracker: Tracker, tmp_path: Path) -> None:
    with drivers(tracker, tmp_path, "down") as (driver,):
        assert driver.end()["status"] == "failed" and driver.process.returncode == 1
    lines = (tmp_path / "down.err").read_text().splitlines()
    assert "Traceback (most recent call last):" not in lines
    assert lines[-1].startswith("error: MLflow at sqlite:///") and "the same command goes on" in lines[-1]


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryClient:
    client = MemoryClient(tmp_path)
    monkeypatch.setattr(tracking, "MlflowClient", lambda tracking_uri: client)
    monkeypatch.setattr(tracking, "system_metrics", lambda uri, run_id: nullcontext())
    monkeypatch.setattr(tracking, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(tracking, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "_SILENT_SECONDS", 0.5)
    return client


def lease(memory: MemoryClient, key: str, owner: str) -> str:
    name = f"diabolo.lease.{key}.abc"
    memory.create_registered_model(name, {"owner": owner, "beat": "0"})
    return name


def test_a_driver_of_another_machine_is_waited_for_as_long_as_its_heart_beats(memory: MemoryClient) -> None:
    name = lease(memory, "beats", "elsewhere 1 1.0")
    stop, began = time.monotonic() + 1.0, time.monotonic()

    def beat() -> None:
        while time.monotonic() < stop:
            memory.set_registered_model_tag(name, "beat", str(time.monotonic()))
            time.sleep(0.05)

    threading.Thread(target=beat).start()
    with Tracker("fake://", "0").job_run("test", "beats", {}, {}):
        assert 1.3 < time.monotonic() - began < 5
        assert [other for other in memory.models if other != name] == list(memory.models)


def test_an_outage_is_no_silence(memory: MemoryClient, monkeypatch: pytest.MonkeyPatch) -> None:
    lease(memory, "outage", "elsewhere 1 1.0")
    taker = tracking._Lease(Tracker("fake://", "0"), "outage", "test")
    assert list(taker._others().values()) == ["elsewhere 1 1.0"]
    time.sleep(0.6)  # nothing was heard, since nobody listened
    assert list(taker._others().values()) == ["elsewhere 1 1.0"]


def test_a_lease_that_is_going_is_read_without_its_tags(memory: MemoryClient) -> None:
    memory.create_registered_model("diabolo.lease.going.abc", {})
    taker = tracking._Lease(Tracker("fake://", "0"), "going", "test")
    assert taker._others() == {"diabolo.lease.going.abc": ""}


def test_leases_that_this_process_has_forgotten_and_those_of_the_dead_are_removed(memory: MemoryClient) -> None:
    process = psutil.Process()
    lease(memory, "a", f"{socket.gethostname()} {process.pid} {process.create_time()}")
    lease(memory, "b", f"{socket.gethostname()} {process.pid} 1.0")
    with Tracker("fake://", "0").job_run("test", "a", {}, {}):
        assert len(memory.models) == 1
    assert memory.models == {}


def test_a_driver_that_lost_its_lease_is_woken_and_commits_nothing(memory: MemoryClient) -> None:
    tracker, began = Tracker("fake://", "0"), time.monotonic()
    with (
        pytest.raises(TakenOverError, match="another driver has taken this test over, since this one was silent"),
        tracker.job_run("test", "lost", {}, {}) as top,
    ):
        memory.models.clear()
        time.sleep(30)
    assert time.monotonic() - began < 10
    assert memory.runs[top].info.status == "RUNNING"  # it is the other driver's now


def test_whose_lease_was_lost_meanwhile_is_told_before_the_commit(
    memory: MemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_BEAT_SECONDS", 60.0)
    with pytest.raises(TakenOverError), Tracker("fake://", "0").job_run("test", "late", {}, {}) as top:
        memory.models.clear()
    assert memory.runs[top].info.status == "RUNNING"


def test_drivers_that_come_together_make_one_store(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    code = f"from pipelines.store.tracking import connect; print(connect('{store}', 'x').experiment_id)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert {out for out, _ in said} == {"1\n"}, said


def test_a_driver_that_comes_second_to_make_the_experiment_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    first = connect(uri, "x")
    look, seen = MlflowClient.get_experiment_by_name, []

    def blind(self: Any, name: str) -> Any:
        seen.append(name)
        return look(self, name) if len(seen) > 1 else None

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", blind)
    assert connect(uri, "x") == first
