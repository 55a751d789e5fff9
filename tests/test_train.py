"""`python -m jobs.train` as a user starts it, on an embedded Ray and a SQLite store of its own."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import jobs.train
from jobs import cli
from pipelines.cluster.resources import Resources
from pipelines.execution.chain import Outcome
from pipelines.graph.stage import Stage
from pipelines.store.connection import connect
from pipelines.store.runs import Tracker
from tests.here import run_here

QUICK = ("--pretrain.epochs", "5", "--finetune.epochs", "10")


class Done(NamedTuple):
    code: int
    report: dict[str, Any]
    out: str
    err: str
    seconds: float


def clean() -> dict[str, str]:
    """The environment without what MLflow leaves in it when other tests use it in this process."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}


def train(folder: Path, *args: str, **env: str) -> Done:
    return command("jobs.train", folder, *args, **env)


def command(module: str, folder: Path, *args: str, **env: str) -> Done:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", module, *args], cwd=folder, capture_output=True, text=True, check=False,
        env=clean() | env,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    report = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return Done(done.returncode, report, done.stdout, done.stderr, time.monotonic() - began)


def store(folder: Path) -> Tracker:
    tracker = connect(f"sqlite:///{folder}/mlflow.db")
    assert tracker is not None
    return tracker


def stage_runs(tracker: Tracker) -> dict[str, Any]:
    return {run.data.tags["stage.name"]: run for run in tracker.search("tags.`stage.fn` LIKE '%'", 100)}


def is_kept(tracker: Tracker, name: str) -> bool:
    run = stage_runs(tracker).get(name)
    return run is not None and run.info.status == "FINISHED"


