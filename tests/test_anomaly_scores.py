"""The default score of anomalies: the search for neighbours, what a model keeps, and the reasons that it gives."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import nan_euclidean_distances
from sklearn.neighbors import NearestNeighbors

from aecore.anomaly import neighbours
from aecore.anomaly.neighbours import NEIGHBOURS, References, most_references
from aecore.anomaly.reasons import REASONS, Reason, Reasons, feature_names
from aecore.anomaly.score import Explanation, FittedScore, NeighbourScore, fit_score
from aecore.config.experiment import Data, Dense
from aecore.config.facts import Facts, TableColumns
from aecore.config.resolve import layer_specs
from aecore.config.specs import FinetuneSpec
from aecore.data.splits import Arrays, Split
from aecore.evaluation.scoring import TrainedStack
from aecore.models.layers import Layer
from aecore.models.rebuild import build_prepare
from aecore.models.stack import Stack
from aecore.models.storage import Result, load_weights, save_weights
from aecore.serving.model import Model
from aecore.serving.table import write_table
from aecore.stages.context import Context
from aecore.stages.finetune import finetune
from aecore.variants import Denoising

FEATURES, TRAINING, WRONG = 20, 2400, 3
TIME, EPOCH = 7, 1_700_000_000
"""The feature that is a time, and the number of seconds that is subtracted from it."""


def rows(count: int, seed: int, missing: float = 0.0, features: int = 6) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, features)).astype(np.float32)
    x[rng.random(x.shape) < missing] = np.nan
    return torch.tensor(x)


def test_the_nearest_are_those_of_scikit_learn() -> None:
    known, asked = rows(300, 0), rows(50, 1)
    distances, numbers = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(known.numpy()).kneighbors(asked.numpy())
    nearest = References(known).nearest(asked)
    assert np.array_equal(nearest.numbers.numpy(), numbers)
    assert np.allclose(nearest.distances.numpy(), distances, atol=1e-6)
    assert np.allclose(nearest.mean_distance().numpy(), distances.mean(1), atol=1e-6)


@pytest.mark.parametrize(("in_references", "in_rows"), [(0.0, 0.3), (0.3, 0.0), (0.2, 0.2)])
def test_missing_values_of_rows_are_left_out_and_those_of_references_are_expected(
    in_references: float, in_rows: float
) -> None:
    known, asked = rows(300, 0, in_references), rows(50, 1, in_rows)
    asked[:, 0] = rows(50, 3)[:, 0]  # else some rows have no value
    mean, variance = known.double().nanmean(0), known.double().numpy()
    differences = (asked.double()[:, None] - known.double().where(known.isfinite(), mean)).square().numpy()
    differences += np.where(np.isnan(variance), np.nanvar(variance, 0), 0)
    expected = np.sort(np.sqrt(6 * np.nanmean(differences, 2)), 1)[:, :NEIGHBOURS]
    nearest = References(known).nearest(asked)
    assert np.allclose(nearest.distances.numpy(), expected, atol=1e-5)
    if not in_references:
        plain = nan_euclidean_distances(asked.double().numpy(), known.double().numpy())
        assert np.allclose(expected, np.sort(plain, 1)[:, :NEIGHBOURS])
    means = References(known).mean(nearest)
    lacking = known[nearest.numbers].isnan().all(1)
    assert torch.equal(means[lacking], mean.float().expand_as(means)[lacking])


def test_references_without_a_value_do_not_hide_a_strange_one() -> None:
    """With 2 % of the values missing, a row's neighbours were those that lack what is strange in it."""
    known, asked = rows(1000, 0, 0.02), rows(40, 1)
    asked[:, 2] = 10
    references = References(known)
    assert (references.nearest(asked).mean_distance() > 6).all()
    assert (asked - references.mean(references.nearest(asked))).abs().argmax(1).eq(2).all()


