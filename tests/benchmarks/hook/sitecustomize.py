"""Imported by each Python process that has this folder on its PYTHONPATH: notes what takes how long.

Appends a line of JSON for each import and call that is watched, when it ends, to the file that BENCHMARK_TIMELINE
names: kind, seconds since the epoch at its begin and end, process, whether in its main thread. `tests.benchmarks.
timeline` reads them. What is watched and is not there is left out.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys
import threading
import time
from typing import Any

IMPORTS = {
    "torch": "import", "sklearn.linear_model": "import", "sklearn.neighbors": "import", "matplotlib.pyplot": "import",
    "pandas": "import", "ray": "import ray", "ray.train": "import", "ray.train.torch": "import",
    "mlflow": "import mlflow", "pipelines.store.runs": "import mlflow", "aecore.stages.pretrain": "import",
    "aecore.stages.evaluate": "import", "torchvision": "import",
}  # fmt: skip
"""Modules whose import is timed, and as what."""
CALLS = {
    "ray": {"init": "ray", "shutdown": "ray"},
    "pipelines.cluster.connection": {"start_ray": "ray"},
    "pipelines.execution.compute": {"load_rows": "data"},
    "pipelines.store.connection": {"connect": "store", "_make_store": "store"},
    "mlflow.tracking.client": {"MlflowClient.*": "mlflow"},
    "pipelines.store.models": {"log_model": "mlflow"},
    "aecore.training.fit": {"fit": "fit"},
    "aecore.stages.pretrain": {"pretrain_layer": "stage"},
    "aecore.stages.finetune": {"finetune": "stage"},
    "aecore.stages.reference": {"reference": "stage"},
    "aecore.stages.evaluate": {"evaluate": "stage"},
    "aecore.stages.measure": {"measure": "stage"},
    "aecore.evaluation.figures.model": {"*": "figures"},
    "aecore.evaluation.probes": {"Probe.accuracy": "measure", "linear_probe": "measure", "nearest": "measure"},
    "aecore.evaluation.clusters": {"cluster_agreement": "measure"},
    "aecore.data.dataset": {"inspect": "data", "load": "data"},
    "aecore.core.fingerprint": {"fingerprint": "data"},
}
"""Functions and methods that are timed, and as what; a star is all that are public."""
LEAST = 0.001
"""Seconds; what is shorter is not noted."""


def note(kind: str, began: float) -> None:
    ended = time.time()
    if ended - began >= LEAST:
        main = threading.current_thread() is threading.main_thread()
        with open(os.environ["BENCHMARK_TIMELINE"], "a") as file:
            file.write(json.dumps([kind, began, ended, os.getpid(), main]) + "\n")


def timed(function: Any, kind: str) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.time()
        try:
            return function(*args, **kwargs)
        finally:
            note(kind, began)

    return call


def wrap(module: Any, wanted: dict[str, str]) -> None:
    for path, kind in wanted.items():
        owner = module
        *classes, last = path.split(".")
        for name in classes:
            owner = getattr(owner, name, None)
        for name in [name for name in vars(owner or object) if not name.startswith("_")] if last == "*" else [last]:
            function = vars(owner or object).get(name)
            own = getattr(function, "__module__", None) == module.__name__
            if isinstance(function, classmethod):
                setattr(owner, name, classmethod(timed(function.__func__, kind)))
            elif callable(function) and not isinstance(function, type) and (own or last != "*"):
                setattr(owner, name, timed(function, kind))


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self.left = {*IMPORTS, *CALLS}

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in self.left:
            return None
        self.left.discard(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def watched(module: Any) -> None:
            began = time.time()
            execute(module)
            if name in IMPORTS:
                note(IMPORTS[name], began)
            wrap(module, CALLS.get(name, {}))

        # of this one loader, in place: another in its stead would hide what else the import system asks a loader for
        vars(spec.loader)["exec_module"] = watched
        return spec


if os.environ.get("BENCHMARK_TIMELINE"):
    sys.meta_path.insert(0, Finder())
