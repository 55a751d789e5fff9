"""Stages and trials on GPUs that Ray only pretends to have: who gets what, in which process, and when."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.timeline import read, watched

ROOT = Path(__file__).parents[1]
START = """
import sys
import ray
from jobs import cli
from pipelines.cluster.connection import import_ray

import_ray()
ray.init(address="local", num_cpus={cpus}, num_gpus={gpus}, include_dashboard=False, logging_level="warning")
"""
COMMAND = """
import jobs.{name} as command
cli.main("{name}", lambda: command.{name}(cli.parse(command.{Name}, "python -m jobs.{name}")))
"""
SMALL = ["--pretrain.epochs", "2", "--network.widths", "[16,8]"]


def python(
    code: str, *args: str, cwd: Path, fake: bool = True, code_wanted: int = 0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run code in a process of its own, which starts a Ray with pretended GPUs."""
    own = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    own |= {"PYTHONPATH": str(ROOT), "DIABOLO_FAKE_GPUS": "1" if fake else "0", **(env or {})}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=cwd, capture_output=True, text=True, check=False, timeout=240, env=own
    )  # fmt: skip
    assert done.returncode == code_wanted, done.stdout + done.stderr
    return done


def job(name: str, *args: str, gpus: int, cwd: Path, **options: Any) -> subprocess.CompletedProcess:
    code = START.format(cpus=2, gpus=gpus) + COMMAND.format(name=name, Name=name.capitalize())
    return python(code, *args, cwd=cwd, **options)


def workers(stderr: str) -> dict[str, str]:
    """The process that computed each stage."""
    done = re.findall(r"\((\S[^()]*) pid=(\d+)\)\S* (\S[^()]*): done after", stderr)
    return {stage: pid for _, pid, stage in done}


def test_one_worker_process_computes_all_stages_of_a_chain_and_another_the_chain_beside_it(tmp_path: Path) -> None:
    """On a node with two GPUs, where a worker may get either. The control trains while the chain's layers do."""
    args = [*SMALL, "--finetune.epochs", "80", "--control", "true"]
    found = workers(job("train", *args, gpus=2, cwd=tmp_path).stderr)
    assert {"layer 1", "layer 2", "finetune", "control"} <= set(found)
    assert len({found[stage] for stage in ("layer 1", "layer 2", "finetune")}) == 1
    assert found["control"] != found["layer 1"]
    # Ray gives no task without a GPU to a worker that had one
    assert not {found.get("evaluate"), found.get("evaluate control")} & {found["layer 1"], found["control"]}


def test_a_gpu_that_cannot_be_used_fails_the_stage_with_what_the_driver_says(tmp_path: Path) -> None:
    done = job("train", *SMALL, gpus=1, cwd=tmp_path, fake=False, code_wanted=1)
    last = done.stderr.splitlines()[-1]
    assert re.match(r"error: a stage was given GPU 0 of \S+ and cannot use it: .*(NVIDIA|CUDA)", last), done.stderr
    assert "gpus 0" in last and "Traceback" not in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "failed"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--resources.gpus", "2"], "error: resources.gpus: 2 asked for a stage, but a worker computes on one GPU"),
        (["--resources.gpus", "0.5", "--resources.workers", "2"], "error: resources.gpus: 0.5 for each of 2 workers"),
        (
            ["--resources.accelerator", "H100"],
            "error: resources.accelerator: H100 is not in the cluster, it has no GPUs",
        ),
    ],
)
def test_what_gpus_cannot_do_is_refused_before_ray_starts(args: list[str], message: str, tmp_path: Path) -> None:
    code = "from jobs import cli\n" + COMMAND.format(name="train", Name="Train")
    done = python(code, *args, cwd=tmp_path, code_wanted=2)
    assert done.stderr.splitlines()[-1].startswith(message) and not list(tmp_path.iterdir())


EVALUATIONS = """
from pathlib import Path
from aecore.config.experiment import Dense, Experiment, Fit
from aecore.config.specs import Numerics
from aecore.data.dataset import inspect
from pipelines.cluster.resources import Resources
from pipelines.execution.chain import compute
from pipelines.graph.recipe import build
from pipelines.store.connection import connect

base = Experiment(pretrain=Fit(epochs=2), finetune=None, network=Dense(widths=(16,)), control=False)
stages = []
for seed in (0, 1):
    experiment = base.model_copy(update={"seed": seed})
    stages += build(experiment, inspect(base.data), Numerics(), f"{seed}: ").kept()
tracker = connect("sqlite:///mlflow.db", "test")
with tracker.job_run("test", "two", {}, {}) as top:
    outcomes = compute(stages, tracker, top, Resources(gpus=1, cpus=1), print)
    runs = {name: tracker.client.get_run(outcome.run_id).info for name, outcome in outcomes.items()}
    print({name: (run.start_time, run.end_time) for name, run in runs.items()})
"""


