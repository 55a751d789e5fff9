"""python -m tests.benchmarks.growth --root FOLDER [--only rows width layers store study] [--quick]

What grows with what: the seconds of an epoch with rows, width and layers; the milliseconds of a look-up with the
finished runs of a SQLite store; what a study's trial costs beside its work with the number of trials. FOLDER holds
MNIST/raw.

The runs of the store are copies, made by SQL, of one real job of digits and one study, with keys of their own. A trial
of the study here is a stub: it opens its run and keeps a tiny result, on Tune like any other.
"""

import argparse
import io
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir, closing, redirect_stderr
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from aecore.config.experiment import Data, Dense, Experiment, Finetune, Fit
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs, resolve
from aecore.config.specs import Numerics
from aecore.data.dataset import inspect, load
from aecore.data.splits import Arrays, Split
from aecore.models.layers import Layer
from aecore.models.prepare import Prepare
from aecore.models.stack import Stack
from aecore.models.storage import Result
from pipelines.cluster.resources import Resources
from pipelines.execution.assignment import Assignment
from pipelines.execution.chain import compute
from pipelines.graph.recipe import Stacked, build
from pipelines.graph.stage import Stage
from pipelines.store.connection import connect
from pipelines.store.lease import Lease
from pipelines.store.record import marker, study_marker
from pipelines.store.runs import Tracker
from pipelines.study import trials as trials_module
from pipelines.study.agenda import Agenda
from pipelines.study.plan import TrialPlan, plan_trials
from pipelines.study.schema import Study
from pipelines.study.sets import StudySet
from pipelines.study.trials import TrialRunner
from pipelines.study.worker import SharedSet, choices
from tests.benchmarks.tables import last, show
from tests.fits import fit_model
from tests.here import run_here

ROWS, WIDTHS, LAYERS = 7_500, (64, 128, 256, 512, 1024, 2048), (1, 2, 4, 8, 16)
RUNS, TRIALS = (10, 100, 1_000, 10_000), (32, 125, 500)
BATCH = 64
MARK, STUDY = marker(""), study_marker("")
AFTER_MARK, AFTER_STUDY = (f"substr(key, {len(mark) + 1})" for mark in (MARK, STUDY))


def epoch(data: Arrays, facts: Facts, experiment: Experiment, repeats: int) -> float:
    """Median seconds of an epoch of `fit` on a whole stack."""
    torch.manual_seed(0)
    net = Stack([Layer(spec) for spec in layer_specs(experiment.network, experiment.data, facts)])
    prepare = Prepare(torch.tensor(data.shift), torch.tensor(data.scale))
    train, validation = (prepare(torch.tensor(x)) for x in (data.train.x, data.validation.x))

    def terms(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"reconstruction": torch.nn.functional.mse_loss(net.reconstruct(x), x)}

    spec = Fit(epochs=repeats, batch_size=BATCH)
    fitted = fit_model(net, terms, (train,), (validation,), spec)
    return median(found["seconds"] for found in fitted.history)


def training(root: Path, part: str, quick: bool) -> list[dict[str, Any]]:
    """Seconds of an epoch against rows, width or layers."""
    experiment = Experiment(data=Data(name="mnist", root=root, likelihood="gaussian"), network=Dense(widths=(256,)))
    facts = inspect(experiment.data)
    experiment = resolve(experiment, facts)
    arrays = load(experiment.data, facts)

    def measured(times: int, widths: Sequence[int]) -> float:
        x = np.resize(arrays.train.x, (times * ROWS, *arrays.train.x.shape[1:]))
        data = arrays._replace(train=Split(x, None), validation=Split(arrays.validation.x[:500], None))
        network = Dense(widths=tuple(widths), activation="relu")
        return epoch(data, facts, experiment.model_copy(update={"network": network}), 1 if quick else 3)

    measured(1, (256,))  # what is paid once
    found: list[dict[str, Any]] = []
    if part == "rows":
        for times in (1, 2, 4, 8, 16):
            seconds = measured(times, (256,))
            found.append({"rows": times * ROWS, "s an epoch": seconds, "us a row": 1e6 * seconds / (times * ROWS)})
    for width in WIDTHS if part == "width" else ():
        seconds = measured(2, (width,))
        weights = 2 * 784 * width
        found.append({"width": width, "s an epoch": seconds, "ns a row and 1,000 weights":
                      1e12 * seconds / (2 * ROWS * weights)})  # fmt: skip
    for count in LAYERS if part == "layers" else ():
        seconds = measured(2, [256] * count)
        found.append({"layers": count, "s an epoch": seconds, "us a row and layer": 1e6 * seconds / (2 * ROWS * count)})
    return found


