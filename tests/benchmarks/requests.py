"""python -m tests.benchmarks.requests [--postgres URI] [--quick]

What a trial of a study costs MLflow: its requests, its seconds when nobody else asks, and how many trials a second a
store takes from many workers at once, which is when the store is the bottleneck. The stores are a SQLite file, a server
on SQLite, and a server on PostgreSQL where `--postgres` names an empty database, as in `uv run --with psycopg2-binary
python -m tests.benchmarks.requests --postgres postgresql+psycopg2://USER:PASSWORD@HOST/DATABASE`.

The trials are made up, but as large as those of the default study; only what goes to MLflow is done, by threads of this
process, so that the server and the threads share the cores of this machine.
"""

import argparse
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import requests
from mlflow import MlflowClient

from aecore.config.experiment import Fit
from aecore.models.storage import Result
from pipelines.graph.stage import Stage
from pipelines.store.client import Store
from pipelines.store.connection import connect
from pipelines.store.record import EPOCH
from pipelines.store.runs import Tracker
from tests.benchmarks.tables import last, show
from tests.nodes import mlflow_server

EPOCHS, METRICS, MEASURES, WEIGHTS, ROWS = 40, 8, 40, 20_000, 400
"""Epochs of a trial and metrics of each, measures, weights of its stack and classifiers, test rows."""
THREADS, SECONDS = (1, 4, 16), 20.0
_numbers = itertools.count(1)


def trial(tracker: Tracker, study: str) -> None:
    """What a made-up trial sends to MLflow and gets from there, where one process trains and measures it."""
    number = next(_numbers)
    inner = [Stage(f"inner {n}", "stages.finetune", Fit(epochs=number, batch_size=n + 1)) for n in range(3)]
    stage = Stage(f"trial {number}", "evaluation.measure", Fit(epochs=number), {"classifiers": tuple(inner)})
    assert not tracker.holders(inner[0].key)
    tags = {"row": "plain", "settings": "{}", "seed": str(number)}
    run = tracker.open_trial(stage, study, [one.key for one in inner], tags=tags)
    generator = np.random.default_rng(number)
    weights = {"w": generator.normal(size=WEIGHTS).astype(np.float32)}
    run.keep({one.key: Result({}, weights, {}) for one in inner})
    points = [
        (epoch, 1000 * epoch, {f"{EPOCH}{name}": 1 / epoch for name in range(METRICS)})
        for epoch in range(1, EPOCHS + 1)
    ]
    measures = {f"test/{name}": float(name) for name in range(MEASURES)}
    result = Result({"history": []}, {"sse": generator.normal(size=ROWS)}, measures)
    run.commit_trial(stage.key, result, points, {"epochs": EPOCHS}, {"cpu_seconds": 1.0})


@contextmanager
def counted(over_http: bool) -> Iterator[list[str]]:
    """Collect the requests over HTTP, or the calls of MLflow's client and of its files where there is no server."""
    calls: list[str] = []

    def spied(owner: Any, name: str) -> Any:
        method = getattr(owner, name)

        def call(self: Any, *args: Any, **options: Any) -> Any:
            calls.append(name)
            return method(self, *args, **options)

        return patch.object(owner, name, call)

    with ExitStack() as stack:
        names = ("create_run", "search_runs", "log_batch", "get_run", "update_run", "set_terminated", "set_tag")
        watched = [(requests.adapters.HTTPAdapter, "send")] if over_http else [(MlflowClient, name) for name in names]
        for one in watched if over_http else [*watched, (Store, "files_at")]:
            stack.enter_context(spied(*one))
        yield calls


def throughput(act: Callable[[], None], threads: int, seconds: float) -> float:
    """Calls a second from so many threads."""
    until, done = time.monotonic() + seconds, list[int]()

    def work() -> None:
        while time.monotonic() < until:
            act()
            done.append(1)

    began = time.monotonic()
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(done) / (time.monotonic() - began)


def measured(uri: str, quick: bool) -> dict[str, Any]:
    """The figures of one store."""
    made = connect(uri, "requests")
    assert made is not None
    lease, study = (made.client.create_run(made.experiment_id).info.run_id for _ in range(2))
    tracker = made._replace(leases=(lease,), patience=60.0)
    trial(tracker, study)  # the first connection
    with counted(uri.startswith("http")) as calls:
        trial(tracker, study)
    seconds = []
    for _ in range(5 if quick else 20):
        began = time.perf_counter()
        trial(tracker, study)
        seconds.append(time.perf_counter() - began)
    found: dict[str, Any] = {"requests a trial": len(calls), "ms a trial": 1000 * median(seconds)}
    for threads in THREADS[:2] if quick else THREADS:
        rate = throughput(lambda: trial(tracker, study), threads, 3.0 if quick else SECONDS)
        found[f"trials a second, {threads} at once"] = rate
    began = time.perf_counter()
    count = len(tracker.trials_of(study))
    return {**found, "trials": count, "ms to read all trials": 1000 * (time.perf_counter() - began)}


def measure(postgres: str | None = None, quick: bool = False) -> list[dict[str, Any]]:
    """Print the table; what stands in it."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="diabolo_requests") as temporary:
        folder = Path(temporary)
        rows.append({"store": "SQLite", **measured(f"sqlite:///{folder}/mlflow.db", quick)})
        print(rows[-1], flush=True)
        for name, backend in (("server on SQLite", None), ("server on PostgreSQL", postgres)):
            if backend or "PostgreSQL" not in name:
                with mlflow_server(folder / name.replace(" ", "_"), backend) as uri:
                    rows.append({"store": name, **measured(uri, quick)})
                print(rows[-1], flush=True)
    show("What a trial costs MLflow", rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postgres", help="address of an empty database")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter, to see that it runs")
    args = parser.parse_args()
    last({"requests": measure(args.postgres, args.quick)})
    os._exit(0)  # threads of MLflow


if __name__ == "__main__":
    main()
