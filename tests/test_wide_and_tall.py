"""Wide and tall: the cost of references and measures is bounded by the data, and samples are said to be such."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA

from aecore.config.experiment import Data, Dense
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.config.specs import ContestSpec, DriftSpec, EvaluateSpec, MeasureSpec, ReferenceSpec
from aecore.core.notes import describe
from aecore.data.splits import Arrays, Split
from aecore.evaluation import contraction as contracting
from aecore.evaluation import drift as drifting
from aecore.evaluation import generative, probes, statistics
from aecore.evaluation.figures import model as figures
from aecore.evaluation.scoring import BySplit
from aecore.evaluation.statistics import compare
from aecore.evaluation.threads import side_by_side
from aecore.models.spec import LayerSpec
from aecore.models.storage import Result
from aecore.stages import drawings
from aecore.stages import drift as drift_stage
from aecore.stages import reference as references
from aecore.stages.contest import contest
from aecore.stages.context import Context
from aecore.stages.drift import drift
from aecore.stages.evaluate import evaluate
from aecore.stages.finetune import finetune
from aecore.stages.measure import measure
from aecore.stages.reference import reference
from aecore.variants import Contractive, Plain, Variational
from pipelines.reporting.summary import describe_tests
from tests.test_few_of_a_kind import tuning
from tests.test_stages import tuning as digits_tuning


def rows_of(rows: int, features: int, rank: int | None = None) -> Arrays:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, rows)
    if rank is None:
        x = rng.standard_normal((rows, features), dtype=np.float32)
    else:
        factors = rng.normal(size=(rank, features)) * np.linspace(3, 1, rank)[:, None]
        x = (rng.normal(size=(rows, rank)) @ factors).astype(np.float32)
    x[:, : min(features, 20)] += y[:, None]
    parts = np.split(np.arange(rows), [int(0.6 * rows), int(0.8 * rows)])
    one, two, three = (Split(x[n], y[n]) for n in parts)
    return Arrays(one, two, three, np.zeros((), np.float32), np.ones((), np.float32))


def pca(data: Arrays, width: int) -> Result:
    layer = LayerSpec(
        kind="dense", in_shape=data.train.x.shape[1:], code_shape=(width,), activation="linear", likelihood="gaussian",
        out_activation="linear", levels=0, dropout=0, normalization="none", tied=False,
    )  # fmt: skip
    return reference(ReferenceSpec(kind="pca", layers=(layer,), seed=0), Context(), data=data)


SHAPES: dict[str, tuple[int, int, int, str]] = {
    # rows, features, width of the code, solver; the first three are as before, the others failed or took gigabytes
    "tall": (5000, 10, 4, "covariance_eigh"),
    "square": (300, 180, 16, "covariance_eigh"),
    "some more features than rows": (100, 900, 8, "covariance_eigh"),
    "all features": (500, 6, 6, "covariance_eigh"),
    "wide": (100, 6000, 8, "full"),
    "very wide": (20, 40_000, 3, "full"),
    "as many units as rows": (50, 3000, 30, "full"),
    "more units than rows, wide": (50, 3000, 45, "full"),
    "more units than rows": (50, 200, 45, "covariance_eigh"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_pca_follows_the_shape(shape: str) -> None:
    rows, features, width, solver = SHAPES[shape]
    data = rows_of(rows, features)
    found, x = pca(data, width), data.train.x
    count = min(width, len(x), features)
    axes, centre = found.weights["layers.0.encoder.affine.weight"], found.weights["layers.0.decoder.bias"]
    known = PCA(count, svd_solver=solver).fit(x)
    assert np.array_equal(axes[:count], known.components_) and np.array_equal(centre, known.mean_)
    assert axes.shape == (width, features) and not axes[count:].any()
    assert ("notes" in found.config) == (count < width)
    # the error of the first axes is what the singular values of the others leave
    singular = np.linalg.svd(x.astype(np.float64) - x.mean(0, dtype=np.float64), compute_uv=False)
    centred = x.astype(np.float64) - centre
    left = np.square(centred - centred @ axes.T.astype(np.float64) @ axes).sum()
    assert left == pytest.approx(np.square(singular[count:]).sum(), rel=1e-4, abs=1e-5 * np.square(singular).sum())


def test_a_pca_wider_than_its_rows_is_measured_and_said() -> None:
    data = rows_of(50, 300)
    spec = MeasureSpec(variant=None, classes=("a", "b", "c"), labels=(30,), seed=0, pictures=True)
    found = measure(spec, Context(), data=data, stack=pca(data, 45))
    assert (
        describe(found.config["notes"])[0] == "PCA: 30 of 45 units are used, since 30 training rows have no more axes"
    )
    assert found.metrics["units/dead"] >= 15 / 45


def test_where_rows_and_features_are_many_pca_is_randomised(monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows_of(400, 120, rank=5)
    exact = pca(data, 5)
    monkeypatch.setattr(references, "_EXACT_SIDE", 100)
    one, two = pca(data, 5), pca(data, 5)
    weight = "layers.0.encoder.affine.weight"
    assert np.array_equal(one.weights[weight], two.weights[weight])
    assert np.abs((one.weights[weight] * exact.weights[weight]).sum(1)) == pytest.approx(np.ones(5), abs=1e-3)
    assert "randomised method" in describe(one.config["notes"])[0] and "notes" not in exact.config


@pytest.mark.parametrize(("rows", "features"), [(80, 20_000), (12, 100_000), (60_000, 10)])
def test_references_take_memory_in_proportion_to_the_data(rows: int, features: int) -> None:
    data = rows_of(rows, features)
    tracemalloc.start()
    pca(data, 5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * data.train.x.nbytes + 2**23  # a matrix of all pairs of features would take 1.6 or 40 GB


@pytest.mark.parametrize(
    ("rows", "features", "variant"),
    [
        (80, 20_000, Plain()),
        pytest.param(80, 20_000, Contractive(), marks=pytest.mark.long),
        pytest.param(80, 20_000, Variational(), marks=pytest.mark.long),
        pytest.param(20, 100_000, Plain(), marks=pytest.mark.long),
        (6000, 10, Plain()),
    ],
)
def test_measures_take_memory_in_proportion_to_the_data(rows: int, features: int, variant: Any) -> None:
    """Memory of NumPy is traced, in which codes, distances and figures lie."""
    data = rows_of(rows, features)
    facts = Facts(digest="", shape=(features,), levels=0, classes=("a", "b", "c"), rows=rows)
    layers = layer_specs(Dense(widths=(8, 4)), Data(), facts)
    layers[1] = variant.build(layers[1], 2)
    spec = digits_tuning(layers, "reconstruct", epochs=1, batch_size=256).model_copy(update={"variant": variant})
    stack = finetune(spec, Context(), data=data)
    tracemalloc.start()
    measures = MeasureSpec(variant=variant, classes=facts.classes, labels=(99_999,), seed=0, pictures=True)
    found = measure(measures, Context(), data=data, stack=stack)
    seen = evaluate(
        EvaluateSpec(task="reconstruct", classes=facts.classes, pictures=True, variant=variant), Context(), data=data,
        finetuned=stack,
    )  # fmt: skip
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    total = sum(split.x.nbytes for split in data[:3])
    assert peak < 8 * total + 2**27
    assert np.isfinite(list(found.metrics.values())).all() and {"codes", "units"} <= seen.figures.keys()
    assert "notes" not in found.config


@pytest.fixture(scope="module")
def tall() -> tuple[Arrays, Result]:
    data = rows_of(3000, 8)
    return data, finetune(tuning(data, ("a", "b", "c"), Plain(), "reconstruct"), Context(), data=data)


LIMITS: dict[str, tuple[Any, dict[str, int], str]] = {
    # the module, its limits as they might be, and what is then said
    "neighbours": (
        probes, {"_MOST_PAIRS": 1, "_FEWEST_COMPARED": 100, "_TREE_UNITS": 0},
        "knn/accuracy: taken on 100 of 600 test rows",
    ),
    "probe": (probes, {"_MOST_PRODUCTS": 6000}, "probe/accuracy: taken on 500 of 1,800 training rows"),
    "Jacobian": (
        contracting, {"_MOST_PRODUCTS": 10_000},
        "contraction/norm, contraction/relative: taken on 30 of 256 test rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("limit", LIMITS)
def test_exact_measures_fall_back_to_samples_and_say_so(
    limit: str, tall: tuple[Arrays, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    (module, values, words), (data, stack) = LIMITS[limit], tall
    spec = MeasureSpec(variant=Plain(), classes=("a", "b", "c"), labels=(1800,), seed=0, pictures=False)
    exact = measure(spec, Context(), data=data, stack=stack)
    for name, value in values.items():
        monkeypatch.setattr(module, name, value)
    found = measure(spec, Context(), data=data, stack=stack)
    assert "notes" not in exact.config
    assert describe(found.config["notes"]) == [f"{words}, since all would take too long"]
    assert found.metrics.keys() == exact.metrics.keys()
    names = {name for name in exact.metrics if found.metrics[name] != exact.metrics[name]}
    assert names and all(found.metrics[name] == pytest.approx(exact.metrics[name], rel=0.2) for name in names)
    assert {"neighbours": "knn/accuracy", "probe": "probe/accuracy", "Jacobian": "contraction/norm"}[limit] in names


def test_neighbours_in_codes_of_few_units_are_exact_for_any_number_of_rows() -> None:
    labels = BySplit(*(np.zeros(rows, int) for rows in (4_000_000, 1, 200_000)))
    assert len(probes.compared_rows(labels, 4)) == 200_000
    assert len(probes.compared_rows(labels, 16)) == 2**32 // 4_000_000
    mnist = BySplit(*(np.zeros(rows, int) for rows in (51_000, 9000, 10_000)))
    assert np.array_equal(probes.compared_rows(mnist, 64), np.arange(10_000))


def test_of_very_many_rows_the_weighted_bound_is_that_of_a_sample(
    digits: tuple[Facts, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, data = digits
    layers = layer_specs(Dense(widths=(8,)), Data(), facts)
    spec = digits_tuning([Variational().build(layers[0], 1)], "reconstruct", epochs=1)
    stack = finetune(spec.model_copy(update={"variant": Variational()}), Context(), data=data)
    monkeypatch.setattr(generative, "_WEIGHTED_ROWS", 50)
    spec_of = MeasureSpec(variant=Variational(), classes=facts.classes, labels=(9999,), seed=0, pictures=False)
    found = measure(spec_of, Context(), data=data, stack=stack)
    assert found.config["notes"] == {"vae/iw_bound": "taken on 50 of 359 test rows, since all would take too long"}
    assert found.metrics["vae/iw_bound"] == pytest.approx(found.metrics["vae/bound"], rel=0.2)


@pytest.mark.parametrize("ratios", [False, True])
def test_of_very_many_points_pairs_are_compared_in_closed_form(ratios: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    base = rng.gamma(2, size=2000)
    values = {
        name: base + shift + 0.1 * rng.normal(size=(3, 2000)) for name, shift in {"a": 0, "b": 0.02, "c": 0.3}.items()
    }
    drawn = compare(values, ratios=ratios)
    monkeypatch.setattr(statistics, "BOOTSTRAPPED_POINTS", 1999)
    assert compare(values, ratios=ratios) == compare(values, 0, ratios)
    for one, two in zip(drawn, compare(values, ratios=ratios), strict=True):
        assert one.difference == pytest.approx(two.difference) and one.holds == two.holds
    assert "150,000 test rows are too many for a bootstrap" in describe_tests(3, 200_000)
    assert "paired bootstrap" in describe_tests(3, 150_000) and "12 rows are too many pairs" in describe_tests(13)


def test_drift_of_many_features_keeps_the_largest_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows_of(400, 300)
    moved = data.test.x.copy()
    moved[:, 7] += 3
    assert data.test.y is not None
    new = data._replace(test=Split(np.concatenate([data.test.x, moved]), np.tile(data.test.y, 2)))
    facts = Facts(digest="", shape=(300,), levels=0, classes=(), rows=400)
    spec = digits_tuning(layer_specs(Dense(widths=(4,)), Data(), facts), "reconstruct", epochs=1)
    served = finetune(spec, Context(), data=data)
    judged = ContestSpec(metric="reconstruction", facts=facts, split="drawn", test=0.2)
    before = contest(judged, Context(), data=data, challenger=served)
    asked = DriftSpec(classes=("a", "b", "c"), threshold=0.2)
    full = drift(asked, Context(), data=new, champion=served, earlier=before)
    assert full.metrics["drift/rows"] == 80 and "lists" not in full.config["words"]
    for module in (drifting, drift_stage):
        monkeypatch.setattr(module, "LISTED", 20)
    monkeypatch.setattr(drift_stage, "_MOST_VALUES", 300 * 60)
    monkeypatch.setattr(drift_stage, "_FEWEST_ROWS", 50)
    found = drift(asked, Context(), data=new, champion=served, earlier=before)
    assert found.metrics["drift/rows"] == 60 and found.metrics["drift/drifted"] == 1
    lines = found.config["table"].splitlines()
    assert len(lines) == 21 and lines[1].startswith("feature 7,")
    assert "the table lists 20 of 305 comparisons" in found.config["words"]


def test_a_plane_of_codes_shows_so_many_training_rows(
    tall: tuple[Arrays, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = tall
    drawn: list[int] = []
    monkeypatch.setattr(drawings, "_DRAWN_ROWS", 500)

    def draw(points: np.ndarray, *rest: Any) -> bytes:
        drawn.append(len(points))
        return b""

    monkeypatch.setattr(figures, "codes_map", draw)
    codes = BySplit(*(split.x[:, :2] for split in data[:3]))

    with side_by_side() as threads:
        drawings.map_codes(threads, codes, data, ("a", "b", "c"))()
    assert drawn == [500]
