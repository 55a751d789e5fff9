"""python -m tests.chaos --runs N [--seed S] [--only worker,node,driver,server] | --study | --drivers

Kills with SIGKILL, at moments drawn by a seed and spread over the whole job, then the same command until it is done:
what is left must be what an undisturbed job leaves, and nothing else.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import psutil

from pipelines.store.connection import connect
from pipelines.store.labels import ORIGIN
from pipelines.store.lease import existing_leases
from pipelines.store.runs import Tracker
from tests.nodes import Nodes, free_port, mlflow_server, ray_nodes

ROOT = Path(__file__).parents[1]
KINDS = ("worker", "node", "driver", "server")
STAGES = ("layer 1", "layer 2", "finetune", "control", "evaluate", "evaluate control")
TRAINED = STAGES[:4]
KINDS_OF_STAGES = {"layer": STAGES[:2], "finetune": STAGES[2:4], "evaluate": STAGES[4:]}
"""The stages of each kind; Ray's workers are called by the kinds of their stages."""
DENOISING = ["--variant.kind", "denoising"]
_START_SECONDS, _STAGE_SECONDS, _COMMIT_SECONDS = 18.0, 2.5, 1.5
"""Latest moments of a kill: after the job's start, a stage's first epoch, and a stage's end."""
_JOB_SECONDS, _ORPHAN_SECONDS, _AGENT_SECONDS = 240.0, 20.0, 90.0
"""How long a job, and who was below it, may live; Ray's agents look for its head for a minute after it has died."""
_MOST_ATTEMPTS = 6


def recipe(root: str | None) -> list[str]:
    """A job of six stages of which each trained one has many epochs, on part of real MNIST or on digits."""
    # on digits such a wide layer needs a task
    data = ["--data.name", "mnist", "--data.root", root, "--data.limit", "3000"] if root else DENOISING
    epochs = "16" if root else "60"
    return [
        *data, "--network.widths", "[256,32]", "--pretrain.epochs", epochs, "--finetune.epochs", epochs,
        "--resources.cpus", "1", "--resources.checkpoint_every", "0.05", "--resources.mlflow_patience", "150",
    ]  # fmt: skip


class Moment(NamedTuple):
    """So many seconds after a mark on the job's stderr."""

    mark: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.mark or 'start'} + {self.seconds:.2f} s"


def draw(rng: random.Random) -> Moment:
    """A moment: during start-up, within a stage, or while a stage is kept."""
    mark = rng.choice(["", "", *(f"{s}: epoch" for s in TRAINED), *(f"{s}: done" for s in (*TRAINED, "evaluate"))])
    most = _COMMIT_SECONDS if "done" in mark else _STAGE_SECONDS if mark else _START_SECONDS
    return Moment(mark, rng.uniform(0, most))


