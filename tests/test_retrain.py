"""`python -m jobs.retrain`: a week of it, who decides when several do, and how often it errs."""

import json
import shutil
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from aecore.errors import InputError
from aecore.statistics import gain
from jobs import cli
from jobs.retrain import Retrain, run
from pipelines import retrain
from pipelines.run import Outcome, Resources, run_here
from pipelines.stage import Stage
from pipelines.tracking import Tracker, connect

QUICK = (
    "--data.name", "parquet", "--data.path", "digits", "--network.widths", "[32, 16]", "--pretrain.epochs", "10",
    "--finetune.epochs", "30", "--finetune.lr", "5e-3", "--model", "digits",
)  # fmt: skip


def write(folder: Path, first: int, last: int, nines: bool = False, name: str | None = None) -> None:
    """Some of scikit-learn's digits as a file more of the data, without nines or nines alone."""
    digits = load_digits()
    own = (digits.target == 9) == nines
    x, y = digits.images[own].astype(np.uint8)[first:last], digits.target[own][first:last]
    kind = pa.fixed_shape_tensor(pa.uint8(), (8, 8))
    column = pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(x.ravel(), 64))
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": column, "label": y}), folder / f"{name or f'{first}-{nines}'}.parquet")


def store(folder: Path) -> Tracker:
    tracker = connect(f"sqlite:///{folder}/mlflow.db")
    assert tracker is not None
    return tracker


Here = Callable[..., dict[str, Any]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Here:
    """The command in this process, from the parsing of its arguments to its report: its stages without Ray."""

    def compute(
        stages: Sequence[Stage], tracker: Tracker, parent: str, resources: Resources, say: Any
    ) -> dict[str, Outcome]:
        found = {stage.name: tracker.find(stage.key) for stage in stages}
        made: dict[str, Any] = {}
        for stage in stages:
            run_here(stage, tracker, parent, done=made)
        runs = {stage.name: tracker.find(stage.key) or "" for stage in stages}
        return {name: Outcome(run, tracker.metrics(run), found[name] is not None) for name, run in runs.items()}

    def command(*args: str) -> dict[str, Any]:
        report = run(cli.parse(Retrain, "python -m jobs.retrain", [*QUICK, *args]))
        assert report is not None and json.dumps(report)
        return report

    monkeypatch.setattr(retrain, "compute", compute)
    monkeypatch.chdir(tmp_path)
    return command


def day(number: int) -> tuple[str, str]:
    return "--logical-date", f"2026-11-{number:02}"


def aliases(report: dict[str, Any]) -> tuple[str, ...]:
    return tuple(report["model"].get(alias, "") for alias in ("champion", "previous", "challenger"))


def test_a_week(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "digits"
    write(data, 0, 900)
    first = here(*day(1))
    assert first["status"] == "promoted" and "version 1 is the first champion" in first["reason"]
    assert aliases(first) == ("1", "", "1") and first["stages"] == {"computed": 5, "restored": 0}

    same = here(*day(2))
    assert same["status"] == "unchanged" and same["reason"] == "data and recipe are those of the champion, version 1"
    assert same["stages"] == {"computed": 0, "restored": 0} and aliases(same) == ("1", "", "1")

    write(data, 900, 1400)
    tie = here(*day(3))
    assert tie["status"] == "kept" and "no drift in" in tie["reason"], tie
    assert aliases(tie) == ("1", "", "2")
    scores = tie["metrics"]
    assert scores["frozen/rows"] + scores["newest/rows"] == scores["rows"] > scores["newest/rows"] > 50
    assert scores["frozen/champion/accuracy"] == first["metrics"]["challenger/accuracy"]  # the same rows
    assert here(*day(3)) == tie  # fired again, it tells what was decided

    write(data, 0, 170, nines=True)
    better = here(*day(4))
    assert better["status"] == "promoted" and "drift in" in better["reason"], better
    assert "unknown classes" in better["reason"] and better["metrics"]["drift/drifted"] == 1
    assert aliases(better) == ("3", "1", "3") and better["metrics"]["difference_low"] > 0.02
    tracker = store(tmp_path)
    names = {item.path for item in tracker.client.list_artifacts(better["run_id"], "drift")}
    assert names == {"drift/drift.csv", "drift/drift.png"}

    good = next(data.glob("*.parquet"))
    shutil.copy(good, tmp_path / "good")
    good.write_bytes(good.read_bytes()[:1000])
    with pytest.raises(InputError, match="is not a readable Parquet file"):
        here(*day(5))
    assert aliases(here(*day(4))) == ("3", "1", "3")
    (failed,) = tracker.runs({"job": "retrain", "logical.date": "2026-11-05"}, "FAILED")
    assert "is not a readable Parquet file" in failed.data.tags["reason"]
    shutil.copy(tmp_path / "good", good)

    # broken off in the middle of training, and fired again
    write(data, 1400, 1600)
    inside = retrain.compute

    def broken(stages: Sequence[Stage], *args: Any) -> Any:
        if any(stage.name == "finetune" for stage in stages):
            inside(stages[:1], *args)
            raise KeyboardInterrupt
        return inside(stages, *args)

    monkeypatch.setattr(retrain, "compute", broken)
    with pytest.raises(KeyboardInterrupt):
        here(*day(6))
    monkeypatch.setattr(retrain, "compute", inside)
    again = here(*day(6))
    assert again["status"] == "kept" and aliases(again) == ("3", "1", "4")
    # the broken firing had computed drift and a layer; they count once, and are restored
    assert again["stages"] == {"computed": 5, "restored": 2}

    back = here("--rollback")
    assert back["status"] == "promoted" and aliases(back) == ("1", "3", "4")
    assert "version 1 is the champion again" in back["reason"]
    assert here(*day(8))["reason"] == "data and recipe are those that 2026-11-06 was decided on"

    decided = tracker.runs({"job": "retrain", "model": "digits"})
    assert len(decided) == 6 and len(tracker.client.search_model_versions("name = 'digits'")) == 4
    tags = next(run.data.tags for run in decided if run.info.run_id == better["run_id"])
    assert tags["parent.version"] == "1" and tags["model.version"] == "3" and tags["decision"] == "promoted"
    assert {"data.digest", "key.finetune", "key.contest", "key.drift", "run.finetune", "git.commit"} <= set(tags)
    assert not tracker.client.search_registered_models("name LIKE 'diabolo.lease.%'")
