"""The trials that figures of a study read, and the colour of each study row.

A study row is one variant under the name that the study gives it; it has a trial per seed. Each figure takes all trials
that are compared, so that a study row has one colour in all figures. A figure is returned as PNG bytes, or None where
the trials lack its data.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aecore.evaluation.figures.look import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY
from aecore.evaluation.trial import Trial

COLOURS = {
    "plain": BLACK,
    "sparse": ORANGE,
    "denoising": BLUE,
    "contractive": GREEN,
    "variational": PINK,
    "pca": "#7A7A7A",
    "random": "#ABABAB",
    "knn": "#555555",
    "iforest": "#8F8F8F",
    "lof": "#C4C4C4",
}
"""Okabe & Ito's colours by kind; the references are grey."""
_STYLES: dict[str, Any] = {"knn": (0, (5, 1, 1, 1)), "iforest": (0, (4, 1.5)), "lof": (0, (1, 1))}
"""Line styles of references, beside the solid lines of the others."""
_SPARE = ((RED, "-"), (SKY, "-"))
_DASHES = ((0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
FONT = 10  # points
WIDTH = 5.4  # inches: at the width of a phone the type is still legible


class Look(NamedTuple):
    """A study row's colour and line style (one of matplotlib's)."""

    colour: str
    style: Any


def looks(trials: Sequence[Trial]) -> dict[str, Look]:
    """Choose a look per study row: the kind's colour for the first row of a kind (or the row named like the kind); for
    further rows the colours that the palette has left, and when these are used up, the kind's colour with dashes."""
    kinds = {trial.row: trial.kind for trial in trials}
    first = {kind: kind if kinds.get(kind) == kind else row for row, kind in reversed(kinds.items())}
    rows = {row: Look(COLOURS.get(kind, BLACK), _STYLES.get(kind, "-")) for row, kind in kinds.items()}
    for number, row in enumerate(row for row, kind in kinds.items() if first[kind] != row):
        if number < len(_SPARE):
            rows[row] = Look(*_SPARE[number])
        else:
            rows[row] = rows[row]._replace(style=_DASHES[number % len(_DASHES)])
    return rows


def by_row(trials: Sequence[Trial], has: Callable[[Trial], Any] = lambda _: True) -> dict[str, list[Trial]]:
    """Return the finished trials for which `has` holds, by study row and in the order of their seeds."""
    rows: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.status == "finished" and has(trial):
            rows.setdefault(trial.row, []).append(trial)
    return {row: sorted(members, key=lambda trial: trial.seed) for row, members in rows.items()}


def lowest_seeds(trials: Sequence[Trial], *names: str) -> dict[str, Trial]:
    """Return the trial with the lowest seed of each study row, among those that have all the arrays `names`."""
    rows = by_row(trials, lambda trial: all(name in trial.arrays for name in names))
    return {row: members[0] for row, members in rows.items()}


def finite(trials: Sequence[Trial], metric: str) -> np.ndarray:
    """Return the finite values of a metric, (trials that have one,)."""
    values = np.array([trial.metrics.get(metric, np.nan) for trial in trials], np.float64)
    return values[np.isfinite(values)]


def best_row(means: Mapping[str, float], higher: bool) -> str:
    """Return the study row with the highest or the lowest mean."""
    return (max if higher else min)(means, key=lambda row: means[row])


def percent(share: float) -> str:
    """Write a share in percent, with one decimal."""
    return f"{100 * share:.1f} %"
