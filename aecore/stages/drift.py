"""Whether new data are like those that a model was trained on."""

import csv
import io
from math import erf, sqrt
from typing import Any

import numpy as np
from scipy import stats

from aecore.config.specs import DriftSpec
from aecore.core.errors import escape_unprintable
from aecore.data.splits import Arrays, row_ids
from aecore.data.stream import Stream
from aecore.evaluation import metrics
from aecore.evaluation.figures import model as figures
from aecore.evaluation.statistics import LEVEL, holm
from aecore.models.storage import Result, Weights
from aecore.serving.model import Model
from aecore.stages.context import Run, all_test_rows

_MOST_ROWS = 20_000
_UNKNOWN, _FEWEST = 0.01, 3
"""Share and number of new rows of classes that the model does not know, from which on they are drift."""
COLUMNS = ("quantity", "class", "test", "rows", "reference_rows", "shift", "effect", "p", "p_holm", "drifted")


def drift(spec: DriftSpec, run: Run, *, data: Arrays | Stream, champion: Result, earlier: Result) -> Result:
    """Compare the test rows that came since the champion was made with the reference of its training, that is with
    validation rows of its day; neither has it been trained on.

    Reconstruction errors, of all rows and of each class, and each unit of the code by the two-sample
    Kolmogorov-Smirnov test; features by Welch's t-test of their means; classes by Pearson's chi-squared test. Of many
    rows every difference is significant, so it is drift only where p, after Holm's correction for all tests, is below
    0.05 and its effect reaches the threshold. The effect is on one scale for all: the largest gap between the two
    distribution functions; for means, the gap between two normal distributions that far apart; for classes, the total
    variation distance. Beside it stands the shift: Cliff's (1993) delta of errors and codes, positive where the new
    ones are larger, or the difference of means in standard deviations.

    Args:
        earlier: the contest that the champion has won, which knows the test rows of its day.

    Returns:
        A result with `drift/...` metrics, the `table` as CSV and the findings in `words` in `config`, and a figure.
    """
    known = earlier.config["facts"]["classes"]
    model = Model(champion, run.device)
    found: dict[str, list[np.ndarray]] = {"code": [], "x": [], "error": [], "class": []}
    rows = 0
    for part in all_test_rows(data, run):
        fresh = np.flatnonzero(~np.isin(row_ids(part.x), earlier.weights["ids"]))[: _MOST_ROWS - rows]
        if not len(fresh):
            continue
        rows += len(fresh)
        measured = model.measure(part.x[fresh])
        found["code"].append(measured["code"])
        found["x"].append(_prepared(model, part.x[fresh]))
        if "reconstruction_mse" in measured:
            found["error"].append(measured["reconstruction_mse"])
        if part.y is not None:
            found["class"].append(np.array(spec.classes)[part.y[fresh]])
    if not rows:
        scores = {"drift/rows": 0.0, "drift/drifted": 0.0}
        return Result({"table": as_csv([]), "words": "no test row has come since", "drifted": False}, {}, scores)
    new = {name: np.concatenate(parts) for name, parts in found.items() if parts}
    table = compare(new, champion.weights, known, spec.threshold)
    drifted = [row for row in table if row["drifted"]]
    scores = {
        "drift/rows": float(rows),
        "drift/drifted": float(bool(drifted)),
        "drift/largest_effect": max(row["effect"] for row in table),
    }
    for row in table:
        if row["class"] == "all" and row["quantity"] in ("error", "unknown classes"):
            scores[f"drift/{row['quantity'].replace(' ', '_')}_effect"] = row["effect"]
    errors = (champion.weights["reference.error"], new["error"]) if "error" in new else None
    picture = figures.drift(errors, [(_name(row), row["effect"], row["drifted"]) for row in table], spec.threshold)
    config = {"table": as_csv(table), "words": words(drifted, rows), "drifted": bool(drifted)}
    return Result(config, {}, scores, {"drift": picture})


