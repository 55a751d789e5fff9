"""python -m tests.benchmarks --root FOLDER [--only training jobs study growth] [--quick]

All that is promised about speed, one benchmark after the other, each a table and the last line JSON. FOLDER holds
MNIST/raw. A quiet machine and an hour; --quick, some minutes, shows only that they run. Each also runs alone, with
further options: `python -m tests.benchmarks.jobs --help`, and so on.
"""

import argparse
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks import growth, jobs, study
from tests.benchmarks.tables import last


def trained(root: Path, quick: bool) -> list[dict[str, Any]]:
    training: Any = importlib.import_module("tests.benchmarks.training")  # torch, which the others start without
    training.torch.set_num_threads(os.cpu_count() or 1)
    found = (
        training.measure(root, 1, [64], ["dense"], 6_400, memory=False)
        if quick
        else training.measure(root, 5, [64, 256, 1024])
    )
    print(training.table(found), flush=True)
    return found


BENCHMARKS: dict[str, Callable[[Path, bool], Any]] = {
    "training": trained,
    "jobs": lambda root, quick: jobs.measure(root, 1, ["digits"]) if quick else jobs.measure(root, 5),
    "study": lambda root, quick: study.measure(root, 2 if quick else 16),
    "growth": lambda root, quick: growth.measure(root, quick=quick),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="fewer and smaller, to see that they run")
    args = parser.parse_args()
    last({name: BENCHMARKS[name](args.root.resolve(), args.quick) for name in args.only})
    os._exit(0)  # threads of Ray


if __name__ == "__main__":
    main()
