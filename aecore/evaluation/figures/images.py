"""Figures of a study that show rows of data or units as images: the same test rows and the same noise everywhere.

Each study row is shown by its lowest seed.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from aecore.evaluation.figures.look import hide_axes, open_frame, png, show_image, show_values, tiled, titled
from aecore.evaluation.figures.trials import FONT, WIDTH, best_row, by_row, finite, looks, lowest_seeds
from aecore.evaluation.trial import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

_OVERCOMPLETE = ("overcomplete", "sparse overcomplete")
"""The study rows that `identity_risk` compares, the row without a constraint first."""


def reconstructions(trials: Sequence[Trial]) -> bytes | None:
    """Draw test rows as they are and as each study row reconstructs them."""
    rows = lowest_seeds(trials, "inputs", "reconstructed")
    if not rows:
        return None
    truth = next(iter(rows.values())).arrays["inputs"]
    lines = {row: trial.arrays["reconstructed"] for row, trial in rows.items()}
    best, error = _closest(truth, lines)
    title = (
        f"Reconstructed: of these {len(truth)} test rows {best} comes closest, squared error {error:.2g} per feature"
    )
    return _gallery(title, {"input": truth, **lines})


def triptychs(trials: Sequence[Trial]) -> bytes | None:
    """Draw test rows clean, corrupted and as each study row restores them."""
    rows = lowest_seeds(trials, "inputs", "corrupted", "restored")
    if not rows:
        return None
    arrays = next(iter(rows.values())).arrays
    corrupted = arrays["corrupted"]
    clean = arrays["inputs"][: len(corrupted)]
    lines = {row: trial.arrays["restored"] for row, trial in rows.items()}
    best, error = _closest(clean, lines)
    before = float(((corrupted - clean) ** 2).mean())
    title = (
        f"Restored: from a squared error of {before:.2g} per feature {best} comes closest to the clean rows, "
        f"{error:.2g}"
    )
    return _gallery(title, {"clean": clean, "corrupted": corrupted, **lines})


def samples(trials: Sequence[Trial]) -> bytes | None:
    """Draw images from the prior of each variational study row, and its manifold where the code is a plane."""
    rows = {row: trial for row, trial in lowest_seeds(trials, "samples").items() if trial.arrays["samples"].ndim == 4}
    if not rows:
        return None
    title = "Drawn from the prior"
    distances = {row: float(values[0]) for row, t in rows.items() if len(values := finite([t], "sample/frechet"))}
    if distances:
        best = best_row(distances, higher=False)
        title += f": {best} is closest to the test images, Fréchet distance {distances[best]:.3g}"
        floor = rows[best].metrics.get("sample/frechet_floor")
        title += f" (real images: {floor:.3g})" if floor is not None else ""
    sheets = [(f"{row}: samples", trial.arrays["samples"]) for row, trial in rows.items()]
    sheets += [(f"{row}: manifold", t.arrays["manifold"]) for row, t in rows.items() if "manifold" in t.arrays]
    lines = -(-len(sheets) // 2)
    figure = titled(WIDTH, 0.7 + 2.7 * lines, title)
    grid = figure.subplots(lines, 2, squeeze=False).ravel()
    for axes in grid:
        hide_axes(axes)
    for axes, (name, images) in zip(grid, sheets, strict=False):
        show_image(axes, tiled(images, 10, gap=1))
        axes.set_title(name, fontsize=FONT)
    return png(figure)


def identity_risk(trials: Sequence[Trial]) -> bytes | None:
    """Draw error, probe accuracy and weights of two autoencoders whose code is wider than their input: one without a
    constraint, which may learn the identity map, and a sparse one. None if the study lacks one of them."""
    members = {row: seeds for row, seeds in by_row(trials).items() if row in _OVERCOMPLETE}
    if len(members) < 2:
        return None
    labels = {"test/reconstruction_mse": "squared error per feature", "probe/accuracy": "probe accuracy"}
    values = {label: {row: finite(members[row], metric) for row in _OVERCOMPLETE} for metric, label in labels.items()}
    values = {label: rows for label, rows in values.items() if all(map(len, rows.values()))}
    if not values:
        return None
    filters = {row: trial.arrays["filters"] for row, trial in lowest_seeds(trials, "filters").items() if row in members}
    lines = 2 if len(filters) == 2 else 1
    means = {label: [float(rows[row].mean()) for row in _OVERCOMPLETE] for label, rows in values.items()}
    parts = [f"{label} {free:.3g} unconstrained, {bound:.3g} sparse" for label, (free, bound) in means.items()]
    title = f"An overcomplete code: {'; '.join(parts)} (whiskers: lowest to highest seed)"
    figure = titled(WIDTH, 0.8 + 2.4 * lines, title)
    bars, *below = figure.subfigures(lines, 1, squeeze=False)[:, 0]
    colours = {row: looks(trials)[row].colour for row in _OVERCOMPLETE}
    for axes, (label, rows) in zip(bars.subplots(1, len(values), squeeze=False)[0], values.items(), strict=True):
        _bars(axes, label, rows, colours)
    for part in below:
        _weights(part, filters)
    return png(figure)


def _bars(axes: "Axes", label: str, rows: Mapping[str, np.ndarray], colours: Mapping[str, str]) -> None:
    """Draw the mean of each study row's values (seeds,) with a whisker from the lowest to the highest."""
    for place, (row, values) in enumerate(rows.items()):
        mean = values.mean()
        reach = [[mean - values.min()], [values.max() - mean]]
        axes.bar(place, mean, 0.6, color=colours[row], alpha=0.8, yerr=reach, capsize=4)
        axes.annotate(f"{mean:.3g}", (place, values.max()), (0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(rows)), [row.replace(" ", "\n") for row in rows], fontsize=FONT - 1)
    axes.set_title(label, fontsize=FONT)
    axes.margins(y=0.18)
    axes.tick_params(axis="y", labelsize=FONT - 1)
    open_frame(axes)


