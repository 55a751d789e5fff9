"""Figures of how well scores rank anomalies, and of the rows that are strangest, of one model or of a study."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aecore.evaluation.figures.look import BLUE, ORANGE, legible, open_frame, png, titled
from aecore.evaluation.figures.trials import FONT, WIDTH, best_row, by_row, looks, lowest_seeds
from aecore.evaluation.ranking import curves, rank, summarize
from aecore.evaluation.trial import Trial

_SHOWN, _BINS = 8, 40
"""Most strange rows that are shown, and bars of a histogram."""
_NORMAL, _ANOMALY = BLUE, ORANGE


class Ranked(NamedTuple):
    """Scores of the test rows, (rows,), and which of these are anomalies."""

    scores: np.ndarray
    anomaly: np.ndarray


def ranking(ranked: Ranked) -> bytes:
    """Draw the ROC curve and the precision-recall curve of one model."""
    measures = summarize(rank(*ranked))
    title = (
        f"AUROC {measures['auroc']:.3f}, average precision {measures['average_precision']:.3f} (chance: 0.5 and "
        f"{ranked.anomaly.mean():.3f})"
    )
    return _curves({"": ranked}, {"": (BLUE, "-")}, title)


def ranking_of_rows(trials: Sequence[Trial]) -> bytes | None:
    """Draw the curves of each study row, of its lowest seed."""
    shown, areas = _ranked(trials), _mean_areas(trials)
    if not shown:
        return None
    best = best_row(areas, True)
    return _curves(
        shown, {row: tuple(look) for row, look in looks(trials).items()},
        f"{best} has the largest mean area under the ROC curve, {areas[best]:.3f}",
    )  # fmt: skip


def _curves(shown: Mapping[str, Ranked], look: Mapping[str, Any], title: str) -> bytes:
    """Draw ROC curves on the left and precision-recall curves on the right; dotted is what chance gives.

    Args:
        look: the colour and the line style of each.
    """
    lines = -(-len(shown) // 2) if len(shown) > 1 else 0  # of the legend
    figure = titled(WIDTH, 3.1 + 0.24 * lines, title)
    left, right = figure.subplots(1, 2)
    for row, ranked in shown.items():
        points, (colour, style) = curves(*ranked), look[row]
        left.plot(points.false_positives, points.recall, color=colour, linestyle=style, linewidth=1.3, label=row)
        right.plot(points.recall, points.precision, color=colour, linestyle=style, linewidth=1.3)
    left.plot([0, 1], [0, 1], color="#999999", linewidth=0.7, linestyle=":")
    chance = float(next(iter(shown.values())).anomaly.mean())
    right.axhline(chance, color="#999999", linewidth=0.7, linestyle=":")
    left.set_xlabel("share of normal rows above", fontsize=FONT)
    left.set_ylabel("share of anomalies above", fontsize=FONT)
    right.set_xlabel("share of anomalies above", fontsize=FONT)
    right.set_ylabel("anomalies among rows above", fontsize=FONT)
    for axes in (left, right):
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        open_frame(axes)
    if len(shown) > 1:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=FONT)
    return png(figure)


def histogram(ranked: Ranked) -> bytes:
    """Draw the scores of normal rows and of anomalies as two histograms, each with an area of one."""
    figure = titled(WIDTH, 2.8, _separation(ranked))
    _histogram(figure.subplots(), ranked)
    return png(figure)


def histograms(trials: Sequence[Trial]) -> bytes | None:
    """Draw the histograms of each study row, of its lowest seed."""
    shown = _ranked(trials)
    if not shown:
        return None
    lines = -(-len(shown) // 2)
    figure = titled(WIDTH, 0.5 + 1.7 * lines, "Scores of normal rows (blue) and of anomalies (orange), by row")
    cells = figure.subplots(lines, 2, squeeze=False).ravel()
    for axes, (row, ranked) in zip(cells, shown.items(), strict=False):
        _histogram(axes, ranked, labelled=False)
        axes.set_title(row, fontsize=FONT, loc="left")
    for axes in cells[len(shown) :]:
        axes.set_axis_off()
    return png(figure)


def _histogram(axes: Any, ranked: Ranked, labelled: bool = True) -> None:
    """Draw both histograms on a scale of the score's logarithm, where that spreads them."""
    scores = ranked.scores - min(0.0, float(ranked.scores.min()))
    positive = scores[scores > 0]
    is_log = bool(len(positive)) and scores.max() > 20 * np.median(positive)
    low = np.quantile(positive, 0.001) if is_log else scores.min()
    edges = np.geomspace(low, scores.max(), _BINS) if is_log else np.linspace(low, scores.max() or 1.0, _BINS)
    anomaly = ranked.anomaly.astype(bool)
    for mask, colour, one, several in (
        (~anomaly, _NORMAL, "normal row", "normal rows"), (anomaly, _ANOMALY, "anomaly", "anomalies"),
    ):  # fmt: skip
        shares = np.histogram(np.clip(scores[mask], edges[0], edges[-1]), edges)[0] / max(1, mask.sum())
        axes.stairs(
            shares,
            edges,
            fill=True,
            alpha=0.55,
            color=colour,
            label=f"{mask.sum():,} {one if mask.sum() == 1 else several}",
        )
    if is_log:
        axes.set_xscale("log")
    if labelled:
        axes.set_xlabel("score: the higher, the stranger", fontsize=FONT)
        axes.set_ylabel("share of the rows", fontsize=FONT)
        axes.legend(frameon=False, fontsize=FONT)
    axes.set_yticks([])
    open_frame(axes)


