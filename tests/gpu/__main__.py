"""python -m tests.gpu [--root FOLDER] [--only PART ...] [--cpu]

Shows what one CUDA GPU makes of Diabolo, in about four minutes. Are the steps of all variants captured as CUDA graphs,
are their fits trained as one, and are their losses right? How long do training and whole jobs take, and does memory
grow? FOLDER (or DIABOLO_DATA) holds MNIST/raw; without it, rows are random and MNIST's jobs are skipped. Only the jobs
need Ray and MLflow. The last line is JSON.

Exit codes: 0 no failure, whether or not targets of speed are met; 1 failures; 2 there is no GPU. With --cpu all of it
runs tiny on a CPU, which tests this command alone.
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from aecore.data.splits import Arrays
from aecore.training.memory import free_device_memory
from tests.benchmarks.tables import last
from tests.gpu import checks, jobs, memory, speed
from tests.gpu.report import Report
from tests.gpu.scale import CPU, GPU, Scale

PARTS = ("memory", "checks", "pipeline", "seeds", "steps", "jobs")
"""In their order. Memory comes first, in a process that has trained nothing yet, as a new worker has not."""
FILE = "MNIST/raw/train-images-idx3-ubyte"


def run(scale: Scale, root: Path | None, only: Sequence[str] = PARTS) -> Report:
    """Run parts and return their findings.

    Args:
        root: the folder that holds MNIST/raw, if there is one.
    """
    report = Report(judged=scale.device.type == "cuda")
    data = cache(partial(rows, scale, root))
    parts: dict[str, Callable[[], Any]] = {
        "memory": lambda: memory.check(scale, report),
        "checks": lambda: checks.check(scale, report),
        "pipeline": lambda: speed.measure_pipeline(data(), scale, report),
        "seeds": lambda: speed.measure_seeds(data(), scale, report),
        "steps": lambda: speed.measure_steps(data(), scale),
        "jobs": lambda: jobs.measure(scale, root, report),
    }
    for part in PARTS:
        if part in only:
            report.run(part, parts[part])
            free_device_memory()  # jobs are other processes on the same device
    return report


def rows(scale: Scale, root: Path | None) -> Arrays:
    """Return MNIST's rows, or random ones, as many as the scale wants."""
    if root is None:
        return speed.random_rows(scale.rows, scale.held)
    return speed.first(speed.mnist(root), scale.rows, scale.held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=os.environ.get("DIABOLO_DATA"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--cpu", action="store_true", help="tiny, without a GPU, to test this command")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        print("error: no CUDA GPU here; run this where there is one, or add --cpu", file=sys.stderr)
        raise SystemExit(2)
    scale, root = CPU if args.cpu else GPU, args.root and args.root.resolve()
    if root is None or not (root / FILE).is_file():
        why = f"{root} holds no {FILE}" if root else "neither --root nor DIABOLO_DATA names a folder"
        print(f"without MNIST, rows are random: {why}", flush=True)
        root = None
    machine = {
        "device": "CPU" if args.cpu else torch.cuda.get_device_name(), "torch": torch.__version__,
        "python": platform.python_version(), "cores": os.cpu_count(), "rows": "MNIST" if root else "random",
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    report = run(scale, root, args.only)
    code = report.close()
    last({**machine, **report.as_json()})
    raise SystemExit(code)


if __name__ == "__main__":
    main()
