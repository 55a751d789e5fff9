"""Measures of how well scores rank anomalies, and what each row adds to them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from aecore.evaluation.ranking import curves, interval, measure, rank, summarize
from aecore.evaluation.statistics import compare


def draw(seed: int, rows: int, places: int = 8, gap: float = 1.0, share: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Draw scores with `places` decimals, so that few places make ties, and mark some rows as anomalies."""
    rng = np.random.default_rng(seed)
    anomaly = rng.random(rows) < share
    anomaly[:2] = True, False
    return np.round(rng.normal(size=rows) + gap * anomaly, places), anomaly


def precision_of_first(scores: np.ndarray, anomaly: np.ndarray) -> float:
    """Average over all orders of tied rows the share of anomalies among the first rows."""
    orders = (np.lexsort((np.random.default_rng(n).random(len(scores)), -scores)) for n in range(3000))
    return float(np.mean([anomaly[order[: anomaly.sum()]].mean() for order in orders]))


@given(st.integers(0, 10**6), st.integers(3, 60), st.integers(0, 3))
def test_means_over_rows_are_the_measures_of_scikit_learn(seed: int, rows: int, places: int) -> None:
    scores, anomaly = draw(seed, rows, places)
    found = summarize(rank(scores, anomaly))
    assert found["auroc"] == pytest.approx(roc_auc_score(anomaly, scores), abs=1e-12)
    assert found["average_precision"] == pytest.approx(average_precision_score(anomaly, scores), abs=1e-12)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(4, 20), st.integers(0, 3))
def test_what_a_row_adds_to_the_average_precision_is_what_is_lost_without_it(seed: int, rows: int, places: int) -> None:
    scores, anomaly = draw(seed, rows, places)
    anomaly[2] = True
    each = np.arange(rows)
    without = np.array([average_precision_score(anomaly[each != n], scores[each != n]) for n in each])
    added = rank(scores, anomaly)["average_precision"]
    assert added - added.mean() == pytest.approx(-(rows - 1) * (without - without.mean()), abs=1e-8)


@given(st.integers(0, 10**6), st.integers(3, 60), st.integers(0, 3))
def test_the_spread_over_rows_is_delongs(seed: int, rows: int, places: int) -> None:
    scores, anomaly = draw(seed, rows, places)
    below = (scores[anomaly][:, None] > scores[~anomaly]) + 0.5 * (scores[anomaly][:, None] == scores[~anomaly])
    variance = below.mean(1).var() / anomaly.sum() + below.mean(0).var() / (~anomaly).sum()
    assert rank(scores, anomaly)["auroc"].var() / rows == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize("places", [0, 1, 8])
def test_precision_counts_ties_as_their_share(places: int) -> None:
    scores, anomaly = draw(3, 30, places)
    found = summarize(rank(scores, anomaly))["precision_at_n"]
    assert found == pytest.approx(precision_of_first(scores, anomaly), abs=0.02)


def test_perfect_and_reversed_scores() -> None:
    _, anomaly = draw(0, 50)
    perfect, worst = (summarize(rank(sign * anomaly.astype(float), anomaly)) for sign in (1, -1))
    assert perfect == pytest.approx({"auroc": 1.0, "average_precision": 1.0, "precision_at_n": 1.0})
    assert (worst["auroc"], worst["precision_at_n"]) == pytest.approx((0.0, 0.0))
    assert interval(rank(anomaly.astype(float), anomaly)["auroc"], anomaly) == {}


def test_a_single_anomaly_tells_no_interval() -> None:
    """Nothing is known of how other anomalies score, so that an interval would be much too narrow."""
    scores, anomaly = draw(0, 50)[0], np.arange(50) == 7
    assert interval(rank(scores, anomaly)["auroc"], anomaly) == {}
    assert interval(rank(scores, ~anomaly)["auroc"], ~anomaly) == {}


def test_intervals_hold_the_true_area_as_often_as_they_promise() -> None:
    scores, anomaly = draw(0, 200_000, gap=1.0, share=0.1)
    truth, hits = roc_auc_score(anomaly, scores), 0
    for seed in range(400):
        drawn = draw(seed + 1, 400, gap=1.0, share=0.1)
        ends = interval(rank(*drawn)["auroc"], drawn[1])
        hits += ends["test/auroc_low"] <= truth <= ends["test/auroc_high"]
    assert 0.91 <= hits / 400 <= 0.98


def test_a_difference_between_two_scores_holds_only_where_there_is_one() -> None:
    """Two scores with the same noise differ by chance; a third one, which is better, is found to be so."""
    false = found = 0
    for seed in range(30):
        scores, anomaly = draw(seed, 600, gap=1.0, share=0.2)
        rng = np.random.default_rng(1000 + seed)
        values = {
            name: np.stack(
                [rank(scores + shift * anomaly + rng.normal(0, 0.5, 600), anomaly)["auroc"] for _ in range(3)]
            )
            for name, shift in (("one", 0.0), ("same", 0.0), ("better", 0.8))
        }
        holds = {(pair.first, pair.second): pair.holds for pair in compare(values, replicates=1000)}
        false += holds["one", "same"]
        found += holds["one", "better"]
    assert false <= 3 and found >= 25


def test_curves_are_those_of_scikit_learn() -> None:
    scores, anomaly = draw(5, 80, 1)
    points = curves(scores, anomaly)
    false, recall, _ = roc_curve(anomaly, scores, drop_intermediate=False)
    assert points.false_positives == pytest.approx(false) and points.recall == pytest.approx(recall)
    precision, _, _ = precision_recall_curve(anomaly, scores)
    assert points.precision[1:] == pytest.approx(precision[:-1][::-1])
    assert len(curves(*draw(6, 5000), points=100).recall) <= 101


def test_measures_are_named_by_score() -> None:
    scores, anomaly = draw(7, 60)
    found = measure(rank(scores, anomaly), {"other": -scores}, anomaly)
    assert found["auroc/other"] == pytest.approx(1 - found["test/auroc"])
    assert set(found) == {"test/auroc", "test/average_precision", "test/precision_at_n", "auroc/other"}
