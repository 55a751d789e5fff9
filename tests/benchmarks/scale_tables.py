"""What a run of `tests.benchmarks.scale` has noted, and the tables of it."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

from tests.benchmarks.sampler import Point, Processes
from tests.benchmarks.tables import show

STARTED = 30
"""The start is over when so many trials have begun."""
RATE = 20
"""Stacks of the driver a second."""
POINTS = 12
"""Rows of the table over time."""
OWN = re.compile(r"(?:^|[/(])((?:jobs|pipelines|aecore)/[\w/]+\.py)")
LIBRARIES = ("mlflow", "ray", "optuna", "matplotlib", "sklearn", "pandas", "pydantic")


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    code: int
    """Exit code of `jobs.compare`."""
    report: dict[str, Any]
    """The last line that the command has printed, a report in JSON."""
    began: float
    ended: float
    """Seconds since the epoch."""
    notes: list[dict[str, Any]]
    """Calls of stages' functions that returned."""
    requests: list[list[Any]]
    """Method, path, began, seconds and status of each request to MLflow."""
    samples: list[dict[str, float]]
    """The cluster twice a second."""
    points: list[Point]
    """The processes twice a second."""
    cpu: dict[str, float]
    """CPU seconds by part."""
    stacks: Counter[str]
    """How often each place of the driver's main thread was seen."""
    finished: Counter[str]
    """Finished MLflow runs by the keys of stages that they bear."""
    events: list[tuple[float, str]]
    """Lines that say when nodes were killed or began to join, in seconds since the command began."""

    @classmethod
    def read(
        cls, folder: Path, uri: str, code: int, when: tuple[float, float], processes: Processes,
        events: list[tuple[float, str]],
    ) -> Self:  # fmt: skip
        """What lies in a run's folder, and the finished runs of its server."""
        lines = (folder / "stdout.txt").read_text().splitlines()
        if code not in (0, 3) or not lines:
            raise SystemExit(f"jobs.compare ended with {code}\n{(folder / 'log.txt').read_text()[-3000:]}")
        stacks = folder / "stacks.txt"
        return cls(
            code=code, report=json.loads(lines[-1]), began=when[0], ended=when[1], notes=read(folder / "notes.jsonl"),
            requests=[one for one in read(folder / "requests.jsonl") if when[0] <= one[2] <= when[1]],
            samples=read(folder / "samples.jsonl"), points=processes.points, cpu=processes.cpu,
            stacks=places(stacks.read_text()) if stacks.exists() else Counter(), finished=finished_keys(uri),
            events=events,
        )  # fmt: skip

    @property
    def trials(self) -> int:
        """The trials that finished."""
        return int(self.report["trials"]["finished"])

    @property
    def training(self) -> list[dict[str, Any]]:
        """The notes of trainings, by their begin."""
        trainings = [note for note in self.notes if note["kind"] in ("pretrain_layer", "finetune")]
        return sorted(trainings, key=lambda note: note["began"])

    @property
    def steady(self) -> tuple[float, float]:
        """From when the first trials have begun to when the last training begins."""
        counts = accumulate(len(note["trials"]) for note in self.training)
        first = next((n for n, count in zip(self.training, counts, strict=True) if count >= STARTED), self.training[0])
        return first["began"], self.training[-1]["began"]

    def gpus(self, began: float, ended: float) -> dict[str, float]:
        """The mean share of the cluster's GPUs that trained, and that were reserved, between two moments."""
        seen = [sample for sample in self.samples if began <= sample["at"] <= ended and sample["gpus"]]
        if not seen or ended <= began:
            return {"training": 0.0, "reserved": 0.0}
        up = sum(sample["gpus"] for sample in seen) / len(seen)
        busy = sum(max(0.0, min(n["ended"], ended) - max(n["began"], began)) for n in self.training)
        reserved = sum(sample["used"] for sample in seen) / sum(sample["gpus"] for sample in seen)
        return {"training": busy / (ended - began) / up, "reserved": reserved}

    def at_once(self) -> int:
        """The most trials that were in training at once."""
        edges = [(n["began"], len(n["trials"])) for n in self.training]
        edges += [(n["ended"], -len(n["trials"])) for n in self.training]
        return max(accumulate(step for _, step in sorted(edges)), default=0)


def read(path: Path) -> list[Any]:
    """The lines of JSON in a file; of processes that were killed the last may be torn."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def finished_keys(uri: str) -> Counter[str]:
    """How many finished runs bear each stage's key."""
    from mlflow import MlflowClient

    client, found, token = MlflowClient(uri), Counter[str](), None
    experiments = [one.experiment_id for one in client.search_experiments()]
    while True:
        page = client.search_runs(experiments, "attributes.status = 'FINISHED'", max_results=1000, page_token=token)
        for run in page:
            found.update(name for name in run.data.tags if name.startswith("stage.key."))
        token = page.token
        if not token:
            return found


