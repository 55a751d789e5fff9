"""How well scores rank anomalies before normal rows: three measures, each as a mean over the test rows.

A value per row lets a measure that is no mean be compared in pairs over rows: the values of a row are what it adds to
the measure, by its influence, so that their mean is the measure and their spread is that of the measure.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Curves(NamedTuple):
    """A ROC curve and a precision-recall curve, at the same thresholds on the score, from the highest down."""

    false_positives: np.ndarray
    """Share of the normal rows whose score reaches the threshold, from 0."""
    recall: np.ndarray
    """Share of the anomalies whose score does, from 0."""
    precision: np.ndarray
    """Share of anomalies among the rows whose score does."""


def rank(scores: np.ndarray, anomaly: np.ndarray) -> dict[str, np.ndarray]:
    """Return for each measure what each test row adds to it, (rows,); the mean over rows is the measure.

    The measures are `auroc`, the area under the ROC curve; `average_precision`; and `precision_at_n`, the share of
    anomalies among as many of the strangest rows as there are anomalies.

    Args:
        scores: (rows,) the higher, the stranger; equal scores are ties.
        anomaly: (rows,) whether a row is an anomaly; there must be rows of both kinds.
    """
    anomaly = anomaly.astype(bool)
    return {
        "auroc": _auroc(scores, anomaly),
        "average_precision": _average_precision(scores, anomaly),
        "precision_at_n": _precision(scores, anomaly),
    }


def measure(
    added: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray], anomaly: np.ndarray
) -> dict[str, float]:  # fmt: skip
    """Return as `test/...` all measures of the default score, and as `auroc/...` the area under the ROC curve of each
    other score.

    Args:
        added: (rows,) what `rank` returns of the default score.
        others: (rows,) further scores by name.
        anomaly: (rows,) whether a row is an anomaly.
    """
    areas = {name: float(_auroc(scores, anomaly.astype(bool)).mean()) for name, scores in others.items()}
    measures = {f"test/{name}": value for name, value in summarize(added).items()}
    return measures | {f"auroc/{name}": area for name, area in areas.items()}


def interval(auroc: np.ndarray, anomaly: np.ndarray) -> dict[str, float]:
    """Return the ends of the 95 % interval of the area under the ROC curve as `test/auroc_low` and `test/auroc_high`,
    by the normal approximation (DeLong et al. 1988); nothing where all anomalies come first or where there is a single
    row of a kind, since then the rows tell no spread.

    Args:
        auroc: (rows,) what `rank` returns.
        anomaly: (rows,) whether a row is an anomaly.
    """
    mean, error = float(auroc.mean()), float(auroc.std()) / np.sqrt(len(auroc))
    if not error or min(anomaly.sum(), (~anomaly).sum()) < 2:
        return {}
    return {"test/auroc_low": max(0.0, mean - 1.96 * error), "test/auroc_high": min(1.0, mean + 1.96 * error)}


def summarize(added: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the measures from what `rank` returns."""
    return {name: float(each.mean()) for name, each in added.items()}


def curves(scores: np.ndarray, anomaly: np.ndarray, points: int = 300) -> Curves:
    """Return the curves of these scores (rows,), at no more than about so many thresholds."""
    order = np.argsort(-scores, kind="stable")
    hits, total = np.cumsum(anomaly[order].astype(bool)), np.arange(1, len(order) + 1)
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of each group of ties
    if len(last) > points:
        last = last[np.unique(np.linspace(0, len(last) - 1, points).round().astype(int))]
    found, all_found = hits[last], total[last]
    recall = np.append(0.0, found / hits[-1])
    false = np.append(0.0, (all_found - found) / max(1, len(order) - hits[-1]))
    precision = found / all_found
    return Curves(false, recall, np.append(precision[0], precision))


def _auroc(scores: np.ndarray, anomaly: np.ndarray) -> np.ndarray:
    """Return what rows add to the area under the ROC curve, by the components of DeLong et al. (1988, sec. 3): the
    share of the rows of the other kind on the right side of a row. The variance of their mean is DeLong's."""
    own = np.where(anomaly, _share_below(scores, scores[~anomaly]), 1 - _share_below(scores, scores[anomaly]))
    area = own[anomaly].mean()
    return area + (own - area) / np.where(anomaly, anomaly.mean(), 1 - anomaly.mean())


def _share_below(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the share of `others` below each score; ties count half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")
    return below / (2 * len(ordered))


def _average_precision(scores: np.ndarray, anomaly: np.ndarray) -> np.ndarray:
    """Return what rows add to the average precision, by the jackknife: how much it changes without the row, times the
    number of rows."""
    rows, positives = len(scores), int(anomaly.sum())
    order = np.argsort(-scores, kind="stable")
    # rows with equal scores form a group, all of which are found at one threshold
    starts = np.append(0, np.flatnonzero(np.diff(scores[order])) + 1)
    group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, rows)))
    hits = np.add.reduceat(anomaly[order].astype(np.float64), starts)
    found, reached = np.cumsum(hits), np.append(starts[1:], rows).astype(np.float64)

    def terms(found: np.ndarray, reached: np.ndarray) -> np.ndarray:
        """Return the precision at each group's threshold, times the anomalies of the group."""
        return hits * np.divide(found, reached, out=np.zeros(len(hits)), where=reached > 0)

    def from_here_on(values: np.ndarray) -> np.ndarray:
        return np.cumsum(values[::-1])[::-1]

    whole = terms(found, reached)
    total = whole.sum()
    # without a normal row, fewer rows are reached from its group on
    fewer = from_here_on(terms(found, reached - 1) - whole)
    normal_left_out = (total + fewer[group]) / positives
    # without an anomaly, fewer are found as well, and one term is missing in its group
    without = from_here_on(terms(found - 1, reached - 1) - whole)
    own = np.divide(found - 1, reached - 1, out=np.zeros(len(hits)), where=reached > 1)
    anomaly_left_out = (total + (without - own)[group]) / max(1, positives - 1)
    left_out = np.where(anomaly[order], anomaly_left_out, normal_left_out)
    added = np.empty(rows)
    added[order] = -(rows - 1) * left_out
    return total / positives + added - added.mean()


def _precision(scores: np.ndarray, anomaly: np.ndarray) -> np.ndarray:
    """Return what rows add to the share of anomalies among the strangest rows, as many as there are anomalies. Of rows
    that tie at the threshold each counts as the share of them that is among the strangest. What a row adds is told for
    a threshold that stays."""
    count = int(anomaly.sum())
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    above, tied = scores > threshold, scores == threshold
    found = np.where(above, 1.0, np.where(tied, (count - above.sum()) / tied.sum(), 0.0))
    precision = found[anomaly].mean()
    return precision + np.where(anomaly, (found - precision) / anomaly.mean(), 0.0)
