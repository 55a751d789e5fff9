"""python -m tests.benchmarks.scale [--trials 250 1000] [--join-late] [--die-early] [--optuna] [-- --scheduler asha ...]

`jobs.compare` as its user starts it, on a fake cluster on this machine: a head without GPUs, eight nodes of four GPUs
that Ray only pretends to have, and an `mlflow server`. Stages compute nothing (see `tests.benchmarks.noop`); the whole
way through Ray, Tune and MLflow is real. Tables of seconds, memory, requests, queues, GPUs in use, and of where the
time goes. What follows `--` is passed on to `jobs.compare`.

The nodes share this machine's cores, so its seconds are those of 33 processes on them, not of a real cluster.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.benchmarks import noop
from tests.benchmarks.sampler import Processes
from tests.benchmarks.scale_tables import Run, print_tables, read, summary
from tests.benchmarks.searching import compare_searches, show_search
from tests.benchmarks.streaming import environ
from tests.benchmarks.tables import last, show
from tests.nodes import BIN, Nodes, end, mlflow_server, ray_nodes, running

ROOT, HOOK = Path(__file__).parents[2], Path(__file__).parent / "noop_hook"
NODES, GPUS, CPUS, HEAD_CPUS = 8, 4, 5, 2
"""Nodes with GPUs; GPUs and CPUs of each; CPUs of the head."""
WHOLE_GPU = ("--resources.gpus", "1")
"""Options that give each trial a whole GPU. By default eight trials with networks as small as these would share one,
and a node has too few CPUs for so many."""
SEEDS, EPOCHS = 3, 4
LATE_SECONDS, NODES_SECONDS = 60.0, 300.0
"""When nodes join late, and how long nodes may take to start."""
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stacked": {"pretrain": {}},
    "sparse": {"variant": {"kind": "sparse", "penalty": "l1", "weight": 0.1}},
    "topk": {"variant": {"kind": "sparse", "penalty": "topk", "k": 0.5}},
    "masking": {"variant": {"kind": "denoising", "noise": "masking", "level": 0.25}},
    "gaussian": {"variant": {"kind": "denoising", "noise": "gaussian", "level": 0.25}},
    "contractive": {"variant": {"kind": "contractive", "weight": 0.1}},
    "variational": {"variant": {"kind": "variational"}},
    "narrow": {"network": {"widths": [4]}},
    "wide": {"network": {"widths": [16]}},
}


@dataclass(frozen=True)
class Setup:
    """What a run is like."""

    trials: int
    seconds: float = 1.0
    """Seconds of a training."""
    nodes: int = NODES
    join_late: bool = False
    """Half of the nodes join after a minute."""
    die_early: bool = False
    """Two nodes are killed when half of the trials are measured."""
    search: str = "random"
    apart: bool = False
    """The networks of settings differ, so that only seeds are trained as one."""
    workers: int = 1
    """Processes of the MLflow server."""
    store: str | None = None
    """Where the MLflow server keeps its tables; SQLite by default."""
    more: tuple[str, ...] = ()
    """Further arguments of `jobs.compare`."""


def recipe(setup: Setup) -> dict[str, Any]:
    """The study: ten rows with as many settings and three seeds as give about so many trials."""
    space: dict[str, Any] = {
        "finetune.lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "finetune.weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
    }
    if setup.apart:
        space["network.widths"] = [[width] for width in range(8, 512)]
    each = SEEDS if setup.search != "optuna" else 1  # the others run with the best settings only
    return {
        "name": "Scale",
        "base": {
            "data": {"limit": 300}, "network": {"kind": "dense", "widths": [8]}, "pretrain": None,
            "finetune": {"task": "reconstruct", "batch_size": 32},
        },
        "variants": VARIANTS, "seeds": list(range(SEEDS)), "settings": space, "search": setup.search,
        "budget": {"epochs": EPOCHS, "settings": max(1, round(setup.trials / len(VARIANTS) / each))},
        "labels": {"counts": [], "fit": {"epochs": 1}},
    }  # fmt: skip


def record(study: dict[str, Any], folder: Path) -> None:
    """Keep a real result of each kind of stage of the study."""
    from aecore.config.specs import Numerics
    from aecore.data.dataset import inspect
    from pipelines.execution.compute import load_rows
    from pipelines.study.plan import plan_trials
    from pipelines.study.schema import Study

    small = study | {"settings": {}, "search": "grid", "seeds": [0, 1]}
    wanted = Study.model_validate(small)
    plans = plan_trials(wanted, inspect(wanted.base.data), Numerics())
    noop.record([plan.stage for plan in plans], load_rows, folder)


@contextmanager
def cluster(folder: Path, count: int, seconds: float) -> Iterator[Nodes]:
    """The head and so many nodes; what is started on them computes nothing."""
    own = {
        "PYTHONPATH": f"{HOOK}:{ROOT}", "NOOP_NOTES": str(folder / "notes.jsonl"),
        "NOOP_RESULTS": str(folder / "results"), "NOOP_SECONDS": f"{seconds:g}",
        "RAY_agent_register_timeout_ms": "120000",
        "RAY_memory_monitor_refresh_ms": "0",  # no worker is to be ended for the memory of other programs
    }  # fmt: skip
    with ray_nodes(folder / "ray", HEAD_CPUS, further=own, has_dashboard=False) as nodes:
        look = [sys.executable, "-m", "tests.benchmarks.sampler", nodes.gcs, str(folder / "samples.jsonl")]
        with running(look, folder / "sampler.log", nodes.env | {"PYTHONPATH": str(ROOT)}, folder):
            wait_for_nodes(folder, nodes, 1)
            for number in range(1, count + 1):  # one by one: Ray gives a node 30 s to start
                nodes.add(CPUS, gpus=GPUS)
                wait_for_nodes(folder, nodes, number + 1)
            yield nodes


def wait_for_nodes(folder: Path, nodes: Nodes, count: int) -> None:
    """Until the sampler sees so many nodes; the dashboard may not answer while nodes start."""
    deadline = time.monotonic() + NODES_SECONDS
    while nodes_up(folder) < count:
        if time.monotonic() > deadline or any(node.poll() is not None for node in nodes.nodes):
            raise SystemExit(f"{count} nodes did not start; see {folder}/ray")
        time.sleep(0.5)


def nodes_up(folder: Path) -> float:
    """The nodes that the sampler has seen last."""
    samples = read(folder / "samples.jsonl")
    return samples[-1]["nodes"] if samples else 0


@contextmanager
def server(folder: Path, store: str | None, workers: int) -> Iterator[str]:
    """The MLflow server, which notes its requests; its address."""
    own = {"PYTHONPATH": f"{HOOK}:{ROOT}", "NOOP_REQUESTS": str(folder / "requests.jsonl")}
    os.environ.update(own)
    with mlflow_server(folder / "mlflow", store, workers=workers) as uri:
        for name in own:
            del os.environ[name]
        yield uri


def run(setup: Setup, folder: Path) -> Run:
    """Start everything, run the study, and read what was noted."""
    folder.mkdir(parents=True)
    study = recipe(setup)
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    record(study, folder / "results")
    for name in ("notes", "requests", "samples"):
        (folder / f"{name}.jsonl").touch()
    with ExitStack() as stack:
        uri = stack.enter_context(server(folder, setup.store, setup.workers))
        before = {one.pid for one in psutil.Process().children()}
        count = setup.nodes // 2 if setup.join_late else setup.nodes
        nodes = stack.enter_context(cluster(folder, count, setup.seconds))
        env = {**environ(), **{k: v for k, v in nodes.env.items() if k.startswith("RAY_")}}
        env |= {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": nodes.gcs, "MLFLOW_TRACKING_URI": uri, "DIABOLO_FAKE_GPUS": "1"}
        began = time.time()
        with (folder / "stdout.txt").open("w") as out, (folder / "log.txt").open("w") as log:
            command = [sys.executable, "-m", "jobs.compare", str(folder / "study.yaml"), *WHOLE_GPU, *setup.more]
            driver = subprocess.Popen(command, cwd=folder, stdout=out, stderr=log, env=env)
        spy = [
            str(BIN / "py-spy"), "record", "--pid", str(driver.pid), "--rate", "20", "--idle", "--threads",
            "--nonblocking", "--format", "raw", "--output", str(folder / "stacks.txt"), "--duration", "unlimited",
        ]  # fmt: skip
        watched = subprocess.Popen(spy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ray = [node.pid for node in nodes.nodes]
        with Processes(driver.pid, min(before), ray) as processes:
            events = follow(setup, driver, nodes, ray, folder)
        ended = time.time()
        watched.wait(60)
        return Run.read(folder, uri, driver.returncode, (began, ended), processes, events)


def follow(
    setup: Setup, driver: subprocess.Popen, nodes: Nodes, ray: list[int], folder: Path
) -> list[tuple[float, str]]:  # fmt: skip
    """Wait for the driver, add and kill nodes meanwhile; what was done when."""
    began, events, dead = time.time(), list[tuple[float, str]](), 0
    while driver.poll() is None:
        time.sleep(0.5)
        missing = setup.nodes + 1 - len(nodes.nodes)
        is_up = nodes_up(folder) >= len(nodes.nodes) - dead  # the node before, since they start one by one
        if missing and is_up and time.time() - began > LATE_SECONDS:
            ray.append(nodes.add(CPUS, gpus=GPUS).pid)
            events.append((time.time(), "a node begins to join"))
        measured = (folder / "notes.jsonl").read_text().count('"kind": "measure"')
        if setup.die_early and not dead and measured >= setup.trials / 2:
            dead = 2
            for node in nodes.nodes[1 : 1 + dead]:
                end(node)
            events.append((time.time(), f"{dead} nodes are killed"))
    return events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", nargs="+", type=int, default=[1000], help="how many; each number is a run")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a training")
    parser.add_argument("--nodes", type=int, default=NODES, help=f"of {GPUS} GPUs each")
    parser.add_argument("--join-late", action="store_true", help="half of the nodes join after a minute")
    parser.add_argument("--die-early", action="store_true", help="two nodes are killed half-way")
    parser.add_argument("--apart", action="store_true", help="settings differ in their networks, not in numbers alone")
    parser.add_argument("--optuna", action="store_true", help="Optuna searches; also ten repetitions against random")
    parser.add_argument("--workers", type=int, default=1, help="processes of the MLflow server")
    parser.add_argument("--store", help="URI of the MLflow server's tables, such as postgresql://...; else SQLite")
    parser.add_argument("--keep", type=Path, help="folder for logs and notes, which are deleted otherwise")
    parser.add_argument("more", nargs="*", help="passed on to jobs.compare, after --")
    args = parser.parse_args()
    results: dict[str, Any] = {"runs": []}
    if args.optuna:
        results["search"] = compare_searches()
        show_search(results["search"])
    with tempfile.TemporaryDirectory(prefix="diabolo_scale", ignore_cleanup_errors=True) as temporary:
        for trials in args.trials:
            setup = Setup(
                trials, args.seconds, args.nodes, args.join_late, args.die_early,
                "optuna" if args.optuna else "random", args.apart, args.workers, args.store, tuple(args.more),
            )  # fmt: skip
            done = run(setup, (args.keep or Path(temporary)).absolute() / f"{trials}")
            print_tables(done)
            results["runs"].append(summary(done))
    if len(results["runs"]) > 1:
        show("All runs", results["runs"])
    last(results)


if __name__ == "__main__":
    main()
