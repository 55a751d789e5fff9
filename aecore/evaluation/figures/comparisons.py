"""Figures that set variants side by side: PNG bytes, or None where the trials lack what is to be drawn.

Each takes all trials that are to be compared, one for each row and seed, so that a row has one colour in all figures.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.spatial import cKDTree
from threadpoolctl import threadpool_limits

from aecore.evaluation.figures.model import (
    BLACK,
    BLUE,
    CLASS_COLOURS,
    GREEN,
    ORANGE,
    PINK,
    RED,
    SKY,
    bare,
    legible,
    plane,
    png,
    show,
    titled,
)
from aecore.evaluation.statistics import listed

COLOURS = {
    "plain": BLACK,
    "sparse": ORANGE,
    "denoising": BLUE,
    "contractive": GREEN,
    "variational": PINK,
    "pca": "#7A7A7A",
    "random": "#ABABAB",
}
"""Okabe & Ito's by kind; the references are grey."""
_SPARE = ((RED, "-"), (SKY, "-"))
_DASHES = ((0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
_BAND = "band: lowest to highest seed"
_NOISES = {"gaussian": "Gaussian noise", "masking": "masking", "salt_and_pepper": "salt and pepper"}
_FONT = 10
_WIDTH = 5.4  # inches: at the width of a phone the type is still legible


class Seen(Protocol):
    """What the figures read of a trial."""

    @property
    def row(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def status(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def history(self) -> Sequence[Mapping[str, float]]: ...
    @property
    def curves(self) -> Mapping[str, Any]: ...
    @property
    def arrays(self) -> Mapping[str, np.ndarray]: ...


class Look(NamedTuple):
    colour: str
    style: Any
    """A line style of matplotlib's."""


class Line(NamedTuple):
    x: np.ndarray
    values: np.ndarray
    """(seeds, points of x)"""


def looks(trials: Sequence[Seen]) -> dict[str, Look]:
    """Colour and line style a row: its kind's colour for the first of a kind (or the row named like it); further rows
    of that kind take what the palette has left, then the kind's colour with dashes."""
    kinds = {trial.row: trial.kind for trial in trials}
    first = {kind: kind if kinds.get(kind) == kind else row for row, kind in reversed(kinds.items())}
    others = [row for row, kind in kinds.items() if first[kind] != row]
    found = {row: Look(COLOURS.get(kind, BLACK), "-") for row, kind in kinds.items()}
    for number, row in enumerate(others):
        dashed = Look(COLOURS.get(kinds[row], BLACK), _DASHES[number % len(_DASHES)])
        found[row] = Look(*_SPARE[number]) if number < len(_SPARE) else dashed
    return found


def _by_row(trials: Sequence[Seen], has: Callable[[Seen], Any]) -> dict[str, list[Seen]]:
    """The finished trials of each row that have something, by seed."""
    rows: dict[str, list[Seen]] = {}
    for trial in trials:
        if trial.status == "finished" and has(trial):
            rows.setdefault(trial.row, []).append(trial)
    return {row: sorted(members, key=lambda trial: trial.seed) for row, members in rows.items()}


def _lines(trials: Sequence[Seen], read: Callable[[Seen], tuple[Any, Any] | None]) -> dict[str, Line]:
    """A line a row from what `read` gives of each trial, (x, values), up to the shortest of its seeds."""
    found = {}
    for row, members in _by_row(trials, read).items():
        pairs = [pair for pair in map(read, members) if pair]
        length = min(len(x) for x, _ in pairs)
        values = np.array([values[:length] for _, values in pairs], np.float64)
        found[row] = Line(np.asarray(pairs[0][0][:length], np.float64), values)
    return found


def _draw(axes: Axes, lines: Mapping[str, Line], look: Mapping[str, Look], name: bool = True) -> None:
    """Means over seeds with a band from lowest to highest; names right of the axes, apart where they would overlap."""
    for row, (x, values) in lines.items():
        colour, style = look[row]
        axes.plot(x, values.mean(0), color=colour, linestyle=style, linewidth=1.6, marker="" if len(x) > 1 else "o")
        axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_FONT - 1)
    if not name:
        return
    ends = {row: (line.x[-1], line.values[:, -1].mean()) for row, line in lines.items()}
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    order = sorted(ends, key=lambda row: ends[row][1])
    heights = np.array([to_axes.transform(ends[row])[1] for row in order])
    figure = axes.figure.figure
    gap = 1.2 * _FONT / (72 * figure.get_figheight() * axes.get_position().height)
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
            row, ends[row], (1.1, height), textcoords="axes fraction", color=colour, fontsize=_FONT,
            va="center", arrowprops=line, annotation_clip=False,
        )  # fmt: skip


def _best(means: Mapping[str, float], higher: bool) -> str:
    return (max if higher else min)(means, key=lambda row: means[row])


def _finite(trials: Sequence[Seen], metric: str) -> np.ndarray:
    values = np.array([trial.metrics.get(metric, np.nan) for trial in trials], np.float64)
    return values[np.isfinite(values)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def learning_curves(trials: Sequence[Seen]) -> bytes | None:
    """`val/reconstruction` by epoch, to the last epoch that all seeds of a row reached; stopped trials are faint."""

    def read(trial: Seen) -> tuple[Any, Any] | None:
        values = [epoch["val/reconstruction"] for epoch in trial.history if "val/reconstruction" in epoch]
        return (range(1, len(values) + 1), values) if values else None

    lines, look = _lines(trials, read), looks(trials)
    if not lines:
        return None
    lowest = {row: float(line.values.mean(0).min()) for row, line in lines.items()}
    best = _best(lowest, higher=False)
    title = f"{best} reaches the lowest mean validation error, {lowest[best]:.3g} ({_BAND})"
    figure = titled(_WIDTH, 4.2, title)
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


def label_efficiency(trials: Sequence[Seen]) -> bytes | None:
    """Test accuracy of the probe and of finetuning by the number of labels they were given."""

    def panel(how: str) -> dict[str, Line]:
        def read(trial: Seen) -> tuple[Any, Any] | None:
            labels = trial.curves.get("labels", {})
            return (labels["counts"], labels[how]) if labels.get(how) else None

        return _lines(trials, read)

    names = {"probe": "linear probe", "finetuned": "finetuned"}
    panels = {names[how]: lines for how in names if (lines := panel(how))}
    if not panels:
        return None
    first, lines = next(iter(panels.items()))
    few = {row: float(line.values[:, 0].mean()) for row, line in lines.items()}
    many = {row: float(line.values[:, -1].mean()) for row, line in lines.items()}
    x, best = next(iter(lines.values())).x, _best(few, higher=True)
    spread = [100 * (max(means.values()) - min(means.values())) for means in (few, many)]
    title = (
        f"With {x[0]:,.0f} labels {best} has the highest mean accuracy ({first}: {_percent(few[best])}); the rows lie "
        f"{spread[0]:.1f} points apart, with {x[-1]:,.0f} labels {spread[1]:.1f} ({_BAND})"
    )
    figure = titled(_WIDTH, 1 + 3.1 * len(panels), title)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (how, lines) in zip(grid, panels.items(), strict=True):
        axes.set_xscale("log")
        _draw(axes, lines, looks(trials))
        axes.set_ylabel(f"test accuracy, {how}")
    grid[-1].set_xlabel("labelled training rows")
    return png(figure)


def robustness(trials: Sequence[Seen]) -> bytes | None:
    """Accuracy, where there are labels, and squared error of corrupted test rows by the level of each noise."""

    def panel(noise: str, measure: str) -> dict[str, Line]:
        def read(trial: Seen) -> tuple[Any, Any] | None:
            curve = trial.curves.get("robustness", {}).get(noise, {})
            return (curve["levels"], curve[measure]) if curve.get(measure) else None

        return _lines(trials, read)

    panels = {(noise, measure): panel(noise, measure) for noise in _NOISES for measure in ("accuracy", "mse")}
    noises = [noise for noise in _NOISES if any(panels[noise, measure] for measure in ("accuracy", "mse"))]
    measures = [measure for measure in ("accuracy", "mse") if any(panels[noise, measure] for noise in noises)]
    if not noises:
        return None
    shown = measures[0]
    holders: dict[str, list[str]] = {}
    for noise in noises:
        last = {row: float(line.values[:, -1].mean()) for row, line in panels[noise, shown].items()}
        if last:
            holders.setdefault(_best(last, higher=shown == "accuracy"), []).append(_NOISES[noise])
    kept = "keeps the highest accuracy" if shown == "accuracy" else "has the lowest squared error"
    best = "; ".join(f"{row} {kept} under {listed(names)}" for row, names in holders.items())
    figure = titled(_WIDTH if len(measures) == 1 else 6.4, 1 + 2.6 * len(noises), f"At the strongest noise {best}")
    grid = figure.subplots(len(noises), len(measures), squeeze=False)
    for (down, across), axes in np.ndenumerate(grid):
        lines = panels[noises[down], measures[across]]
        if lines:
            _draw(axes, lines, looks(trials), name=across == len(measures) - 1)
        axes.set_xlabel(f"level of {_NOISES[noises[down]]}", fontsize=_FONT)
        axes.set_ylabel("accuracy" if measures[across] == "accuracy" else "squared error a feature", fontsize=_FONT)
    return png(figure)


def contraction(trials: Sequence[Seen]) -> bytes | None:
    """How far a code moves, as a share of the step its input made, by the length of the step (Rifai et al. 2011)."""

    def read(trial: Seen) -> tuple[Any, Any] | None:
        curve = trial.curves.get("contraction", {})
        return (curve["radius"], curve["ratio"]) if curve.get("ratio") else None

    lines = _lines(trials, read)
    if not lines:
        return None
    least = {row: float(line.values[:, 0].mean()) for row, line in lines.items()}
    best = _best(least, higher=False)
    title = f"Of the shortest step {best} passes on least to the code, {least[best]:.2g} of its length ({_BAND})"
    figure = titled(_WIDTH, 4.2, title)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    _draw(axes, lines, looks(trials))
    axes.set_xlabel("length of the step in the input")
    axes.set_ylabel("step of the code / step of the input")
    return png(figure)


def _first(trials: Sequence[Seen], *names: str) -> dict[str, Seen]:
    """The lowest seed of each row that has all these arrays."""
    rows = _by_row(trials, lambda trial: all(name in trial.arrays for name in names))
    return {row: members[0] for row, members in rows.items()}


def planes(trials: Sequence[Seen]) -> dict[str, np.ndarray]:
    """The codes of the same test rows in a plane, (rows, 2), by row of the study; takes seconds, in threads."""
    rows = _first(trials, "map")
    # in all threads alike: scikit-learn sets this limit in each, and then puts back what it found
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as mappers:
        return dict(zip(rows, mappers.map(lambda trial: plane(trial.arrays["map"]), rows.values()), strict=True))


def codes_maps(trials: Sequence[Seen], maps: Mapping[str, np.ndarray], classes: Sequence[str]) -> bytes | None:
    """One map of `planes` a row of the study, coloured by class if there are labels."""
    rows = _first(trials, "map")
    if not rows:
        return None
    agreement = {}
    for row, trial in rows.items():
        if "map_labels" in trial.arrays and len(maps[row]) > 1:
            labels = trial.arrays["map_labels"]
            neighbour = cKDTree(maps[row]).query(maps[row], 2)[1][:, 1]
            agreement[row] = float((labels[neighbour] == labels).mean())
    title = f"Codes of {len(next(iter(maps.values())))} test rows in a plane"
    if agreement:
        best, worst = _best(agreement, higher=True), _best(agreement, higher=False)
        title += (
            f": nearest neighbours share a class most often in {best} ({_percent(agreement[best])}), "
            f"least in {worst} ({_percent(agreement[worst])})"
        )
    lines = -(-len(rows) // 2)
    figure = titled(_WIDTH, 0.7 + 2.6 * lines, title)
    grid = figure.subplots(lines, 2, squeeze=False).ravel()
    for axes in grid:
        bare(axes)
    for axes, (row, trial) in zip(grid, rows.items(), strict=False):
        points, known = maps[row], trial.arrays.get("map_labels")
        axes.set_title(f"{row}, {_percent(agreement[row])}" if row in agreement else row, fontsize=_FONT)
        if known is None:
            axes.scatter(points[:, 0], points[:, 1], s=3, color=looks(trials)[row].colour, linewidths=0)
            continue
        for number, name in enumerate(map(legible, classes)):
            own, colour = points[known == number], CLASS_COLOURS[number % len(CLASS_COLOURS)]
            axes.scatter(own[:, 0], own[:, 1], s=3, color=colour, linewidths=0)
            if len(own):
                box = {"facecolor": "white", "alpha": 0.75, "pad": 0.6, "lw": 0}
                style: dict[str, Any] = {"fontsize": _FONT, "fontweight": "bold", "ha": "center", "va": "center"}
                axes.text(*np.median(own, 0), name, color=colour, bbox=box, **style)
    return png(figure)


def _sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Images (count, channels, height, width) side by side as one, white between them."""
    count, channels, height, width = images.shape
    lines = -(-count // columns)
    sheet = np.ones((lines * columns, channels, height + 1, width + 1))
    sheet[:count, :, :height, :width] = images
    sheet = sheet.reshape(lines, columns, channels, height + 1, width + 1)
    return sheet.transpose(2, 0, 3, 1, 4).reshape(channels, lines * (height + 1), columns * (width + 1))


def _gallery(title: str, lines: Mapping[str, np.ndarray]) -> bytes:
    """A line of images (count, *shape) or a heat map (count, features) a name, on one scale."""
    count, *shape = next(iter(lines.values())).shape
    flat = len(shape) == 1
    height = 0.9 if flat else 0.7 * _WIDTH / count * shape[1] / shape[2] + 0.06
    figure = titled(_WIDTH, 0.8 + height * len(lines) + 0.4 * flat, title)
    grid = figure.subplots(len(lines), 1, squeeze=False)[:, 0]
    limit = max(float(np.abs(values).max()) for values in lines.values()) or 1.0
    for axes, (name, values) in zip(grid, lines.items(), strict=True):
        if flat:
            shown = axes.imshow(values, aspect="auto", cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
        else:
            show(axes, _sheet(values, count))
        bare(axes)
        axes.set_ylabel(name.replace(" ", "\n"), rotation=0, ha="right", va="center", fontsize=_FONT)
    if flat:
        axes.set_xlabel(f"feature ({count} test rows in each map)", fontsize=_FONT)
        figure.colorbar(shown, ax=grid, label="standardised value", shrink=0.8)
    return png(figure)


def _errors(truth: np.ndarray, lines: Mapping[str, np.ndarray]) -> tuple[str, float]:
    """Who is closest to the truth, and by what squared error a feature."""
    errors = {row: float(((values - truth) ** 2).mean()) for row, values in lines.items()}
    best = _best(errors, higher=False)
    return best, errors[best]


def reconstructions(trials: Sequence[Seen]) -> bytes | None:
    """The same test rows as they are and as each row of the study reconstructs them (its lowest seed)."""
    rows = _first(trials, "inputs", "reconstructed")
    if not rows:
        return None
    truth = next(iter(rows.values())).arrays["inputs"]
    lines = {row: trial.arrays["reconstructed"] for row, trial in rows.items()}
    best, error = _errors(truth, lines)
    title = f"Reconstructed: of these {len(truth)} test rows {best} comes closest, squared error {error:.2g} a feature"
    return _gallery(title, {"input": truth, **lines})


def triptychs(trials: Sequence[Seen]) -> bytes | None:
    """Clean, corrupted and restored by each row of the study (its lowest seed); the first of `inputs` are the clean."""
    rows = _first(trials, "inputs", "corrupted", "restored")
    if not rows:
        return None
    arrays = next(iter(rows.values())).arrays
    corrupted = arrays["corrupted"]
    clean = arrays["inputs"][: len(corrupted)]
    lines = {row: trial.arrays["restored"] for row, trial in rows.items()}
    best, error = _errors(clean, lines)
    was = float(((corrupted - clean) ** 2).mean())
    title = f"Restored: from a squared error of {was:.2g} a feature {best} comes closest to the clean rows, {error:.2g}"
    return _gallery(title, {"clean": clean, "corrupted": corrupted, **lines})


def activations(trials: Sequence[Seen]) -> bytes | None:
    """Codes (test rows, units) of the sparse and the plain rows on one colour scale, units by mean activity."""
    rows = {row: t.arrays["codes"] for row, t in _first(trials, "codes").items() if t.kind in ("sparse", "plain")}
    if not any(trial.kind == "sparse" for trial in trials if trial.row in rows):
        return None
    means = {row: float(np.abs(codes).mean()) for row, codes in rows.items()}
    low, high = _best(means, higher=False), _best(means, higher=True)
    title = f"{low} is least active, {means[low]:.2g} a unit"
    title += f"; {high} most, {means[high]:.2g}" if high != low else ""
    limit = max(float(np.quantile(np.abs(codes), 0.995)) for codes in rows.values()) or 1.0
    signed = any((codes < 0).any() for codes in rows.values())
    figure = titled(_WIDTH, 0.9 + 1.7 * len(rows), title)
    grid = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (row, codes) in zip(grid, rows.items(), strict=True):
        codes = codes[:, np.argsort(-np.abs(codes).mean(0))]
        scale: dict[str, Any] = {"cmap": "PuOr" if signed else "Greys", "vmin": -limit if signed else 0, "vmax": limit}
        shown = axes.imshow(codes, aspect="auto", interpolation="nearest", **scale)
        axes.set_title(f"{row}: {means[row]:.2g}", fontsize=_FONT, loc="left", color=looks(trials)[row].colour)
        axes.set_ylabel(f"{len(codes)} test rows", fontsize=_FONT)
        axes.set_yticks([])
        axes.tick_params(labelsize=_FONT - 1)
    axes.set_xlabel("unit, the most active first", fontsize=_FONT)
    figure.colorbar(shown, ax=grid, label="activity", shrink=0.8, extend="both" if signed else "max")
    return png(figure)


def identity_risk(trials: Sequence[Seen]) -> bytes | None:
    """What a code wider than the data learns without a constraint and with one: error, probe and weights."""
    names = ("overcomplete", "sparse overcomplete")
    rows = {row: members for row, members in _by_row(trials, lambda _: True).items() if row in names}
    if len(rows) < 2:
        return None
    labels = {"test/reconstruction_mse": "squared error a feature", "probe/accuracy": "probe accuracy"}
    values = {metric: {row: _finite(members, metric) for row, members in rows.items()} for metric in labels}
    values = {metric: found for metric, found in values.items() if all(map(len, found.values()))}
    if not values:
        return None
    free, bound = ({metric: float(found[row].mean()) for metric, found in values.items()} for row in names)
    parts = [f"{labels[metric]} {free[metric]:.3g} unconstrained, {bound[metric]:.3g} sparse" for metric in values]
    filters = {row: trial.arrays["filters"] for row, trial in _first(trials, "filters").items() if row in rows}
    lines = 2 if len(filters) == 2 else 1
    title = f"An overcomplete code: {'; '.join(parts)} (whiskers: lowest to highest seed)"
    figure = titled(_WIDTH, 0.8 + 2.4 * lines, title)
    bars, *below = figure.subfigures(lines, 1, squeeze=False)[:, 0]
    for axes, (metric, found) in zip(bars.subplots(1, len(values), squeeze=False)[0], values.items(), strict=True):
        for place, row in enumerate(names):
            mean = found[row].mean()
            reach = [[mean - found[row].min()], [found[row].max() - mean]]
            axes.bar(place, mean, 0.6, color=looks(trials)[row].colour, alpha=0.8, yerr=reach, capsize=4)
            axes.annotate(f"{mean:.3g}", (place, found[row].max()), (0, 4), textcoords="offset points", ha="center")
        axes.set_xticks(range(2), ["overcomplete", "sparse\novercomplete"], fontsize=_FONT - 1)
        axes.set_title(labels[metric], fontsize=_FONT)
        axes.margins(y=0.18)
        axes.tick_params(axis="y", labelsize=_FONT - 1)
        axes.spines[["top", "right"]].set_visible(False)
    for part in below:
        for axes, row in zip(part.subplots(1, 2), names, strict=True):
            largest = np.abs(filters[row]).max(tuple(range(1, filters[row].ndim)), keepdims=True)
            images = filters[row] / np.maximum(largest, 1e-12)
            if images.ndim == 2:
                axes.imshow(images, aspect="auto", cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
            else:
                show(axes, _sheet(images, 4), limit=1.0)
            bare(axes)
            axes.set_title(f"weights, {row}", fontsize=_FONT)
    return png(figure)


def samples(trials: Sequence[Seen]) -> bytes | None:
    """Images drawn from the prior of each variational row, and its manifold where the code is a plane."""
    rows = {row: trial for row, trial in _first(trials, "samples").items() if trial.arrays["samples"].ndim == 4}
    if not rows:
        return None
    title = "Drawn from the prior"
    distances = {row: float(found[0]) for row, t in rows.items() if len(found := _finite([t], "sample/frechet"))}
    if distances:
        best = _best(distances, higher=False)
        title += f": {best} is closest to the test images, Fréchet distance {distances[best]:.3g}"
        floor = rows[best].metrics.get("sample/frechet_floor")
        title += f" (real images: {floor:.3g})" if floor is not None else ""
    sheets = [(f"{row}: samples", trial.arrays["samples"]) for row, trial in rows.items()]
    sheets += [(f"{row}: manifold", t.arrays["manifold"]) for row, t in rows.items() if "manifold" in t.arrays]
    lines = -(-len(sheets) // 2)
    figure = titled(_WIDTH, 0.7 + 2.7 * lines, title)
    grid = figure.subplots(lines, 2, squeeze=False).ravel()
    for axes in grid:
        bare(axes)
    for axes, (name, images) in zip(grid, sheets, strict=False):
        show(axes, _sheet(images, 10))
        axes.set_title(name, fontsize=_FONT)
    return png(figure)


def _groups(values: Sequence[Any]) -> list[str]:
    """A name a value for its group: numbers of more than five distinct values by quartile."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values) or len(set(numbers)) <= 5:
        return [str(value) for value in values]
    return [str(quarter) for quarter in np.searchsorted(np.quantile(numbers, [0.25, 0.5, 0.75]), numbers)]


def importance(trials: Sequence[Seen], metric: str) -> bytes | None:
    """For each setting that was searched the share of the metric's variance that lies between its values.

    One-way: between-group over total sum of squares (the correlation ratio; Fisher 1925), over all finished trials with
    that setting, each row's mean subtracted first. A tick marks what groups without any effect would give on average.
    """
    seen = [trial for trial in trials if trial.status == "finished" and len(_finite([trial], metric))]
    shares: dict[str, tuple[float, float]] = {}
    for name in sorted({name for trial in seen for name in trial.settings}):
        rows = _by_row([trial for trial in seen if name in trial.settings], lambda _: True)
        levels = _groups([trial.settings[name] for row in rows.values() for trial in row])
        values = [_finite(row, metric) for row in rows.values()]
        centred = np.concatenate([row - row.mean() for row in values])
        total = float((centred**2).sum())
        count = len(set(levels))
        if count < 2 or not total:
            continue
        groups = [centred[[level == other for other in levels]] for level in set(levels)]
        chance = (count - 1) / max(len(centred) - len(rows), 1)
        shares[name] = float(sum(len(g) * g.mean() ** 2 for g in groups)) / total, min(1.0, chance)
    if not shares:
        return None
    order = sorted(shares, key=lambda name: shares[name])
    top = order[-1]
    title = f"{top} explains {100 * shares[top][0]:.0f} % of the variance of {metric}"
    figure = titled(_WIDTH, 1.3 + 0.4 * len(order), title)
    axes = figure.subplots()
    axes.barh(order, [shares[name][0] for name in order], 0.6, color=BLUE)
    axes.plot([shares[name][1] for name in order], order, "|", color=BLACK, markersize=16, markeredgewidth=1.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of variance between its values (tick: by chance)", fontsize=_FONT)
    axes.tick_params(labelsize=_FONT)
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)
