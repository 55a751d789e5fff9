"""python -m tests.benchmarks.jobs --root FOLDER [--repeats 1] [--only mnist digits memory]

The whole MNIST job as a user starts it against the tutorial's whole script, one after the other: seconds, accuracy,
where the seconds go, and peak memory (PSS: what processes share counts once). Cold is with a Ray of its own and no
store, warm with a Ray that is up and a store that is there. And the job of the README's first line, cold. FOLDER holds
MNIST/raw.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.tables import last, show
from tests.benchmarks.timeline import ROOT, Done, run, table, watched
from tests.nodes import ray_nodes

RECIPE = ROOT / "jobs" / "recipes" / "mnist.yaml"
LOOK_SECONDS = 1.0


def mnist(root: Path, seed: int) -> list[str]:
    return ["jobs.train", str(RECIPE), "--data.root", str(root), "--control", "false", "--seed", str(seed)]


def tutorial(root: Path, seed: int) -> list[str]:
    return ["tests.benchmarks.tutorial", "--root", str(root), "--seed", str(seed)]


def cold(command: Sequence[str], folder: Path, watch: float = 0) -> Done:
    """In a folder of its own."""
    folder.mkdir()
    return run(command, folder, watch=watch)


def warm(command: Sequence[str], folder: Path) -> Done:
    """On a Ray that is up, with a store that another job has made."""
    folder.mkdir()
    os.environ.update(watched(folder))  # the workers', which the head starts
    with ray_nodes(folder / "ray", os.cpu_count() or 1) as nodes:
        env = {k: v for k, v in nodes.env.items() if k.startswith("RAY_")} | {"RAY_ADDRESS": nodes.gcs}
        small = "jobs.train --network.widths [4] --pretrain null --finetune.epochs 1 --control false"
        run(small.split(), folder, env)
        return run(command, folder, env)


def whole(root: Path, repeats: int, folder: Path) -> dict[str, list[Done]]:
    """The MNIST job, cold and warm, and the tutorial's script, in turn."""
    found: dict[str, list[Done]] = {"tutorial": [], "cold": [], "warm": []}
    for seed in range(repeats):
        found["tutorial"].append(cold(tutorial(root, seed), folder / f"tutorial{seed}", watch=2 * LOOK_SECONDS))
        found["cold"].append(cold(mnist(root, seed), folder / f"cold{seed}"))
        found["warm"].append(warm(mnist(root, seed), folder / f"warm{seed}"))
    return found


def accuracy(done: Done) -> float:
    return done.report["accuracy"] if "accuracy" in done.report else done.report["metrics"]["test/accuracy"]


def middle(runs: Sequence[Done]) -> Done:
    """The one of median seconds."""
    return sorted(runs, key=lambda done: done.seconds)[len(runs) // 2]


def measure(root: Path, repeats: int = 1, only: Sequence[str] = ("mnist", "digits", "memory")) -> dict[str, Any]:
    """Print the tables; what stands in them."""
    results: dict[str, Any] = {}
    split: dict[str, Done] = {}
    with tempfile.TemporaryDirectory(prefix="diabolo_jobs") as temporary:
        folder = Path(temporary)
        if "mnist" in only:
            found = whole(root, repeats, folder)
            pairs = {n: list(zip(found["tutorial"], runs, strict=True)) for n, runs in found.items()}
            results["mnist"] = [
                {
                    "MNIST job": name,
                    "s": median(done.seconds for done in runs),
                    "times quicker than the tutorial": median(t.seconds / done.seconds for t, done in pairs[name]),
                    "accuracy": median(accuracy(done) for done in runs),
                    "orchestration, s": middle(runs).orchestration if name != "tutorial" else "",
                }
                for name, runs in found.items()
            ]
            show(f"The whole MNIST job, medians of {repeats}", results["mnist"])
            split |= {f"mnist, {name}": middle(found[name]) for name in ("cold", "warm")}
            results["memory"] = [{"peak memory, GB": "tutorial", **middle(found["tutorial"]).memory}]
        if "digits" in only:
            runs = [cold(["jobs.train"], folder / f"digits{number}") for number in range(repeats)]
            results["digits"] = [{"README's first job, cold": "digits", "s": median(done.seconds for done in runs)}]
            show(f"Digits, median of {repeats}", results["digits"])
            split["digits, cold"] = middle(runs)
        if split:
            results["seconds"] = table(split)
            show("Where the seconds go", results["seconds"])
        if "memory" in only:
            done = cold(mnist(root, 0), folder / "memory", LOOK_SECONDS)
            results.setdefault("memory", []).append({"peak memory, GB": "MNIST job, cold", **done.memory})
            show("Memory", results["memory"])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=["mnist", "digits", "memory"])
    args = parser.parse_args()
    last(measure(args.root.resolve(), args.repeats, args.only))


if __name__ == "__main__":
    main()
