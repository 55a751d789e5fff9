"""The diagram of mean ranks over data sets (Demsar 2006, fig. 1)."""

import numpy as np

from aecore.evaluation.figures.look import legible, png, titled
from aecore.evaluation.figures.trials import FONT, WIDTH, Look
from aecore.evaluation.ranks import Ranks


def critical_difference(ranks: Ranks, look: dict[str, Look]) -> bytes:
    """Draw the mean rank of each study row on a line, the best on the left, and a bar over each group of rows whose
    ranks do not differ."""
    names, values = list(ranks.means), np.array([*ranks.means.values()])
    bars = len(ranks.groups)
    figure = titled(WIDTH, 1.2 + 0.24 * len(names) + 0.12 * bars, _finding(ranks))
    axes = figure.subplots()
    low, high = np.floor(values.min() - 0.2), np.ceil(values.max() + 0.2)
    half = -(-len(names) // 2)
    depth = 0.8 + 0.35 * bars
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        on_left = number < half
        y = -(depth + (number if on_left else len(names) - 1 - number))
        x = low if on_left else high
        colour = look[name].colour
        axes.plot([value, value, x], [0, y, y], color=colour, linewidth=1, clip_on=False)
        text = f"{legible(name)} {value:.1f}"
        axes.text(x, y, f"{text} " if on_left else f" {text}", ha="right" if on_left else "left", va="center",
                  fontsize=FONT, color=colour)  # fmt: skip
    for number, group in enumerate(ranks.groups):
        ends = [ranks.means[group[0]] - 0.05, ranks.means[group[-1]] + 0.05]
        axes.plot(ends, [-0.35 * (number + 1)] * 2, color="black", linewidth=3, solid_capstyle="butt")
    if np.isfinite(ranks.critical_difference) and ranks.critical_difference < high - low:
        axes.plot([low, low + ranks.critical_difference], [0.9, 0.9], color="black", linewidth=1.2, marker="|")
        axes.text(low, 1.15, f"critical difference {ranks.critical_difference:.2f}", fontsize=FONT - 1, va="bottom")
    axes.set_xlim(low, high)
    axes.set_ylim(-(depth + half), 1.6)
    axes.spines[["left", "right", "bottom"]].set_visible(False)
    axes.spines["top"].set_position(("data", 0))
    axes.xaxis.tick_top()
    axes.set_yticks([])
    axes.tick_params(labelsize=FONT)
    return png(figure)


def _finding(ranks: Ranks) -> str:
    best = next(iter(ranks.means))
    over = f"over {ranks.sets} sets"
    if not np.isfinite(ranks.critical_difference):
        return f"Mean ranks {over}: no row differs from another"
    tied = max((len(group) for group in ranks.groups if best in group), default=1) - 1
    others = f"; {tied} more {'is' if tied == 1 else 'are'} not worse beyond doubt" if tied else ", beyond doubt"
    return f"{legible(best)} has the best mean rank {over}, {ranks.means[best]:.1f}{others}"
