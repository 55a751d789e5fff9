"""What MLflow's list of runs shows a person: names, source, user, commit and description."""

import json
from pathlib import Path
from typing import Any

import pytest

from aecore.config.experiment import Conv, Data, Dense, Experiment, Finetune
from aecore.config.facts import Facts
from aecore.core.errors import InputError
from aecore.variants import Denoising
from pipelines.execution.chain import Outcome
from pipelines.execution.summary import job_metrics, train_seconds
from pipelines.graph.description import (
    Description,
    data_name,
    describe_experiment,
    describe_scores,
    experiment_name,
    run_name,
)
from pipelines.host.environment import user_name
from pipelines.store.record import marker
from pipelines.store.runs import Tracker

GREY = Facts(digest="f" * 64, shape=(1, 28, 28), levels=256, classes=("a", "b"), rows=10)
COLOUR = GREY.model_copy(update={"shape": (3, 32, 32)})
MNIST = Data(name="mnist")


@pytest.mark.parametrize(
    ("fields", "facts", "name"),
    [
        ({"network": Dense(widths=(256, 32)), "variant": Denoising()}, GREY, "mnist 784-256-32 denoising seed 0"),
        ({"network": Dense(widths=(16,)), "seed": 7}, GREY, "mnist 784-16 plain seed 7"),
        ({"network": Conv(widths=(16, 32))}, COLOUR, "mnist conv 3-16-32 plain seed 0"),
        ({"network": Conv(widths=(16,), dense=(64, 8))}, COLOUR, "mnist conv 3-16-64-8 plain seed 0"),
        ({"finetune": None, "network": Dense(widths=(8,))}, GREY, "mnist 784-8 plain seed 0"),
        (
            {"pretrain": None, "finetune": Finetune(task="reconstruct"), "network": Dense(widths=(8,))},
            GREY, "mnist 784-8 plain end to end seed 0",
        ),
        (
            {"pretrain": None, "finetune": Finetune(task="classify"), "network": Dense(widths=(8,))},
            GREY, "mnist 784-8 supervised seed 0",
        ),
    ],
    ids=["stacked", "seed", "conv", "conv and dense", "layers alone", "end to end", "classifier alone"],
)  # fmt: skip
def test_a_run_is_named_by_data_widths_variant_and_seed(fields: dict[str, Any], facts: Facts, name: str) -> None:
    """Each was called `train`."""
    assert experiment_name(Experiment(data=MNIST, **fields), facts) == name


@pytest.mark.parametrize(
    ("contamination", "words"), [("clean", "none"), ("mixed", "as many as there are"), (0.05, "5 % of the rows")]
)
def test_a_description_tells_what_anomalies_are(contamination: Any, words: str) -> None:
    """Runs of the same table that differ in the anomalies among the training rows had one name and description."""
    experiment = Experiment(data=Data(anomaly=("fraud", "fault"), contamination=contamination))
    assert describe_experiment(experiment).endswith(f"; anomalies are fraud, fault, in training {words}.")
    assert "anomalies" not in describe_experiment(Experiment())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("customers.parquet", "customers.parquet"),
        ("/data/2026/customers/", "customers"),
        ("s3://KEY:secret@bucket/a/rows.parquet", "rows.parquet"),
        ("https://host/rows.parquet?token=sec/ret", "rows.parquet"),
        ("s3://bucket/part-*.parquet", "part-*.parquet"),
        ("data/\x1b[31mred.parquet", "\\x1b[31mred.parquet"),
        ("/", "parquet"),
    ],
    ids=["file", "folder", "password", "token", "pattern", "escape", "root"],
)
def test_parquet_is_named_by_its_file(path: str, name: str) -> None:
    """All were called `parquet`."""
    assert data_name(Data(name="parquet", path=path)) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("plain finetune.lr=0.001 seed=0", "plain finetune.lr=0.001 seed=0"),
        ("a\nb\tc", "a b c"),
        ("x" * 300 + " variant.level=0.25 seed=12", "x" * 87 + "..." + "xxx variant.level=0.25 seed=12"),
    ],
    ids=["short", "lines", "long"],
)
def test_names_fit_into_mlflow_and_keep_the_seed(text: str, name: str) -> None:
    """PostgreSQL refuses names of more than 250 characters."""
    assert run_name(text) == name and len(name) <= 120


def outcome(**metrics: float) -> Outcome:
    return Outcome("run", {name.replace("__", "/"): value for name, value in metrics.items()}, False)


