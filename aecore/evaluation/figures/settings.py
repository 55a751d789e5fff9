"""The figures of a search: how far it came with the number of settings, and which settings mattered."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

from aecore.evaluation.figures.curves import name_ends
from aecore.evaluation.figures.look import BLACK, BLUE, open_frame, png, titled
from aecore.evaluation.figures.trials import FONT, WIDTH, best_row, by_row, finite, looks
from aecore.evaluation.trial import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Share(NamedTuple):
    """The share of a metric's variance that lies between the values of a setting."""

    found: float
    chance: float
    """The share that a setting without any effect would have on average."""


def search(trials: Sequence[Trial], metric: str) -> bytes | None:
    """Draw each searched study row's best mean of a metric so far by the number of settings tried.

    Settings stand in the order in which the first trial of each was started. Settings without a finished trial count as
    tried. More is better if the metric's name contains `accuracy`, else less.
    """
    higher = "accuracy" in metric
    tried = {row: values for row, values in _tried(trials, metric).items() if len(values) > 1}
    best = {row: _best_so_far(values, higher) for row, values in tried.items() if np.isfinite(values).any()}
    if not best:
        return None
    row = best_row({row: float(values[-1]) for row, values in best.items()}, higher)
    place = int(np.argmax(best[row] == best[row][-1])) + 1
    title = f"{row} reaches the best {metric}, {best[row][-1]:.4g}, with its {_ordinal(place)} settings"
    figure = titled(WIDTH, 4.2, title)
    axes = figure.subplots()
    for row, values in best.items():
        colour, style = looks(trials)[row]
        places = np.arange(1, len(values) + 1)
        axes.plot(places, values, color=colour, linestyle=style, linewidth=1.6, drawstyle="steps-post")
        axes.plot(places, tried[row], ".", color=colour, alpha=0.4, markersize=5)
    _limit(axes, np.concatenate([values[np.isfinite(values)] for values in tried.values()]), best, higher)
    axes.set_xlabel("settings tried")
    axes.set_ylabel(f"best {metric} so far")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    open_frame(axes)
    name_ends(axes, {row: (len(values), float(values[-1])) for row, values in best.items()}, looks(trials))
    return png(figure)


def _tried(trials: Sequence[Trial], metric: str) -> dict[str, np.ndarray]:
    """Return by study row the mean of the metric over the finished seeds of each settings, in the order of their start;
    NaN where there is none."""
    rows: dict[str, dict[str, list[Trial]]] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        if trial.settings:
            rows.setdefault(trial.row, {}).setdefault(str(trial.settings), []).append(trial)
    values = {
        row: [finite([trial for trial in members if trial.status == "finished"], metric) for members in each.values()]
        for row, each in rows.items()
    }
    return {row: np.array([v.mean() if len(v) else np.nan for v in means]) for row, means in values.items()}


def _best_so_far(values: np.ndarray, higher: bool) -> np.ndarray:
    """Return the best of the values (settings,) up to each place; NaN before the first value."""
    return np.fmax.accumulate(values) if higher else np.fmin.accumulate(values)


def _limit(axes: "Axes", values: np.ndarray, best: Mapping[str, np.ndarray], higher: bool) -> None:
    """Show all lines of the best, and of the points the better three quarters: some settings are far off."""
    reached = np.concatenate([line[np.isfinite(line)] for line in best.values()])
    worst = np.quantile(values, 0.25 if higher else 0.75)
    low, high = min(reached.min(), worst), max(reached.max(), worst)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _ordinal(number: int) -> str:
    """Write 1 as 1st, 2 as 2nd and so on."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


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
