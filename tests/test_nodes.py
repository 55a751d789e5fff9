"""Jobs on two Ray nodes with token authentication and an MLflow server, submitted as a user submits them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from aecore.config.experiment import Experiment, Finetune, Fit
from aecore.config.specs import Numerics
from aecore.data.dataset import inspect
from pipelines.graph.recipe import build
from pipelines.store.connection import connect
from pipelines.store.runs import Tracker
from tests.here import run_here
from tests.nodes import Nodes, free_port, mlflow_server, ray_nodes

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.long


class World(NamedTuple):
    nodes: Nodes
    mlflow: str
    env: dict[str, str]

    @property
    def tracker(self) -> Tracker:
        found = connect(self.mlflow)
        assert found is not None
        return found

    def submit(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jobs.submit", *args], cwd=ROOT, env=self.env | env, capture_output=True, text=True,
            check=False, timeout=300,
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    with mlflow_server(folder / "mlflow") as uri, ray_nodes(folder / "ray", 1, 1) as nodes:
        nodes.wait_for(2)
        yield World(nodes, uri, {**nodes.env, "RAY_API_SERVER_ADDRESS": nodes.dashboard, "MLFLOW_TRACKING_URI": uri})


def stages_of(tracker: Tracker, run_id: str) -> dict[str, Any]:
    found = tracker.search(f"tags.`mlflow.parentRunId` = '{run_id}'", 100)
    return {run.data.tags["stage.name"]: run for run in found}


def test_a_submitted_job_runs_on_both_nodes_with_the_bits_of_one_process(world: World, tmp_path: Path) -> None:
    done = world.submit("--", "jobs.train", "--pretrain.epochs", "4", "--finetune.epochs", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["status"] == "finished" and report["stages"] == {"computed": 7, "restored": 0}
    tracker = world.tracker
    top = tracker.client.get_run(report["run_id"])
    assert top.data.tags["ray.submission_id"].startswith("train-") and top.info.status == "FINISHED"
    runs = stages_of(tracker, report["run_id"])
    assert len({run.data.tags["ray.node_id"] for run in runs.values()}) == 2

    here = connect(f"sqlite:///{tmp_path}/mlflow.db")
    assert here is not None
    experiment = Experiment()
    assert experiment.pretrain is not None and experiment.finetune is not None
    experiment = experiment.model_copy(
        update={
            "pretrain": Fit.model_validate({**experiment.pretrain.model_dump(), "epochs": 4}),
            "finetune": Finetune.model_validate({**experiment.finetune.model_dump(), "epochs": 4}),
        }
    )
    graph = build(experiment, inspect(experiment.data), Numerics())
    made: dict[str, Any] = {}
    with here.job_run("train", "here", {}, {}) as parent:
        for stage in (*graph.layers, graph.finetune):
            assert stage is not None
            one, two = run_here(stage, here, parent, done=made), tracker.restore(runs[stage.name].info.run_id)
            assert all(np.array_equal(one.weights[name], two.weights[name]) for name in two.weights), stage.name


def test_stopped_in_layer_2_and_submitted_again(world: World) -> None:
    job = ["jobs.train", "--pretrain.epochs", "500", "--finetune", "null", "--network.widths", "[24,12]"]
    client = JobSubmissionClient(world.nodes.dashboard, headers={"Authorization": f"Bearer {world.nodes.token}"})
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.submit", "--name", "stopped", "--", *job], cwd=ROOT, env=world.env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    tracker = world.tracker
    deadline = time.monotonic() + 180

    def kept() -> bool:
        runs = tracker.search("tags.`stage.name` = 'layer 1' and tags.attempts = '1'", 10)
        return any(r.info.status == "FINISHED" and r.data.params["fit.epochs"] == "500" for r in runs)

    while not kept():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)
    client.stop_job("stopped")
    out, err = process.communicate(timeout=120)
    assert client.get_job_status("stopped") == JobStatus.STOPPED
    assert process.returncode == 130, out + err
    (top,) = tracker.search("tags.`ray.submission_id` = 'stopped'", 10)
    assert top.info.status == "KILLED" and not tracker.search("attributes.status = 'RUNNING'", 10)
    again = world.submit("--name", "stopped", "--", *job)
    assert again.returncode == 0, again.stdout + again.stderr
    report = json.loads(again.stdout.splitlines()[-1])
    assert report["run_id"] == top.info.run_id and report["stages"] == {"computed": 2, "restored": 1}
    runs = stages_of(tracker, top.info.run_id)
    assert sorted(runs) == ["evaluate", "layer 1", "layer 2"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert tracker.client.get_run(top.info.run_id).data.tags["ray.submission_id"] == "stopped-a2"


def test_what_cannot_be_submitted_is_told_in_one_line(world: World, tmp_path: Path) -> None:
    def refused(*args: str, **env: str) -> str:
        done = world.submit(*args, "--", "jobs.train", **env)
        assert done.returncode == 2 and not done.stdout, done.stdout + done.stderr
        (line,) = done.stderr.splitlines()
        return line

    nobody = f"http://127.0.0.1:{free_port()}"
    assert f"{nobody}: no answer; is the address right" in refused("--address", nobody)
    without = refused(RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"))
    assert "export RAY_AUTH_MODE=token and put the cluster's token into" in without
    assert "name a server" in refused(MLFLOW_TRACKING_URI="sqlite:///mlflow.db")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://127.0.0.1:9", "error: MLFLOW_TRACKING_URI: cannot use http://127.0.0.1:9"),
        ("sqlite:///{folder}/mlflow.db", "is a file of one machine and the cluster has several nodes; start"),
    ],
)
def test_a_store_that_the_job_cannot_use_ends_it_with_one_line(
    world: World, tmp_path: Path, uri: str, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=world.env | {
            "RAY_ADDRESS": world.nodes.gcs, "MLFLOW_TRACKING_URI": uri.format(folder=tmp_path), "PYTHONPATH": str(ROOT),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
        },
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_folder_that_only_one_node_has_is_no_storage_path(world: World) -> None:
    # both nodes are this machine: one must see another folder at the same path, which takes a mount of its own
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("hiding a folder from one of two local nodes takes root and `unshare -m`, which fails here")
    folder = world.nodes.folder / "mine"
    folder.mkdir()
    hidden = f'mount -t tmpfs none {folder} && exec "$@"'
    world.nodes.add(1, "unshare", "-m", "sh", "-c", hidden, "sh")
    world.nodes.wait_for(3)
    done = world.submit("--", "jobs.train", "--resources.storage_path", str(folder), "--seed", "7")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "resources.storage_path:" in done.stdout and "is another folder on" in done.stdout