def compute_here(
    stages: Sequence[Stage], tracker: Tracker, parent: str, resources: Resources, say: Any
) -> dict[str, Outcome]:
    """`pipelines.run.compute` in this process, without Ray."""
    made: dict[str, Any] = {}
    results = [run_here(stage, tracker, parent, done=made) for stage in stages]
    runs = [tracker.find(stage.key) or "" for stage in stages]
    return {s.name: Outcome(run, r.metrics, False) for s, run, r in zip(stages, runs, results, strict=True)}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The command in this process, from the parsing of its arguments to its report: its stages without Ray."""

    def run(*args: str) -> dict[str, Any]:
        report = jobs.train.train(cli.parse(jobs.train.Train, "python -m jobs.train", list(args)))
        assert report is not None
        return report

    monkeypatch.setattr(jobs.train, "compute", compute_here)
    monkeypatch.setattr("pipelines.execution.store.start_ray", lambda warm: None)
    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    folder = tmp_path_factory.mktemp("first")
    done = train(folder, *QUICK, "--figures", "pictures", "--register", "digits")
    assert done.code == 0, done.err
    return folder, done


def test_the_job_ends_with_a_table_and_its_report(first: tuple[Path, Done]) -> None:
    _, done = first
    assert set(done.report) == {"job", "status", "run_id", "experiment", "metrics", "stages", "seconds", "model"}
    assert (done.report["job"], done.report["status"]) == ("train", "finished")
    assert done.report["stages"] == {"computed": 7, "restored": 0}
    wanted = {"test/accuracy", "test/error", "test/reconstruction_mse", "probe/accuracy", "knn/accuracy"}
    assert wanted | {"control/accuracy", "val/error"} <= set(done.report["metrics"])
    assert "test/accuracy" in done.out.splitlines()[-5:][0] or "test/accuracy" in done.out
    assert "layer 1: epoch" in done.err and "finetune: done after" in done.err
    assert "epoch" not in "".join(done.out.splitlines()[3:-1]).replace("epochs", "")


def test_one_tree_of_runs(first: tuple[Path, Done]) -> None:
    folder, done = first
    tracker = store(folder)
    stages = stage_runs(tracker)
    assert set(stages) == {
        "layer 1", "layer 2", "layer 3", "finetune", "evaluate", "control", "evaluate control",
    }  # fmt: skip
    for run in stages.values():
        assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == done.report["run_id"]
        assert run.data.tags["attempts"] == "1"
    top = tracker.client.get_run(done.report["run_id"])
    assert top.info.status == "FINISHED" and top.data.tags["job"] == "train"
    assert {"git.commit", "data.digest", "ray.job_id"} <= set(top.data.tags)
    assert [item.path for item in tracker.client.list_artifacts(top.info.run_id)] == ["experiment.json"]
    points = tracker.client.get_metric_history(stages["layer 1"].info.run_id, "train/reconstruction")
    assert [point.step for point in points] == [1, 2, 3, 4, 5]
    assert {"train/loss", "val/loss", "lr"} <= set(stages["finetune"].data.metrics)


def test_mlflow_shows_what_the_run_was_and_what_came_out(first: tuple[Path, Done]) -> None:
    folder, done = first
    tracker = store(folder)
    top, metrics = tracker.client.get_run(done.report["run_id"]), done.report["metrics"]
    name, tags = "digits 64-48-32-16 plain seed 0", top.data.tags
    assert top.info.run_name == name and tags["mlflow.source.name"] == "jobs.train"
    result, _, _, _, figures, model, about, status = tags["mlflow.note.content"].split("  \n")
    accuracies = [f"{100 * metrics[f'{whose}/accuracy']:.2f} %" for whose in ("test", "control")]
    assert result.startswith("Test accuracy {}, control {}, pretraining gains ".format(*accuracies))
    evaluate = stage_runs(tracker)["evaluate"].info.run_id
    assert figures == f"Figures: [figures](#/experiments/{tracker.experiment_id}/runs/{evaluate}/artifacts/figures)."
    assert model == "Model: models:/digits/1." and status == "Status: finished"
    assert about.startswith("What: 3 layers pretrained (5 epochs, lr 0.002), the whole finetuned to classify")
    assert metrics["gain/accuracy"] == pytest.approx(metrics["test/accuracy"] - metrics["control/accuracy"])
    assert top.data.metrics.items() >= metrics.items() and top.data.metrics["train_seconds"] > 0
    wanted = {"data.name": "digits", "network.widths": "[48, 32, 16]", "variant.kind": "plain", "seed": "0"}
    assert top.data.params.items() >= (wanted | {"pretrain.epochs": "5", "finetune.lr": "0.001"}).items()
    for stage, run in stage_runs(tracker).items():
        assert run.info.run_name == f"{stage} ({name})"
        for inherited in ("mlflow.user", "mlflow.source.name"):
            assert run.data.tags[inherited] == tags[inherited]


def test_pictures_are_written(first: tuple[Path, Done]) -> None:
    folder, _ = first
    names = {path.name for path in (folder / "pictures").iterdir()}
    assert names == {"codes.png", "confusion.png", "loss_curves.png", "reconstructions.png", "units.png"}
    for path in (folder / "pictures").iterdir():
        with Image.open(path) as image:
            assert min(image.size) > 150


def test_the_model_is_registered_once(first: tuple[Path, Done]) -> None:
    folder, done = first
    assert done.report["model"] == {"name": "digits", "version": "1"}
    assert len(store(folder).client.search_model_versions("name = 'digits'")) == 1


def test_the_registered_model_encodes(first: tuple[Path, Done], head: dict[str, str]) -> None:
    folder, _ = first
    asked = ("--model", "models:/digits/1", "--output", "codes")
    done = command("jobs.encode", folder, *asked, **head)
    assert done.code == 0 and done.report["rows"] == {"all": 1797, "made": 1797}, done.err
    assert pq.read_table(folder / "codes")["id"].to_pylist() == list(range(1797))
    # refused before Ray starts, in one line
    wide = folder / "wide.parquet"
    pq.write_table(pa.table({"x": np.ones((40, 9)).tolist()}), wide)
    done = command("jobs.encode", folder, *asked, "--data.name", "parquet", "--data.path", str(wide))
    assert (done.code, done.out) == (2, "") and done.err.count("\n") == 1 and "vectors of 9 features" in done.err


def test_the_same_again_computes_nothing_and_starts_no_ray(first: tuple[Path, Done], tmp_path: Path) -> None:
    folder, before = first
    # a ray that cannot be imported shows that none is wanted
    (tmp_path / "ray.py").write_text("raise RuntimeError('ray was imported')")
    # and what is not part of the experiment may differ
    done = train(folder, *QUICK, "--register", "digits", "--resources.retries", "9", PYTHONPATH=str(tmp_path))
    assert done.code == 0, done.err
    assert done.report["stages"] == {"computed": 0, "restored": 7}
    for same in ("run_id", "experiment", "metrics", "model"):
        assert done.report[same] == before.report[same]
    assert done.seconds < 20  # 6 s on a quiet machine


def test_a_cluster_that_is_gone_is_told_and_what_is_kept_needs_none(first: tuple[Path, Done], tmp_path: Path) -> None:
    gone = {"RAY_ADDRESS": "127.0.0.1:9"}
    done = train(tmp_path, *QUICK, **gone)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: RAY_ADDRESS: no answer from 127.0.0.1:9")
    done = train(first[0], *QUICK, "--register", "digits", **gone)
    assert done.code == 0 and done.report["stages"] == {"computed": 0, "restored": 7}


def test_a_cluster_that_asks_for_a_token_is_told(tmp_path: Path, head: dict[str, str]) -> None:
    done = train(tmp_path, *QUICK, **head | {"RAY_AUTH_MODE": "disabled"})
    (line,) = done.err.splitlines()
    assert done.code == 2 and "export RAY_AUTH_MODE=token" in line
    assert line.startswith(f"error: RAY_ADDRESS: {head['RAY_ADDRESS']} asks for a token")


def test_a_changed_finetuning_runs_alone_on_restored_layers(first: tuple[Path, Done], head: dict[str, str]) -> None:
    folder, before = first
    done = train(folder, *QUICK, "--finetune.lr", "5e-4", "--control", "false", **head)
    assert done.code == 0, done.err
    assert done.report["stages"] == {"computed": 2, "restored": 3}
    assert done.report["run_id"] != before.report["run_id"]
    assert "layer 3: restored" in done.err and "data" not in done.report["metrics"]


def test_another_folder_and_a_shared_ray_give_the_same_bits(
    first: tuple[Path, Done], tmp_path: Path, head: dict[str, str]
) -> None:
    folder, _ = first
    assert train(tmp_path, *QUICK, "--control", "false", **head).code == 0
    ours, theirs = store(folder), store(tmp_path)
    for name, run in stage_runs(theirs).items():
        one, two = ours.restore(stage_runs(ours)[name].info.run_id), theirs.restore(run.info.run_id)
        assert set(one.weights) == set(two.weights)
        assert all(np.array_equal(one.weights[w], two.weights[w]) for w in one.weights), name


def test_interrupted_it_ends_killed_and_goes_on_where_it_was(tmp_path: Path) -> None:
    # without the control, which needs no layer and may take the CPUs first
    short = ["--pretrain.epochs", "40", "--control", "false"]
    line = [sys.executable, "-m", "jobs.train", *short, "--finetune.epochs", "3000"]
    out, err = tmp_path / "out", tmp_path / "err"
    with (
        out.open("w") as stdout,
        err.open("w") as stderr,
        subprocess.Popen(line, cwd=tmp_path, stdout=stdout, stderr=stderr, env=clean()) as process,
    ):
        deadline = time.monotonic() + 120
        # the driver may be behind the stages with keeping their results
        while "finetune: epoch" not in err.read_text() or not is_kept(store(tmp_path), "layer 3"):
            assert process.poll() is None and time.monotonic() < deadline, err.read_text()
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
    assert json.loads(out.read_text().splitlines()[-1])["status"] == "killed"
    assert process.returncode == 130
    tracker = store(tmp_path)
    assert not tracker.search("attributes.status = 'RUNNING'", 10)
    (top,) = tracker.search("tags.job = 'train'", 10)
    assert top.info.status == "KILLED"
    assert {run.info.status for run in stage_runs(tracker).values()} <= {"FINISHED", "KILLED"}
    assert stage_runs(tracker)["layer 3"].info.status == "FINISHED"
    again = train(tmp_path, *short, "--finetune.epochs", "3")
    assert again.code == 0, again.err
    assert again.report["stages"] == {"computed": 2, "restored": 3}


def test_a_crash_ends_failed(first: tuple[Path, Done], head: dict[str, str]) -> None:
    folder, _ = first
    done = train(folder, *QUICK, "--pretrain.lr", "1e30", "--control", "false", **head)
    assert done.code == 1 and done.report["status"] == "failed"
    assert "DivergenceError" in done.err.splitlines()[-1]
    tracker = store(folder)
    assert not tracker.search("attributes.status = 'RUNNING'", 10)
    failed = tracker.search("attributes.status = 'FAILED'", 10)
    name = "digits 64-48-32-16 plain seed 0"
    assert sorted(run.info.run_name for run in failed) == [name, f"layer 1 ({name})"]
    (top,) = [run for run in failed if run.data.tags.get("job") == "train"]
    assert top.data.tags["mlflow.note.content"].startswith("Status: failed: train/reconstruction is ")


def test_asking_for_a_gpu_that_no_node_has(tmp_path: Path) -> None:
    done = train(tmp_path, "--resources.gpus", "0.5")
    assert done.code == 2
    assert "resources.gpus: 0.5 asked for a stage, the largest node has" in done.err.splitlines()[-1]


def test_hugging_face_images_train_and_evaluate(tmp_path: Path, here: Callable[..., dict[str, Any]]) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    structs = []
    for image in digits.images:
        buffer = io.BytesIO()
        Image.fromarray((image * 15).astype(np.uint8)).save(buffer, "PNG")
        structs.append({"bytes": buffer.getvalue(), "path": None})
    column = pa.array(structs, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": column, "label": digits.target}), tmp_path / "digits.parquet")
    report = here(
        "--data.name", "parquet", "--data.path", "digits.parquet", "--finetune.epochs", "20", "--pretrain.epochs", "5",
        "--control", "false",
    )  # fmt: skip
    assert report["metrics"]["test/accuracy"] > 0.8


def test_vectors_with_string_labels_and_no_split_train_and_evaluate(
    tmp_path: Path, here: Callable[..., dict[str, Any]]
) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    features = np.eye(3)[labels] @ rng.normal(size=(3, 12)) * 3 + rng.normal(size=(600, 12))
    table = pa.table({
        "features": pa.array(features.astype(np.float32).tolist(), pa.list_(pa.float32(), 12)),
        "label": [("ash", "birch", "oak")[n] for n in labels],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "trees.parquet")
    args = ["--data.name", "parquet", "--data.path", str(tmp_path / "trees.parquet"), "--network.widths", "[8, 4]"]
    report = here(*args, "--control", "false", "--pretrain.epochs", "10", "--finetune.epochs", "20")
    assert report["metrics"]["test/accuracy"] > 0.9


def test_without_labels_it_reconstructs(here: Callable[..., dict[str, Any]]) -> None:
    metrics = here(*QUICK, "--data.labels", "null", "--control", "true")["metrics"]
    assert {"test/reconstruction_mse", "control/reconstruction_mse"} <= set(metrics)
    assert "test/accuracy" not in metrics


def test_two_workers_train_what_one_trains(
    tmp_path: Path, head: dict[str, str], here: Callable[..., dict[str, Any]]
) -> None:
    small = ("--network.widths", "[16]", "--pretrain.epochs", "3", "--finetune", "null", "--resources.cpus", "1")
    here(*small)
    team = tmp_path / "team"
    team.mkdir()
    done = train(team, *small, "--resources.workers", "2", **head)
    assert done.code == 0, done.err
    assert "layer 1: epoch 1" in done.err
    for metric in ("train/loss", "val/loss"):
        alone, together = (
            [p.value for p in at.client.get_metric_history(stage_runs(at)["layer 1"].info.run_id, metric)]
            for at in (store(tmp_path), store(team))
        )
        assert len(alone) == 3 and together == pytest.approx(alone, rel=1e-4)


def test_more_workers_than_the_cluster_holds_are_refused(tmp_path: Path) -> None:
    done = train(tmp_path, *QUICK, "--resources.cpus", "1", "--resources.workers", "999")
    assert done.code == 2 and "resources.workers: 999 with 1 CPUs each asked for" in done.err.splitlines()[-1]