def _separation(ranked: Ranked) -> str:
    """Say how many of the normal rows score as high as half of the anomalies."""
    threshold = np.median(ranked.scores[ranked.anomaly.astype(bool)])
    above = float((ranked.scores[~ranked.anomaly.astype(bool)] >= threshold).mean())
    return f"{100 * above:.1f} % of the normal rows score as high as the median anomaly"


def strangest(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw for the strangest test rows which features make them strange.

    Args:
        rows: what `aecore.stages.anomalies.explain_strangest` returns.
    """
    rows = rows[:_SHOWN]
    known = [row["anomaly"] for row in rows if row["anomaly"] is not None]
    title = f"The {len(rows)} strangest test rows, and the features that make them strange"
    title += f": {sum(known)} {'is an anomaly' if sum(known) == 1 else 'are anomalies'}" if known else ""
    figure = titled(WIDTH, 0.6 + 0.78 * len(rows), title)
    axes = figure.subplots()
    places, names = [], []
    for number, row in enumerate(rows):
        for position, reason in enumerate(row["reasons"]):
            place = number + (position - 1) * 0.27
            share = reason["contribution"] / row["score"] if row["score"] else 0.0
            axes.barh(place, share, height=0.22, color=_ANOMALY if row["anomaly"] else _NORMAL)
            text = f" {legible(reason['feature'])}: {legible(reason['value'])}, usually {legible(reason['expected'])}"
            axes.text(share, place, text, va="center", fontsize=FONT - 2)
        kind = {True: "\nanomaly", False: "\nnormal", None: ""}[row["anomaly"]]
        places.append(number)
        names.append(f"test row {row['row']}{kind}")
    axes.set_yticks(places, names, fontsize=FONT - 1)
    axes.invert_yaxis()
    axes.set_xlim(0, 2)
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.set_xlabel("share of the score", fontsize=FONT, loc="left")
    open_frame(axes)
    return png(figure)


def strangest_of_study(trials: Sequence[Trial]) -> bytes | None:
    """Draw the strangest test rows of the study row with the best mean area under the ROC curve."""
    explained = {row: own[0] for row, own in by_row(trials, lambda trial: trial.curves.get("strangest")).items()}
    if not explained:
        return None
    areas = {row: area for row, area in _mean_areas(trials).items() if row in explained}
    return strangest(explained[best_row(areas, True)].curves["strangest"])


def _ranked(trials: Sequence[Trial]) -> dict[str, Ranked]:
    """Return what is drawn of each study row: the test rows as its lowest seed ranks them."""
    scored = lowest_seeds(trials, "score", "anomaly")
    return {row: Ranked(trial.arrays["score"], trial.arrays["anomaly"]) for row, trial in scored.items()}


def _mean_areas(trials: Sequence[Trial]) -> dict[str, float]:
    """Return the mean area under the ROC curve over the seeds of each study row that ranks anomalies."""
    rows = by_row(trials, lambda trial: "test/auroc" in trial.metrics)
    return {row: float(np.mean([trial.metrics["test/auroc"] for trial in own])) for row, own in rows.items()}
