"""Submitting a job: what is refused, the log over broken streams, and the exit code. No Ray is started."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from aecore.core.errors import InputError
from jobs import submit as module
from jobs.submit import submit

ROOT = Path(__file__).parents[1]
LOG = "".join(f"epoch {i} ✓\n" for i in range(25)) + '{"job": "train", "status": "finished"}\n'
RECIPE = ["jobs.train", "jobs/recipes/mnist.yaml"]
REMOTE = ["--address", "http://head:8265"]


class Fake:
    """A stand-in for a cluster's job client. It knows some jobs, and runs the next one until it has `status`.

    Each entry of `streams` is one log stream: how many characters of LOG it delivers, and how it ends then ("end",
    "hang", or an exception). Each stream starts at the log's first character, as Ray's streams do.
    """

    def __init__(
        self,
        jobs: dict[str, JobStatus] | None = None,
        streams: tuple[tuple[int, Any], ...] = ((len(LOG), "end"),),
        status: JobStatus = JobStatus.SUCCEEDED,
        code: int | None = 0,
        message: str = "",
    ) -> None:
        self.jobs, self.streams, self.outages, self.running = jobs or {}, list(streams), 0, True
        self.status, self.code, self.message = status, code, message
        self.submitted: dict[str, Any] = {}

    def list_jobs(self) -> list[Any]:
        return [SimpleNamespace(submission_id=name, status=status) for name, status in self.jobs.items()]

    def submit_job(self, **job: Any) -> str:
        self.submitted = job
        return str(job["submission_id"])

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        length, then = self.streams.pop(0)
        for start in range(0, length, 40):
            yield LOG[start : min(start + 40, length)]
        if then == "hang":
            await asyncio.sleep(3600)
        if isinstance(then, Exception):
            raise then

    def get_job_info(self, name: str) -> Any:
        if self.outages:
            self.outages -= 1
            raise ConnectionError("the tunnel is down")
        status = JobStatus.RUNNING if self.running and self.streams else self.status
        return SimpleNamespace(status=status, driver_exit_code=self.code, message=self.message)

    def get_job_logs(self, name: str) -> str:
        return LOG


@pytest.fixture(autouse=True)
def _laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "GIT_COMMIT", "RAY_JOB_STOP_WAIT_TIME_S"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.0)


def run(cluster: Fake, *args: str) -> int:
    return submit([*REMOTE, *args, "--", *RECIPE, "--finetune.lr", "2e-4"], lambda address: cluster)


def test_the_job_gets_the_command_the_folder_and_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "SECRET", "DIABOLO__SEED", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.setenv(name, name.lower())
    cluster = Fake()
    assert run(cluster, "--env", "AWS_PROFILE") == 0
    assert cluster.submitted["entrypoint"] == "python -m jobs.train jobs/recipes/mnist.yaml --finetune.lr 2e-4"
    assert cluster.submitted["runtime_env"]["working_dir"] == "."
    variables = cluster.submitted["runtime_env"]["env_vars"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert variables.pop("GIT_COMMIT") == (head.stdout.strip() or "unknown")
    assert variables == {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLFLOW_EXPERIMENT_NAME": "mlflow_experiment_name",
        "MLFLOW_EXPERIMENT_ID": "mlflow_experiment_id", "AWS_PROFILE": "aws_profile",
        "DIABOLO__SEED": "diabolo__seed", "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "DIABOLO_SUBMISSION_ID": cluster.submitted["submission_id"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("jobs", "once", "free"),
    [
        ({}, True, "night"),
        ({"night": JobStatus.FAILED}, True, "night-a2"),
        ({"night": JobStatus.STOPPED, "night-a2": JobStatus.FAILED}, True, "night-a3"),
        ({"night": JobStatus.SUCCEEDED}, False, "night-a2"),
        ({"night": JobStatus.SUCCEEDED}, True, "night: has succeeded already"),
        ({"night": JobStatus.FAILED, "night-a2": JobStatus.SUCCEEDED}, True, "night-a2: has succeeded already"),
        ({"night": JobStatus.RUNNING}, True, "night: running already"),
    ],
)
def test_once_refuses_a_job_that_has_succeeded_but_not_one_that_failed(
    jobs: dict[str, JobStatus], once: bool, free: str
) -> None:
    cluster = Fake(jobs)
    args = ["--name", "night", *(["--once"] if once else [])]
    if "already" not in free:
        assert run(cluster, *args) == 0 and cluster.submitted["submission_id"] == free
        return
    with pytest.raises(InputError, match=free):
        run(cluster, *args)
    assert not cluster.submitted


def submission(*args: str) -> str:
    cluster = Fake()
    assert submit([*REMOTE, *args], lambda address: cluster) == 0
    return str(cluster.submitted["submission_id"])


def test_the_same_work_has_the_same_id_and_other_work_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "train.py").touch()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_COMMIT", "a")
    ids = [submission("--", "jobs.train", "recipe.yaml")]
    assert ids[0].startswith("train-recipe-") and submission("--", "jobs.train", "recipe.yaml") == ids[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert submission("--", "jobs.train", "recipe.yaml") == ids[0]
    ids.append(submission("--", "jobs.train", "recipe.yaml", "--seed", "1"))
    recipe.write_text("seed: 2")
    ids.append(submission("--", "jobs.train", "recipe.yaml"))
    monkeypatch.setenv("GIT_COMMIT", "b")
    ids.append(submission("--", "jobs.train", "recipe.yaml"))
    monkeypatch.setenv("DIABOLO__SEED", "3")
    ids.append(submission("--", "jobs.train", "recipe.yaml"))
    assert len(set(ids)) == 5
    assert submission("--name", "nightly.1", "--", "jobs.train") == "nightly.1"


def test_an_ended_attempt_gets_a_successor_and_a_running_one_is_refused() -> None:
    ended = {"n": JobStatus.FAILED, "n-a2": JobStatus.STOPPED, "n-a3": JobStatus.SUCCEEDED, "other": JobStatus.RUNNING}
    cluster = Fake(ended)
    assert run(cluster, "--name", "n") == 0 and cluster.submitted["submission_id"] == "n-a4"
    for status in (JobStatus.RUNNING, JobStatus.PENDING):
        cluster = Fake({"n": JobStatus.FAILED, "n-a2": status})
        with pytest.raises(InputError, match=f"n-a2: {str(status).lower()} already"):
            run(cluster, "--name", "n")
        assert not cluster.submitted


def test_a_duplicate_in_the_same_moment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**job: Any) -> str:
        raise RuntimeError("Request failed with status code 500: Job with submission_id n already exists. Please use")

    cluster = Fake()
    monkeypatch.setattr(cluster, "submit_job", refuse)
    with pytest.raises(InputError, match="submitted by somebody else just now"):
        run(cluster, "--name", "n")


@pytest.mark.parametrize(("refusals", "starts"), [(3, True), (10**6, False)], ids=["late", "never"])
def test_an_agent_that_has_not_started_is_waited_for(
    refusals: int, starts: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster, tries = Fake(), 0

    def submit_job(**job: Any) -> str:
        nonlocal tries
        tries += 1
        if tries <= refusals:
            raise RuntimeError("failed with status code 500: No available agent to submit job, please try again later.")
        return Fake.submit_job(cluster, **job)

    monkeypatch.setattr(cluster, "submit_job", submit_job)
    monkeypatch.setattr(module, "_AGENT_SECONDS", 60.0 if starts else 0.05)
    if starts:
        assert run(cluster, "--name", "n") == 0 and tries == 4
    else:
        with pytest.raises(InputError, match=r"the agent that runs jobs has not started on the head, .* 52365"):
            run(cluster, "--name", "n")
        assert not cluster.submitted
    assert capsys.readouterr().err.count("n: waiting for the agent of the head") == 1


@pytest.mark.parametrize(
    "address",
    ["http://head:8265/", " http://head:8265 ", "HTTP://head:8265", "http://head:8265/#/jobs", "http://head:8265"],
)
@pytest.mark.parametrize("variable", ["--address", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_an_address_of_a_dashboard_is_taken_as_people_copy_it(
    variable: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def connect(address: str) -> Fake:
        asked.append(address)
        return Fake()

    if variable != "--address":
        monkeypatch.setenv(variable, address)
    own = ["--address", address] if variable == "--address" else []
    assert submit([*own, *GOOD], connect) == 0 and asked == ["http://head:8265"]


STREAMS: dict[str, tuple[tuple[int, Any], ...]] = {
    "whole": ((len(LOG), "end"),),
    "ends early": ((100, "end"), (130, "end"), (len(LOG), "end")),
    "breaks": ((90, RuntimeError("closed unexpectedly")), (len(LOG), "end")),
    "is shorter when it comes again": ((200, ConnectionError("reset")), (50, "end"), (len(LOG), "end")),
    "never gets to the end": ((0, OSError("refused")), (77, "end")),
    "falls silent": ((100, "hang"), (len(LOG), "hang")),
}


@pytest.mark.parametrize("streams", STREAMS.values(), ids=STREAMS)
def test_the_log_comes_whole_and_once(
    streams: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_SILENCE_SECONDS", 0.2)
    assert run(Fake(streams=streams), "--name", "n") == 0
    printed = capsys.readouterr()
    assert printed.out == LOG and json.loads(printed.out.splitlines()[-1])["status"] == "finished"
    assert printed.err.splitlines() == ["n: submitted; `ray job stop n` stops it", "n: succeeded"]


def test_a_cluster_that_does_not_answer_is_waited_for_and_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = ((100, OSError("reset")), *[(0, OSError("refused"))] * 20, (len(LOG), "end"))
    cluster = Fake(streams=streams)
    cluster.outages = 20
    assert run(cluster) == 0
    monkeypatch.setattr(module, "_MOST_FAILURES", 5)
    cluster = Fake(streams=streams)
    cluster.outages = 20
    with pytest.raises(RuntimeError, match="does not answer; the job may still be running"):
        run(cluster)


def test_an_ended_jobs_exit_code_survives_its_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(name: str) -> str:
        raise RuntimeError("Request failed with status code 500: Cannot connect to host")

    cluster = Fake(streams=((100, "end"), *[(0, OSError("refused"))] * 10), status=JobStatus.FAILED, code=1)
    monkeypatch.setattr(cluster, "get_job_logs", lost)
    monkeypatch.setattr(cluster, "running", False)
    assert run(cluster) == 1
    printed = capsys.readouterr()
    assert printed.out == LOG[:100] and "warning: the end of the log is lost with its node" in printed.err


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0), (JobStatus.FAILED, 2, 2), (JobStatus.FAILED, 1, 1), (JobStatus.FAILED, 130, 130),
        (JobStatus.STOPPED, -15, 130), (JobStatus.STOPPED, None, 130), (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 1), (JobStatus.FAILED, 0, 1),
    ],
)  # fmt: skip
def test_the_exit_code_is_the_drivers(
    status: JobStatus, code: int | None, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Fake(status=status, code=code, message="no such\npackage"), "--name", "n") == expected
    why = " (no such package)" if code is None and status == JobStatus.FAILED else ""
    assert capsys.readouterr().err.splitlines()[-1] == f"n: {str(status).lower()}{why}"


GOOD = ["--", *RECIPE]
BAD: list[tuple[list[str], dict[str, str], str]] = [
    ([*REMOTE], {}, "no command: not a command of this folder"),
    ([*REMOTE, "--", "jobs.trian"], {}, "jobs.trian: not a command of this folder"),
    ([*REMOTE, "--", "jobs.train", "gone.yaml"], {}, "recipe gone.yaml: does not reach the cluster"),
    ([*REMOTE, "--", "jobs.train", ".pre-commit-config.yml"], {}, "does not reach the cluster"),
    (GOOD, {}, "address missing: name the dashboard"),
    (["--address", "head:6379", *GOOD], {}, "address head:6379: name the dashboard"),
    (GOOD, {"RAY_ADDRESS": "ray://head:10001"}, "address ray://head:10001: name the dashboard"),
    (GOOD, {"RAY_ADDRESS": "auto"}, "address auto: name the dashboard"),
    (GOOD, {"RAY_API_SERVER_ADDRESS": " "}, "address missing: name the dashboard"),
    (["--address", "http://", *GOOD], {}, "address http://: name the dashboard"),
    (["--address", "http://head:99999", *GOOD], {}, "address http://head:99999: name the dashboard"),
    (["--address", "http:/head:8265", *GOOD], {}, "address http:/head:8265: name the dashboard"),
    ([*REMOTE, "--name", "a b", *GOOD], {}, "--name a b: use letters"),
    ([*REMOTE, "--env", "NOT_SET", *GOOD], {}, "--env NOT_SET: not set in this environment"),
    ([*REMOTE, *GOOD], {"MLFLOW_TRACKING_URI": ""}, "MLFLOW_TRACKING_URI: not set; name a server"),
    ([*REMOTE, *GOOD], {"MLFLOW_TRACKING_URI": "sqlite:////shared/mlflow.db"}, "sqlite:////shared/mlflow.db: a file"),
    ([*REMOTE, *GOOD], {"MLFLOW_TRACKING_URI": "file:///shared/mlruns"}, "file:///shared/mlruns is a folder"),
    ([*REMOTE, *GOOD], {"MLFLOW_TRACKING_URI": " "}, "MLFLOW_TRACKING_URI: not set; name a server, since"),
    ([*REMOTE, *GOOD], {"MLFLOW_TRACKING_URI": "m:5000"}, "m:5000 has no scheme; write http://m:5000"),
    ([*REMOTE, *GOOD], {"MLFLOW_TRACKING_URI": "./mlruns"}, "./mlruns is a folder, and MLflow keeps"),
    (["--address", "http://localhost:8265", *GOOD], {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}, "a file that the"),
]


@pytest.mark.parametrize(("args", "environment", "message"), BAD, ids=[row[2] for row in BAD])
def test_what_cannot_work_is_refused_in_one_line(
    args: list[str], environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    cluster = Fake()
    with pytest.raises(InputError) as error:
        submit(args, lambda address: cluster)
    assert message in str(error.value) and "\n" not in str(error.value) and not cluster.submitted


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile", "postgresql://u@db/mlflow", "https://m"])
def test_a_store_that_every_machine_can_reach_is_accepted(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert run(Fake()) == 0


def test_a_local_cluster_may_write_a_file_with_an_absolute_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////tmp/mlflow.db")
    assert submit(["--address", "http://127.0.0.1:8265", *GOOD], lambda address: Fake()) == 0


def test_a_large_folder_makes_a_warning_and_ignored_files_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "train.py").touch()
    for name in ("data", "kept", ".git"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "large.bin").open("wb") as file:
            file.truncate(60 * 10**6)  # a hole, which takes no room
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".gitignore").write_text("data/\n")
    (tmp_path / ".rayignore").write_text("kept/\n")
    assert submission("--", "jobs.train") and "warning" not in capsys.readouterr().err
    (tmp_path / ".rayignore").unlink()
    assert submission("--", "jobs.train") and "warning: 60 MB go to the cluster" in capsys.readouterr().err


def test_a_recipe_that_git_ignores_is_refused_wherever_it_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "own").mkdir()
    for file in ("jobs/train.py", "own/a.yaml", "own/b.yaml"):
        (tmp_path / file).touch()
    (tmp_path / "own" / ".gitignore").write_text("b.yaml\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_INDEX_FILE", str(ROOT / ".git" / "index"))  # as in a git hook
    assert submission("--", "jobs.train", "./own/a.yaml") and submission("--", "jobs.train", f"{tmp_path}/own/a.yaml")
    with pytest.raises(InputError, match=r"recipe own/b\.yaml: does not reach the cluster"):
        submission("--", "jobs.train", "own/b.yaml")


@pytest.fixture
def dashboard(server: Any) -> Any:
    """A server in the dashboard's place."""
    return server