def test_a_row_is_no_neighbour_of_its_own() -> None:
    known = rows(300, 0)
    own = torch.tensor([4, 200, 17])
    nearest = References(known).nearest(known[own], own)
    assert not (nearest.numbers == own[:, None]).any()
    distances, _ = NearestNeighbors(n_neighbors=NEIGHBOURS + 1).fit(known.numpy()).kneighbors(known[own].numpy())
    assert np.allclose(nearest.distances.numpy(), distances[:, 1:], atol=1e-6)


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_chunks_of_rows_have_the_same_neighbours(missing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    known, asked, own = rows(300, 0, missing), rows(50, 0, missing), torch.arange(50)
    whole = References(known).nearest(asked, own)
    monkeypatch.setattr(neighbours, "_CHUNK_VALUES", 7 * 300)
    parts = References(known).nearest(asked, own)
    assert torch.equal(parts.numbers, whole.numbers) and torch.equal(parts.distances, whole.distances)
    assert References(known).nearest(asked[:0]).mean_distance().shape == (0,)


def test_few_references_are_all_neighbours() -> None:
    assert References(rows(3, 0)).nearest(rows(2, 1)).numbers.shape == (2, 3)
    assert most_references(10) == 10_000 and most_references(2**20) == 16 and most_references(2**30) > NEIGHBOURS


class Planted:
    """A table of correlated features, a model that learned it, and anomalies of three wrong features each."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        mixing = rng.normal(size=(4, FEATURES))
        spread, mean = np.exp(rng.normal(size=FEATURES)), rng.normal(0, 10, FEATURES)
        spread[TIME], mean[TIME] = 86_400, 0

        def draw(count: int) -> np.ndarray:
            latent = rng.normal(size=(count, 4)) @ mixing / 2
            return (mean + spread * (latent + rng.normal(0, 0.15, latent.shape))).astype(np.float32)

        train, validation, self.normal, self.strange = (draw(count) for count in (TRAINING, 400, 300, 300))
        self.wrong = np.argsort(rng.random(self.strange.shape), 1)[:, :WRONG]
        shifts = rng.choice([-4.0, 4.0], self.wrong.shape) * train.std(0)[self.wrong]
        np.put_along_axis(
            self.strange, self.wrong, (np.take_along_axis(self.strange, self.wrong, 1) + shifts).astype(np.float32), 1
        )
        names = tuple("time" if number == TIME else f"sensor {number}" for number in range(FEATURES))
        offsets = tuple(EPOCH if number == TIME else 0 for number in range(FEATURES))
        self.columns = TableColumns(features=names, types=("double",) * FEATURES, offsets=offsets)
        splits = (Split(train, None), Split(validation, None), Split(self.normal, None))
        arrays = Arrays(*splits, train.mean(0), 1 / train.std(0))
        facts = Facts(digest="0" * 64, shape=(FEATURES,), levels=0, classes=(), rows=TRAINING + 1000)
        layers = layer_specs(Dense(widths=(80,), activation="relu"), Data(likelihood="gaussian"), facts)
        spec = {
            "layers": layers, "task": "reconstruct", "classes": (), "seed": 0, "numerics": {}, "anomalies": "mixed",
            "variant": Denoising(noise="gaussian", level=1.0), "fit": {"epochs": 20, "lr": 3e-3, "batch_size": 64},
            "columns": self.columns,
        }  # fmt: skip
        self.result = finetune(FinetuneSpec.model_validate(spec), Context(), data=arrays)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


def test_a_single_feature_is_compared_with_the_nearest_values() -> None:
    facts = Facts(digest="0" * 64, shape=(1,), levels=0, classes=(), rows=200)
    layers = layer_specs(Dense(widths=(2,)), Data(likelihood="gaussian"), facts)
    stack = TrainedStack(Stack([Layer(spec) for spec in layers]), "fp32", torch.device("cpu"))
    known = torch.linspace(-1, 1, 201)[torch.randperm(201, generator=torch.Generator().manual_seed(0)), None]
    score = NeighbourScore(stack, fit_score(stack, known, known[:50], False))
    with torch.no_grad():
        explanation = score.explain(torch.tensor([[3.0]]), torch.tensor([7.0]))
    assert explanation.contributions.item() == pytest.approx(7) and explanation.expected.item() > 0.9


def test_wrong_features_are_named_first(planted: Planted) -> None:
    model = Model(planted.result)
    scores = model.measure(planted.strange)["score"]
    reasons = model.explain(planted.strange, scores)
    named = [{reason.feature for reason in each} for each in reasons]
    right = [{planted.columns.features[number] for number in row} for row in planted.wrong]
    assert np.mean([one == other for one, other in zip(named, right, strict=True)]) >= 0.99
    # without a second and a third look the wrong features move the others, which then share a sixth of the score
    parts = [
        sum(r.contribution for r in each if r.feature in names) for each, names in zip(reasons, right, strict=True)
    ]
    assert np.mean(parts / scores) >= 0.95
    assert all(len(each) == REASONS and each[0].contribution >= each[-1].contribution for each in reasons)


def test_contributions_sum_to_the_score(planted: Planted) -> None:
    model = Model(planted.result)
    assert model.score is not None
    with torch.no_grad():
        x = model.prepare(torch.tensor(planted.strange))
        scores = model.score.score(x)
        explanation = model.score.explain(x, scores)
    assert (
        torch.allclose(explanation.contributions.sum(1), scores, rtol=1e-5) and (explanation.contributions >= 0).all()
    )


def test_reasons_have_the_units_of_the_table(planted: Planted) -> None:
    """A time in seconds since 1970 is shown as the table has it, though the model reads it less an offset."""
    model, row = Model(planted.result), planted.normal[:1].copy()
    row[0, TIME] += 864_000
    row[0, 0] = 12.5
    shown = {each.feature: each for each in model.explain(row, model.measure(row)["score"])[0]}
    time = shown["time"]
    assert int(time.value) == pytest.approx(EPOCH + int(row[0, TIME]), abs=1)
    assert abs(float(time.expected) - EPOCH) < 86_400 * 5 and float(time.value) - float(time.expected) > 432_000
    assert all(each.value == "12.5" for name, each in shown.items() if name == "sensor 0")


def test_anomalies_are_stranger_than_most_rows(planted: Planted) -> None:
    model = Model(planted.result)
    normal, strange = (model.measure(x) for x in (planted.normal, planted.strange))
    usual = planted.result.weights["anomaly.scores"]
    expected = [100 * np.mean(usual <= score) for score in normal["score"]]
    assert np.allclose(normal["anomaly_score"], expected, atol=1e-4) and normal["anomaly_score"].dtype == np.float32
    assert 40 < normal["anomaly_score"].mean() < 65 and np.median(strange["anomaly_score"]) == 100
    assert normal["score"].dtype == np.float32


def test_a_served_row_has_score_and_reasons(planted: Planted) -> None:
    model = Model(planted.result)
    table = model.predict(write_table(planted.strange[:8], planted.columns))
    assert list(table) == ["code", "reconstruction_mse", "score", "anomaly_score", "reasons"]
    direct = model.explain(planted.strange[:8], model.measure(planted.strange[:8])["score"])
    for row, each in zip(table.reasons, direct, strict=True):
        assert [record["feature"] for record in row] == [reason.feature for reason in each]
        assert all(set(record) == {"feature", "value", "expected", "contribution"} for record in row)
    assert len(model.predict(write_table(planted.strange[:0], planted.columns))) == 0


def test_batches_do_not_alter_scores_and_reasons(planted: Planted) -> None:
    model, x = Model(planted.result), planted.strange[:50]
    scores = model.measure(x)["score"]
    whole, model.batch = model.explain(x, scores), 7
    assert np.allclose(model.measure(x)["score"], scores, rtol=1e-5)
    assert [[r.feature for r in each] for each in model.explain(x, scores)] == [[r.feature for r in e] for e in whole]


@pytest.mark.parametrize("value", [1e20, -3e38])
def test_the_largest_values_give_finite_numbers(value: float, planted: Planted) -> None:
    model, row = Model(planted.result), planted.normal[:1].copy()
    row[0, 3] = value
    table = model.measure(row)
    (reasons,) = model.explain(row, table["score"])
    assert np.isfinite(table["score"]).all() and table["anomaly_score"] == 100
    assert reasons[0].feature == "sensor 3" and np.isfinite([each.contribution for each in reasons]).all()


def test_a_model_keeps_its_score(planted: Planted, tmp_path: Path) -> None:
    save_weights(tmp_path, planted.result.config, planted.result.weights)
    config, weights = load_weights(tmp_path)
    kept, before = FittedScore.from_weights(weights), FittedScore.from_weights(planted.result.weights)
    assert kept is not None and before is not None
    assert all(np.array_equal(one, two) and one.dtype == np.float32 for one, two in zip(kept, before, strict=True))
    assert {name: weights[name] for name in kept.to_weights()}.keys() == {
        f"anomaly.{name}" for name in FittedScore._fields
    }
    again, first = (Model(result).measure(planted.strange) for result in (Result(config, weights, {}), planted.result))
    assert all(np.array_equal(again[name], first[name]) for name in first)


def test_a_model_without_a_score_answers_as_before(planted: Planted) -> None:
    weights = {name: value for name, value in planted.result.weights.items() if not name.startswith("anomaly.")}
    model = Model(replace(planted.result, weights=weights))
    table = model.predict(write_table(planted.normal[:5], planted.columns))
    errors = planted.result.weights["reference.error"]
    expected = [100 * np.mean(errors <= error) for error in table.reconstruction_mse]
    assert list(table) == ["code", "reconstruction_mse", "anomaly_score"]
    assert np.allclose(table.anomaly_score, expected, atol=1e-4) and model.score is None


def test_features_without_names_are_called_by_their_place() -> None:
    assert feature_names(TableColumns(), (3,)) == ["feature 0", "feature 1", "feature 2"]
    assert feature_names(TableColumns(), (1, 2, 2))[3] == "pixel 0, 1, 1"


def test_equal_training_rows_give_finite_scores() -> None:
    """The spreads are then rounding errors or 0, and the features of another row are strange all the same."""
    equal = np.ones((40, 4), np.float32)
    splits = (Split(equal, None), Split(equal[:8], None), Split(equal[:8], None))
    facts = Facts(digest="0" * 64, shape=(4,), levels=0, classes=(), rows=56)
    spec = {
        "layers": layer_specs(Dense(widths=(8,)), Data(likelihood="gaussian"), facts), "task": "reconstruct",
        "classes": (), "seed": 0, "numerics": {}, "anomalies": "clean", "variant": Denoising(),
        "fit": {"epochs": 2}, "columns": TableColumns(features=("a", "b", "c", "d"), types=("double",) * 4),
    }  # fmt: skip
    arrays = Arrays(*splits, equal[0], np.ones(4, np.float32))
    model = Model(finetune(FinetuneSpec.model_validate(spec), Context(), data=arrays))
    asked = np.array([[1, 1, 1, 1], [1, 1, 3, 1], [1e30, 1, 1, 1]], np.float32)
    scores = model.measure(asked)["score"]
    assert np.isfinite(scores).all() and scores[0] < scores[1] < scores[2]
    _, second, third = model.explain(asked, scores)
    assert second[0].feature == "c" and third
    assert 0 < sum(each.contribution for each in third) <= scores[2] * (1 + 1e-5)


def test_a_usual_category_tells_its_share_and_what_adds_nothing_is_no_reason(planted: Planted) -> None:
    columns = TableColumns(
        features=("colour", "size"), types=("string", "double"), categories=(("blue", "red"), ()), missing="impute"
    )
    score = SimpleNamespace(
        explain=lambda x, scores: Explanation(torch.tensor([[1.5, 0.5, 0.0]]), torch.tensor([[0.4, 0.6, 7.0]]))
    )
    prepare = build_prepare(planted.result)
    prepare.scale, prepare.shift = torch.ones(()), torch.zeros(())
    reasons = Reasons(cast(NeighbourScore, score), prepare, columns)
    raw = torch.tensor([[0.0, 1.0, torch.nan]])
    assert reasons.of(raw, torch.tensor([2.0])) == [[Reason("colour", "red", "red (60 %)", 2.0)]]
