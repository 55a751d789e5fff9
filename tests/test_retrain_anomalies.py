"""`python -m jobs.retrain` with `data.anomaly`: three days, what is compared, and what is refused."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from aecore.anomaly.score import FittedScore, NeighbourScore
from aecore.config.experiment import Data, Dense, Experiment, Finetune
from aecore.config.facts import Facts
from aecore.config.specs import ContestSpec, DriftSpec, Numerics
from aecore.core.errors import InputError
from aecore.data.dataset import inspect, load
from aecore.data.splits import Arrays, content_hashes
from aecore.evaluation.ranking import rank
from aecore.evaluation.scoring import TrainedStack
from aecore.evaluation.statistics import ranking_gain
from aecore.models.rebuild import build_prepare, build_stack
from aecore.models.storage import Result
from aecore.serving.model import Model
from aecore.stages.contest import contest
from aecore.stages.context import Context
from aecore.stages.drift import drift
from pipelines.cluster.resources import Resources
from pipelines.graph.recipe import build
from pipelines.graph.stage import Finished, Known
from pipelines.retraining import models
from pipelines.retraining.rule import Rule, judge
from tests.test_retrain import Here, aliases, day, in_process

QUICK = (
    "--data.name", "parquet", "--data.path", "parts", "--data.anomaly", "fault", "--network.widths", "[4, 2]",
    "--pretrain.epochs", "3", "--finetune.epochs", "10", "--finetune.lr", "5e-3", "--model", "parts",
)  # fmt: skip


def write(folder: Path, seed: int, normal: int, faults: int, mode: float = 0.0, fault: str = "fault") -> None:
    """Add a file with normal rows, near a plane that `mode` shifts, and with faults, which lie anywhere."""
    rng = np.random.default_rng(seed)
    plane = np.random.default_rng(0).normal(size=(2, 6))
    x = (
        rng.normal(size=(normal, 2)) @ plane
        + 0.2 * rng.normal(size=(normal, 6))
        + mode * np.array([1, -1, 1, -1, 1, -1])
    )
    x = np.concatenate([x, rng.uniform(-5, 5, size=(faults, 6))]).astype(np.float32)
    labels = np.repeat(["fine", fault], [normal, faults])
    folder.mkdir(exist_ok=True)
    columns = {f"sensor {number}": values for number, values in enumerate(x.T)}
    pq.write_table(pa.table({**columns, "label": labels}), folder / f"{seed}.parquet")


@pytest.fixture(scope="module")
def _first_day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Make a folder with data and their first champion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it
        folder = tmp_path_factory.mktemp("first")
        write(folder / "parts", 1, 600, 40)
        yield folder, in_process(patch, folder, QUICK)(*day(1))


@pytest.fixture
def here(_first_day: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    """Return the command, in a copy of the folder with the first champion."""
    shutil.copytree(_first_day[0] / "parts", tmp_path / "parts")
    shutil.copy(_first_day[0] / "mlflow.db", tmp_path)
    return in_process(monkeypatch, tmp_path, QUICK)


def test_three_days(
    _first_day: tuple[Path, dict[str, Any]], here: Here, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = _first_day
    assert first["status"] == "promoted" and "version 1 is the first champion" in first["reason"]
    assert first["metrics"]["anomalies"] == 40 and first["metrics"]["challenger/auroc"] > 0.9

    write(tmp_path / "parts", 2, 300, 20)
    kept = here(*day(2))
    assert kept["status"] == "kept" and aliases(kept) == ("1", "", "2"), kept
    assert re.search(r"gains [+-]0\.\d{3} AUROC \(95 % interval .*, \d+ test rows, 60 of them anom", kept["reason"])
    assert re.search(r"; no drift in \d+ new normal test rows$", kept["reason"])
    scores = kept["metrics"]
    assert scores["frozen/anomalies"] == 40 and scores["newest/anomalies"] == 20
    assert scores["frozen/champion/auroc"] == first["metrics"]["challenger/auroc"]  # the same rows
    assert scores["drift/rows"] == scores["newest/rows"] - 20

    write(tmp_path / "parts", 3, 400, 20, mode=3.0)
    capsys.readouterr()
    better = here(*day(3))
    assert better["status"] == "promoted" and aliases(better) == ("3", "1", "3"), better
    assert better["metrics"]["difference_low"] > 0.02 and better["metrics"]["drift/drifted"] == 1
    assert "at least the margin of 0.02; drift in" in better["reason"]
    cells = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    lines = {name.strip(): values for _, name, *values, _ in cells}
    assert [float(cell) for cell in lines["anomalies"]] == [80, 40, 40]
    assert float(lines["difference_low"][0]) == pytest.approx(better["metrics"]["difference_low"], abs=1e-4)
    assert lines["difference"][0].strip().startswith("+0.") and "champion/average_precision" in lines


def test_only_on_drift_and_from_the_weights_of_the_champion(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "parts", 2, 300, 200)  # normal rows of the same kind, and a third as many anomalies more
    kept = here(*day(2), "--only-on-drift")
    assert kept["status"] == "kept" and kept["stages"]["computed"] == 1
    assert re.fullmatch(r"no drift in \d+ new normal test rows, so nothing was trained", kept["reason"])
    write(tmp_path / "parts", 3, 400, 20, mode=3.0)
    better = here(*day(3), "--only-on-drift", "--warm-start")
    assert better["status"] == "promoted" and better["stages"]["computed"] == 4, better  # no layer was pretrained
    with pytest.raises(InputError, match=r"^metric: accuracy needs a model that classifies, this one reconstructs"):
        here(*day(4), "--metric", "accuracy")
    for task, other in (("reconstruct", "reconstruction"), ("classify", "accuracy")):
        classes = in_process(monkeypatch, tmp_path, [arg for arg in QUICK if arg not in ("--data.anomaly", "fault")])
        with pytest.raises(InputError, match=rf"^metric: auroc needs labels that mark anomalies; .*, or use {other}$"):
            classes(*day(4), "--metric", "auroc", "--finetune.task", task)


@pytest.mark.parametrize(
    ("before", "test_only", "now", "leaked"),
    [
        ({"anomaly": ("fault",)}, ["fault"], {"anomaly": ("fault",)}, ""),
        ({"anomaly": ("fault",)}, ["fault"], {"anomaly": ("fault", "crack")}, ""),  # the champion saw no crack
        ({"anomaly": ("fault",)}, ["fault"], {"anomaly": ("fault", "worn")}, "worn"),
        ({"anomaly": ("fault",), "contamination": "mixed"}, [], {"anomaly": ("fault",)}, "fault"),
        ({"labels": None}, None, {"anomaly": ("fault", "crack")}, "crack, fault"),
        ({"labels": None}, None, {"anomaly": ("fault",), "contamination": "mixed"}, ""),
    ],
)
def test_no_champion_is_tested_on_rows_of_its_training(
    before: dict[str, Any], test_only: list[str] | None, now: dict[str, Any], leaked: str, tmp_path: Path
) -> None:
    for seed, label in enumerate(("fault", "worn", "crack")):
        write(tmp_path / ("old" if seed < 2 else "new"), seed, 200, 20, fault=label)
    old = Data(name="parquet", path=str(tmp_path / "old"), split="content", **before)
    facts = inspect(old)
    config = {"facts": facts.model_dump(mode="json"), "split": "content", "test": old.test}
    config |= {} if test_only is None else {"test_only": test_only}
    model = Result({"task": "reconstruct", "columns": facts.columns.model_dump(mode="json")}, {}, {})
    finished = Finished("champion", "", Known(key="0"))
    champion = models.Champion("models:/parts@champion", "1", finished, finished, model, Result(config, {}, {}))
    both = (str(tmp_path / "old"), str(tmp_path / "new"))
    experiment = Experiment(
        data=Data(name="parquet", path=both, split="content", **now), network=Dense(widths=(2,)),
        finetune=Finetune(task="reconstruct"),
    )  # fmt: skip
    rule = Rule()
    candidate = models.candidate_of(experiment, rule.logical_date, rule, Resources(), None)
    contest_spec = models.contest_stage(candidate, champion, "auroc").spec
    assert isinstance(contest_spec, ContestSpec)
    assert contest_spec.test_only == (() if "contamination" in now else tuple(sorted(now["anomaly"])))
    if not leaked:
        models.check_schema(candidate, champion)
        return
    with pytest.raises(InputError, match=f"^data.anomaly: all rows with the label {leaked} are test rows now, but mod"):
        models.check_schema(candidate, champion)


class Day(NamedTuple):
    """The data of a day with models of two seeds."""

    facts: Facts
    rows: Arrays
    models: tuple[Result, Result]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Day:
    folder = tmp_path_factory.mktemp("made")
    write(folder, 1, 600, 60)
    data = Data(name="parquet", path=str(folder), split="content", anomaly=("fault",))
    facts = inspect(data)
    rows = load(data, facts)

    def model(seed: int) -> Result:
        experiment = Experiment(
            data=data, network=Dense(widths=(2,)), pretrain=None, seed=seed, finetune=Finetune(epochs=1 + seed)
        )
        stage = build(experiment, facts, Numerics()).finetune
        assert stage is not None
        return stage.function()(stage.spec, Context(), data=rows)

    return Day(facts, rows, (model(0), model(1)))


def spec(made: Day, metric: Literal["auroc", "reconstruction"] = "auroc") -> ContestSpec:
    return ContestSpec(metric=metric, facts=made.facts, split="content", test=0.2)


def without_references(model: Result) -> Result:
    """Return a model as an earlier version trained it."""
    return Result(model.config, {n: value for n, value in model.weights.items() if not n.startswith("anomaly.")}, {})


def test_models_are_compared_by_the_area_under_the_roc_curve(made: Day) -> None:
    one, two = made.models
    x, y = made.rows.test
    assert y is not None and (y == 0).sum() > 40 and y.sum() == 60
    # that day there were some of the normal rows, and no anomaly
    ids = content_hashes(x[y == 0][:30])
    earlier = Result({}, {"ids": ids}, {})
    found = contest(spec(made), Context(), data=made.rows, champion=one, challenger=two, earlier=earlier)
    scored = found.metrics
    # two trained models and, as a model of an earlier version, one that keeps no references
    stack = [TrainedStack(build_stack(model), "fp32", torch.device("cpu")) for model in (one, two)]
    known = [FittedScore(*(model.weights[f"anomaly.{name}"] for name in FittedScore._fields)) for model in (one, two)]
    prepared = build_prepare(one)(torch.tensor(x))
    scores = [NeighbourScore(*pair).score(prepared).numpy() for pair in zip(stack, known, strict=True)]
    newest = ~np.isin(content_hashes(x), ids)
    for name, each in zip(("champion", "challenger"), scores, strict=True):
        assert scored[f"{name}/auroc"] == pytest.approx(roc_auc_score(y, each))
        assert scored[f"{name}/average_precision"] == pytest.approx(average_precision_score(y, each))
        assert scored[f"newest/{name}/auroc"] == pytest.approx(roc_auc_score(y[newest], each[newest]))
    assert scored["difference"] == pytest.approx(scored["challenger/auroc"] - scored["champion/auroc"])
    assert scored["difference_low"] <= scored["difference"] <= scored["difference_high"]
    # of rows of one kind there is no area, and the decision is made without it
    assert {name for name in scored if name.startswith("frozen/")} == {"frozen/rows", "frozen/anomalies"}
    assert scored["frozen/rows"] == 30 and scored["frozen/anomalies"] == 0
    assert judge("auroc", scored, 0.005)[1].startswith("the challenger gains ")
    same = contest(spec(made), Context(), data=made.rows, champion=one, challenger=one).metrics
    assert same["difference"] == same["difference_low"] == same["difference_high"] == 0


def test_a_champion_without_references_is_scored_by_its_errors(made: Day) -> None:
    one, two = made.models
    x, y = made.rows.test
    old = without_references(one)
    scored = contest(spec(made), Context(), data=made.rows, champion=old, challenger=two).metrics
    errors = Model(old).measure(x)["reconstruction_mse"]
    assert scored["champion/auroc"] == pytest.approx(roc_auc_score(y, errors))
    assert scored["champion/auroc"] != scored["challenger/auroc"]


def test_reconstruction_is_compared_on_normal_rows(made: Day) -> None:
    one, two = made.models
    x, y = made.rows.test
    assert y is not None
    scored = contest(spec(made, "reconstruction"), Context(), data=made.rows, champion=one, challenger=two).metrics
    errors = Model(one).measure(x[y == 0])["reconstruction_mse"]
    assert scored["rows"] == (y == 0).sum() and scored["champion/reconstruction"] == pytest.approx(errors.mean())


def test_anomalies_are_no_drift_where_the_reference_has_none(made: Day) -> None:
    y = made.rows.test.y
    assert y is not None
    earlier = Result({"facts": made.facts.model_dump(mode="json")}, {"ids": np.empty(0, np.uint64)}, {})

    def found(normal_only: bool, rows: Arrays = made.rows) -> Result:
        ask = DriftSpec(classes=(), threshold=0.2, normal_only=normal_only)
        return drift(ask, Context(), data=rows, champion=made.models[0], earlier=earlier)

    normal, whole = found(True), found(False)
    assert normal.metrics["drift/rows"] == (y == 0).sum() and whole.metrics["drift/rows"] == len(y)
    assert not normal.config["drifted"] and whole.config["drifted"]
    assert normal.config["words"] == f"no drift in {(y == 0).sum()} new normal test rows"
    anomalies = made.rows._replace(test=made.rows.test.take(y == 1))
    assert found(True, anomalies).config["words"] == "no normal test row is newer than the model"


def ranked(anomalies: int, gain: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the scores of two models that agree in part, and which of 520 rows are anomalies."""
    rng = np.random.default_rng(seed)
    anomaly = np.arange(520) < anomalies
    shared = 1.5 * anomaly + rng.normal(size=520)
    one, two = (shared + 0.6 * rng.normal(size=520) for _ in range(2))
    return one, two + gain * anomaly, anomaly