def test_an_evaluation_holds_no_gpu(tmp_path: Path) -> None:
    """The next stage on the only GPU has begun before the evaluation of the first has ended."""
    done = python(START.format(cpus=2, gpus=1) + EVALUATIONS, cwd=tmp_path)
    times = eval(done.stdout.splitlines()[-1], {})
    assert times["0: layer 1"][1] <= times["1: layer 1"][0]  # one GPU, one stage
    assert times["1: layer 1"][0] < times["0: evaluate"][1]


TRIALS = """
import json, os, sys, time
from pathlib import Path
import pipelines.study.trials as module
from aecore.config.experiment import Dense, Experiment, Finetune
from aecore.data.dataset import inspect
from pipelines.cluster.resources import Resources
from pipelines.store.connection import connect
from pipelines.study.agenda import Agenda
from pipelines.study.plan import plan_trials
from pipelines.study.schema import Study
from pipelines.study.sets import StudySet
from aecore.config.specs import Numerics

count, folder = int(sys.argv[1]), Path.cwd()


def meet(config, **_):
    \"\"\"A trial that ends when as many as there should be at once have begun.\"\"\"
    import ray
    from ray import tune

    gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    (folder / f"{os.getpid()}.json").write_text(json.dumps(gpus))
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.json"))) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    tune.report({"epoch": 1, "score": 0.0, "chosen": 0.0, "errors": {}, "trained": {}, "ended": True})


module.compute_trial = meet
study = Study(
    base=Experiment(pretrain=None, finetune=Finetune(task="reconstruct"), network=Dense(widths=(4,))),
    variants={"a": {}}, seeds=tuple(range(count)), scheduler="asha",
)
tracker = connect(f"sqlite:///{folder}/mlflow.db", "test")
facts = inspect(study.base.data)
with tracker.job_run("test", "trials", {}, {}) as top:
    sets = [StudySet("", study, facts, Numerics())]
    runner = module.TrialRunner(study, sets, tracker, top, Resources(gpus=0.25, cpus=1))
    agenda = Agenda(retries=0)
    agenda.add([plan for plan in plan_trials(study, facts, Numerics()) if plan.row == "a"])
    runner.run(agenda)
"""


@pytest.mark.parametrize("gpus", [pytest.param(1, marks=pytest.mark.long), 2])
def test_four_trials_with_a_quarter_run_at_once_on_each_gpu(gpus: int, tmp_path: Path) -> None:
    """Under ASHA, where each trial is one of Tune's."""
    python(START.format(cpus=8, gpus=gpus) + TRIALS, str(4 * gpus), cwd=tmp_path)
    used = sorted(json.loads(path.read_text())[0] for path in tmp_path.glob("*.json"))
    assert used == [str(gpu) for gpu in range(gpus) for _ in range(4)]


STUDY = """
base: {{data: {{limit: 300}}, network: {{kind: dense, widths: [8]}}, pretrain: null}}
variants: {{plain: {{}}, sparse: {{variant: {{kind: sparse}}}}}}
seeds: [0, 1]
budget: {{epochs: 2}}
scheduler: {scheduler}
labels: {{counts: [], fit: {{epochs: 1}}}}
"""


@pytest.mark.parametrize("scheduler", ["none", pytest.param("asha", marks=pytest.mark.long)])
def test_trials_are_measured_without_a_gpu(scheduler: str, tmp_path: Path) -> None:
    """Trials of a study train on the GPU; tasks on CPUs measure them, in other processes."""
    (tmp_path / "study.yaml").write_text(STUDY.format(scheduler=scheduler))
    done = job("compare", "study.yaml", gpus=1, cwd=tmp_path, env=watched(tmp_path))
    report = json.loads(done.stdout.splitlines()[-1])
    ended = {"finished": 8, "stopped": 0, "failed": 0}
    if scheduler == "asha":
        ended = report["trials"]
        assert ended["failed"] == 0 and ended["finished"] > ended["stopped"] > 0
    assert report["status"] == "finished" and report["trials"] == ended, done.stdout
    notes = read(tmp_path / "timeline.jsonl")
    trained, measured = ({note.process for note in notes if note.kind == kind} for kind in ("fit", "measure"))
    assert trained and measured and not trained & measured
