"""Figures of a study that are lines: a mean over seeds per study row, in a band from the lowest to the highest seed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from aecore.evaluation.figures.look import open_frame, png, titled
from aecore.evaluation.figures.trials import FONT, WIDTH, Look, best_row, by_row, looks, percent
from aecore.evaluation.trial import Trial
from aecore.evaluation.verdicts import listed

_BAND = "band: lowest to highest seed"
_NOISES = {"gaussian": "Gaussian noise", "masking": "masking", "salt_and_pepper": "salt and pepper"}
_MEASURES = {"accuracy": "accuracy", "mse": "squared error per feature"}


class Line(NamedTuple):
    """The curves of a study row, one per seed."""

    x: np.ndarray
    values: np.ndarray
    """(seeds, points of x)"""

    def mean(self, point: int) -> float:
        """Return the mean over seeds at one point."""
        return float(self.values[:, point].mean())


Read = Callable[[Trial], tuple[Any, Any] | None]
"""Reads x and values of a curve from a trial; None where the trial has no such curve."""


def learning_curves(trials: Sequence[Trial]) -> bytes | None:
    """Draw `val/reconstruction` by epoch, as far as all seeds of a study row go; stopped trials are faint."""

    def read(trial: Trial) -> tuple[Any, Any] | None:
        values = [epoch["val/reconstruction"] for epoch in trial.history if "val/reconstruction" in epoch]
        return (range(1, len(values) + 1), values) if values else None

    lines, look = _lines(trials, read), looks(trials)
    if not lines:
        return None
    lowest = {row: float(line.values.mean(0).min()) for row, line in lines.items()}
    best = best_row(lowest, higher=False)
    title = f"{best} reaches the lowest mean validation error, {lowest[best]:.3g} ({_BAND})"
    figure = titled(WIDTH, 4.2, title)
    axes = figure.subplots()
    for trial in trials:
        if trial.status == "stopped" and (curve := read(trial)):
            axes.plot(*curve, color=look[trial.row].colour, linewidth=0.8, alpha=0.3)
    every = np.concatenate([line.values.ravel() for line in lines.values()])
    if every.min() > 0 and every.max() > 5 * every.min():
        axes.set_yscale("log")
    _draw(axes, lines, look)
    axes.set_xlabel("epoch")
    axes.set_ylabel("reconstruction error on validation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return png(figure)


def label_efficiency(trials: Sequence[Trial]) -> bytes | None:
    """Draw the test accuracy of the probe and of finetuning by the number of labels they were given."""
    names = {"probe": "linear probe", "finetuned": "finetuned"}
    panels = {name: _lines(trials, _curve("labels", x="counts", y=how)) for how, name in names.items()}
    panels = {name: lines for name, lines in panels.items() if lines}
    if not panels:
        return None
    first, lines = next(iter(panels.items()))
    few, many = ({row: line.mean(point) for row, line in lines.items()} for point in (0, -1))
    x, best = next(iter(lines.values())).x, best_row(few, higher=True)
    spread = [100 * (max(means.values()) - min(means.values())) for means in (few, many)]
    title = (
        f"With {x[0]:,.0f} labels {best} has the highest mean accuracy ({first}: {percent(few[best])}); the rows lie "
        f"{spread[0]:.1f} points apart, with {x[-1]:,.0f} labels {spread[1]:.1f} ({_BAND})"
    )
    figure = titled(WIDTH, 1 + 3.1 * len(panels), title)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (how, lines) in zip(grid, panels.items(), strict=True):
        axes.set_xscale("log")
        _draw(axes, lines, looks(trials))
        axes.set_ylabel(f"test accuracy, {how}")
    grid[-1].set_xlabel("labelled training rows")
    return png(figure)


def robustness(trials: Sequence[Trial]) -> bytes | None:
    """Draw accuracy, where there are labels, and squared error of corrupted test rows by the level of each noise."""
    panels = {
        (noise, measure): _lines(trials, _curve("robustness", noise, x="levels", y=measure))
        for noise in _NOISES
        for measure in _MEASURES
    }
    noises = [noise for noise in _NOISES if any(panels[noise, measure] for measure in _MEASURES)]
    measures = [measure for measure in _MEASURES if any(panels[noise, measure] for noise in noises)]
    if not noises:
        return None
    title = _most_robust({noise: panels[noise, measures[0]] for noise in noises}, measures[0])
    figure = titled(WIDTH if len(measures) == 1 else 6.4, 1 + 2.6 * len(noises), title)
    grid = figure.subplots(len(noises), len(measures), squeeze=False)
    for (down, across), axes in np.ndenumerate(grid):
        if lines := panels[noises[down], measures[across]]:
            _draw(axes, lines, looks(trials), named=across == len(measures) - 1)
        axes.set_xlabel(f"level of {_NOISES[noises[down]]}", fontsize=FONT)
        axes.set_ylabel(_MEASURES[measures[across]], fontsize=FONT)
    return png(figure)


def _most_robust(panels: Mapping[str, Mapping[str, Line]], measure: str) -> str:
    """Say which study row is best at the strongest level of each noise."""
    winners: dict[str, list[str]] = {}
    for noise, lines in panels.items():
        if last := {row: line.mean(-1) for row, line in lines.items()}:
            winners.setdefault(best_row(last, higher=measure == "accuracy"), []).append(_NOISES[noise])
    verb = "keeps the highest accuracy" if measure == "accuracy" else "has the lowest squared error"
    return "At the strongest noise " + "; ".join(
        f"{row} {verb} under {listed(names)}" for row, names in winners.items()
    )


def contraction(trials: Sequence[Trial]) -> bytes | None:
    """Draw how far a code moves, as a share of its input's step, by the length of that step (Rifai et al. 2011)."""
    lines = _lines(trials, _curve("contraction", x="radius", y="ratio"))
    if not lines:
        return None
    least = {row: line.mean(0) for row, line in lines.items()}
    best = best_row(least, higher=False)
    title = f"Of the shortest step {best} passes on least to the code, {least[best]:.2g} of its length ({_BAND})"
    figure = titled(WIDTH, 4.2, title)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    _draw(axes, lines, looks(trials))
    axes.set_xlabel("length of the step in the input")
    axes.set_ylabel("step of the code / step of the input")
    return png(figure)