def paired(one: np.ndarray, two: np.ndarray, anomaly: np.ndarray) -> np.ndarray:
    return rank(two, anomaly)["auroc"] - rank(one, anomaly)["auroc"]


def test_the_interval_is_that_of_resampled_rows() -> None:
    one, two, anomaly = ranked(100, 0.4, 0)

    def difference(rows: np.ndarray) -> float:
        strange, usual = rows[anomaly[rows]], rows[~anomaly[rows]]
        one_area, two_area = ((scores[strange][:, None] > scores[usual]).mean() for scores in (one, two))
        return float(two_area - one_area)

    found = ranking_gain(paired(one, two, anomaly), anomaly)
    drawn = [difference(np.random.default_rng(seed).integers(520, size=520)) for seed in range(1000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.mean == pytest.approx(difference(np.arange(520)))
    assert found.high - found.low == pytest.approx(high - low, rel=0.15)
    # a quarter as many anomalies, and the interval is twice as wide, however many normal rows there are
    fewer = [ranking_gain(paired(*ranked(count, 0.4, 0)), ranked(count, 0.4, 0)[2]) for count in (25, 100)]
    assert 1.5 < (fewer[0].high - fewer[0].low) / (fewer[1].high - fewer[1].low) < 3


@pytest.mark.parametrize("anomalies", [3, 30])
def test_the_interval_has_the_degrees_of_freedom_of_welch(anomalies: int) -> None:
    one, two, anomaly = ranked(anomalies, 0.4, 0)
    better = paired(one, two, anomaly)
    found = ranking_gain(better, anomaly)
    parts = [better[own] * own.mean() for own in (anomaly, ~anomaly)]
    error = sum(part.var(ddof=1) / len(part) for part in parts) ** 0.5
    freedom = stats.ttest_ind(*parts, equal_var=False).df
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, freedom) * error)