class World:
    """Where jobs run: a cluster of two nodes and an MLflow server, started when a job first needs them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.port = free_port()
        self.server: ExitStack | None = None
        self.nodes: Nodes | None = None
        self.agents: set[psutil.Process] = set()
        # Ray's sockets have short names
        self.ray = stack.enter_context(tempfile.TemporaryDirectory(prefix="dc", dir="/tmp", ignore_cleanup_errors=True))

    def serve(self) -> str:
        """An MLflow server, the same again after a kill."""
        if self.server is None:
            own = self.folder / "server" / "tmp"
            own.mkdir(parents=True, exist_ok=True)
            self.server = self.stack.enter_context(ExitStack())
            with patch.dict(os.environ, {"TMPDIR": str(own)}):
                self.server.enter_context(mlflow_server(self.folder / "server", port=self.port))
        return f"http://127.0.0.1:{self.port}"

    def kill_server(self) -> None:
        assert self.server is not None
        self.server.close()
        self.server = None

    def cluster(self) -> Nodes:
        if self.nodes is None:
            with patch.dict(os.environ, {"TMPDIR": str(self.temporary)}):
                self.nodes = self.stack.enter_context(ray_nodes(self.folder / "ray", 1, 1))
                self.nodes.wait_for(2, 90)
        return self.nodes

    def env(self, folder: Path, embedded: bool) -> dict[str, str]:
        """Of a job in `folder`, with a store of its own: a SQLite file, or an experiment of the server."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "DIABOLO__"))}
        clean |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), "RAY_TMPDIR": self.ray, "GIT_COMMIT": "x"}
        if embedded:
            return {**clean, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        nodes = self.cluster()
        names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_UV_RUN_RUNTIME_ENV")
        return {
            **clean, **{name: nodes.env[name] for name in names}, "RAY_ADDRESS": nodes.gcs,
            "MLFLOW_TRACKING_URI": self.serve(), "MLFLOW_EXPERIMENT_NAME": folder.name,
        }  # fmt: skip


class Job:
    """A command, started as often as it takes, and all processes that were ever below it."""

    def __init__(self, module: str, args: list[str], folder: Path, env: dict[str, str]) -> None:
        self.command, self.folder, self.env = [sys.executable, "-m", module, *args], folder, env
        self.attempts = 0
        self.family: set[psutil.Process] = set()
        self.process: subprocess.Popen | None = None

    @property
    def text(self) -> str:
        """What this attempt has said on stderr."""
        return (self.folder / f"{self.attempts}.err").read_text(errors="replace")

    def start(self) -> None:
        self.attempts += 1
        with (self.folder / f"{self.attempts}.err").open("w") as err, (self.folder / "out").open("w") as out:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=self.env, stdout=out, stderr=err, stdin=subprocess.DEVNULL
            )
        self.began = time.monotonic()

    def ended(self) -> bool:
        """Whether this attempt is over; notes who lives below it."""
        assert self.process is not None
        self.family |= descendants(self.process.pid)
        return self.process.poll() is not None

    def until(self, moment: Moment) -> bool:
        """Wait for a moment; false where the job ended before."""
        while moment.mark not in self.text:
            if self.ended():
                return False
            self.in_time()
            time.sleep(0.02)
        deadline = (time.monotonic() if moment.mark else self.began) + moment.seconds
        while time.monotonic() < deadline:
            if self.ended():
                return False
            time.sleep(0.02)
        return True

    def goes_on(self, lost: str = "", said: int = 0) -> float:
        """Seconds until the next epoch or end of a stage, of one that `lost` names if it names any, past so many
        characters of stderr; or until the job's end."""
        kinds = lost.removeprefix("raylet with ").replace("ray::", "").split(", ")
        names = [name for kind, stages in KINDS_OF_STAGES.items() if kind in kinds for name in stages]
        again = "|".join(rf"{name}: attempt [\s\S]*\b{name}: (epoch \d|done after)" for name in names)
        began = time.monotonic()
        while not re.search(again or r": (epoch \d|done after)", self.text[said:]) and not self.ended():
            self.in_time()
            time.sleep(0.05)
        return time.monotonic() - began

    def end(self) -> int:
        """Wait; the exit code."""
        while not self.ended():
            self.in_time()
            time.sleep(0.2)
        assert self.process is not None
        return self.process.returncode

    def in_time(self) -> None:
        if time.monotonic() - self.began > _JOB_SECONDS:
            assert self.process is not None
            self.process.kill()
            raise AssertionError(f"hangs: {self.text[-3000:]}")

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.folder / "out").read_text().splitlines()[-1])
        return report


def descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def title(process: psutil.Process) -> str:
    """What a process calls itself; Ray's workers are called by their task."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def is_worker(process: psutil.Process) -> bool:
    return re.match("ray::(?!.*Agent)", title(process)) is not None


def kill(kind: str, world: World, job: Job, rng: random.Random) -> str:
    """What was killed."""
    assert job.process is not None
    if kind == "driver":
        job.process.kill()
        return f"driver {job.process.pid}"
    if kind == "server":
        world.kill_server()
        time.sleep(rng.uniform(0, 3))
        world.serve()
        return "server"
    if kind == "trial":
        return end_one([p for p in descendants(job.process.pid) if is_worker(p) and "rain" in title(p)], rng)
    nodes = world.nodes if "RAY_ADDRESS" in job.env else None
    roots = [job.process, *(nodes.nodes if nodes else [])]
    if kind == "worker":
        workers: list[psutil.Process] = []
        while not workers and not job.ended():
            workers = [p for root in roots for p in descendants(root.pid) if is_worker(p)]
        at_work = [p for p in workers if title(p).removeprefix("ray::") in KINDS_OF_STAGES]
        return end_one(at_work or workers, rng)
    assert nodes is not None
    (second,) = nodes.nodes[1:]
    job.family |= descendants(second.pid)
    raylet = next(p for p in descendants(second.pid) if p.name() == "raylet")
    said = ", ".join(sorted(title(p) for p in descendants(second.pid) if is_worker(p)))
    raylet.kill()
    nodes.nodes.remove(second)
    with patch.dict(os.environ, {"TMPDIR": str(world.temporary)}):
        nodes.add(1)
    return f"raylet with {said or 'nobody'}"


def end_one(processes: list[psutil.Process], rng: random.Random) -> str:
    """Kill one of them; who it was, empty where there is none."""
    if not processes:
        return ""
    victim = rng.choice(sorted(processes, key=lambda p: p.pid))
    said = title(victim)
    victim.kill()
    return said


class Truth(NamedTuple):
    """What an undisturbed job leaves."""

    weights: dict[str, dict[str, np.ndarray]]
    """By stage."""
    metrics: dict[str, float]
    steps: dict[str, dict[str, list[int]]]
    """Of each stage's metrics, system metrics left out."""
    rest: dict[str, Any]
    """Of each stage: params, names of tags, artifacts."""


def stage_runs(tracker: Tracker) -> list[Any]:
    return list(tracker.client.search_runs([tracker.experiment_id], "tags.`stage.fn` LIKE '%'", max_results=1000))


def name_of(run: Any) -> str:
    """The name of a stage, or the kind of a job."""
    return str(run.data.tags.get("stage.name") or run.data.tags["job"])


def steps_of(tracker: Tracker, run: Any) -> dict[str, list[int]]:
    history = tracker.client.get_metric_history
    return {name: sorted(p.step for p in history(run.info.run_id, name)) for name in run.data.metrics}


def tracker_of(env: dict[str, str]) -> Tracker:
    found = connect(env["MLFLOW_TRACKING_URI"], env.get("MLFLOW_EXPERIMENT_NAME"))
    assert found is not None
    return found._replace(patience=60.0)


def truth_of(tracker: Tracker, report: dict[str, Any]) -> Truth:
    runs = {run.data.tags["stage.name"]: run for run in stage_runs(tracker)}
    return Truth(
        {name: dict(tracker.restore(run.info.run_id).weights) for name, run in runs.items()},
        report["metrics"],
        {name: without_system(steps_of(tracker, run)) for name, run in runs.items()},
        {name: rest_of(tracker, run) for name, run in runs.items()},
    )


def rest_of(tracker: Tracker, run: Any) -> Any:
    def below(path: str | None) -> Iterator[str]:
        for item in tracker.client.list_artifacts(run.info.run_id, path):
            yield from below(item.path) if item.is_dir else [item.path]

    tags = set(run.data.tags) - {"ray.node_id", *ORIGIN}  # who started the job, from which commit
    return run.data.params, sorted(tags), sorted(below(None))


def without_system(steps: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: found for name, found in steps.items() if not name.startswith("system/")}


