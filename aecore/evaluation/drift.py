"""Tests whether new rows are like those that a model was trained on, and says in words which quantities drifted."""

import csv
import io
from collections.abc import Iterator, Sequence
from math import erf, sqrt
from typing import Any

import numpy as np
from scipy import stats

from aecore.core.errors import escape_unprintable, shorten
from aecore.data.numbers import Moments
from aecore.evaluation.statistics import LEVEL, holm
from aecore.models.storage import Weights

COLUMNS = ("quantity", "class", "test", "rows", "reference_rows", "shift", "effect", "p", "p_holm", "drifted")
Comparison = dict[str, Any]
"""One line of the table of tests, by `COLUMNS`."""
LISTED = 10_000
"""The most lines of the table that are kept; drift and the largest effects come first."""
_FEWEST, _UNKNOWN = 3, 0.01
"""A class is tested from `_FEWEST` rows on. Unknown classes are drift from as many rows and this share on."""


def drift_table(
    new: Weights, reference: Weights, known: Sequence[str], threshold: float, features: Sequence[str] = ()
) -> list[Comparison]:
    """Test each quantity of the new rows against the reference; return a line per test, drift and large effects first.

    Reconstruction errors, of all rows and of each class, and each unit of the code are compared by the two-sample
    Kolmogorov-Smirnov test; features by Welch's t-test of their means; classes by Pearson's chi-squared test. With many
    rows every difference is significant. So a difference is drift only where p, after Holm's correction for all tests,
    is below 0.05 and where its effect reaches `threshold` as well.

    The effect is on one scale for all tests: the largest gap between the two distribution functions; for means, the gap
    between two normal distributions that far apart; for classes, the total variation distance. The shift tells the
    direction: Cliff's (1993) delta of errors and codes, positive where the new values are larger, or the difference of
    means in standard deviations.

    A quantity is left out if there are too few rows to test it: two for a mean, three for the errors of a class.

    Args:
        new: `code` (rows, units) and `x` (rows, features) and, where there are any, `error` (rows,) and the class names
            `class` (rows,).
        reference: the arrays that `stages.finetune` returns with the model.
        known: the names of the classes, indexed by the reference's labels.
        features: the names of the features; none where they are known by number.
    """
    labels = reference.get("reference.label")
    classes = None
    if labels is not None and known and "class" in new:
        classes = np.array(known)[labels], new["class"]
    table = [*_errors(new, reference, known, classes), *_codes(new, reference), *_means(new, reference, features)]
    if classes is not None:
        table += _shares_of_classes(*classes)
    adjusted = holm(np.array([row["p"] for row in table]))
    for row, p in zip(table, adjusted, strict=True):
        row["p_holm"] = float(p)
        row["drifted"] = bool(p < LEVEL and row["effect"] >= threshold)
    if classes is not None:
        table.append(_unknown_classes(*classes, known))
    return sorted(table, key=lambda row: (not row["drifted"], -row["effect"]))


def cliffs_delta(new: np.ndarray, old: np.ndarray) -> float:
    """Return Cliff's (1993) delta: how much more often a new value is larger than an old one than smaller, -1 to 1."""
    return float(2 * stats.mannwhitneyu(new, old, method="asymptotic").statistic / (len(new) * len(old)) - 1)


def summary(drifted: Sequence[Comparison], rows: int, kind: str = "test rows") -> str:
    """Say in words which quantities have drifted, of `rows` new rows of this kind."""
    if not drifted:
        return f"no drift in {rows} new {kind}"
    shown = [f"{title(row)} {row['effect']:.2f}" for row in drifted[:3]]
    more = f" and {len(drifted) - 3} more" if len(drifted) > 3 else ""
    return f"drift in {rows} new {kind}: {', '.join(shown)}{more}"


def title(row: Comparison) -> str:
    """Return the name of a comparison for people: its quantity and, if it has one, its class."""
    quantity, group = (shorten(escape_unprintable(row[column]), 40) for column in ("quantity", "class"))
    return quantity if row["class"] == "all" else f"{quantity} of {group}"