@pytest.mark.parametrize(
    ("test", "control", "gain", "words"),
    [
        (
            {"test__accuracy": 0.95, "test__reconstruction_mse": 0.5}, {"test__accuracy": 0.9}, {"gain/accuracy": 0.05},
            [
                "Test accuracy 95.00 %, control 90.00 %, pretraining gains +5.00 points.",
                "Reconstruction error per feature 0.5.",
                "Control: the same network, finetuned from random weights.",
            ],
        ),
        (
            {"test__reconstruction_mse": 0.5}, {"test__reconstruction_mse": 0.75}, {"gain/reconstruction_mse": 0.25},
            [
                "Reconstruction error per feature 0.5, control 0.75, pretraining lowers it by 0.25.",
                "Control: the same network, finetuned from random weights.",
            ],
        ),
        ({"test__accuracy": 0.95}, None, {}, ["Test accuracy 95.00 %."]),
        ({}, None, {}, []),
    ],
    ids=["classifier", "autoencoder", "no control", "nothing"],
)  # fmt: skip
def test_a_job_has_the_metrics_by_which_people_compare(
    test: dict[str, float], control: dict[str, float] | None, gain: dict[str, float], words: list[str]
) -> None:
    outcomes = {"layer 1": outcome(train_seconds=2.0), "finetune": outcome(best__error=0.1, train_seconds=3.0)}
    outcomes["evaluate"] = outcome(**test)
    if control is not None:
        outcomes |= {"control": outcome(train_seconds=4.0), "evaluate control": outcome(**control)}
    metrics = job_metrics(outcomes)
    assert metrics["val/error"] == 0.1
    assert {name: value for name, value in metrics.items() if name.startswith("gain/")} == pytest.approx(gain)
    assert describe_scores(metrics) == words
    assert train_seconds(outcomes) == (5.0 if control is None else 9.0)


def test_a_description_holds_no_secret_and_begins_with_the_result() -> None:
    shown = Description("name", "What: reads s3://me:secret@bucket/x", ["Error 1.", "See http://h/x?token=secret"])
    text = shown.text("failed: no route to http://me:secret@host\nand more")
    assert "secret" not in text
    assert text.startswith("Status: failed: no route to http://***@host and more  \nError 1.  \n")
    assert shown.text("finished").startswith("Error 1.  \n") and shown.text("finished").endswith("Status: finished")
    assert "Status" not in shown.text() and len(Description("n", "x" * 9000).text()) == 4000


def tags_of(tracker: Tracker, run_id: str) -> dict[str, str]:
    return dict(tracker.client.get_run(run_id).data.tags)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "finished"),
        (InputError("data.path: s3://me:secret@b has no rows"), "failed: data.path: s3://***@b has no rows"),
        (KeyboardInterrupt(), "killed; the same command continues it"),
    ],
    ids=["finished", "failed", "killed"],
)
def test_a_job_says_what_it_is_and_how_it_ended(tracker: Tracker, error: BaseException | None, status: str) -> None:
    shown, run_id = Description("digits 64-8 plain seed 0", "What: a test."), ""
    try:
        with tracker.job_run("train", f"says {status}", {}, {}, shown) as run_id:
            assert tags_of(tracker, run_id)["mlflow.note.content"] == "What: a test."
            shown.results = ["Error 0.5."]
            if error:
                raise error
    except (InputError, KeyboardInterrupt):
        pass
    tags = tags_of(tracker, run_id)
    assert tags["mlflow.runName"] == shown.name and tags["job"] == "train"
    lines = ["Error 0.5.", "What: a test."]
    lines.insert(0 if error else 2, f"Status: {status}")
    assert tags["mlflow.note.content"] == "  \n".join(lines)
    assert tags["mlflow.user"] == user_name() and tags["mlflow.source.type"] == "LOCAL"
    assert tags["mlflow.source.name"].startswith("pytest")
    assert tags.get("mlflow.source.git.commit", "unknown") == tags["git.commit"]


def test_where_no_commit_is_known_none_is_shown(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    with tracker.job_run("train", "no commit", {}, {}) as run_id:
        tags = tags_of(tracker, run_id)
    assert "mlflow.source.git.commit" not in tags and tags["git.commit"] == "unknown"
    assert tags["mlflow.user"] == "ada"  # who logs in to the server, as MLflow has it


def test_a_run_of_an_earlier_version_is_found_and_named(tracker: Tracker) -> None:
    tags = {"mlflow.runName": "train", "job": "train", "stage.key": "old", marker("old"): "1"}
    old = tracker.client.create_run(tracker.experiment_id, tags=tags).info.run_id
    tracker.client.set_terminated(old, "FINISHED")
    assert tracker.find("old") == old
    with tracker.job_run("train", "old", {}, {}, Description("digits 64-8 plain seed 0")) as run_id:
        assert run_id == old
    assert tags_of(tracker, old)["mlflow.runName"] == "digits 64-8 plain seed 0"


def test_mlflow_offers_a_view_with_the_results(tracker: Tracker) -> None:
    tags = tracker.client.get_experiment(tracker.experiment_id).tags
    view = json.loads(tags["mlflow.sharedViewState.diabolo"])
    columns = json.loads(view["state"])["selectedColumns"]
    assert view["name"] == "Results" and {"attributes.`Description`", "metrics.`gain/accuracy`"} <= set(columns)


def test_a_driver_that_was_lost_is_told_by_the_next_one(tracker: Tracker) -> None:
    lost = {"mlflow.runName": "lost", "job": "train", "lease": "0" * 32, "mlflow.note.content": "What: a test."}
    run_id = tracker.client.create_run(tracker.experiment_id, tags=lost).info.run_id
    tracker.close_abandoned()
    assert tracker.client.get_run(run_id).info.status == "KILLED"
    assert tags_of(tracker, run_id)["mlflow.note.content"].startswith("Status: killed without a word")
