"""A real cluster on this machine for tests: a Ray head with token authentication, further nodes, an MLflow server.

All in processes of their own on the loopback, with folders of their own, ended one by one.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def end(process: subprocess.Popen) -> None:
    """Kill a process with all below it."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=10)
    process.wait()


@contextmanager
def running(command: list[str], log: Path, env: dict[str, str], cwd: Path) -> Iterator[subprocess.Popen]:
    """A process in the background, ended with all below it."""
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=cwd, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        end(process)


def wait_for(url: str, log: Path, seconds: float = 180, headers: dict[str, str] | None = None) -> None:
    """Until a server answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise AssertionError(f"{url}: {error}\n{log.read_text()[-2000:]}") from error
            time.sleep(0.3)


@contextmanager
def mlflow_server(
    folder: Path, backend: str | None = None, port: int | None = None, workers: int = 1
) -> Iterator[str]:  # fmt: skip
    """An MLflow server of so many processes that keeps everything in `folder`, or its tables in `backend`; its
    address."""
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend or f"sqlite:///{folder}/server.db",
        "--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port),
        "--workers", f"{workers}",
    ]  # fmt: skip
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with running(command, folder / "server.log", env, folder):
        wait_for(f"http://127.0.0.1:{port}/health", folder / "server.log")
        yield f"http://127.0.0.1:{port}"


@dataclass
class Nodes:
    """A running cluster."""

    folder: Path
    gcs: str
    """HOST:PORT, for RAY_ADDRESS."""
    dashboard: str
    """http://HOST:PORT, for `ray job submit`."""
    token: str
    env: dict[str, str]
    """Of whoever talks to it."""
    stack: ExitStack = field(repr=False)
    nodes: list[subprocess.Popen] = field(default_factory=list)

    def add(self, cpus: int, *before: str, gpus: int = 0) -> subprocess.Popen:
        """One node more; its GPUs are only pretended. `before` is what the command line begins with."""
        own = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="dn", dir="/tmp", ignore_cleanup_errors=True))
        command = [
            *before, str(BIN / "ray"), "start", f"--address={self.gcs}", f"--num-cpus={cpus}", "--block",
            "--disable-usage-stats", "--object-store-memory=200000000", f"--temp-dir={own}",
            *([f"--num-gpus={gpus}"] if gpus else []),
        ]  # fmt: skip
        log = self.folder / f"node{len(self.nodes)}.log"
        self.nodes.append(self.stack.enter_context(running(command, log, self.env, self.folder)))
        return self.nodes[-1]

    def wait_for(self, count: int, seconds: float = 60) -> None:
        """Until so many nodes are up; none may have died meanwhile."""
        deadline = time.monotonic() + seconds
        while True:
            table = json.loads(self.ask("/api/v0/nodes"))["data"]["result"]["result"]
            if sum(row["state"] == "ALIVE" for row in table) >= count:
                return
            assert time.monotonic() < deadline and all(node.poll() is None for node in self.nodes), table
            time.sleep(0.5)

    def ask(self, path: str) -> bytes:
        """What the dashboard answers."""
        request = urllib.request.Request(self.dashboard + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())


@contextmanager
def ray_nodes(
    folder: Path, *cpus: int, further: Mapping[str, str] = {}, has_dashboard: bool = True
) -> Iterator[Nodes]:  # fmt: skip
    """A head and further nodes with so many CPUs each, and with further variables in their environment.

    Without its dashboard, a head starts in half the time, but takes no jobs and does not say which nodes are up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(32)
    (folder / "token").write_text(token)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "DIABOLO__"))}
    env = clean | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_worker_niceness": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # jobs find the interpreter and the packages of this one
        "PATH": f"{BIN}:{os.environ['PATH']}", **further,
    }  # fmt: skip
    gcs, dashboard = free_port(), free_port()
    with ExitStack() as stack:
        # Ray's sockets lie in it, whose names may have 107 characters; each node has its own, as on machines apart
        own = stack.enter_context(tempfile.TemporaryDirectory(prefix="dn", dir="/tmp", ignore_cleanup_errors=True))
        command = [
            str(BIN / "ray"), "start", "--head", f"--port={gcs}", f"--dashboard-port={dashboard}",
            f"--num-cpus={cpus[0]}", "--dashboard-host=127.0.0.1", "--block", "--disable-usage-stats",
            "--object-store-memory=200000000", f"--temp-dir={own}", f"--ray-client-server-port={free_port()}",
            f"--include-dashboard={has_dashboard}",
        ]  # fmt: skip
        head = stack.enter_context(running(command, folder / "head.log", env, folder))
        made = Nodes(folder, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", token, env, stack, [head])
        authorised = {"Authorization": f"Bearer {token}"}
        if has_dashboard:
            wait_for(f"{made.dashboard}/api/version", folder / "head.log", headers=authorised)
        for count in cpus[1:]:
            made.add(count)
        yield made
