"""python -m tests.benchmarks.timeline jobs.train [ARGUMENT ...]

Runs a command and tells where its seconds went, driver and workers together. See `hook/sitecustomize.py`, which each of
its processes imports, for what is watched.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.benchmarks.streaming import environ, memory_of
from tests.benchmarks.tables import last, show

ROOT, HOOK = Path(__file__).parents[2], Path(__file__).parent / "hook"
PARTS = (
    "training", "imports of workers", "measures", "figures", "other work of stages", "start and end of Ray",
    "MLflow: import", "MLflow: store", "MLflow: calls", "data and hashes", "the rest",
)  # fmt: skip
"""Of what goes on at once, the first of these counts, so that they add up to the whole."""
OWN = ("training", "measures", "other work of stages")
"""Stages' own work; what is left is orchestration."""


class Note(NamedTuple):
    """An import or call that has ended."""

    kind: str
    began: float
    ended: float
    """Seconds since the epoch."""
    process: int
    main: bool
    """Whether it was in its process's main thread."""


class Done(NamedTuple):
    """A command that has ended."""

    report: dict[str, Any]
    """The last line of its stdout."""
    seconds: float
    """From its start to its end, as a user sees them."""
    parts: dict[str, float]
    """Seconds that went to each of `PARTS`."""
    memory: dict[str, float]
    """Peak PSS, GB, where it was asked for: of all processes `together`, and of the `largest`."""
    notes: list[Note]
    driver: int
    """Its process."""

    @property
    def orchestration(self) -> float:
        """Seconds."""
        return self.seconds - sum(self.parts[part] for part in OWN)


def run(command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None, watch: float = 0) -> Done:
    """Run `python -m COMMAND` in a folder.

    Args:
        env: further variables; a cluster's workers know the timeline only if its head was started with `watched`.
        watch: seconds between two looks at its memory, which cost a third of a second each; 0 looks never.
    """
    noted = watched(folder)
    Path(noted["BENCHMARK_TIMELINE"]).unlink(missing_ok=True)
    with (folder / "log.txt").open("w") as log:
        began = time.time()
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**environ(), **noted, **(env or {})},
        )  # fmt: skip
        memory = look(process, watch) if watch else {}
        assert process.stdout is not None
        told = process.stdout.read()
        process.wait()
        ended = time.time()
    if process.returncode:
        raise SystemExit((folder / "log.txt").read_text()[-3000:])
    notes = read(Path(noted["BENCHMARK_TIMELINE"]))
    parts = split(notes, process.pid, began, ended)
    return Done(json.loads(told.splitlines()[-1]), ended - began, parts, memory, notes, process.pid)


def watched(folder: Path) -> dict[str, str]:
    """The environment of processes that note what takes how long."""
    return {"PYTHONPATH": f"{HOOK}:{ROOT}", "BENCHMARK_TIMELINE": str(folder / "timeline.jsonl")}


def look(process: subprocess.Popen[str], pause: float) -> dict[str, float]:
    """The peak memory of a process and all below it, while it runs."""
    peak = largest = 0
    while process.poll() is None:
        with suppress(psutil.Error):
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            each = [memory_of(member)[1] for member in family]
            peak, largest = max(peak, sum(each)), max(largest, *each)
        time.sleep(pause)
    return {"together": peak / 1e9, "largest": largest / 1e9}


def read(path: Path) -> list[Note]:
    """What was noted."""
    return [Note(*json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def split(notes: Sequence[Note], driver: int, began: float, ended: float) -> dict[str, float]:
    """Seconds of each of `PARTS` between two moments."""
    edges = [(began, "the rest", 1), (ended, "the rest", -1)]
    for note in notes:
        if (part := part_of(note, driver)) and note.ended > began and note.began < ended:
            edges += [(max(note.began, began), part, 1), (min(note.ended, ended), part, -1)]
    found, on, before = dict.fromkeys(PARTS, 0.0), Counter[str](), began
    for when, part, step in sorted(edges):
        if now := next((name for name in PARTS if on[name] > 0), None):
            found[now] += when - before
        on[part] += step
        before = when
    return found


def part_of(note: Note, driver: int) -> str | None:
    """Which part a noted import or call belongs to, if any."""
    if note.kind.startswith("import") and note.process != driver:
        return "imports of workers"
    if note.kind in ("mlflow", "store") and note.process == driver and not note.main:
        return None  # nobody waits for it
    return {
        "fit": "training", "measure": "measures", "figures": "figures", "stage": "other work of stages",
        "ray": "start and end of Ray",
        "import ray": "start and end of Ray", "import mlflow": "MLflow: import", "store": "MLflow: store",
        "mlflow": "MLflow: calls", "data": "data and hashes", "import": None,
    }[note.kind]  # fmt: skip


def table(done: Mapping[str, Done]) -> list[dict[str, Any]]:
    """A row for each part, a column for each command."""
    rows: list[dict[str, Any]] = [{"seconds": p, **{name: d.parts[p] for name, d in done.items()}} for p in PARTS]
    sums: list[tuple[str, Callable[[Done], float]]] = [
        ("orchestration", lambda d: d.orchestration), ("whole job", lambda d: d.seconds),
    ]  # fmt: skip
    return rows + [{"seconds": name, **{n: of(d) for n, d in done.items()}} for name, of in sums]


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory(prefix="diabolo_timeline") as folder:
        done = run(sys.argv[1:], Path(folder), {k: v for k, v in os.environ.items() if k.startswith("RAY_")})
    show(" ".join(sys.argv[1:]), table({"s": done}))
    last({"seconds": done.seconds, "orchestration": done.orchestration, "parts": done.parts})


if __name__ == "__main__":
    main()