def faults(tracker: Tracker, report: dict[str, Any], truth: Truth) -> list[str]:
    """How a job's store differs from what an undisturbed one leaves."""
    found = []
    everything = list(tracker.client.search_runs([tracker.experiment_id], max_results=1000))
    keys = Counter(run.data.tags["stage.key"] for run in everything)
    found += [f"{count} runs of key {key[:12]}" for key, count in keys.items() if count != 1]
    names = Counter(name_of(run) for run in everything)
    if names != Counter([*truth.weights, report["job"]]):
        found.append(f"runs {dict(names)}")
    for top in (run for run in everything if "job" in run.data.tags):
        found += (
            []
            if top.data.params and top.inputs and top.inputs.dataset_inputs
            else ["the job's run has no params or data"]
        )
    for run in everything:
        name, steps = name_of(run), steps_of(tracker, run)
        if run.info.status != "FINISHED":
            found.append(f"{name} is {run.info.status}")
        twice = [metric for metric, them in steps.items() if len(them) != len(set(them))]
        found += [f"{name}: {metric} at steps {steps[metric]}" for metric in twice]
        if name in truth.steps and not twice and without_system(steps) != truth.steps[name]:
            found.append(f"{name}: other points than undisturbed")
    for run in stage_runs(tracker):
        name = run.data.tags["stage.name"]
        weights = tracker.restore(run.info.run_id).weights
        wanted = truth.weights.get(name, {})
        if set(weights) != set(wanted) or not all(np.array_equal(weights[w], wanted[w]) for w in wanted):
            found.append(f"{name}: other weights")
        if rest_of(tracker, run) != truth.rest.get(name):
            found.append(f"{name}: other params, tags or artifacts {rest_of(tracker, run)}")
    if report["metrics"] != truth.metrics:
        found.append(f"metrics {report['metrics']}")
    models = tracker.client.search_logged_models([tracker.experiment_id])
    tuned = {run.info.run_id for run in everything if name_of(run) in ("finetune", "control")}
    if sorted((m.source_run_id, str(m.status)) for m in models) != sorted((run_id, "READY") for run_id in tuned):
        found.append(f"models {[(m.source_run_id, str(m.status)) for m in models]}")
    return found + [f"lease {name}" for name in existing_leases(tracker)]


def orphans(processes: set[psutil.Process], seconds: float) -> list[str]:
    """Which of them live still."""
    _, alive = psutil.wait_procs(list(processes), timeout=seconds)
    return [f"orphan {p.pid} {title(p)[:60]}" for p in alive if p.is_running() and p.status() != "zombie"]


def left_over(world: World, job: Job, *places: Path) -> list[str]:
    """Processes and files that nobody needs any more."""
    world.agents |= {p for p in job.family if not is_worker(p)}
    found = orphans({p for p in job.family if is_worker(p)}, _ORPHAN_SECONDS)
    # sockets of Ray's own agents, where their node is killed, and torch's cache
    theirs = ("pymp-", "ray", "torchinductor_")
    return found + [f"left {p}" for place in places for p in sorted(place.glob("*")) if not p.name.startswith(theirs)]


class Run(NamedTuple):
    """How one run went."""

    number: int
    kind: str
    moment: str
    killed: str
    """What was killed, empty where the job was done before."""
    attempts: int
    faults: list[str]
    resume: float | None
    """Seconds until work went on: after the start of the next attempt, or, if that was not needed, after the kill."""
    seconds: float

    def __str__(self) -> str:
        verdict = "ok" if not self.faults else "FAULTS " + "; ".join(self.faults)
        resume = "-" if self.resume is None else f"{self.resume:.1f} s"
        return (
            f"run {self.number:3}  {self.kind:6}  {self.moment:30}  {self.killed or 'done before':28}  attempts "
            f"{self.attempts}  resume {resume:7}  {self.seconds:5.1f} s  {verdict}"
        )


def job_of(world: World, name: str, embedded: bool) -> Job:
    """A job in a folder of its own."""
    folder = world.folder / name
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    args = [*recipe(os.environ.get("DIABOLO_DATA")), "--resources.storage_path", str(folder / "storage")]
    return Job("jobs.train", args, folder, world.env(folder, embedded))


def undisturbed(world: World, embedded: bool) -> Truth:
    """The truth, from a job that nobody kills; from an earlier one where the folder has it."""
    job = job_of(world, "undisturbed", embedded)
    if not (job.folder / "out").exists():
        job.start()
        assert job.end() == 0, job.text
    truth = truth_of(tracker_of(job.env), job.report())
    assert set(truth.weights) == set(STAGES)
    wrong = faults(tracker_of(job.env), job.report(), truth) + left_over(world, job, job.folder / "tmp")
    assert not wrong, wrong
    return truth


