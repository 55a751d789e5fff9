"""python -m tests.benchmarks.orchestration [--stages 100 300 1000]

What a stage costs that computes next to nothing (random weights of a layer of one unit): milliseconds each, and which
part of the driver they go to.
"""

import argparse
import cProfile
import os
import pstats
import tempfile
import time
from contextlib import chdir

from aecore.config.experiment import Dense, Experiment
from aecore.config.resolve import layer_specs, resolve
from aecore.config.specs import ReferenceSpec
from aecore.data.dataset import inspect
from pipelines.cluster.connection import start_ray
from pipelines.cluster.resources import Resources
from pipelines.execution.chain import compute
from pipelines.graph.recipe import load_stage
from pipelines.graph.stage import Stage
from pipelines.store.connection import connect

PARTS = {
    "submit": ("_submit",), "wait": ("wait",), "open run": ("open_run",), "commit": ("commit",), "look up": ("find",),
}  # fmt: skip


def stages(count: int) -> list[Stage]:
    """As many stages, that differ in their seed."""
    experiment = Experiment(network=Dense(widths=(1,)))
    facts = inspect(experiment.data)
    experiment = resolve(experiment, facts)
    layers = tuple(layer_specs(experiment.network, experiment.data, facts))
    data = load_stage(experiment, facts)
    return [
        Stage(f"nothing {n}", "stages.reference", ReferenceSpec(kind="random", layers=layers, seed=n), {"data": data})
        for n in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", type=int, default=[100, 300, 1000])
    counts = parser.parse_args().stages
    start_ray()
    print("stages   ms each  " + "".join(f"{name:>10}" for name in PARTS) + "   (ms each, in the driver)")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            tracker = connect(f"sqlite:///{folder}/mlflow.db")
            assert tracker is not None
            profile = cProfile.Profile()
            with tracker.job_run("nothing", str(count), {}, {}) as parent:
                compute(stages(1), tracker, parent, Resources(cpus=1), lambda line: None)
                wanted = stages(count + 1)[1:]
                began = time.perf_counter()
                profile.enable()
                compute(wanted, tracker, parent, Resources(cpus=1), lambda line: None)
                profile.disable()
                each = 1000 * (time.perf_counter() - began) / count
            spent = {name: 0.0 for name in PARTS}
            for (file, _, function), row in vars(pstats.Stats(profile))["stats"].items():
                for name, functions in PARTS.items():
                    if function in functions and ("pipelines" in file or "ray/_private/worker" in file):
                        spent[name] += 1000 * row[3] / count
            print(f"{count:6} {each:9.1f}  " + "".join(f"{spent[name]:10.1f}" for name in PARTS), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