def places(stacks: str) -> Counter[str]:
    """How often py-spy has seen each place of the main thread: the innermost function of ours, and in whose library."""
    found: Counter[str] = Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        if "MainThread" in frames[0]:
            found[place(frames[1:])] += int(count)
    return found


def place(frames: Sequence[str]) -> str:
    """A stack's innermost function of ours, and the library that it has called."""
    ours = [number for number, frame in enumerate(frames) if OWN.search(frame)]
    if not ours:
        return "start and end of Python"
    inner = frames[ours[-1]]
    match = OWN.search(inner)
    assert match is not None
    below = frames[ours[-1] + 1 :]
    if any("importlib" in frame for frame in below):
        return f"imports ({match[1]})"
    library = next((name for name in LIBRARIES if any(f"{name}/" in frame for frame in below)), "")
    return f"{match[1]}: {inner.split(' (')[0]}" + (f", in {library}" if library else "")


def summary(run: Run) -> dict[str, Any]:
    """Return the figures that decide whether a run has met its targets, as one row of a table."""
    began, ended = run.steady
    gpus = run.gpus(began, ended)
    measured = Counter(trial for note in run.notes if note["kind"] == "measure" for trial in note["trials"])
    driver = [point.driver for point in run.points]
    return {
        "status": f"{run.report['status']}, {run.code}",
        "trials": run.trials,
        "failed": run.report["trials"]["failed"],
        "s": run.ended - run.began,
        "steady, s": ended - began,
        "GPUs training, %": 100 * gpus["training"],
        "GPUs reserved, %": 100 * gpus["reserved"],
        "most in training at once": run.at_once(),
        "driver, peak MB": max(driver) / 1e6,
        "machine, peak GB": max(point.machine for point in run.points) / 1e9,
        "requests a trial": len(run.requests) / max(run.trials, 1),
        "ms a request": 1000 * sum(one[3] for one in run.requests) / max(len(run.requests), 1),
        "most waiting tasks": int(max((sample["tasks"] for sample in run.samples), default=0)),
        "most waiting groups": int(max((sample["groups"] for sample in run.samples), default=0)),
        "measured twice": sum(count > 1 for count in measured.values()),
        "finished twice": sum(count > 1 for count in run.finished.values()),
    }


def print_tables(run: Run) -> None:
    """Everything about a run."""
    show("Summary", [{"": name, "value": value} for name, value in summary(run).items()])
    show("Over time", list(over_time(run)))
    for when, what in run.events:
        print(f"{when - run.began:.0f} s: {what}")
    wall = run.ended - run.began
    show("CPU seconds of the machine", [{"part": part, "s": s, "cores": s / wall} for part, s in run.cpu.items()])
    seen = run.stacks.most_common(15)
    show("The driver's main thread", [{"where": where, "s": count / RATE} for where, count in seen])
    show("Requests to MLflow", requests(run))


def over_time(run: Run) -> Iterator[dict[str, Any]]:
    """The run in equal parts of its time."""
    step = (run.ended - run.began) / POINTS
    for number in range(POINTS):
        began, ended = run.began + number * step, run.began + (number + 1) * step
        points = [point for point in run.points if began <= point.at <= ended]
        samples = [sample for sample in run.samples if began <= sample["at"] <= ended]
        gpus = run.gpus(began, ended)
        yield {
            "until, s": round(ended - run.began),
            "measured": sum(len(n["trials"]) for n in run.notes if n["kind"] == "measure" and n["ended"] <= ended),
            "least error": min((e for n in run.notes if n["ended"] <= ended for e in n["errors"] if e), default=""),
            "driver, MB": max((point.driver for point in points), default=0) / 1e6,
            "MLflow server, MB": max((point.server for point in points), default=0) / 1e6,
            "requests a s": sum(began <= one[2] < ended for one in run.requests) / step,
            "nodes": int(max((sample["nodes"] for sample in samples), default=0)),
            "GPUs training, %": 100 * gpus["training"],
            "GPUs reserved, %": 100 * gpus["reserved"],
            "waiting tasks": int(max((sample["tasks"] for sample in samples), default=0)),
            "waiting groups": int(max((sample["groups"] for sample in samples), default=0)),
        }


def requests(run: Run) -> list[dict[str, Any]]:
    """The requests by kind."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for method, path, _, seconds, _ in run.requests:
        short = re.sub(r"^/(api|ajax-api)/\d\.0/mlflow(-artifacts)?/", "", path)
        kinds[f"{method} {re.sub(r'artifacts/.*', 'artifacts/...', short)}"].append(seconds)
    rows = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    return [
        {
            "request": kind, "a trial": len(each) / max(run.trials, 1), "ms": 1000 * sum(each) / len(each),
            "s": sum(each),
        }
        for kind, each in rows
    ]  # fmt: skip
