"""The measures that the report of a study compares, and their comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from aecore.evaluation.statistics import Pair, compare, judge, worth
from aecore.evaluation.trial import REFERENCES, Trial


class Measure(NamedTuple):
    """A metric of the trials, as the report shows it."""

    name: str
    label: str
    better: str = ""
    """`higher` or `lower`; empty for measures that are only described, since neither is better."""
    points: str = ""
    """Name of the array with a value per test row, if there is one: test rows then count as well as seeds."""
    ratios: bool = False
    """Whether study rows are compared by their ratio, as is done with errors."""

    def show(self, value: float, places: int = 4) -> str:
        """Return a value as text: an accuracy in percent, any other value with `places` significant digits."""
        if not np.isfinite(value):
            return "–"
        return f"{100 * value:.2f} %" if self.name.endswith("accuracy") else f"{value:.{places}g}"

    def show_difference(self, value: float) -> str:
        """Return a difference of two study rows as text; a difference of logarithms is shown as a ratio."""
        return f"× {np.exp(value):.3g}" if self.ratios and np.isfinite(value) else self.show(value, 3)


MEASURES = (
    Measure("test/reconstruction_mse", "Squared error per feature", "lower", "sse", True),
    Measure("test/unexplained", "Variance left unexplained", "lower", ratios=True),
    Measure("probe/accuracy", "Linear probe, accuracy", "higher", "correct/probe"),
    Measure("knn/accuracy", "Nearest neighbours, accuracy", "higher", "correct/knn"),
    Measure("finetuned/accuracy", "Finetuned, accuracy", "higher", "correct/finetuned"),
    Measure("cluster/nmi", "k-means, mutual information (NMI)", "higher"),
    Measure("cluster/ari", "k-means, Rand index (ARI)", "higher"),
    Measure("cluster/accuracy", "k-means, accuracy", "higher"),
    Measure("robust/accuracy", "Probe under noise, mean accuracy", "higher"),
    Measure("robust/mse", "Restored from noise, mean squared error", "lower", ratios=True),
    Measure("vae/bound", "Evidence lower bound, nats", "higher"),
    Measure("vae/iw_bound", "Importance-weighted bound, nats", "higher"),
    Measure("sample/frechet", "Samples, Fréchet distance", "lower", ratios=True),
    Measure("sample/frechet_floor", "Real rows, Fréchet distance"),
    Measure("vae/active_units", "Active latent units"),
    Measure("contraction/norm", "Norm of the encoder's Jacobian"),
    Measure("contraction/relative", "Norm of the Jacobian / spread of the codes"),
    Measure("units/mean_activation", "Mean activity of a unit"),
    Measure("units/dead", "Share of units that never move"),
    Measure("units/saturated", "Share of activities at their bounds"),
)
"""The measures in the order of the report."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One measure in the report: means of all study rows, their differences, and a verdict."""

    measure: Measure
    means: dict[str, float]
    """Means over seeds, by study row."""
    verdict: str
    """Which study row is best, in words; empty where nothing is compared."""
    cells: list[tuple[str, bool]]
    """For each study row its mean and spread as text, and whether the row is among the best."""
    pairs: list[tuple[Pair, str, str, str]]
    """Each pair of study rows with its difference and the ends of its interval as text."""


def compare_measures(trials: Sequence[Trial], rows: Sequence[str]) -> list[Comparison]:
    """Compare the study rows by each measure that at least one of them has."""
    comparisons = (_compare(measure, trials, rows) for measure in MEASURES)
    return [comparison for comparison in comparisons if comparison]


def worth_of_pretraining(comparisons: Sequence[Comparison]) -> list[str]:
    """Say for each study row what its training without labels is worth: how much higher the test accuracy of its
    finetuned classifier is than that of the same network finetuned from random weights. Empty without labels."""
    finetuned = [one for one in comparisons if one.measure.name == "finetuned/accuracy"]
    pairs = [pair for one in finetuned for pair, *_ in one.pairs if "pca" not in (pair.first, pair.second)]
    return worth(pairs, "random")


def _compare(measure: Measure, trials: Sequence[Trial], rows: Sequence[str]) -> Comparison | None:
    by_seed = _values(trials, measure._replace(points=""))
    if not by_seed:
        return None
    means = {row: float(np.nanmean(values)) for row, values in by_seed.items()}
    cells = {row: _cell(measure, values) for row, values in by_seed.items()}
    pairs: tuple[Pair, ...] = ()
    best: tuple[str, ...] = ()
    words = ""
    if measure.better and len(means) > 1:
        pairs = compare(_values(trials, measure), ratios=measure.ratios)
        verdict = judge(means, pairs, measure.better == "higher", REFERENCES)
        best, words = verdict.best, verdict.words()
    elif measure.better:
        words = "; ".join(f"only {row} has it, {cell}: not compared." for row, cell in cells.items())
    show = measure.show_difference
    return Comparison(
        measure=measure,
        means=means,
        verdict=words,
        cells=[(cells.get(row, "–"), row in best) for row in rows],
        pairs=[(pair, show(pair.difference), show(pair.low), show(pair.high)) for pair in pairs],
    )


def _values(trials: Sequence[Trial], measure: Measure) -> dict[str, np.ndarray]:
    """Return an array per study row: (seeds,) or, where every trial has values per test row, (seeds, test rows); NaN
    for the seeds that the study row lacks."""
    scored = [t for t in trials if t.status == "finished" and np.isfinite(t.metrics.get(measure.name, np.nan))]
    seeds = sorted({trial.seed for trial in scored})
    points = bool(measure.points) and all(measure.points in trial.arrays for trial in scored)
    shape = scored[0].arrays[measure.points].shape if scored and points else ()
    values = {trial.row: np.full((len(seeds), *shape), np.nan) for trial in scored}
    for trial in scored:
        value = trial.arrays[measure.points] if points else trial.metrics[measure.name]
        values[trial.row][seeds.index(trial.seed)] = value
    return values


def _cell(measure: Measure, values: np.ndarray) -> str:
    """Return as text the mean over seeds and, with several seeds, the standard deviation."""
    values = values[np.isfinite(values)]
    mean = measure.show(float(values.mean()))
    if len(values) == 1:
        return mean
    spread = float(values.std(ddof=1))
    # the spread of equal numbers is rounding
    return f"{mean} ± {measure.show(spread if spread > 1e-12 * abs(values.mean()) else 0.0, 2)}"