def template(tracker: Tracker) -> tuple[Stacked, str]:
    """One finished job of digits in the store, and one study of eight trials of nothing; the study's run."""
    experiment = Experiment(network=Dense(widths=(4,)), pretrain=Fit(epochs=2), finetune=Finetune(epochs=2))
    facts = inspect(experiment.data)
    graph = build(experiment, facts, Numerics())
    with tracker.job_run("train", "template", {"data.digest": facts.digest}, experiment.model_dump(mode="json")) as top:
        tracker.log_data(top, "digits", facts)
        done: dict[str, Any] = {}
        for stage in graph.kept():
            run_here(stage, tracker, top, done)
    with tracker.job_run("compare", "study", {}, {}) as top:
        for number in range(8):
            tags = {"row": "plain", "settings": json.dumps({"finetune.lr": number}), "seed": "0"}
            one = Stage(f"trial {number}", "nothing", Fit(epochs=number + 1))
            run = tracker.open_trial(one, top, [], tags=tags)
            run.commit_trial(one.key, Result({}, {}, {"val/reconstruction_mse": 1.0 + number}), [], {}, {})
    return graph, top


def multiply(path: Path, count: int) -> None:
    """Let a store hold so many runs: copies of those that it holds, each with ids and keys of its own."""

    def other(column: str) -> str:
        return f"printf('%08x', n) || substr({column}, 9)"

    with closing(sqlite3.connect(path)) as store, store:
        (there,) = store.execute("SELECT count(*) FROM runs").fetchone()
        store.execute("CREATE TEMP TABLE numbers AS WITH RECURSIVE up(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM up "
                      f"WHERE n < {max(1, round(count / there) - 1)}) SELECT n FROM up")  # fmt: skip
        if count <= there:
            return
        for table in ("runs", "tags", "params", "latest_metrics", "metrics"):
            columns = [row[1] for row in store.execute(f"PRAGMA table_info({table})")]
            values = [other(name) if name == "run_uuid" else f'"{name}"' for name in columns]
            if table == "tags":
                place = columns.index("value")
                values[place] = (
                    "CASE WHEN key IN ('stage.key', 'mlflow.parentRunId') OR key LIKE 'run.%' "
                    f"THEN {other('value')} ELSE value END"
                )
                place = columns.index("key")
                values[place] = (
                    f"CASE WHEN key LIKE '{MARK}%' THEN '{MARK}' || {other(AFTER_MARK)} "
                    f"WHEN key LIKE '{STUDY}%' THEN '{STUDY}' || {other(AFTER_STUDY)} ELSE key END"
                )
            names = ", ".join(f'"{name}"' for name in columns)
            store.execute(f"INSERT INTO {table} ({names}) SELECT {', '.join(values)} FROM {table}, numbers")


