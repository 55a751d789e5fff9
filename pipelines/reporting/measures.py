"""The measures that the report of a study compares, and what it says of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from aecore.evaluation.statistics import Pair, compare, judge
from pipelines.study.trial import REFERENCES, Trial


class Measure(NamedTuple):
    """A metric of the trials, as the report shows it."""

    name: str
    label: str
    better: str = ""
    """`higher` or `lower`; empty for measures that are only described, since neither is better."""
    points: str = ""
    """The array of the measure's values per test row, where it has one: test rows then count as well as seeds."""
    ratios: bool = False
    """Whether rows are compared by their ratio, as errors are."""

    def show(self, value: float, places: int = 4) -> str:
        """Write a value, to so many significant digits where it is no accuracy."""
        if not np.isfinite(value):
            return "–"
        return f"{100 * value:.2f} %" if self.name.endswith("accuracy") else f"{value:.{places}g}"

    def show_difference(self, value: float) -> str:
        """Write a difference of two rows as `compare` gives it: of logarithms as the ratio they stand for."""
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
    """What the report shows of one measure."""

    measure: Measure
    means: dict[str, float]
    """Means over seeds, by row."""
    verdict: str
    """In words; empty where nothing is compared."""
    cells: list[tuple[str, bool]]
    """For each row of the study its mean and spread as text, and whether it is among the best."""
    pairs: list[tuple[Pair, str, str, str]]
    """Each pair of rows with its difference and the ends of its interval as text."""


def compare_measures(trials: Sequence[Trial], rows: Sequence[str]) -> list[Comparison]:
    """Compare the rows by each measure that some row has."""
    comparisons = (_compare(measure, trials, rows) for measure in MEASURES)
    return [comparison for comparison in comparisons if comparison]


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
    """Return an array per row: (seeds,) or, where every trial has values per test row, (seeds, test rows); NaN for the
    seeds that a row lacks."""
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
    """Write the mean over seeds and, with more than one, the standard deviation."""
    values = values[np.isfinite(values)]
    mean = measure.show(float(values.mean()))
    if len(values) == 1:
        return mean
    spread = float(values.std(ddof=1))
    # the spread of equal numbers is rounding
    return f"{mean} ± {measure.show(spread if spread > 1e-12 * abs(values.mean()) else 0.0, 2)}"