def disturbed(world: World, number: int, seed: int, kind: str, truth: Truth) -> Run:
    """One job, killed once, and started again until it is done."""
    rng = random.Random(f"{seed} {number}")
    moment, began = draw(rng), time.monotonic()
    embedded = kind == "driver" and (rng.random() < 0.5 or world.nodes is None)
    job = job_of(world, f"{seed}-{number}-{kind}", embedded)
    job.start()
    in_time = job.until(moment)
    said = len(job.text)
    killed = kill(kind, world, job, rng) if in_time else ""
    resume = job.goes_on(killed, said) if killed and kind != "driver" else None
    while job.end() and job.attempts < _MOST_ATTEMPTS:
        job.start()
        resume = job.goes_on()
    wrong = []
    if job.process is None or job.process.returncode:
        wrong.append(f"exit code {job.process and job.process.returncode}: {job.text[-500:]}")
    else:
        wrong += faults(tracker_of(job.env), job.report(), truth)
    storage = job.folder / "storage"
    wrong += left_over(world, job, job.folder / "tmp", storage, world.temporary)
    wrong += [f"left {path}" for path in job.folder.glob("mlflow.db?*")]
    if kind == "node":
        world.cluster().wait_for(2, 90)
    how = f"{moment}{' embedded' if embedded else ''}"
    return Run(number, kind, how, killed, job.attempts, wrong, resume, time.monotonic() - began)


STUDY = {
    "name": "Killed",
    "base": {"network": {"widths": [32, 8]}, "pretrain": None, "finetune": {"task": "reconstruct"}},
    "variants": {
        "stacked": {"pretrain": {}}, "plain": {}, "denoising": {"variant": {"kind": "denoising", "level": 0.2}},
    },
    "seeds": [0, 1],
    "budget": {"epochs": 60},
    "labels": {"counts": [100], "fit": {"epochs": 3}},
}  # fmt: skip
_DURATIONS = ["run_id", "seconds"]


def study_of(world: World, name: str) -> Job:
    """A study of six trials, in a folder of its own, on an embedded Ray."""
    folder = world.folder / name
    (folder / "tmp").mkdir(parents=True)
    (folder / "study.yaml").write_text(json.dumps(STUDY))  # which is YAML
    args = ["study.yaml", "--figures", "report", "--resources.checkpoint_every", "0.05"]
    return Job("jobs.compare", args, folder, world.env(folder, embedded=True))


def table(job: Job) -> pd.DataFrame:
    """A study's numbers, without how long they took and where they are."""
    frame = pd.read_csv(job.folder / "report" / "results.csv")
    return frame.drop(columns=[name for name in frame.columns if name in _DURATIONS])


def killed_study(world: World, seed: int, kinds: Sequence[str]) -> list[str]:
    """A study whose driver or trials are killed so often, and started until it is done, against an undisturbed one."""
    rng, told = random.Random(f"study {seed}"), []
    calm, job = study_of(world, "calm"), study_of(world, f"killed {seed}")
    calm.start()
    assert calm.end() == 0, calm.text
    job.start()
    seconds = time.monotonic() - calm.began
    for number, kind in enumerate(kinds):
        # while what trials share is computed, and then among the trials
        moment = Moment("seed=0: begins", rng.uniform(0, 6)) if number else Moment("", rng.uniform(0.2, 0.6) * seconds)
        if kind == "trial":
            moment = Moment("plain seed=0: begins", rng.uniform(2, 4))
        assert job.until(moment), f"the study ended before kill {number}"
        told.append(f"{moment}: {kill(kind, world, job, rng)}")
        if kind == "driver":
            assert job.end() != 0
            job.start()
    while job.end() and job.attempts < _MOST_ATTEMPTS:
        job.start()
    print("study  " + "; ".join(told) + f"; attempts {job.attempts}; undisturbed {seconds:.1f} s", flush=True)
    if job.process is None or job.process.returncode:
        return [f"exit code: {job.text[-2000:]}"]
    found = []
    both = [tracker_of(one.env) for one in (calm, job)]
    keys = [
        sorted((run.data.tags["stage.key"], run.info.status) for run in one.client.search_runs([one.experiment_id]))
        for one in both
    ]
    found += [] if keys[0] == keys[1] else [f"other runs than undisturbed: {len(keys[0])} and {len(keys[1])}"]
    found += [f"run of {key} is {status}" for key, status in keys[1] if status != "FINISHED"]
    found += [f"{count} runs of {key}" for key, count in Counter(key for key, _ in keys[1]).items() if count > 1]
    for run in both[1].client.search_runs([both[1].experiment_id]):
        name, steps = name_of(run), steps_of(both[1], run)
        found += [f"{name}: {m} at {them}" for m, them in steps.items() if len(them) != len(set(them))]
    if calm.report()["metrics"] != job.report()["metrics"]:
        found.append("other metrics")
    if not table(calm).equals(table(job)):
        found.append(f"other numbers: {table(calm).compare(table(job))}")
    places = [job.folder / "tmp", job.folder / "checkpoints"]
    return found + left_over(world, job, *places)


