"""Studies of anomalies: their trials, the stages that measure them, and the report."""

import json
import warnings
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors

from aecore.anomaly.detectors import fit_detector
from aecore.anomaly.score import fit_score
from aecore.config.experiment import Data
from aecore.config.facts import Facts
from aecore.config.specs import DetectionSpec, DetectorSpec, EvaluateSpec, Numerics
from aecore.core.errors import InputError
from aecore.core.types import Detector
from aecore.data.dataset import inspect, load
from aecore.data.splits import Arrays
from aecore.data.stream import open_stream
from aecore.evaluation import trial
from aecore.evaluation.ranking import rank
from aecore.evaluation.scoring import build_trained
from aecore.evaluation.statistics import ranking_gain
from aecore.evaluation.trial import Trial
from aecore.models.storage import Result
from aecore.stages.anomalies import detect, known_rows, note_of_few
from aecore.stages.context import CPU, Context
from aecore.stages.evaluate import evaluate
from pipelines.graph.stage import Stage
from pipelines.reporting import report
from pipelines.study.plan import TrialPlan, plan_trials
from pipelines.study.schema import Study

ROWS = 400
MEASURES = ("auroc", "average_precision", "precision_at_n")


def write_table(folder: Path, seed: int = 0, **fields: Any) -> Data:
    """Write a table of four related features, of which a twentieth of the rows breaks the relation."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(ROWS, 2))
    x = hidden @ rng.normal(size=(2, 4)) + 0.1 * rng.normal(size=(ROWS, 4))
    anomaly = np.arange(ROWS) % 20 == 0
    x[anomaly, 1] += rng.choice([-3, 3], anomaly.sum())
    frame = pd.DataFrame(x, columns=["age", "income", "visits", "days"]).assign(label=np.where(anomaly, "bad", "good"))
    frame.to_parquet(folder / "rows.parquet", index=False)
    return Data.model_validate(
        {"name": "parquet", "path": str(folder / "rows.parquet"), "anomaly": "bad", "test": 0.5} | fields
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Facts, Arrays]:
    data = write_table(tmp_path_factory.mktemp("table"))
    facts = inspect(data)
    return data, facts, load(data, facts)


def study_of(data: Data, **fields: Any) -> Study:
    base = {
        "data": data.model_dump(), "network": {"kind": "dense", "widths": [16], "activation": "relu"}, "pretrain": None,
        "finetune": {"task": "reconstruct", "batch_size": 64}, "control": False,
    }  # fmt: skip
    variants = {"denoising": {"variant": {"kind": "denoising", "noise": "gaussian", "level": 1.0}}}
    defaults = {"base": base, "variants": variants, "budget": {"epochs": 10, "steps": 100}, "seeds": [0, 1]}
    return Study.model_validate(defaults | fields)


def computed(stage: Stage, data: Arrays, known: dict[str, Result] | None = None) -> Result:
    """Compute a stage and those that it needs in this process."""
    known = {} if known is None else known

    def one(each: Stage) -> Any:
        if each.name == "data":
            return data
        if each.key not in known:
            inputs = {n: tuple(map(one, i)) if isinstance(i, tuple) else one(i) for n, i in each.inputs.items()}
            known[each.key] = each.function()(each.spec, Context(), **inputs)
        return known[each.key]

    return cast(Result, one(stage))


def trials_of(study: Study, facts: Facts, arrays: Arrays) -> list[Trial]:
    known: dict[str, Result] = {}
    trials = []
    for plan in plan_trials(study, facts, Numerics()):
        result = computed(plan.stage, arrays, known)
        curves = dict(result.config)
        trials.append(
            Trial(
                plan.row, plan.settings, plan.seed, plan.kind, "finished", metrics=result.metrics,
                history=tuple(curves.pop("history")), curves=curves, arrays=result.weights,
            )
        )  # fmt: skip
    return trials


@pytest.fixture(scope="module")
def trials(table: tuple[Data, Facts, Arrays]) -> list[Trial]:
    data, facts, arrays = table
    return trials_of(study_of(data), facts, arrays)


def plans(data: Data, facts: Facts, **fields: Any) -> list[TrialPlan]:
    return plan_trials(study_of(data, **fields), facts, Numerics())


def test_every_study_of_anomalies_has_its_references(table: tuple[Data, Facts, Arrays]) -> None:
    data, facts, _ = table
    found = plans(data, facts)
    assert {plan.row for plan in found if plan.is_reference} == {*trial.ANOMALY_REFERENCES}
    fits = {
        plan.row: {plan.trained.key for plan in found if plan.row == row}
        for row in ("knn", "iforest")
        for plan in found
        if plan.row == row
    }
    assert {row: len(keys) for row, keys in fits.items()} == {"knn": 1, "iforest": 2}  # only the forest has a seed
    ordinary = plans(data.model_copy(update={"anomaly": (), "labels": None}), facts.model_copy(update={"labels": ()}))
    assert {plan.row for plan in ordinary} == {"denoising", "pca", "random"}


def test_names_of_references_are_taken_only_where_they_are_references(table: tuple[Data, Facts, Arrays]) -> None:
    data = table[0]
    with pytest.raises(ValueError, match=r"variants\.knn: every study has a reference of this name"):
        study_of(data, variants={"knn": {}})
    assert "knn" in study_of(data.model_copy(update={"anomaly": (), "labels": None}), variants={"knn": {}}).variants


@pytest.mark.parametrize("choose", ["probe", "finetuned"])
def test_labels_cannot_choose(table: tuple[Data, Facts, Arrays], choose: str) -> None:
    with pytest.raises(InputError, match=r"choose: .*anomal"):
        plans(table[0], table[1], choose=choose)


def test_labels_drop_no_row(table: tuple[Data, Facts, Arrays]) -> None:
    with pytest.raises(ValueError, match=r"scheduler: race drops rows by test rows, and labels of anomalies drop none"):
        study_of(table[0], scheduler="race", seeds=[0, 1, 2])


def test_detectors_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(5, 5)) * [3, 2, 1, 0.3, 0.1]
    rows, x = ((rng.normal(size=(count, 5)) @ mixing.T).astype(np.float32) for count in (300, 50))
    found = {kind: fit_detector(kind, rows, 3).score(x) for kind in get_args(Detector)}
    assert found["knn"] == pytest.approx(NearestNeighbors(n_neighbors=5).fit(rows).kneighbors(x)[0].mean(1))
    assert found["iforest"] == pytest.approx(-IsolationForest(random_state=3).fit(rows).score_samples(x))
    assert found["lof"] == pytest.approx(-LocalOutlierFactor(20, novelty=True).fit(rows).score_samples(x))
    _, values, axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    kept = axes[: int(np.searchsorted(np.cumsum(values**2) / np.square(values).sum(), 0.9)) + 1]
    rest = (x - rows.mean(0)) - (x - rows.mean(0)) @ kept.T @ kept
    assert found["pca"] == pytest.approx(np.square(rest).sum(1), rel=1e-3)


@pytest.mark.parametrize("kind", get_args(Detector))
def test_detectors_fit_very_few_rows(kind: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for rows in (np.eye(3, 2), np.ones((3, 2))):
            scores = fit_detector(kind, rows.astype(np.float32), 0).score(np.full((4, 2), 2, np.float32))
            assert scores.shape == (4,) and np.isfinite(scores).all()


def test_trials_are_measured_by_the_labels_of_test_rows(trials: list[Trial], table: tuple[Data, Facts, Arrays]) -> None:
    truth = table[2].test.y
    assert truth is not None and {each.row for each in trials} == {"denoising", *trial.ANOMALY_REFERENCES}
    for each in trials:
        assert each.metrics["test/auroc"] == pytest.approx(roc_auc_score(truth, each.arrays["score"]), abs=1e-6)
        for name in MEASURES:
            assert each.arrays[name].mean() == pytest.approx(each.metrics[f"test/{name}"], abs=1e-4)
        assert (each.arrays["anomaly"] == truth).all()
    by_row = {each.row: each.metrics["test/auroc"] for each in trials}
    assert by_row["denoising"] > 0.9 and by_row["knn"] > 0.8
    own = next(each for each in trials if each.row == "denoising")
    others = {"auroc/error", "auroc/code_neighbours", "auroc/code_distance", "auroc/ranks"}
    assert others < own.metrics.keys() and np.isfinite(own.metrics["val/reconstruction_mse"])


def test_labels_of_test_rows_change_measures_alone(table: tuple[Data, Facts, Arrays]) -> None:
    data, facts, arrays = table
    plan = next(plan for plan in plans(data, facts) if plan.row == "denoising")
    assert arrays.test.y is not None
    other = arrays._replace(test=arrays.test._replace(y=np.random.default_rng(1).permutation(arrays.test.y)))
    own, changed = (computed(plan.stage, each) for each in (arrays, other))
    assert (own.weights["score"] == changed.weights["score"]).all()
    assert own.metrics["val/reconstruction_mse"] == changed.metrics["val/reconstruction_mse"]
    assert own.config["history"][-1]["val/loss"] == changed.config["history"][-1]["val/loss"]
    assert own.metrics["test/auroc"] != changed.metrics["test/auroc"]


def test_the_strangest_rows_are_explained(trials: list[Trial]) -> None:
    first, second = (each for each in trials if each.row == "denoising")
    assert "strangest" not in second.curves
    rows = first.curves["strangest"]
    scores = first.arrays["score"]
    assert [row["row"] for row in rows] == np.argsort(-scores, kind="stable")[: len(rows)].tolist()
    assert [row["reasons"][0]["feature"] for row in rows if row["anomaly"]].count("income") >= 0.8 * sum(
        row["anomaly"] for row in rows
    )
    for row in rows:
        parts = [reason["contribution"] for reason in row["reasons"]]
        assert parts == sorted(parts, reverse=True) and sum(parts) <= row["score"] * (1 + 1e-5)
    assert json.loads(json.dumps(rows)) == rows


def test_the_report_answers_by_the_area_under_the_curve(trials: list[Trial], tmp_path: Path) -> None:
    written = report.write(trials, report.About("strange rows", "val/reconstruction_mse"), tmp_path, lambda each: each)
    page = (tmp_path / "report.html").read_text()
    assert {"test/auroc", "test/average_precision", "test/precision_at_n"} <= written.verdicts.keys()
    assert "auroc/error" in written.means and "auroc/error" not in written.verdicts
    assert "AUROC" in written.answer and "knn" in written.verdicts["test/auroc"]
    for name in ("ranking", "scores", "strangest"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000 and name in page


def test_a_training_job_is_scored_too(table: tuple[Data, Facts, Arrays]) -> None:
    data, facts, arrays = table
    plan = next(plan for plan in plans(data, facts) if plan.row == "denoising")
    known: dict[str, Result] = {}
    measured = computed(plan.stage, arrays, known)
    trained = computed(plan.trained, arrays, known)
    spec = EvaluateSpec(task="reconstruct", classes=(), pictures=True, anomalies="clean", columns=facts.columns)
    found = evaluate(spec, Context(), data=arrays, finetuned=trained)
    assert {"ranking", "scores", "strangest"} < found.figures.keys()
    assert found.metrics["test/auroc_low"] < found.metrics["test/auroc"] < found.metrics["test/auroc_high"]
    ends = [found.metrics[f"reference/difference{end}"] for end in ("_low", "", "_high")]
    assert ends[1] == pytest.approx(found.metrics["test/auroc"] - found.metrics["reference/auroc"], abs=1e-6)
    assert arrays.test.y is not None
    reference = detect(DetectorSpec(kind="knn", seed=0), Context(), data=arrays).weights["score"]
    difference = measured.weights["auroc"] - rank(reference, arrays.test.y)["auroc"]
    _, mean, low, high = ranking_gain(difference, arrays.test.y == 1)
    assert ends == pytest.approx([low, mean, high], abs=1e-5)


def test_a_single_anomaly_proves_nothing(table: tuple[Data, Facts, Arrays]) -> None:
    data, facts, arrays = table
    plan = next(plan for plan in plans(data, facts) if plan.row == "denoising")
    trained = computed(plan.trained, arrays)
    spec = EvaluateSpec(task="reconstruct", classes=(), pictures=True, anomalies="clean", columns=facts.columns)
    one = arrays._replace(test=arrays.test._replace(y=(np.arange(len(arrays.test.x)) == 3).astype(np.int64)))
    found = evaluate(spec, Context(), data=one, finetuned=trained).metrics
    assert "test/auroc_low" not in found and found["reference/difference_low"] == -found["reference/difference_high"]


def test_a_huge_value_leaves_scores_finite(table: tuple[Data, Facts, Arrays]) -> None:
    """Squares of such values are infinite in 32 bits, and nothing can be drawn of scores that are."""
    data, facts, arrays = table
    x = arrays.test.x.copy()
    x[2, 1] = 1e30
    huge = arrays._replace(test=arrays.test._replace(x=x))
    planned = {plan.row: plan for plan in plans(data, facts)}
    trained = computed(planned["denoising"].trained, arrays)
    spec = EvaluateSpec(task="reconstruct", classes=(), pictures=True, anomalies="clean", columns=facts.columns)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = evaluate(spec, Context(), data=huge, finetuned=trained)
        scores = {kind: detect(DetectorSpec(kind=kind, seed=0), Context(), data=huge) for kind in get_args(Detector)}
    assert {"codes", "ranking", "scores", "strangest"} < found.figures.keys()
    assert all(np.isfinite(each.weights["score"]).all() for each in scores.values())
    assert all(each.weights["score"].argmax() == 2 for kind, each in scores.items() if kind != "iforest")


@pytest.mark.parametrize("kind", ["plain", "sparse", "contractive", "variational"])
def test_every_variant_is_scored(table: tuple[Data, Facts, Arrays], kind: str) -> None:
    data, facts, arrays = table
    variants = {kind: {"variant": {"kind": kind}, "network": {"widths": [3, 2]}}}
    plan = next(plan for plan in plans(data, facts, variants=variants) if plan.row == kind)
    found = computed(plan.stage, arrays)
    assert found.metrics["test/auroc"] > 0.6 and ("auroc/bound" in found.metrics) == (kind == "variational")


def test_images_are_scored_too() -> None:
    data = Data(anomaly=("0",), limit=200)
    facts = inspect(data)
    plan = next(plan for plan in plans(data, facts) if plan.row == "denoising")
    found = computed(plan.stage, load(data, facts))
    assert found.metrics["test/auroc"] > 0.8
    assert found.config["strangest"][0]["reasons"][0]["feature"].startswith("pixel ")


def test_the_farthest_references_are_left_out_where_rows_may_be_anomalies(table: tuple[Data, Facts, Arrays]) -> None:
    data, facts, arrays = table
    plan = next(plan for plan in plans(data, facts) if plan.row == "denoising")
    net = build_trained(computed(plan.trained, arrays), [], CPU)
    train, validation = known_rows(Context(), arrays)
    train[:5] = 50 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    clean, mixed = (fit_score(net, train, validation, mixed) for mixed in (False, True))
    rows = len(train) + len(validation)
    assert (len(clean.references), len(mixed.references)) == (rows, rows - int(0.1 * rows))
    assert np.abs(clean.references).max() > 20 > 10 > np.abs(mixed.references[:, :4]).max()
    assert (np.diff(mixed.scores) >= 0).all()


def test_what_a_score_keeps_of_the_rows(table: tuple[Data, Facts, Arrays]) -> None:
    data, facts, arrays = table
    plan = next(plan for plan in plans(data, facts) if plan.row == "denoising")
    net = build_trained(computed(plan.trained, arrays), [], CPU)
    train, validation = known_rows(Context(), arrays)
    kept = fit_score(net, train, validation, False)
    rows = torch.cat([train, validation]).numpy()
    assert kept.spread == pytest.approx(np.sqrt(rows.var(0).mean()), rel=1e-4)
    errors = (validation - net.reconstruct(validation)).detach().numpy()
    assert kept.residual_spread == pytest.approx(np.sqrt(np.square(errors).mean(0)), rel=1e-4)
    _, numbers = NearestNeighbors(n_neighbors=6).fit(rows).kneighbors(rows)
    differences = (rows - rows[numbers[:, 1:]].mean(1)) / kept.spread
    assert kept.neighbour_spread == pytest.approx(np.sqrt(np.square(differences).mean(0)), rel=1e-3)
    # rows that the network was not trained on tell how usual a score is
    distances, _ = NearestNeighbors(n_neighbors=6).fit(kept.references).kneighbors(kept.references[len(train) :])
    assert kept.scores == pytest.approx(np.sort(distances[:, 1:].mean(1)), rel=1e-3)


@pytest.mark.parametrize(("contamination", "mixed"), [("clean", False), ("mixed", True), (0.03, True)])
def test_the_stages_know_whether_rows_may_be_anomalies(tmp_path: Path, contamination: Any, mixed: bool) -> None:
    data = write_table(tmp_path, contamination=contamination)
    spec = next(plan for plan in plans(data, inspect(data)) if plan.row == "denoising").stage.spec
    assert isinstance(spec, DetectionSpec) and spec.mixed == mixed


def test_a_stream_is_scored_as_the_rows_in_memory_are(tmp_path: Path) -> None:
    """All test rows count, whether they come at once or piece by piece."""
    data = write_table(tmp_path, split="content")
    facts = inspect(data)
    streamed = open_stream(data.model_copy(update={"in_memory": "never"}), facts)
    spec = DetectorSpec(kind="iforest", seed=0)
    results = [detect(spec, Context(), data=each).weights["score"] for each in (load(data, facts), streamed)]
    assert sorted(results[0]) == pytest.approx(sorted(results[1]), rel=1e-3)


@pytest.mark.parametrize(("count", "note"), [(1, "by 1 anomaly, which is too few"), (9, "by 9 anomalies"), (10, "")])
def test_few_anomalies_are_noted(count: int, note: str) -> None:
    found = note_of_few(np.arange(50) < count)
    assert found.get("test/auroc", "").startswith(note) and bool(found) == bool(note)
