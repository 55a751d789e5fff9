"""Whole jobs, each as a user starts it: a process of its own in a folder of its own, with a store of its own."""

import importlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.tables import show
from tests.gpu.report import Report
from tests.gpu.scale import Scale

ROOT = Path(__file__).parents[2]
NEEDED = ("ray", "mlflow", "psutil")
LIMIT_SECONDS = 200.0
"""Seconds after which a job is ended."""
TINY = ("--pretrain.epochs", "1", "--finetune.epochs", "1", "--network.widths", "[8]")
TINY_STUDY = ("--seeds", "[0]", "--budget.epochs", "3", "--labels.counts", "[]", "--labels.fit.epochs", "1")


class Job(NamedTuple):
    """A command, its target on an H100, and the least accuracy on the test rows, below which something is wrong."""

    command: tuple[str, ...]
    tiny: tuple[str, ...]
    """Options that are added to the command for a run with few rows and epochs."""
    seconds: float
    """The target, from start to end as a user sees them."""
    accuracy: float = 0.0
    needs_mnist: bool = True


class Done(NamedTuple):
    """A job that has ended."""

    code: int | None
    """The exit code; None for a job that was ended after `LIMIT_SECONDS`."""
    seconds: float
    report: dict[str, Any]
    """The last line of stdout; empty where that is not JSON."""
    stderr: str
    began_at: float
    """Unix time in seconds."""

    @property
    def workers(self) -> int:
        """The number of worker processes that printed a line."""
        return len(set(re.findall(r"\([^()\n]*\bpid=(\d+)", self.stderr)))


def mnist(seed: int) -> tuple[str, ...]:
    """Return the textbook's job."""
    return "jobs.train", str(ROOT / "jobs" / "recipes" / "mnist.yaml"), "--control", "false", "--seed", str(seed)


TINY_MNIST = (*TINY, "--data.limit", "500")
JOBS = {
    "MNIST, cold": Job(mnist(0), TINY_MNIST, 25, accuracy=0.97),
    "MNIST, on a running Ray": Job(mnist(1), TINY_MNIST, 12, accuracy=0.97),
    "digits": Job(("jobs.train",), (*TINY, "--control", "false"), 20, accuracy=0.9, needs_mnist=False),
    "study of digits": Job(("jobs.compare",), TINY_STUDY, 45, needs_mnist=False),
    "mnist_best": Job(
        ("jobs.train", str(ROOT / "jobs" / "recipes" / "mnist_best.yaml")), (*TINY_MNIST, "--control", "false"), 70,
        accuracy=0.98,
    ),
}  # fmt: skip
WARM = "MNIST, on a running Ray"
"""The job that finds a Ray that is up, and the store of the job before it."""


