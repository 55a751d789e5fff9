"""Figures of a study that show codes: in a plane, and as heat maps of their units' activity."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.spatial import cKDTree
from threadpoolctl import threadpool_limits

from aecore.evaluation.figures.look import hide_axes, plane, png, scatter, show_values, titled
from aecore.evaluation.figures.trials import FONT, WIDTH, best_row, looks, lowest_seeds, percent
from aecore.evaluation.trial import Trial


def planes(trials: Sequence[Trial]) -> dict[str, np.ndarray]:
    """Return the codes of the same test rows in a plane, (test rows, 2), for each study row; takes seconds, in
    threads."""
    rows = lowest_seeds(trials, "map")
    # the limit is the same in all threads: scikit-learn sets it in each one and then restores what it found
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as mappers:
        return dict(zip(rows, mappers.map(lambda trial: plane(trial.arrays["map"]), rows.values()), strict=True))


def codes_maps(trials: Sequence[Trial], maps: Mapping[str, np.ndarray], classes: Sequence[str]) -> bytes | None:
    """Draw the map of each study row, coloured by class if there are labels.

    Args:
        maps: what `planes` returned.
    """
    rows = lowest_seeds(trials, "map")
    if not rows:
        return None
    agreement = _agreement(rows, maps)
    title = f"Codes of {len(next(iter(maps.values())))} test rows in a plane"
    if agreement:
        best, worst = best_row(agreement, higher=True), best_row(agreement, higher=False)
        title += (
            f": nearest neighbours share a class most often in {best} ({percent(agreement[best])}), "
            f"least in {worst} ({percent(agreement[worst])})"
        )
    lines = -(-len(rows) // 2)
    figure = titled(WIDTH, 0.7 + 2.6 * lines, title)
    grid = figure.subplots(lines, 2, squeeze=False).ravel()
    for axes in grid:
        hide_axes(axes)
    for axes, (row, trial) in zip(grid, rows.items(), strict=False):
        points = maps[row]
        axes.set_title(f"{row}, {percent(agreement[row])}" if row in agreement else row, fontsize=FONT)
        if "map_labels" in trial.arrays:
            scatter(axes, points, trial.arrays["map_labels"], classes, 3, FONT)
        else:
            axes.scatter(points[:, 0], points[:, 1], s=3, color=looks(trials)[row].colour, linewidths=0)
    return png(figure)


def _agreement(rows: Mapping[str, Trial], maps: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return for each study row with labels the share of points whose nearest neighbour has their class."""
    agreement = {}
    for row, trial in rows.items():
        if "map_labels" in trial.arrays and len(maps[row]) > 1:
            labels = trial.arrays["map_labels"]
            neighbour = cKDTree(maps[row]).query(maps[row], 2)[1][:, 1]
            agreement[row] = float((labels[neighbour] == labels).mean())
    return agreement


def activations(trials: Sequence[Trial]) -> bytes | None:
    """Draw codes (test rows, units) of the sparse and plain study rows on one scale, the most active units first."""
    rows = {row: t.arrays["codes"] for row, t in lowest_seeds(trials, "codes").items() if t.kind in ("sparse", "plain")}
    if not any(trial.kind == "sparse" for trial in trials if trial.row in rows):
        return None
    means = {row: float(np.abs(codes).mean()) for row, codes in rows.items()}
    low, high = best_row(means, higher=False), best_row(means, higher=True)
    title = f"{low} is least active, {means[low]:.2g} per unit"
    title += f"; {high} most, {means[high]:.2g}" if high != low else ""
    limit = max(float(np.quantile(np.abs(codes), 0.995)) for codes in rows.values()) or 1.0
    signed = any((codes < 0).any() for codes in rows.values())
    figure = titled(WIDTH, 0.9 + 1.7 * len(rows), title)
    grid = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (row, codes) in zip(grid, rows.items(), strict=True):
        shown = show_values(axes, codes[:, np.argsort(-np.abs(codes).mean(0))], limit, signed)
        axes.set_title(f"{row}: {means[row]:.2g}", fontsize=FONT, loc="left", color=looks(trials)[row].colour)
        axes.set_ylabel(f"{len(codes)} test rows", fontsize=FONT)
        axes.set_yticks([])
        axes.tick_params(labelsize=FONT - 1)
    axes.set_xlabel("unit, the most active first", fontsize=FONT)
    figure.colorbar(shown, ax=grid, label="activity", shrink=0.8, extend="both" if signed else "max")
    return png(figure)
