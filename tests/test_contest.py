"""Tests of contests (scores, intervals, how often the rule of promotion errs) and of what is called drift."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from aecore.config.experiment import Data, Dense, Experiment, Finetune, Fit
from aecore.config.facts import Facts
from aecore.config.specs import ContestSpec, DriftSpec, Numerics
from aecore.data.dataset import inspect, load
from aecore.data.splits import Arrays, Split, content_hashes
from aecore.data.stream import Stream, open_stream
from aecore.evaluation.drift import cliffs_delta, drift_table, summary
from aecore.evaluation.statistics import gain
from aecore.models.rebuild import build_classifier, build_prepare, build_stack
from aecore.models.storage import Result
from aecore.stages.contest import contest
from aecore.stages.context import Context
from aecore.stages.drift import drift
from aecore.stages.finetune import finetune
from pipelines.graph.recipe import build
from pipelines.retraining.rule import judge
from tests.test_stream import images

MARGIN = 0.005


def signs(better: int, worse: int, rows: int) -> np.ndarray:
    return np.repeat([1.0, -1.0, 0.0], [better, worse, rows - better - worse])


def test_of_a_handful_of_rows_nothing_is_found() -> None:
    # by McNemar's exact test, n rows that are all for one model have p = 2 / 2^n, below 0.05 from n = 6 on
    assert [gain(signs(n, 0, 400)).low > 0 for n in range(1, 9)] == [False] * 5 + [True] * 3
    assert gain(signs(0, 9, 400)).high < 0
    assert gain(np.zeros(100)) == (100, 0.0, 0.0, 0.0)
    assert np.isnan(gain(np.empty(0)).mean) and gain(np.empty(0)).rows == 0


@pytest.mark.parametrize("rows", [300, 50_000])
def test_the_interval_of_many_rows_is_that_of_the_normal_limit(rows: int) -> None:
    values = np.random.default_rng(0).gamma(2, size=rows) - 1.9
    found = gain(values)
    half = 1.96 * values.std() / np.sqrt(rows)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.2 * half)
    assert gain(values) == found


def scores(whole: tuple[float, float, float], frozen: tuple[float, float, float] | None = None) -> dict[str, float]:
    found = {"rows": 1000.0} | dict(zip(("difference", "difference_low", "difference_high"), whole, strict=True))
    if frozen:
        names = ("frozen/difference", "frozen/difference_low", "frozen/difference_high")
        found |= {"frozen/rows": 900.0} | dict(zip(names, frozen, strict=True))
    return found


@pytest.mark.parametrize(
    ("found", "promoted", "why"),
    [
        (scores((0.02, 0.01, 0.03)), True, r"gains \+2.00 points of accuracy \(95 % interval \+1.00 to \+3.00, 1,000"),
        (scores((0.004, 0.002, 0.006)), False, "less than the margin of 0.5"),
        (scores((0.0, 0.0, 0.0)), False, "less than the margin of 0.5: a tie"),
        (scores((0.02, -0.001, 0.04)), False, "may be chance: a tie"),
        (scores((0.02, 0.01, 0.03), (-0.02, -0.03, -0.01)), False, "loses: -2.00 points"),
        (scores((0.02, 0.01, 0.03), (-0.01, -0.03, 0.01)), True, "at least the margin"),
    ],
)
def test_the_rule(found: dict[str, float], promoted: bool, why: str) -> None:
    took, reason = judge("accuracy", found, MARGIN)
    assert took == promoted and re.search(why, reason), reason


def simulated(gap: float, rng: np.random.Generator, rows: int = 10_000) -> bool:
    """Decide on a simulated challenger that is better by `gap` on average; nothing is trained.

    As classifiers with 2.5 % test error are found to be: they differ in whether they are right on 1.2 % of the rows,
    and retrained with another seed their true accuracy varies by 0.1 points (mnist_best.yaml: by 0.03 in three).
    """
    true = rng.normal(gap, 0.001 * np.sqrt(2))
    chances = [0.006 + max(true, 0), 0.006 + max(-true, 0)]
    better = rng.choice([1.0, -1.0, 0.0], rows, p=[*chances, 1 - sum(chances)])
    _, *interval = gain(better)
    names = ("difference", "difference_low", "difference_high")
    return judge("accuracy", {"rows": float(rows), **dict(zip(names, interval, strict=True))}, MARGIN)[0]


def test_what_is_no_better_is_not_promoted_and_a_gain_of_a_point_is() -> None:
    rng = np.random.default_rng(0)
    equal = [simulated(0.0, rng) for _ in range(400)]
    better = [simulated(0.01, rng) for _ in range(200)]
    # of 40 challengers that are equal at most 2 may be promoted, of 20 that are better at least 18 must; ten times each
    assert sum(equal) <= 4 and sum(better) >= 180
    assert max(sum(equal[n : n + 40]) for n in range(0, 400, 40)) <= 2
    assert min(sum(better[n : n + 20]) for n in range(0, 200, 20)) >= 18


def made(data: Data, facts: Facts, rows: Arrays | Stream, task: str, seed: int) -> Result:
    experiment = Experiment(
        data=data, network=Dense(widths=(24,)), pretrain=Fit(epochs=2), seed=seed,
        finetune=Finetune(task=task, epochs=3),
    )  # fmt: skip
    graph = build(experiment, facts, Numerics())
    assert graph.finetune is not None
    (layer,) = graph.layers
    below = layer.function()(layer.spec, Context(), data=rows)
    return graph.finetune.function()(graph.finetune.spec, Context(), data=rows, layers=[below])


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, digits: tuple[Facts, Arrays]) -> dict[str, Any]:
    """Make digits in four shades, of which the champion did not see the last one, and two models of each task."""
    data = images(tmp_path_factory.mktemp("set") / "digits.parquet", digits).model_copy(update={"split": "content"})
    facts = inspect(data)
    rows = load(data, facts)
    found: dict[str, Any] = {"data": data, "facts": facts, "rows": rows}
    for task in ("classify", "reconstruct"):
        found[task] = [made(data, facts, rows, task, seed) for seed in (0, 1)]
    seen = content_hashes(rows.test.x[rows.test.x.reshape(len(rows.test.x), -1).min(1) < 3])
    found["earlier"] = Result({"facts": facts.model_dump(mode="json")}, {"ids": seen}, {})
    return found


def spec(grown: dict[str, Any], metric: str = "accuracy") -> ContestSpec:
    return ContestSpec(metric=metric, facts=grown["facts"], split="content", test=0.2)


def test_rows_are_told_apart_and_scored_alike_by_both(grown: dict[str, Any]) -> None:
    one, two = grown["classify"]
    rows, earlier = grown["rows"], grown["earlier"]
    found = contest(spec(grown), Context(), data=rows, champion=one, challenger=two, earlier=earlier)
    scored = found.metrics
    net = [build_classifier(result).eval() for result in (one, two)]
    x = build_prepare(one)(torch.tensor(rows.test.x))
    right = [(model(x).argmax(1).numpy() == rows.test.y) for model in net]
    fresh = ~np.isin(content_hashes(rows.test.x), earlier.weights["ids"])
    assert 0.2 < fresh.mean() < 0.3
    for prefix, own in (("", fresh | True), ("frozen/", ~fresh), ("newest/", fresh)):
        assert scored[f"{prefix}rows"] == own.sum()
        means = [r[own].mean() for r in right]
        assert [scored[f"{prefix}{who}/accuracy"] for who in ("champion", "challenger")] == pytest.approx(means)
        assert scored[f"{prefix}difference"] == pytest.approx(means[1] - means[0])
    assert np.array_equal(found.weights["ids"], content_hashes(rows.test.x))
    assert Facts.model_validate(found.config["facts"]) == grown["facts"]


def test_the_first_one_has_nobody_to_beat(grown: dict[str, Any]) -> None:
    found = contest(spec(grown), Context(), data=grown["rows"], challenger=grown["classify"][0])
    assert set(found.metrics) == {"rows", "challenger/accuracy"}


def test_errors_are_compared_in_the_units_of_the_champion(grown: dict[str, Any]) -> None:
    one, two = grown["reconstruct"]
    same = contest(spec(grown, "reconstruction"), Context(), data=grown["rows"], champion=one, challenger=one).metrics
    assert same["difference"] == same["difference_low"] == same["difference_high"] == 0
    assert same["champion/reconstruction"] == pytest.approx(
        float(np.mean(stages_error(one, grown["rows"].test))), rel=1e-4
    )
    # the same model, but its features are scaled by half: its errors are the same in other units
    halved = Result(two.config, two.weights | {"prepare.scale": two.weights["prepare.scale"] / 2}, {})
    found = contest(spec(grown, "reconstruction"), Context(), data=grown["rows"], champion=two, challenger=halved)
    model = build_stack(two).eval()
    x = torch.tensor(grown["rows"].test.x).float() * torch.tensor(two.weights["prepare.scale"])
    with torch.no_grad():
        expected = (2 * model.reconstruct(x / 2) - x).square().mean()
    assert found.metrics["challenger/reconstruction"] == pytest.approx(float(expected), rel=1e-4)


def stages_error(result: Result, rows: Split) -> np.ndarray:
    from aecore.serving.model import Model

    return Model(result).measure(rows.x)["reconstruction_mse"]


def test_read_from_disk_all_test_rows_count_too(grown: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aecore.data.sets.PIECE_BYTES", 700 * 64)
    monkeypatch.setattr(
        "aecore.data.stream.SAMPLE_BYTES", {"train": 500 * 64, "validation": 300 * 64, "test": 200 * 64}
    )
    streamed = open_stream(grown["data"].model_copy(update={"in_memory": "never"}), grown["facts"])
    one, two = grown["classify"]
    both = [
        contest(spec(grown), Context(), data=d, champion=one, challenger=two, earlier=grown["earlier"])
        for d in (grown["rows"], streamed)
    ]
    assert both[0].metrics == pytest.approx(both[1].metrics)
    assert set(both[0].weights["ids"]) == set(both[1].weights["ids"])


def test_a_shade_that_the_champion_never_saw_is_drift(grown: dict[str, Any]) -> None:
    data, facts, rows = grown["data"], grown["facts"], grown["rows"]
    dark = [Split(s.x[(own := s.x.reshape(len(s.x), -1).min(1) < 3)], s.y[own]) for s in rows[:3]]
    champion = made(data, facts, rows._replace(train=dark[0], validation=dark[1], test=dark[2]), "classify", 0)
    ask = DriftSpec(classes=facts.classes, threshold=0.2)
    found = drift(ask, Context(), data=rows, champion=champion, earlier=grown["earlier"])
    assert found.metrics["drift/drifted"] == 1 and found.metrics["drift/rows"] > 100
    assert found.config["drifted"] and found.config["words"].startswith("drift in ")
    with Image.open(io.BytesIO(found.figures["drift"])) as picture:
        assert min(picture.size) > 300
    table = list(csv.DictReader(io.StringIO(found.config["table"])))
    quantities = {row["quantity"] for row in table}
    assert {"error", "code 0", "feature 0", "classes", "unknown classes"} <= quantities
    assert {row["class"] for row in table if row["quantity"] == "error"} == {"all", *facts.classes}
    nothing = Result({"facts": facts.model_dump(mode="json")}, {"ids": content_hashes(rows.test.x)}, {})
    none = drift(ask, Context(), data=rows, champion=champion, earlier=nothing)
    assert none.metrics == {"drift/rows": 0, "drift/drifted": 0} and none.config["table"].count("\n") == 1


def drawn(rng: np.random.Generator, rows: int, shift: float = 0.0) -> dict[str, np.ndarray]:
    x = rng.normal(shift, 1, size=(rows, 30))
    x[:, 0] = 0  # a pixel that is always black
    x[:, 1] = np.where(rng.random(rows) < 0.002, 1.0, 0.0)  # and one that is nearly always black
    return {"code": x[:, 2:12], "x": x, "error": rng.gamma(2, size=rows) * np.exp(shift)}


def reference(rng: np.random.Generator) -> dict[str, np.ndarray]:
    rows = drawn(rng, 2000)
    stored = {"code": rows["code"], "error": rows["error"], "mean": rows["x"].mean(0), "std": rows["x"].std(0)}
    return {f"reference.{k}": v for k, v in stored.items()} | {"reference.label": rng.integers(0, 2, 2000)}


def test_of_rows_alike_little_is_found_and_of_others_enough() -> None:
    rng = np.random.default_rng(0)
    old = reference(rng)
    kinds = {"class": np.array(["ash", "oak"])}

    def found(rows: int, shift: float = 0.0) -> bool:
        new = drawn(rng, rows, shift) | {"class": rng.choice(kinds["class"], rows)}
        return any(row["drifted"] for row in drift_table(new, old, ["ash", "oak"], 0.2))

    assert sum(found(rows) for rows in (30, 100, 1000) for _ in range(10)) <= 1
    # with 20,000 rows a shift of a twentieth is significant, but too small to matter
    assert not found(20_000, 0.05)
    assert all(found(rows, 0.8) for rows in (100, 1000) for _ in range(5))


def test_effects_are_what_they_are_called() -> None:
    rng = np.random.default_rng(1)
    old, new = reference(rng), drawn(rng, 3000, 0.5) | {"class": np.repeat(["ash", "elm"], [2700, 300])}
    table = {(row["quantity"], row["class"]): row for row in drift_table(new, old, ["ash", "oak"], 0.2)}
    # a shift of half a deviation moves a normal distribution function by 0.197 at most
    assert table["code 0", "all"]["effect"] == pytest.approx(0.197, abs=0.04)
    assert table["feature 5", "all"]["effect"] == pytest.approx(0.197, abs=0.02)
    assert table["feature 5", "all"]["shift"] == pytest.approx(0.5, abs=0.05)
    assert table["feature 0", "all"]["effect"] == 0 and table["feature 0", "all"]["p"] == 1
    oak = (old["reference.label"] == 1).mean()
    assert table["classes", "all"]["effect"] == pytest.approx(oak)
    assert table["unknown classes", "all"]["effect"] == pytest.approx(0.1)
    assert table["unknown classes", "all"]["drifted"]
    assert ("error", "ash") in table and ("error", "oak") not in table
    assert "unknown classes 0.10" in summary([table["unknown classes", "all"]], 3000)
    assert summary([{"quantity": "error", "class": "\x1b[31m", "effect": 0.5}], 9).endswith(
        r"rows: error of \x1b[31m 0.50"
    )
    a, b = rng.normal(size=50), rng.normal(0.7, size=40)
    signs_of = np.sign(b[:, None] - a[None])
    assert cliffs_delta(b, a) == pytest.approx(signs_of.mean())
    assert table["error", "all"]["p"] == pytest.approx(
        stats.ks_2samp(old["reference.error"], new["error"], method="asymp").pvalue
    )  # fmt: skip


def test_warm_starts_take_the_weights_over_and_a_head_only_for_the_same_classes(
    grown: dict[str, Any], tmp_path: Path
) -> None:
    data, facts, rows = grown["data"], grown["facts"], grown["rows"]
    parent = grown["classify"][0]
    experiment = Experiment(data=data, network=Dense(widths=(24,)), finetune=Finetune(epochs=1, lr=1e-9), seed=7)
    graph = build(experiment, facts, Numerics())
    assert graph.finetune is not None
    own: Any = graph.finetune.spec
    warm = finetune(own, Context(), data=rows, parent=parent)
    for name, value in parent.weights.items():
        if name.startswith(("head.", "encoders.", "autoencoder.")):
            assert np.allclose(warm.weights[name], value, atol=1e-6), name
    assert warm.config["autoencoder"] == parent.config["autoencoder"] and "reference.error" in warm.weights
    other = finetune(own.model_copy(update={"classes": (*"abcdefghijk",)}), Context(), data=rows, parent=parent)
    assert other.weights["head.weight"].shape == (11, 24)
    assert np.allclose(other.weights["encoders.0.affine.weight"], parent.weights["encoders.0.affine.weight"], atol=1e-6)