def _weights(figure: "SubFigure", filters: Mapping[str, np.ndarray]) -> None:
    """Draw the weights (units, *shape) of each overcomplete study row, every unit on its own scale."""
    for axes, row in zip(figure.subplots(1, 2), _OVERCOMPLETE, strict=True):
        largest = np.abs(filters[row]).max(tuple(range(1, filters[row].ndim)), keepdims=True)
        images = filters[row] / np.maximum(largest, 1e-12)
        if images.ndim == 2:
            show_values(axes, images, 1)
            hide_axes(axes)
        else:
            show_image(axes, tiled(images / 2 + 0.5, 4, gap=1))
        axes.set_title(f"weights, {row}", fontsize=FONT)


def _closest(truth: np.ndarray, lines: Mapping[str, np.ndarray]) -> tuple[str, float]:
    """Return the study row that is closest to the truth, and its squared error per feature."""
    errors = {row: float(((values - truth) ** 2).mean()) for row, values in lines.items()}
    best = best_row(errors, higher=False)
    return best, errors[best]


def _gallery(title: str, lines: Mapping[str, np.ndarray]) -> bytes:
    """Draw a line of images (count, *shape) or a heat map (count, features) per name, all on one scale."""
    count, *shape = next(iter(lines.values())).shape
    flat = len(shape) == 1
    height = 0.9 if flat else 0.7 * WIDTH / count * shape[1] / shape[2] + 0.06
    figure = titled(WIDTH, 0.8 + height * len(lines) + 0.4 * flat, title)
    grid = figure.subplots(len(lines), 1, squeeze=False)[:, 0]
    limit = max(float(np.abs(values).max()) for values in lines.values()) or 1.0
    for axes, (name, values) in zip(grid, lines.items(), strict=True):
        if flat:
            shown = show_values(axes, values, limit)
            hide_axes(axes)
        else:
            show_image(axes, tiled(values, count, gap=1))
        axes.set_ylabel(name.replace(" ", "\n"), rotation=0, ha="right", va="center", fontsize=FONT)
    if flat:
        axes.set_xlabel(f"feature ({count} test rows in each map)", fontsize=FONT)
        figure.colorbar(shown, ax=grid, label="standardised value", shrink=0.8)
    return png(figure)