ANSWERS = [
    (401, "Unauthorized: Missing authentication token", "Authentication required: Unauthorized"),
    (403, "Forbidden: Invalid authentication token", "Authentication failed: Forbidden"),
    (404, "Not found", "not a Ray dashboard"),
    (200, "<html>MLflow</html>", "not a Ray dashboard"),
    (502, "Bad gateway", "no answer"),
]


@pytest.mark.parametrize(("status", "body", "message"), ANSWERS)
def test_a_server_that_refuses_rays_client_is_explained(
    status: int, body: str, message: str, dashboard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://overridden:1")
    dashboard.answer = status, body
    address = f"http://127.0.0.1:{dashboard.server_port}"
    with pytest.raises(InputError, match=message) as error:
        submit(["--address", address, *GOOD])
    assert str(error.value).startswith(address) and "\n" not in str(error.value)
    assert ("RAY_AUTH_MODE=token" in str(error.value)) == (status in (401, 403))


def test_a_wrong_address_ends_the_command_with_one_line_and_code_2() -> None:
    line = [sys.executable, "-m", "jobs.submit", "--address", "http://127.0.0.1:9", *GOOD]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: http://127.0.0.1:9: no answer") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (InputError("so"), 2, "error: so"), (RuntimeError("a\nb"), 1, "error: a b"), (3, 3, None),
        (KeyboardInterrupt(), 130, "interrupted; a job that was submitted continues"),
    ],
)  # fmt: skip
def test_every_end_has_its_code(
    end: Any, code: int, line: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ending(args: list[str]) -> int:
        if isinstance(end, BaseException):
            raise end
        return int(end)

    monkeypatch.setattr(module, "submit", ending)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == code and capsys.readouterr().err == (f"{line}\n" if line else "")