def lookups(tracker: Tracker, graph: Stacked, top: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of each."""
    stages = graph.kept()
    known = tracker.find(stages[0].key)
    assert known

    def lease() -> None:
        one = Lease(tracker, "benchmark", "job")
        one.take()
        one.release()

    def again() -> None:
        with tracker.job_run("train", "template", {}, {}) as run:
            assert all(one.restored for one in compute(stages, tracker, run, Resources(), lambda line: None).values())

    asked: dict[str, Callable[[], Any]] = {
        "find": partial(tracker.find, stages[0].key),
        "find nothing": partial(tracker.find, "0" * 64),
        "metrics": partial(tracker.metrics, known),
        "open": partial(tracker.find_or_create, stages[0].key, {}),
        "trials": partial(tracker.trials_of, top),
        "close nested": partial(tracker.close_run, known, "FINISHED"),
        "close abandoned": tracker.close_abandoned,
        "lease": lease,
        f"restore a job of {len(stages)}": again,
    }
    assert len(tracker.trials_of(top)) == 8
    return {name: timed(call, repeats) for name, call in asked.items()}


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return 1000 * median(seconds)


def store(quick: bool, counts: Sequence[int] = RUNS) -> list[dict[str, Any]]:
    """Milliseconds of each look-up against the runs that a store holds."""
    found = []
    with tempfile.TemporaryDirectory(prefix="diabolo_growth") as temporary, chdir(temporary):
        first = Path(temporary) / "template.db"
        tracker = connect(f"sqlite:///{first}", "growth")
        assert tracker is not None
        graph, top = template(tracker)
        for count in counts:
            path = Path(temporary) / f"{count}.db"
            shutil.copyfile(first, path)
            multiply(path, count)
            here = tracker._replace(uri=f"sqlite:///{path}")
            with closing(sqlite3.connect(path)) as opened:
                (runs,) = opened.execute("SELECT count(*) FROM runs").fetchone()
            found.append({"runs": runs, **lookups(here, graph, top, 5 if quick else 20)})
    return found


def stub(config: dict[str, Any], *, sets: Mapping[str, SharedSet], assignment: Assignment) -> None:
    """The body of a trial that computes nothing."""
    import ray
    from ray import tune

    (choice,) = choices(config)
    one = ray.get(sets[""].planned).plan(*choice)
    run = Tracker(*assignment.store).open_trial(one.stage, assignment.parent, [], tags=one.tags())
    run.commit_trial(one.stage.key, Result({}, {}, {"val/reconstruction_mse": 0.0}), [], {}, {})
    tune.report({"epoch": 1, "score": 0.0, "chosen": 0.0, "ended": True})


def trials(quick: bool) -> list[dict[str, Any]]:
    """Milliseconds that a trial of nothing takes, by how many there are."""
    found: list[dict[str, Any]] = []
    body: Any = vars(trials_module)["compute_trial"]
    vars(trials_module)["compute_trial"] = stub
    try:
        # one folder for all: Ray's later workers start where it has started
        with tempfile.TemporaryDirectory(prefix="diabolo_growth") as folder, chdir(folder):
            for count in TRIALS[: 1 if quick else None]:
                tracker = connect(f"sqlite:///{folder}/{count}/mlflow.db", "growth")
                assert tracker is not None
                wanted = Study(
                    base=Experiment(pretrain=None, finetune=Finetune(task="reconstruct"), network=Dense(widths=(4,))),
                    seeds=tuple(range(count)),
                )
                facts = inspect(wanted.base.data)
                with tracker.job_run("compare", "growth", {}, {}) as top:
                    runner = TrialRunner(
                        wanted, [StudySet("", wanted, facts, Numerics())], tracker, top, Resources(cpus=1)
                    )
                    members = [m for m in plan_trials(wanted, facts, Numerics()) if m.row == "plain"]
                    if not found:
                        run_all(runner, members[:4])  # Ray and the first workers start
                        members = members[4:]
                    began = time.perf_counter()
                    errors = run_all(runner, members)
                    seconds = time.perf_counter() - began
                assert not errors and len(tracker.trials_of(top)) == count
                found.append({"trials": count, "s": seconds, "ms a trial": 1000 * seconds / len(members)})
                print(found[-1], flush=True)
    finally:
        vars(trials_module)["compute_trial"] = body
    return found


def run_all(runner: TrialRunner, plans: Sequence[TrialPlan]) -> dict[str, str]:
    """Run trials; return the errors of those that failed."""
    agenda = Agenda(retries=0)
    agenda.add(plans)
    runner.run(agenda)
    return agenda.endings.errors


PARTS: dict[str, tuple[str, Callable[[Path, bool], list[dict[str, Any]]]]] = {
    "rows": ("784-256-784, batches of 64", lambda root, quick: training(root, "rows", quick)),
    "width": ("One layer, 15,000 rows", lambda root, quick: training(root, "width", quick)),
    "layers": ("Layers of 256 end to end, 15,000 rows", lambda root, quick: training(root, "layers", quick)),
    "store": ("Look-ups, median ms, by runs in a SQLite store", lambda root, quick: store(quick)),
    "study": ("A study's trials of nothing on Tune", lambda root, quick: trials(quick)),
}


def measure(root: Path, only: Sequence[str] = tuple(PARTS), quick: bool = False) -> dict[str, list[dict[str, Any]]]:
    """Print the tables; what stands in them."""
    found = {}
    for part in only:
        title, act = PARTS[part]
        with redirect_stderr(io.StringIO()):  # the stages' progress
            found[part] = act(root, quick)
        show(title, found[part])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    last(measure(args.root.resolve(), args.only, args.quick))
    os._exit(0)  # threads of Ray


if __name__ == "__main__":
    main()
