"""`python -m jobs.compare` as a user starts it: Ray Tune, a SQLite store of its own, the report."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests.test_train import Done, clean, command, store

BASE = {
    "data": {"limit": 400},
    "network": {"widths": [24, 8], "code_activation": "linear"},
    "finetune": {"batch_size": 64, "lr": 2e-3},
}
SHARING = {
    "name": "A small study",
    "base": BASE,
    "variants": {"stacked": {"pretrain": {"lr": 1e-3}, "settings": {"finetune.lr": [1e-3, 2e-3, 4e-3]}}, "plain": {}},
    "seeds": [0],
    "budget": {"epochs": 8},
    "labels": {"counts": [100], "fit": {"epochs": 2}},
}


def compare(folder: Path, study: dict[str, Any], *args: str, **env: str) -> Done:
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return command("jobs.compare", folder, "study.yaml", *args, **env)


def runs(folder: Path) -> list[Any]:
    tracker = store(folder)
    return tracker.search("tags.`stage.fn` LIKE '%'", 1000)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, head: dict[str, str]) -> tuple[Path, Done]:
    folder = tmp_path_factory.mktemp("study")
    done = compare(folder, SHARING, "--figures", "out", **head)
    assert done.code == 0, done.err
    return folder, done


def test_shared_layers_are_trained_once(first: tuple[Path, Done]) -> None:
    folder, done = first
    assert done.report["trials"] == {"finished": 6, "stopped": 0, "failed": 0}
    assert "epoch" not in done.err and "done after" not in done.err
    found = runs(folder)
    layers = [run for run in found if run.data.tags["stage.fn"] == "stages.pretrain_layer"]
    assert len(layers) == 2 and {run.data.tags["attempts"] for run in found} == {"1"}
    assert {run.info.status for run in found} == {"FINISHED"}
    assert done.report["stages"] == {"computed": len(found), "restored": 0}


def test_one_tree_study_trials_stages(first: tuple[Path, Done]) -> None:
    folder, done = first
    found = {run.info.run_id: run for run in runs(folder)}
    trials = {key: run for key, run in found.items() if "row" in run.data.tags}
    rows = sorted(run.data.tags["row"] for run in trials.values())
    assert rows == ["pca", "plain", "random", "stacked", "stacked", "stacked"]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials.values()} == {done.report["run_id"]}
    for key, run in trials.items():
        assert not [r for r in found.values() if r.data.tags["mlflow.parentRunId"] == key]
        # the stack, two classifiers and the measures are kept in the run of the trial
        places = [value for name, value in run.data.tags.items() if name.startswith("stage.key.")]
        assert sorted(places) == ["measured.safetensors", *["trained.safetensors"] * 3]
        assert "probe/accuracy" in run.data.metrics
    top = store(folder).client.get_run(done.report["run_id"])
    assert top.info.status == "FINISHED" and top.data.tags["job"] == "compare"
    names = {item.path for item in store(folder).client.list_artifacts(top.info.run_id, "report")}
    assert names == {
        "report/report.html",
        "report/results.parquet",
        "report/results.csv",
        "report/pairs.csv",
        "report/figures",
    }


def test_mlflow_shows_the_study_and_its_trials(first: tuple[Path, Done]) -> None:
    folder, done = first
    top = store(folder).client.get_run(done.report["run_id"])
    assert top.info.run_name == "A small study" and top.data.tags["mlflow.source.name"] == "jobs.compare"
    result, report, about, status = top.data.tags["mlflow.note.content"].split("  \n")
    assert (
        result == done.out.partition("Which should I use? ")[2].partition("\n")[0]
        and f"/runs/{top.info.run_id}/artifacts/report/report.html)" in report
    )
    assert about == "What: compares plain, stacked on digits (1,797 rows), seeds 0; 8 epochs per trial."
    assert status == "Status: finished" and top.data.metrics["train_seconds"] > 0
    children = {run.info.run_name: run.data.tags for run in runs(folder)}
    rates = [f"stacked finetune.lr={rate} seed=0" for rate in (0.001, 0.002, 0.004)]
    layers = {name for name in children if name.endswith(": layer 1 (A small study)")}
    assert {"plain seed=0", "pca seed=0", "random seed=0", *rates} <= children.keys() and len(layers) == 1
    assert {tags["mlflow.source.name"] for tags in children.values()} == {"jobs.compare"}


def test_the_report_is_whole_and_alone(first: tuple[Path, Done]) -> None:
    folder, done = first
    page = (folder / "out" / "report.html").read_text()
    assert "A small study" in page and not re.search(r"https?://|<script ", page)
    assert "finetune.lr = " in page and "importance" in {f.stem for f in (folder / "out" / "figures").iterdir()}
    table = pd.read_parquet(folder / "out" / "results.parquet")
    assert sorted(table["row"]) == ["pca", "plain", "random", "stacked", "stacked", "stacked"]
    trained = table[~table["row"].isin(["pca", "random"])]
    assert set(trained["epochs_used"]) == set(trained["epochs_planned"]) == {8}
    (plain,) = table[table["row"] == "plain"]["test/reconstruction_mse"]
    assert done.report["metrics"]["plain/test/reconstruction_mse"] == pytest.approx(plain)
    assert set(done.report["verdicts"]) >= {"test/reconstruction_mse", "probe/accuracy", "finetuned/accuracy"}
    assert "test/reconstruction_mse: " in done.out and "6 of 6: " in done.err


def test_the_same_study_again_computes_nothing(first: tuple[Path, Done], tmp_path: Path) -> None:
    folder, before = first
    (tmp_path / "ray.py").write_text("raise RuntimeError('ray was imported')")
    done = compare(folder, SHARING, PYTHONPATH=f"{tmp_path}:{Path.cwd()}")
    assert done.code == 0, done.err
    assert done.report["stages"] == {"computed": 0, "restored": 6}
    for name in ("run_id", "metrics", "verdicts"):
        assert done.report[name] == before.report[name]


def test_a_seed_more_computes_that_seed(first: tuple[Path, Done], head: dict[str, str]) -> None:
    folder, before = first
    plan = compare(folder, SHARING, "--seeds", "[0,1]", "--plan")
    trials = [line for line in plan.out.splitlines() if re.search(r"seed=\d", line)]
    assert [("seed=0" in line) == ("finished" in line) for line in trials] == [True] * 12
    done = compare(folder, SHARING, "--seeds", "[0,1]", **head)
    # six trials, and two layers that some of them share
    assert done.report["stages"] == {"computed": 8, "restored": 6}
    # PCA itself has no seed
    pca = [run for run in runs(folder) if run.data.tags.get("row") == "pca"]
    assert sorted(sum(name.startswith("stage.key.") for name in run.data.tags) for run in pca) == [3, 4]
    assert done.report["run_id"] == before.report["run_id"]


def test_optuna_chooses_and_one_failure_ends_nothing(tmp_path: Path, head: dict[str, str]) -> None:
    study = {
        **SHARING,
        "variants": {
            "plain": {"settings": {"finetune.lr": {"low": 1e-4, "high": 1e-2, "log": True}}},
            "diverging": {"finetune": {"lr": 1e30}},
        },
        "seeds": [0, 1],
        "search": "optuna",
        "budget": {"epochs": 4, "settings": 2},
    }
    done = compare(tmp_path, study, "--figures", "out", **head)
    assert done.code == 3 and done.report["status"] == "partial", done.err
    # two settings with the first seed, the best with the other; PCA and random weights twice each
    assert done.report["trials"] == {"finished": 7, "stopped": 0, "failed": 2}
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    plain = table[table["row"] == "plain"]
    best = plain[plain["seed"] == 0].sort_values("val/reconstruction_mse").iloc[0]
    (other,) = plain[plain["seed"] == 1]["settings.finetune.lr"]
    assert other == pytest.approx(best["settings.finetune.lr"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "diverging seed=0" in page and "lower the learning rate" in page
    assert "warning: diverging seed=0, diverging seed=1 failed: " in done.err
    failed = [run for run in runs(tmp_path) if run.data.tags.get("row") == "diverging"]
    assert {run.info.status for run in failed} == {"FAILED"} and "DivergenceError" in failed[0].data.tags["error"]
    note = store(tmp_path).client.get_run(done.report["run_id"]).data.tags["mlflow.note.content"]
    assert note.startswith("Status: partial: diverging seed=0, diverging seed=1 failed: ")


@pytest.mark.long
def test_optuna_chooses_by_the_finetuned_classifier_and_searches_the_control(
    tmp_path: Path, head: dict[str, str]
) -> None:
    study = {
        **SHARING,
        "variants": {"SDAE": {"variant": {"kind": "denoising"}, "pretrain": {}, "finetune": None}},
        "seeds": [0, 1],
        "search": "optuna",
        "choose": "finetuned",
        "settings": {"pretrain.epochs": [1, 2], "labels.fit.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
        "budget": {"epochs": 4, "settings": 2},
        "labels": {"counts": [], "fit": {"epochs": 3}},
    }
    done = compare(tmp_path, study, "--figures", "out", **head)
    assert done.code == 0, done.err
    # of each row two settings with the first seed, the best with the other; PCA twice
    assert done.report["trials"] == {"finished": 8, "stopped": 0, "failed": 0}
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    for name, names in (("SDAE", {"pretrain.epochs", "labels.fit.lr"}), ("random", {"labels.fit.lr"})):
        row = table[table["row"] == name]
        best = row[row["seed"] == 0].sort_values("val/finetuned_accuracy").iloc[-1]
        (other,) = row[row["seed"] == 1].to_dict("records")
        assert {s.removeprefix("settings.") for s in row.dropna(axis=1).columns if s.startswith("settings.")} == names
        assert all(other[f"settings.{setting}"] == pytest.approx(best[f"settings.{setting}"]) for setting in names)
    again = compare(tmp_path, study)
    assert again.report["stages"]["computed"] == 0 and again.report["metrics"] == done.report["metrics"]


@pytest.mark.long
def test_asha_spends_less_and_keeps_the_winner(tmp_path: Path, head: dict[str, str]) -> None:
    rates = [round(10 ** (-5 + step * 4 / 7), 9) for step in (3, 1, 6, 0, 7, 4, 2, 5)]
    study = {**SHARING, "variants": {"plain": {}}, "settings": {"finetune.lr": rates}, "budget": {"epochs": 16}}
    tables = {}
    for scheduler in ("none", "asha"):
        folder = tmp_path / scheduler
        folder.mkdir()
        done = compare(folder, study, "--scheduler", scheduler, "--figures", "out", **head)
        assert done.code == 0, done.err
        table = pd.read_csv(folder / "out" / "results.csv")
        tables[scheduler] = table[table["row"] == "plain"].set_index("settings.finetune.lr")
    grid, asha = tables["none"], tables["asha"]
    assert len(grid) == len(asha) == 8 and set(grid["epochs_used"]) == {16}
    assert asha["epochs_used"].sum() <= 8 * 16 / 2
    assert set(asha["status"]) == {"finished", "stopped"}
    last = asha[asha["status"] == "finished"]["val/reconstruction_mse"].nsmallest(2)
    assert grid["val/reconstruction_mse"].idxmin() in last.index
    again = compare(tmp_path / "asha", study, "--scheduler", "asha")
    assert again.report["stages"]["computed"] == 0 and again.report["trials"]["stopped"] > 0


def test_when_time_is_up_what_is_left_is_told_and_done_the_next_time(tmp_path: Path, head: dict[str, str]) -> None:
    study = {**SHARING, "variants": {"plain": {}}, "seeds": [0, 1, 2, 3]}
    done = compare(tmp_path, study, "--budget.hours", "0.0005", **head)
    assert done.code in (1, 3), done.err
    counts = done.report["trials"]
    assert counts["failed"] and sum(counts.values()) == 12 and not counts["stopped"]
    assert done.report["status"] == ("partial" if counts["finished"] else "failed")
    assert "failed: the study's time was up" in done.err and "the same command runs these trials again" in done.err
    again = compare(tmp_path, study, **head)
    assert again.code == 0, again.err
    assert again.report["trials"] == {"finished": 12, "stopped": 0, "failed": 0}


def test_bad_studies_end_in_one_line(tmp_path: Path) -> None:
    done = compare(tmp_path, {**SHARING, "variants": {"kl": {"variant": {"kind": "sparse", "penalty": "kl"}}}})
    assert done.code == 2 and not done.out
    line = "error: variants.kl: variant.penalty: kl needs codes in (0, 1), layer 2 has linear"
    assert done.err.splitlines()[-1].startswith(line)
    done = compare(tmp_path, {**SHARING, "sheduler": "asha"})
    assert done.code == 2 and "sheduler: unknown key; the nearest is scheduler" in done.err


KSPARSE = '''"""k-sparse codes as a kind of their own."""

from __future__ import annotations

from typing import ClassVar, Literal

from aecore.variants.base import Objective


class Ksparse(Objective):
    """The k largest codes reconstruct."""

    paper: ClassVar = "Makhzani & Frey, ICLR 2014"
    kind: Literal["ksparse"] = "ksparse"
    k: int = 4

    def build(self, layer, number):
        return layer.model_copy(update={"top_k": self.k, "top_k_encoding": self.k})

    def loss(self, model, x):
        return {"reconstruction": model.reconstruction_loss(model.encode(x), x)}
'''


def test_one_file_and_one_line_add_a_variant(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    for name in ("aecore", "pipelines", "jobs", "tests", "pyproject.toml"):
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, tmp_path / name)
    (tmp_path / "aecore" / "variants" / "ksparse.py").write_text(KSPARSE)
    union = tmp_path / "aecore" / "variants" / "__init__.py"
    text = union.read_text()
    text = text.replace(
        "from aecore.variants.plain", "from aecore.variants.ksparse import Ksparse\nfrom aecore.variants.plain"
    )
    assert "Plain |" in text
    union.write_text(text.replace("Plain |", "Plain | Ksparse |"))

    def run(*args: str) -> Any:
        return subprocess.run(
            [sys.executable, "-m", *args], cwd=tmp_path, capture_output=True, text=True, check=False,
            env=clean() | {"PYTHONPATH": str(tmp_path)},
        )  # fmt: skip

    assert "--variant.k " in run("jobs.train", "--help").stdout.replace("\n", " ")
    plans = [run("jobs.train", "--plan", "--variant.kind", "ksparse", "--variant.k", k).stdout for k in ("4", "5")]
    assert plans[0] and plans[0] != plans[1]
    table = run("pytest", "-q", "-p", "no:cacheprovider", "tests/test_stages.py", "-k", "Ksparse")
    assert "11 passed" in table.stdout, table.stdout
    study = {**SHARING, "variants": {"k": {"variant": {"kind": "ksparse"}}}, "budget": {"epochs": 2}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    done = run("jobs.compare", "study.yaml")
    assert done.returncode == 0, done.stderr
    (trial,) = [r for r in runs(tmp_path) if r.data.tags.get("row") == "k"]
    assert trial.data.params["variant.kind"] == "ksparse" and trial.data.metrics["probe/accuracy"] > 0.3
