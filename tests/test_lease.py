"""One driver at a time works on a job: real processes on one store are killed or told to end, others take over."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from aecore.config.experiment import Fit
from aecore.core.errors import TakenOverError
from aecore.models.storage import Result
from pipelines.graph.stage import Stage
from pipelines.store import client as store_client
from pipelines.store import lease as store_lease
from pipelines.store import runs as store_runs
from pipelines.store.connection import connect
from pipelines.store.lease import Lease, check_leases, existing_leases, held_leases
from pipelines.store.runs import Tracker
from tests.faults import MemoryClient

ROOT = Path(__file__).parents[1]
DRIVER = """
import json, os, sys, time
from pathlib import Path
from jobs import cli
from pipelines.store import client, lease
from pipelines.store.connection import connect

uri, what = sys.argv[1:]
lease.BEAT_SECONDS, lease.POLL_SECONDS, lease.SILENT_SECONDS = 0.5, 0.2, 6.0
tracker = connect(uri, "test")._replace(patience=5.0)
inside, count = Path("inside"), Path("count")

def count_up():
    for _ in range(2):
        with tracker.job_run("test", "race", {}, {}):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another driver is inside
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
            client.MlflowClient = Hanging
        if what == "down":
            class Refusing(Hanging):
                def __getattr__(self, name):
                    def refuse(*args, **kwargs):
                        raise ConnectionError("refused")
                    return refuse
            client.MlflowClient = Refusing
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
    (run,) = tracker.search(f"tags.`stage.key` = '{key}'", 10)
    return run.info.status


def wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_of_several_drivers_one_holds_the_job_at_a_time(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    with drivers(tracker, tmp_path, "count", "count", "count") as three:
        for driver in three:
            driver.end()
            assert driver.process.returncode == 0, (tmp_path / "count.err").read_text()
    assert (tmp_path / "count").read_text() == "6" and status(tracker, "race") == "FINISHED"
    assert not existing_leases(tracker)


def test_a_driver_that_waits_says_so_and_takes_over_when_the_other_dies(tracker: Tracker, tmp_path: Path) -> None:
    with drivers(tracker, tmp_path, "sleep") as (holder,):
        holder.wait_until_ready()
        with drivers(tracker, tmp_path, "sleep") as (waiter,):
            wait_until(lambda: "works on the same test: waiting" in (tmp_path / "sleep.err").read_text(), 60)
            assert (
                f"another driver ({socket.gethostname()} {holder.process.pid} " in (tmp_path / "sleep.err").read_text()
            )
            time.sleep(1)
            assert not (tmp_path / f"{waiter.process.pid}.ready").exists()
            holder.process.kill()
            killed = time.monotonic()
            waiter.wait_until_ready()
            assert 4 < time.monotonic() - killed < 12  # after 6 s of silence, and no process is looked up
            # the run that the killed driver left open was closed, and is open again for the new one
            assert len(existing_leases(tracker)) == 1 and status(tracker, "sleep") == "RUNNING"
            waiter.process.send_signal(signal.SIGTERM)
            assert waiter.end()["status"] == "killed"
    assert status(tracker, "sleep") == "KILLED" and not existing_leases(tracker)
    assert (tmp_path / "sleep.err").read_text().count("waiting until it has ended") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_is_told_to_end_closes_its_runs_within_two_seconds(
    number: signal.Signals, tracker: Tracker, tmp_path: Path
) -> None:
    with drivers(tracker, tmp_path, "sleep") as (driver,):
        driver.wait_until_ready()
        time.sleep(0.5)
        below = [run.info.run_id for run in tracker.search("tags.`stage.key` = 'below'", 10)]
        began = time.monotonic()
        driver.process.send_signal(number)
        while status(tracker, "sleep") != "KILLED":
            assert time.monotonic() - began < 2
            time.sleep(0.01)
        assert driver.end()["status"] == "killed" and driver.process.returncode == 130
        assert time.monotonic() - began < 4
    assert {tracker.client.get_run(run_id).info.status for run_id in below} == {"KILLED"}
    assert not existing_leases(tracker)


def test_a_driver_that_is_told_to_end_ends_even_if_mlflow_hangs(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with drivers(tracker, tmp_path, "hang") as (driver,):
        driver.wait_until_ready()
        began = time.monotonic()
        driver.process.send_signal(signal.SIGTERM)
        assert driver.end()["status"] == "killed" and driver.process.returncode == 130
        assert time.monotonic() - began < 2.5  # the process's end included
    assert status(tracker, "sleep") == "RUNNING"
    monkeypatch.setattr(store_lease, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(store_lease, "SILENT_SECONDS", 2.0)
    with tracker.job_run("test", "another", {}, {}):  # a driver of another job hears its silence and closes its runs
        assert status(tracker, "sleep") == "RUNNING" and len(existing_leases(tracker)) == 2
        wait_until(lambda: status(tracker, "sleep") == "KILLED", 20)
        assert len(existing_leases(tracker)) == 1 and status(tracker, "another") == "RUNNING"


def test_a_driver_without_mlflow_fails_in_one_line_at_the_end_of_its_patience(tracker: Tracker, tmp_path: Path) -> None:
    with drivers(tracker, tmp_path, "down") as (driver,):
        assert driver.end()["status"] == "failed" and driver.process.returncode == 1
    lines = (tmp_path / "down.err").read_text().splitlines()
    assert "Traceback (most recent call last):" not in lines
    assert lines[-1].startswith("error: MLflow at sqlite:///") and "the same command goes on" in lines[-1]


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryClient:
    client = MemoryClient(tmp_path)
    monkeypatch.setattr(store_client, "MlflowClient", lambda tracking_uri: client)
    monkeypatch.setattr(store_runs, "system_metrics", lambda uri, run_id: nullcontext())
    monkeypatch.setattr(store_lease, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(store_lease, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(store_lease, "SILENT_SECONDS", 0.5)
    return client


TRACKER = Tracker("fake://", "0")


def lease(memory: MemoryClient, key: str, owner: str, token: str = "theirs") -> str:
    """Make the lease of a driver of another process."""
    if "diabolo.leases" not in memory.experiments:
        memory.create_experiment("diabolo.leases")
    experiment = memory.experiments["diabolo.leases"].experiment_id
    tags = {"lease.key": key, "lease.owner": owner, "lease.token": token, "lease.beat": "0"}
    return str(memory.create_run(experiment, tags=tags).info.run_id)


def delete_all(memory: MemoryClient) -> None:
    for name in existing_leases(TRACKER):
        memory.delete_run(name)


def keep_beating(memory: MemoryClient, name: str, seconds: float) -> None:
    stop = time.monotonic() + seconds

    def beat() -> None:
        while time.monotonic() < stop:
            memory.set_tag(name, "lease.beat", str(time.monotonic()))
            time.sleep(0.05)

    threading.Thread(target=beat).start()


def test_another_driver_is_waited_for_as_long_as_its_heart_beats(memory: MemoryClient) -> None:
    name = lease(memory, "beats", "elsewhere 1 1.0")
    began = time.monotonic()
    keep_beating(memory, name, 1.0)
    with TRACKER.job_run("test", "beats", {}, {}):
        assert 1.3 < time.monotonic() - began < 5
        assert existing_leases(TRACKER) == set(held_leases()) != {name}


def test_a_driver_of_the_same_host_name_and_process_number_is_not_taken_for_dead(memory: MemoryClient) -> None:
    # in two containers that share a host name, a process that lives has a number that does not exist in the other one
    name = lease(memory, "container", f"{socket.gethostname()} 999999999 1.0")
    keep_beating(memory, name, 1.0)
    taker = Lease(TRACKER, "container", "test")
    taker._experiment_id = memory.experiments["diabolo.leases"].experiment_id
    for _ in range(10):
        assert list(taker._look(TRACKER)[0]) == [name]
        time.sleep(0.05)


def test_an_outage_is_no_silence(memory: MemoryClient) -> None:
    lease(memory, "outage", "elsewhere 1 1.0")
    taker = Lease(TRACKER, "outage", "test")
    taker._experiment_id = memory.experiments["diabolo.leases"].experiment_id
    assert list(taker._look(TRACKER)[0].values()) == ["elsewhere 1 1.0"]
    time.sleep(0.6)  # nothing was heard, since nobody listened
    assert list(taker._look(TRACKER)[0].values()) == ["elsewhere 1 1.0"]


def test_leases_that_this_process_has_forgotten_are_removed_at_once(memory: MemoryClient) -> None:
    # by a call, for example, that acted although its answer was lost
    lease(memory, "a", "this process", f"{store_lease._PROCESS}.lost")
    began = time.monotonic()
    with TRACKER.job_run("test", "a", {}, {}):
        assert time.monotonic() - began < 0.4 and existing_leases(TRACKER) == set(held_leases())
    assert not existing_leases(TRACKER) and not held_leases()


def test_a_driver_hears_the_silence_of_other_jobs_and_closes_their_runs(memory: MemoryClient) -> None:
    dead, living = lease(memory, "dead", "elsewhere 1 1.0"), lease(memory, "living", "elsewhere 2 1.0")
    jobs = [memory.create_run("0", tags={"job": "test", "lease": name}) for name in (dead, living)]
    keep_beating(memory, living, 2.0)
    with TRACKER.job_run("test", "next", {}, {}):
        assert [job.info.status for job in jobs] == ["RUNNING", "RUNNING"]
        wait_until(lambda: jobs[0].info.status == "KILLED", 1.8)
        assert jobs[1].info.status == "RUNNING" and existing_leases(TRACKER) == {living, *held_leases()}


def test_a_driver_that_lost_its_lease_is_woken_and_commits_nothing(memory: MemoryClient) -> None:
    began = time.monotonic()
    with (
        pytest.raises(TakenOverError, match="another driver has taken this test over, since this one was silent"),
        TRACKER.job_run("test", "lost", {}, {}) as top,
    ):
        delete_all(memory)
        time.sleep(30)
    assert time.monotonic() - began < 10
    assert memory.runs[top].info.status == "RUNNING"  # it is the other driver's now


@pytest.mark.parametrize("commits", [False, True])
def test_a_driver_that_lost_its_lease_unawares_finds_out_before_the_commit(
    commits: bool, memory: MemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_lease, "BEAT_SECONDS", 60.0)
    with pytest.raises(TakenOverError), TRACKER.job_run("test", "late", {}, {}) as top:
        run = TRACKER.open_run(Stage("stage", "stages.stage", Fit()), top)
        delete_all(memory)
        if commits:
            run.commit(Result({}, {}, {}))
    assert memory.runs[top].info.status == memory.runs[run.run_id].info.status == "RUNNING"


def test_a_lease_that_was_deleted_while_its_taker_was_paused_is_not_held(
    memory: MemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Lease._create

    def create_and_pause(lease: Lease) -> None:
        create(lease)
        delete_all(memory)  # by a driver that came, heard nothing, worked and went

    monkeypatch.setattr(Lease, "_create", create_and_pause)
    with pytest.raises(TakenOverError):
        Lease(TRACKER, "paused", "test").take()
    assert not held_leases()


def test_the_loss_of_another_lease_ends_a_job_as_failed(memory: MemoryClient) -> None:
    with pytest.raises(TakenOverError), TRACKER.job_run("test", "outer", {}, {}) as top:
        (outer,) = held_leases()
        with TRACKER.lease("inner", "promotion") as check_inner:
            memory.delete_run(*(set(held_leases()) - {outer}))
            check_inner()
    assert memory.runs[top].info.status == "FAILED" and not existing_leases(TRACKER)


def test_a_worker_commits_only_as_long_as_its_drivers_lease_is_held(memory: MemoryClient) -> None:
    name = lease(memory, "job", "elsewhere 1 1.0")
    worker = TRACKER._replace(leases=(name,))
    stage, result = Stage("stage", "stages.stage", Fit()), Result({}, {}, {})
    run = worker.open_run(stage, "parent")
    memory.delete_run(name)
    with pytest.raises(TakenOverError, match="another driver has taken this job over"):
        run.commit(result)
    assert worker.find(stage.key) is None
    worker._replace(leases=(lease(memory, "job", "elsewhere 2 1.0"),)).open_run(stage, "parent").commit(result)
    assert worker.find(stage.key) == run.run_id


def test_leases_outlive_the_deletion_of_their_experiment(tracker: Tracker) -> None:
    with tracker.lease("one", "test"):
        (name,) = held_leases()
        experiment = tracker.client.get_run(name).info.experiment_id
        tracker.client.delete_experiment(experiment)
        with pytest.raises(TakenOverError):
            check_leases(tracker, [name])
        with tracker.lease("two", "test"):
            assert existing_leases(tracker) == set(held_leases()) - {name}


def test_drivers_that_come_together_make_one_store(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    code = f"from pipelines.store.connection import connect; print(connect('{store}', 'x').experiment_id)"
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