def compare(new: Weights, reference: Weights, known: list[str], threshold: float) -> list[dict[str, Any]]:
    """The table of tests, largest effects first.

    Args:
        new: `code` (rows, units) and `x` (rows, features), `error` (rows,) and `class` (rows,) names where there are.
        reference: as `stages.finetune` returns it.
        known: names of the classes that the reference's labels number.
    """
    table: list[dict[str, Any]] = []

    def add(
        quantity: str, group: str, test: str, sizes: tuple[int, int], shift: float, effect: float, p: float
    ) -> None:
        row = (quantity, group, test, *sizes, float(shift), float(effect), float(p), float("nan"), False)
        table.append(dict(zip(COLUMNS, row, strict=True)))

    def distributions(quantity: str, group: str, old: np.ndarray, now: np.ndarray) -> None:
        tested = stats.ks_2samp(old, now, method="asymp")
        add(
            quantity,
            group,
            "Kolmogorov-Smirnov",
            (len(now), len(old)),
            cliff(now, old),
            tested.statistic,
            tested.pvalue,
        )

    labels = reference.get("reference.label")
    old_classes = None if labels is None or not known else np.array(known)[labels]
    if "error" in new and "reference.error" in reference:
        old = reference["reference.error"]
        distributions("error", "all", old, new["error"])
        if old_classes is not None and "class" in new:
            for name in known:
                pair = old[old_classes == name], new["error"][new["class"] == name]
                if min(map(len, pair)) >= _FEWEST:
                    distributions("error", name, *pair)
    for unit, old in enumerate(reference["reference.code"].T):
        distributions(f"code {unit}", "all", old, new["code"][:, unit])
    if len(new["x"]) > 1:
        _means(add, new["x"], reference, len(reference["reference.code"]))
    if old_classes is not None and "class" in new:
        names = sorted({*old_classes, *new["class"]})
        counts = np.array([[(values == name).sum() for name in names] for values in (old_classes, new["class"])])
        if len(names) > 1:
            shares = counts / counts.sum(1, keepdims=True)
            distance = np.abs(shares[0] - shares[1]).sum() / 2
            p = stats.chi2_contingency(counts, correction=False).pvalue
            sizes = len(new["class"]), len(old_classes)
            add("classes", "all", "chi-squared", sizes, np.nan, distance, p)
    adjusted = holm(np.array([row["p"] for row in table]))
    for row, p in zip(table, adjusted, strict=True):
        row["p_holm"] = float(p)
        row["drifted"] = bool(p < LEVEL and row["effect"] >= threshold)
    if old_classes is not None and "class" in new:
        unknown = ~np.isin(new["class"], known)
        add("unknown classes", "all", "share", (len(unknown), len(old_classes)), np.nan, unknown.mean(), np.nan)
        table[-1]["drifted"] = bool(unknown.sum() >= _FEWEST and unknown.mean() >= _UNKNOWN)
    return sorted(table, key=lambda row: (not row["drifted"], -row["effect"]))


def cliff(new: np.ndarray, old: np.ndarray) -> float:
    """Cliff's (1993) delta: how much oftener a new value is larger than an old one than smaller, from -1 to 1."""
    return float(2 * stats.mannwhitneyu(new, old, method="asymptotic").statistic / (len(new) * len(old)) - 1)


def words(drifted: list[dict[str, Any]], rows: int) -> str:
    """The findings as a sentence."""
    if not drifted:
        return f"no drift in {rows} new test rows"
    shown = [f"{_name(row)} {row['effect']:.2f}" for row in drifted[:3]]
    more = f" and {len(drifted) - 3} more" if len(drifted) > 3 else ""
    return f"drift in {rows} new test rows: {', '.join(shown)}{more}"


def as_csv(table: list[dict[str, Any]]) -> str:
    """The table as text."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return buffer.getvalue()


def _name(row: dict[str, Any]) -> str:
    return row["quantity"] if row["class"] == "all" else f"{row['quantity']} of {escape_unprintable(row['class'])[:40]}"


def _means(add: Any, x: np.ndarray, reference: Weights, count: int) -> None:
    """Welch's test of each feature's mean; `count` rows made the reference's."""
    old = reference["reference.mean"].astype(np.float64), reference["reference.std"].astype(np.float64)
    now = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    spread = np.sqrt((old[1] ** 2 + now[1] ** 2) / 2)
    varies = spread > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = np.where(
            varies, (now[0] - old[0]) / spread, np.where(now[0] == old[0], 0.0, np.sign(now[0] - old[0]) * 9)
        )
        p = stats.ttest_ind_from_stats(now[0], now[1], len(x), *old, count, equal_var=False).pvalue
    p = np.where(varies, p, np.where(shift == 0, 1.0, 0.0))
    for number in range(x.shape[1]):
        # the largest gap between two normal distribution functions that are so many deviations apart
        effect = erf(abs(shift[number]) / (2 * sqrt(2)))
        add(f"feature {number}", "all", "Welch", (len(x), count), shift[number], effect, p[number])


def _prepared(model: Model, rows: np.ndarray) -> np.ndarray:
    """What the first layer reads, (rows, features)."""
    return metrics.over_batches(model.prepare, rows, model.device).flatten(1).cpu().numpy()
