"""The instruments of `tests.benchmarks.scale`, without a cluster."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.noop import error
from tests.benchmarks.sampler import Point
from tests.benchmarks.scale import HOOK, ROOT, SEEDS, VARIANTS, Setup, recipe
from tests.benchmarks.scale_tables import Run, over_time, places, requests, summary

STAGES = """
import json
import sys

from aecore.config.specs import Numerics
from aecore.data.dataset import inspect
from aecore.stages.context import Context
from pipelines.execution.compute import inputs_of, load_rows
from pipelines.study.plan import plan_trials
from pipelines.study.schema import Study

study = Study.model_validate(json.loads(sys.argv[1]))
results = []


def result(stage):
    if not stage.inputs:
        return load_rows(stage.spec)
    return stage.function()(stage.spec, Context(), **inputs_of(stage, [result(parent) for parent in stage.parents()]))


for plan in plan_trials(study, inspect(study.base.data), Numerics())[:2]:
    found = result(plan.stage)
    results.append({"error": found.metrics["val/reconstruction_mse"], **found.config["noop"]})
print(json.dumps({"results": results, "torch": hasattr(sys.modules["torch"], "version")}))
"""


def small() -> dict[str, Any]:
    study = recipe(Setup(trials=SEEDS * len(VARIANTS)))
    return study | {"variants": {"plain": {}}}


def test_a_worker_returns_recorded_results_whose_error_is_the_trials_and_notes_each_call(tmp_path: Path) -> None:
    code = "import json, sys; from pathlib import Path; from tests.benchmarks import scale; "
    code += "scale.record(json.loads(sys.argv[1]), Path(sys.argv[2]))"
    study = json.dumps(small())
    subprocess.run([sys.executable, "-c", code, study, str(tmp_path / "results")], cwd=ROOT, check=True, timeout=200)
    env = {
        "PYTHONPATH": f"{HOOK}:{ROOT}", "NOOP_NOTES": str(tmp_path / "notes"), "NOOP_SECONDS": "0.01",
        "NOOP_RESULTS": str(tmp_path / "results"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", STAGES, study], env=env, capture_output=True, text=True, check=True, timeout=200
    )  # fmt: skip
    told = json.loads(done.stdout)
    first, second = told["results"]
    assert first["identity"] != second["identity"] and first["error"] != second["error"]
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert Counter(note["kind"] for note in notes) == {"finetune": 6, "measure": 2}  # here nothing is shared
    measured = [note["trials"][0] for note in notes if note["kind"] == "measure"]
    assert measured == [first["identity"][:16], second["identity"][:16]]


def test_the_error_is_least_at_its_best_and_the_same_again() -> None:
    assert error(3e-3, 1e-4, "plain", 0, noise=0) == pytest.approx(1)
    assert error(3e-2, 1e-4, "plain", 0, noise=0) == pytest.approx(2)
    assert error(1e-3, 1e-5, "sparse", 1) == error(1e-3, 1e-5, "sparse", 1) != error(1e-3, 1e-5, "sparse", 2)


def test_where_the_drivers_main_thread_was() -> None:
    stacks = [
        "thread (0x7F): MainThread;main (jobs/cli.py:9);find (pipelines/store/runs.py:1);get (mlflow/rest.py:2) 40",
        "thread (0x7F): MainThread;main (jobs/cli.py:9);find (pipelines/store/runs.py:7);get (mlflow/rest.py:2) 2",
        "thread (0x7E): Thread-1;beat (pipelines/store/lease.py:3) 70",
    ]
    assert places("\n".join(stacks)) == {"pipelines/store/runs.py: find, in mlflow": 42}


def call(kind: str, began: float, ended: float, *trials: str, task: str = "") -> dict[str, Any]:
    return {"kind": kind, "task": task, "began": began, "ended": ended, "process": 1, "trials": trials, "errors": []}


def test_what_a_run_comes_to() -> None:
    """Two GPUs of four train for all of the steady time; one trial is measured twice."""
    some = [f"{number}" for number in range(30)]
    run = Run(
        code=0, report={"status": "finished", "trials": {"finished": 4, "failed": 0}}, began=0.0, ended=20.0,
        notes=[
            call("finetune", 2.0, 12.0, *some), call("finetune", 2.0, 12.0, "a"), call("finetune", 12.0, 13.0, "b"),
            call("measure", 13.0, 14.0, "a"), call("measure", 14.0, 15.0, "a"), call("measure", 14.0, 15.0, "b"),
        ],
        requests=[["POST", "/api/2.0/mlflow/runs/create", 1.0, 0.25, 200]] * 8,
        samples=[
            {"at": at / 2, "nodes": 2, "gpus": 4, "used": 3, "tasks": at, "groups": 1} for at in range(40)
        ],
        points=[Point(at, 100_000_000 + at, 5, 7) for at in range(20)], cpu={}, stacks=Counter(),
        finished=Counter({"stage.key.a": 2, "stage.key.b": 1}), events=[],
    )  # fmt: skip
    row = summary(run)
    assert row["steady, s"] == 10 and row["GPUs training, %"] == 50 and row["GPUs reserved, %"] == 75
    assert row["requests a trial"] == 2 and row["ms a request"] == 250 and row["most in training at once"] == 31
    assert row["measured twice"] == 1 and row["finished twice"] == 1 and row["most waiting tasks"] == 39
    assert [one["measured"] for one in over_time(run)][-1] == 3
    assert requests(run) == [{"request": "POST runs/create", "a trial": 2, "ms": 250, "s": 2}]