def measure(scale: Scale, root: Path | None, report: Report) -> list[dict[str, Any]]:
    """Run all jobs one after another; print a table and return its rows.

    Args:
        root: the folder that holds MNIST/raw; None skips what needs it.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        report.skip(f"all jobs: {', '.join(missing)} cannot be imported")
        return []
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="diabolo_gpu", ignore_cleanup_errors=True) as temporary:
        for name, job in JOBS.items():
            if job.needs_mnist and root is None:
                report.skip(f"{name}: there is no MNIST/raw; name its folder by --root")
                continue
            folder = Path(temporary) / ("mnist" if job.command[:2] == mnist(0)[:2] else name.replace(" ", "_"))
            folder.mkdir(exist_ok=True)
            command = [*job.command, *(job.tiny if scale.tiny_jobs else ())]
            command += ["--data.root", str(root)] if job.needs_mnist else []
            try:
                with ExitStack() as stack:
                    env = stack.enter_context(running_ray(folder)) if name == WARM else {}
                    done = run(command, folder, env)
                table.append(judged(name, job, done, folder, report))
            except Exception as error:  # the jobs behind this one are measured all the same
                report.fail(f"{name}: {type(error).__name__}: {error}")
    show("Whole jobs", [{column: "" if value is None else value for column, value in row.items()} for row in table])
    return table


def run(command: list[str], folder: Path, env: dict[str, str]) -> Done:
    """Run `python -m COMMAND` in a folder, and end it with all below it after `LIMIT_SECONDS`."""
    from tests.nodes import end

    out, err = folder / "stdout.txt", folder / "stderr.txt"
    with out.open("w") as stdout, err.open("w") as stderr:
        began_at, began = time.time(), time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=folder, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            env=environ() | env,
        )  # fmt: skip
        code: int | None = None
        try:
            code = process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            seconds = time.perf_counter() - began
            if code is None:
                end(process)
    lines = out.read_text(errors="replace").splitlines()
    try:
        last = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = {}
    return Done(code, seconds, last if isinstance(last, dict) else {}, err.read_text(errors="replace"), began_at)


def environ() -> dict[str, str]:
    """Return this process's environment without settings of Diabolo, MLflow and Ray, and with this checkout."""
    prefixes = ("DIABOLO__", "MLFLOW_", "RAY_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return clean | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


@contextmanager
def running_ray(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment of jobs on a Ray that `ray start --head` has started."""
    from tests.nodes import free_port, running

    port, log, started = free_port(), folder / "head.log", time.monotonic()
    (folder / "token").write_text(secrets.token_hex(32))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    # Ray's sockets lie in its folder, and their names may have 107 characters
    with tempfile.TemporaryDirectory(prefix="dg", dir="/tmp", ignore_cleanup_errors=True) as own:
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--block",
            "--include-dashboard=false", "--disable-usage-stats", f"--ray-client-server-port={free_port()}",
            f"--temp-dir={own}",
        ]  # fmt: skip
        with running(command, log, environ() | token, folder) as head:
            while "Ray runtime started" not in log.read_text(errors="replace"):
                if head.poll() is not None or time.monotonic() - started > 60:
                    raise RuntimeError(f"no Ray could be started: {log.read_text(errors='replace')[-500:]}")
                time.sleep(0.2)
            yield token | {"RAY_ADDRESS": f"127.0.0.1:{port}"}


def judged(name: str, job: Job, done: Done, folder: Path, report: Report) -> dict[str, Any]:
    """Report what is wrong with a job and note its target; return its row of the table."""
    trials, metrics = done.report.get("trials", {}), done.report.get("metrics", {})
    accuracy, restored = metrics.get("test/accuracy"), done.report.get("stages", {}).get("restored")
    unfinished = {kind: count for kind, count in trials.items() if kind != "finished" and count}
    if done.code is None:
        report.fail(f"{name}: did not end within {LIMIT_SECONDS:.0f} s")
    elif done.code:
        line = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        report.fail(f"{name}: exit code {done.code} ({line[:300]})")
    elif not done.report:
        report.fail(f"{name}: its last line is no JSON")
    if unfinished:
        report.fail(f"{name}: trials {', '.join(f'{kind}: {count}' for kind, count in unfinished.items())}")
    if done.code == 0 and restored:
        report.fail(f"{name}: {restored} stages were restored, so its seconds say nothing")
    if report.judged and job.accuracy and accuracy is not None and not accuracy >= job.accuracy:
        report.fail(f"{name}: accuracy {accuracy:.4f} on the test rows, less than {job.accuracy:g}")
    if done.code == 0:
        report.target(f"{name}: s", done.seconds, job.seconds)
    else:
        print(done.stderr[-3000:], file=sys.stderr, flush=True)
    row = {
        "job": name, "exit code": done.code, "s": done.seconds, "target, s": job.seconds,
        "s of training": trained(folder, done), "worker processes": done.workers, "accuracy": accuracy,
        "trials finished": trials.get("finished"), "trials failed": trials.get("failed"),
    }  # fmt: skip
    print(", ".join(f"{column} {value}" for column, value in row.items() if value is not None), flush=True)
    return row


def trained(folder: Path, done: Done) -> float | None:
    """Return the seconds of training of all stages that began with the job, from its store; None without a store."""
    connect: Any = importlib.import_module("pipelines.store.connection").connect
    tracker = connect(f"sqlite:///{folder}/mlflow.db", "diabolo", create=False)
    if tracker is None:
        return None
    own = [run for run in tracker.search() if run.info.start_time >= 1000 * (done.began_at - 1)]
    return sum(run.data.metrics.get("train_seconds", 0.0) for run in own if "stage.fn" in run.data.tags)