def two_drivers(world: World) -> list[str]:
    """Two drivers of one job, started at once, each with a Ray of its own and the same store."""
    one, two = (job_of(world, f"driver {n}", True) for n in (1, 2))
    for name in ("MLFLOW_TRACKING_URI",):
        two.env[name] = one.env[name]
    two.command[-1] = one.command[-1]  # the same storage
    one.start()
    two.start()
    codes = [job.end() for job in (one, two)]
    if codes != [0, 0]:
        return [f"exit codes {codes}: {one.text[-1500:]} {two.text[-1500:]}"]
    reports = [job.report() for job in (one, two)]
    print(f"drivers  stages {[r['stages'] for r in reports]}  seconds {[r['seconds'] for r in reports]}", flush=True)
    found = []
    for name in ("run_id", "experiment", "metrics"):
        if reports[0][name] != reports[1][name]:
            found.append(f"{name} differ: {reports[0][name]} {reports[1][name]}")
    computed = sorted(report["stages"]["computed"] for report in reports)
    if computed != [0, len(STAGES)]:
        found.append(f"stages computed {computed}")
    tracker = tracker_of(one.env)
    truth = truth_of(tracker, reports[0])
    found += faults(tracker, reports[1], truth)
    attempts = {run.data.tags["attempts"] for run in stage_runs(tracker)}
    found += [] if attempts == {"1"} else [f"attempts {attempts}"]
    return (
        found
        + left_over(world, one, one.folder / "tmp", two.folder / "tmp", one.folder / "storage")
        + left_over(world, two)
    )


@contextmanager
def world_in(folder: Path) -> Iterator[World]:
    """Ended with all that was started in it."""
    with ExitStack() as stack:
        yield World(folder, stack)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of kills, with commas")
    parser.add_argument("--study", action="store_true", help="kill the driver of a study twice instead")
    parser.add_argument("--drivers", action="store_true", help="start two drivers of one job instead")
    parser.add_argument("--folder", type=Path, help="where all is kept; a temporary one by default")
    settings = parser.parse_args()
    kinds = settings.only.split(",")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began, runs = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="chaos", ignore_cleanup_errors=True) as temporary:
        folder = settings.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with world_in(folder) as world:
            if settings.study or settings.drivers:
                kills = ("driver", "driver")
                wrong = killed_study(world, settings.seed, kills) if settings.study else two_drivers(world)
                seconds = round(time.monotonic() - began, 1)
                print(json.dumps({"study" if settings.study else "drivers": wrong or "ok", "seconds": seconds}))
                return int(bool(wrong))
            truth = undisturbed(world, embedded=set(kinds) == {"driver"})
            print(f"undisturbed  {time.monotonic() - began:.1f} s", flush=True)
            for number in range(settings.runs):
                kind = kinds[(number + settings.seed) % len(kinds)]
                try:
                    runs.append(disturbed(world, number, settings.seed, kind, truth))
                except AssertionError as error:  # it hangs; the next ones say whether others do
                    runs.append(Run(number, kind, "", "", 1, [str(error)], None, _JOB_SECONDS))
                print(runs[-1], flush=True)
            left = orphans(world.agents, _AGENT_SECONDS)
    good = sum(not run.faults for run in runs)
    resumes = sorted(run.resume for run in runs if run.killed and run.resume is not None)
    print(
        json.dumps({
            "runs": len(runs), "killed": sum(bool(run.killed) for run in runs), "good": good,
            "kinds": dict(Counter(run.kind for run in runs)), "resume_median": resumes and resumes[len(resumes) // 2],
            "resume_most": resumes and resumes[-1], "orphans": left, "seconds": round(time.monotonic() - began, 1),
        })
    )  # fmt: skip
    return int(good < len(runs) or bool(left))


if __name__ == "__main__":
    sys.exit(main())
