"""Shared fixtures: tiny data, stores of their own, real MNIST where DIABOLO_DATA says that it lies."""

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from aecore.config.experiment import Experiment, Finetune, Fit
from aecore.config.facts import Facts
from aecore.data.dataset import inspect, load
from aecore.data.splits import Arrays, Split
from pipelines.store.connection import connect
from pipelines.store.runs import Tracker
from tests.nodes import ray_nodes

ROOT = Path(__file__).parents[1]

settings.register_profile(
    "suite", max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("long", settings.get_profile("suite"), max_examples=1500, derandomize=False)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("DIABOLO__", "MLFLOW_", "RAY_ADDRESS")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder that holds MNIST/raw."""
    root = os.environ.get("DIABOLO_DATA")
    if not root:
        pytest.skip("needs real MNIST, which tests never download; set DIABOLO_DATA to the folder of MNIST/raw")
    return Path(root).resolve()


@pytest.fixture(scope="session")
def digits() -> tuple[Facts, Arrays]:
    data = Experiment().data
    facts = inspect(data)
    return facts, load(data, facts)


@pytest.fixture(scope="session")
def vectors() -> Arrays:
    """Standard normal vectors on a plane of two dimensions, in eight."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(600, 2)) @ rng.normal(size=(2, 8)) + 0.1 * rng.normal(size=(600, 8))).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    one, zero = np.ones((), np.float32), np.zeros((), np.float32)
    return Arrays(Split(x[:400], y[:400]), Split(x[400:500], y[400:500]), Split(x[500:], y[500:]), zero, one)


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracker]:
    """A store of this module's own."""
    made = connect(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db", "test")
    assert made is not None
    yield made


@pytest.fixture
def quick() -> Experiment:
    """The digits experiment in a second."""
    return Experiment(pretrain=Fit(epochs=2), finetune=Finetune(epochs=2))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a Ray that this module's jobs share: each is spared the seconds that starting one takes."""
    with ray_nodes(tmp_path_factory.mktemp("ray"), os.cpu_count() or 1) as nodes:
        names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_UV_RUN_RUNTIME_ENV")
        yield {"RAY_ADDRESS": nodes.gcs, "PYTHONPATH": str(ROOT), **{name: nodes.env[name] for name in names}}


@pytest.fixture
def server() -> Iterator[Any]:
    """A server that answers every request with the status and body in `answer`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = made.answer
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        answer = (200, "")

    with Server(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()