def _curve(*path: str, x: str, y: str) -> Read:
    """Make a function that reads the values `x` and `y` below `path` in a trial's curves."""

    def read(trial: Trial) -> tuple[Any, Any] | None:
        curve = trial.curves
        for name in path:
            curve = curve.get(name, {})
        return (curve[x], curve[y]) if curve.get(y) else None

    return read


def _lines(trials: Sequence[Trial], read: Read) -> dict[str, Line]:
    """Return the line of each study row, up to the last point that all its seeds have."""
    lines = {}
    for row, members in by_row(trials, read).items():
        curves = [curve for curve in map(read, members) if curve]
        length = min(len(x) for x, _ in curves)
        values = np.array([values[:length] for _, values in curves], np.float64)
        lines[row] = Line(np.asarray(curves[0][0][:length], np.float64), values)
    return lines


def _draw(axes: Axes, lines: Mapping[str, Line], look: Mapping[str, Look], named: bool = True) -> None:
    """Draw means over seeds with a band from lowest to highest, and each study row's name beside its line's end."""
    for row, (x, values) in lines.items():
        colour, style = look[row]
        axes.plot(x, values.mean(0), color=colour, linestyle=style, linewidth=1.6, marker="" if len(x) > 1 else "o")
        axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    open_frame(axes)
    axes.tick_params(labelsize=FONT - 1)
    if named:
        name_ends(axes, {row: (line.x[-1], line.mean(-1)) for row, line in lines.items()}, look)


def name_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], look: Mapping[str, Look]) -> None:
    """Write names right of the axes, each joined to its line's end; names that would overlap are pushed apart."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    order = sorted(ends, key=lambda row: ends[row][1])
    heights = np.array([to_axes.transform(ends[row])[1] for row in order])
    figure = axes.figure.figure
    gap = 1.2 * FONT / (72 * figure.get_figheight() * axes.get_position().height)
    room = max(1.0, gap * (len(order) - 1))
    for _ in range(300):
        push = np.maximum(0, gap - np.diff(heights)) / 2
        heights[1:] += push
        heights[:-1] -= push
        heights = np.clip(heights, (1 - room) / 2, (1 + room) / 2)
    for row, height in zip(order, heights, strict=True):
        colour, style = look[row]
        line = {"arrowstyle": "-", "color": colour, "linestyle": style, "linewidth": 0.8, "relpos": (0, 0.5)}
        axes.annotate(
            row, ends[row], (1.1, height), textcoords="axes fraction", color=colour, fontsize=FONT,
            va="center", arrowprops=line, annotation_clip=False,
        )  # fmt: skip
