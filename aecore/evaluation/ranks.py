"""Comparison of study rows over many data sets by their ranks (Demsar, JMLR 7 (2006) 1-30)."""

from collections.abc import Mapping
from math import exp, lgamma
from typing import NamedTuple

import numpy as np
from scipy import stats

from aecore.evaluation.statistics import LEVEL


class Ranks(NamedTuple):
    """Mean ranks of study rows over data sets, and which of them differ."""

    means: dict[str, float]
    """Mean rank of each study row over the sets, the best first; ties share their ranks, and 1 is the best."""
    sets: int
    """Number of sets on which all of these rows have a value."""
    p: float
    """p of the hypothesis that all rows rank alike, by Iman and Davenport's form of Friedman's test (Demsar, sec.
    3.2.2); NaN with fewer than two sets or rows."""
    critical_difference: float
    """Mean ranks that lie farther apart than this differ, by Nemenyi's test; infinite where the first test finds
    nothing."""
    groups: tuple[tuple[str, ...], ...]
    """The largest groups of rows, of two or more, whose mean ranks do not differ."""


def compare_ranks(values: Mapping[str, Mapping[str, float]], higher: bool) -> Ranks:
    """Rank study rows on each data set and compare their mean ranks.

    Args:
        values: for each study row its value on each set. Sets on which a row has none are left out.
        higher: whether more is better.
    """
    rows = list(values)
    known = [
        name for name in next(iter(values.values()), ()) if all(np.isfinite(values[r].get(name, np.nan)) for r in rows)
    ]
    table = np.array([[values[row][name] for row in rows] for name in known]).reshape(len(known), len(rows))
    # values that differ by rounding alone are ties
    ranks = stats.rankdata(np.round(-table if higher else table, 12), axis=1) if len(known) else table
    means = ranks.mean(0) if len(known) else np.full(len(rows), np.nan)
    order = np.argsort(means, kind="stable")
    p = _friedman(ranks)
    critical = _nemenyi(len(rows), len(known)) if p < LEVEL else np.inf
    ordered = {rows[n]: float(means[n]) for n in order}
    return Ranks(ordered, len(known), p, critical, _groups(ordered, critical))


def _friedman(ranks: np.ndarray) -> float:
    """Return p of the hypothesis that all columns of `ranks` (sets, rows) have one mean; ties are corrected for."""
    sets, rows = ranks.shape
    if sets < 2 or rows < 2:
        return float("nan")
    between = sets * np.square(ranks.mean(0) - (rows + 1) / 2).sum()
    spread = np.square(ranks - (rows + 1) / 2).sum() / (sets * (rows - 1))
    if not spread:
        return 1.0
    chi = between / spread
    rest = sets * (rows - 1) - chi
    # even if all sets agree, p is the chance that they do so by permutation, which the F distribution does not know
    least = exp(-(sets - 1) * lgamma(rows + 1))
    if rest <= 1e-12 * chi:
        return least
    return max(least, float(stats.f.sf((sets - 1) * chi / rest, rows - 1, (rows - 1) * (sets - 1))))


def _nemenyi(rows: int, sets: int) -> float:
    """Return the critical difference of mean ranks at the level of 5 % (Demsar, sec. 3.2.2)."""
    range_of_infinite_freedom = stats.studentized_range.ppf(1 - LEVEL, rows, np.inf)
    return float(range_of_infinite_freedom / np.sqrt(2) * np.sqrt(rows * (rows + 1) / (6 * sets)))


def _groups(means: Mapping[str, float], critical: float) -> tuple[tuple[str, ...], ...]:
    names, values = list(means), np.array([*means.values()])
    groups: list[tuple[str, ...]] = []
    last = 0
    for start in range(len(names)):
        stop = int(np.searchsorted(values, values[start] + critical, "right"))
        if stop > max(last, start + 1):
            groups.append(tuple(names[start:stop]))
        last = max(last, stop)
    return tuple(groups)
