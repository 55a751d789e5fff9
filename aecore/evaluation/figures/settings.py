"""The figure of a search: which settings mattered."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from aecore.evaluation.figures.look import BLACK, BLUE, open_frame, png, titled
from aecore.evaluation.figures.trials import FONT, WIDTH, by_row, finite
from aecore.evaluation.trial import Trial


class Share(NamedTuple):
    """The share of a metric's variance that lies between the values of a setting."""

    found: float
    chance: float
    """The share that a setting without any effect would have on average."""


def importance(trials: Sequence[Trial], metric: str) -> bytes | None:
    """Draw, for each setting that was searched, the share of the metric's variance between the setting's values.

    The share is one-way: between-group over total sum of squares (the correlation ratio; Fisher 1925), over all
    finished trials with that setting, after each study row's mean is subtracted. A tick marks what chance would give.
    """
    scored = [trial for trial in trials if trial.status == "finished" and len(finite([trial], metric))]
    names = sorted({name for trial in scored for name in trial.settings})
    shares = {name: share for name in names if (share := _share(scored, name, metric))}
    if not shares:
        return None
    order = sorted(shares, key=lambda name: shares[name])
    top = order[-1]
    title = f"{top} explains {100 * shares[top].found:.0f} % of the variance of {metric}"
    figure = titled(WIDTH, 1.3 + 0.4 * len(order), title)
    axes = figure.subplots()
    axes.barh(order, [shares[name].found for name in order], 0.6, color=BLUE)
    axes.plot([shares[name].chance for name in order], order, "|", color=BLACK, markersize=16, markeredgewidth=1.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of variance between its values (tick: by chance)", fontsize=FONT)
    axes.tick_params(labelsize=FONT)
    open_frame(axes)
    return png(figure)


def _share(trials: Sequence[Trial], name: str, metric: str) -> Share | None:
    """Return the share of one setting; None where the setting has one value only or the metric does not vary."""
    rows = by_row([trial for trial in trials if name in trial.settings])
    groups = np.array(_groups([trial.settings[name] for row in rows.values() for trial in row]))
    levels = np.unique(groups)
    values = [finite(row, metric) for row in rows.values()]
    centred = np.concatenate([row - row.mean() for row in values])
    total = float((centred**2).sum())
    if len(levels) < 2 or not total:
        return None
    between = sum(len(own) * own.mean() ** 2 for level in levels for own in [centred[groups == level]])
    return Share(float(between) / total, min(1.0, (len(levels) - 1) / max(len(centred) - len(rows), 1)))


def _groups(values: Sequence[Any]) -> list[str]:
    """Name the group of each value: the value itself, or its quartile where numbers have more than five values."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values) or len(set(numbers)) <= 5:
        return [str(value) for value in values]
    return [str(quarter) for quarter in np.searchsorted(np.quantile(numbers, [0.25, 0.5, 0.75]), numbers)]