def test_with_ten_anomalies_equal_models_rarely_seem_to_differ() -> None:
    intervals = [ranking_gain(paired(*(sample := ranked(10, 0.0, seed))), sample[2]) for seed in range(400)]
    wrong = sum(found.low > 0 or found.high < 0 for found in intervals)
    assert 6 <= wrong <= 34  # 20 are expected
    better = [ranking_gain(paired(*(sample := ranked(10, 2.0, seed))), sample[2]).low > 0 for seed in range(100)]
    assert sum(better) > 60


def test_of_one_anomaly_nothing_is_found() -> None:
    anomaly = np.arange(100) < 1
    scores = np.random.default_rng(0).normal(size=100)
    found = ranking_gain(paired(scores - 9 * anomaly, scores + 9 * anomaly, anomaly), anomaly)
    assert found == (100, 1.0, -1.0, 1.0)
    took, reason = judge(
        "auroc", {"rows": 100, "anomalies": 1, "difference": 1, "difference_low": -1, "difference_high": 1}, 0.005
    )
    assert not took and reason == (
        "the challenger gains +1.000 AUROC (95 % interval -1.000 to +1.000, 100 test rows, 1 of them anomalies), which "
        "may be chance: a tie"
    )
    wide = ranking_gain(paired(*ranked(2, 0.5, 3)), np.arange(520) < 2)
    assert -1 <= wide.low < 0 < wide.high <= 1