def as_csv(table: Sequence[Comparison]) -> str:
    """Write the first 10,000 lines of the table as CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table[:LISTED])
    return buffer.getvalue()


def _comparison(names: tuple[str, str, str], sizes: tuple[int, int], *numbers: float) -> Comparison:
    """Make a line of the table, not yet judged: quantity, class and test; new and reference rows; shift, effect, p."""
    values = (*names, *sizes, *map(float, numbers), float("nan"), False)
    return dict(zip(COLUMNS, values, strict=True))


def _distributions(quantity: str, old: np.ndarray, new: np.ndarray, group: str = "all") -> Comparison:
    with np.errstate(divide="ignore", invalid="ignore"):
        tested = stats.ks_2samp(old, new, method="asymp")
    p = tested.pvalue if np.isfinite(tested.pvalue) else 1.0  # of one row and another
    names, sizes = (quantity, group, "Kolmogorov-Smirnov"), (len(new), len(old))
    return _comparison(names, sizes, cliffs_delta(new, old), tested.statistic, p)


def _errors(
    new: Weights, reference: Weights, known: Sequence[str], classes: tuple[np.ndarray, np.ndarray] | None
) -> Iterator[Comparison]:
    if "error" not in new or "reference.error" not in reference:
        return
    errors = reference["reference.error"], new["error"]
    yield _distributions("error", *errors)
    for name in known if classes is not None else ():
        assert classes is not None
        old, now = (values[names == name] for values, names in zip(errors, classes, strict=True))
        if min(len(old), len(now)) >= _FEWEST:
            yield _distributions("error", old, now, name)


def _codes(new: Weights, reference: Weights) -> Iterator[Comparison]:
    for unit, old in enumerate(reference["reference.code"].T):
        yield _distributions(f"code {unit}", old, new["code"][:, unit])


def _means(new: Weights, reference: Weights, features: Sequence[str]) -> Iterator[Comparison]:
    """Compare each feature's mean by Welch's test; of the reference's features only means and spreads are known."""
    x, rows = new["x"], len(reference["reference.code"])
    counts, old_counts = (~np.isnan(x)).sum(0), reference.get("reference.observed", np.full(x.shape[1], rows))
    old_mean, old_std = (reference[f"reference.{name}"].astype(np.float64) for name in ("mean", "std"))
    mean, std = _mean_and_spread(x)
    spread = np.sqrt((old_std**2 + std**2) / 2)
    varies = spread > 0
    gap = mean - old_mean
    with np.errstate(invalid="ignore", divide="ignore"):
        # a feature that never varies has moved by nothing or, in units of no spread, by very much: call it 9
        shift = np.where(varies, gap / spread, np.where(mean == old_mean, 0.0, np.sign(gap) * 9))
        p = stats.ttest_ind_from_stats(mean, std, counts, old_mean, old_std, old_counts, equal_var=False).pvalue
    p = np.where(varies, p, np.where(shift == 0, 1.0, 0.0))
    for number, feature in enumerate(features or range(x.shape[1])):
        sizes = int(counts[number]), int(old_counts[number])
        if min(sizes) < 2:
            continue
        # the largest gap between two normal distribution functions whose means are `shift` deviations apart
        effect = erf(abs(shift[number]) / (2 * sqrt(2)))
        yield _comparison((f"feature {feature}", "all", "Welch"), sizes, shift[number], effect, p[number])


def _mean_and_spread(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each feature, (features,), over the rows in which it is not missing."""
    if not np.isnan(x).any():
        return x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    moments = Moments()
    moments.add(x.astype(np.float64))
    return moments.mean, moments.deviation


def _shares_of_classes(old: np.ndarray, new: np.ndarray) -> Iterator[Comparison]:
    names = sorted({*old, *new})
    if len(names) < 2:
        return
    counts = np.array([[(values == name).sum() for name in names] for values in (old, new)])
    shares = counts / counts.sum(1, keepdims=True)
    distance = np.abs(shares[0] - shares[1]).sum() / 2
    p = stats.chi2_contingency(counts, correction=False).pvalue
    yield _comparison(("classes", "all", "chi-squared"), (len(new), len(old)), np.nan, distance, p)


def _unknown_classes(old: np.ndarray, new: np.ndarray, known: Sequence[str]) -> Comparison:
    unknown = ~np.isin(new, known)
    names, sizes = ("unknown classes", "all", "share"), (len(new), len(old))
    row = _comparison(names, sizes, np.nan, unknown.mean(), np.nan)
    return row | {"drifted": bool(unknown.sum() >= _FEWEST and unknown.mean() >= _UNKNOWN)}
