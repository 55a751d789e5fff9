"""The measures that the report of a study compares, and their comparison."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from aecore.evaluation.statistics import Pair, compare
from aecore.evaluation.trial import Trial
from aecore.evaluation.verdicts import Verdict, judge, worth

SHOWN_ROWS = 12
"""The most study rows that a figure or a table of pairs shows."""


DETECTION = ("test/auroc", "test/average_precision", "test/precision_at_n", "auroc/")
"""How the names of the measures begin that say how well anomalies are found."""


class Measure(NamedTuple):
    """A metric of the trials, as the report shows it."""

    name: str
    label: str
    short: str
    """A label for the head of a narrow column."""
    better: str = ""
    """`higher` or `lower`; empty for measures that are only described, since neither is better."""
    points: str = ""
    """Name of the array with a value per test row, if there is one: test rows then count as well as seeds."""
    ratios: bool = False
    """Whether study rows are compared by their ratio, as is done with errors."""

    @property
    def in_words(self) -> str:
        """The short label as it stands within a sentence."""
        return self.short if self.short.isupper() else self.short[0].lower() + self.short[1:]

    def show(self, value: float, places: int = 4) -> str:
        """Return a value as text: an accuracy in percent, a measure of detection with three decimals, any other value
        with `places` significant digits."""
        if not np.isfinite(value):
            return "–"
        if self.name.startswith(DETECTION):
            return f"{value:.3f}"
        return f"{100 * value:.2f} %" if self.name.endswith("accuracy") else f"{value:.{places}g}"

    def show_difference(self, value: float) -> str:
        """Return a difference of two study rows as text; a difference of logarithms is shown as a ratio."""
        return f"× {np.exp(value):.3g}" if self.ratios and np.isfinite(value) else self.show(value, 3)


MEASURES = (
    Measure("test/auroc", "Area under the ROC curve", "AUROC", "higher", "auroc"),
    Measure("test/average_precision", "Average precision", "Average precision", "higher", "average_precision"),
    Measure(
        "test/precision_at_n",
        "Anomalies among the strangest rows, as many as there are",
        "Precision at n",
        "higher",
        "precision_at_n",
    ),
    Measure("auroc/error", "AUROC by the error of reconstruction", "AUROC, error"),
    Measure("auroc/code_neighbours", "AUROC by distance to nearest codes", "AUROC, codes"),
    Measure("auroc/code_distance", "AUROC by Mahalanobis distance of codes", "AUROC, Mahalanobis"),
    Measure("auroc/ranks", "AUROC by ranks of error and nearest codes", "AUROC, ranks"),
    Measure("auroc/bound", "AUROC by the evidence lower bound", "AUROC, bound"),
    Measure("test/reconstruction_mse", "Squared error per feature", "Squared error", "lower", "sse", True),
    Measure("test/unexplained", "Variance left unexplained", "Unexplained variance", "lower", ratios=True),
    Measure("probe/accuracy", "Linear probe, accuracy", "Probe accuracy", "higher", "correct/probe"),
    Measure("knn/accuracy", "Nearest neighbours, accuracy", "Neighbours accuracy", "higher", "correct/knn"),
    Measure("finetuned/accuracy", "Finetuned, accuracy", "Finetuned accuracy", "higher", "correct/finetuned"),
    Measure("cluster/nmi", "k-means, mutual information (NMI)", "k-means NMI", "higher"),
    Measure("cluster/ari", "k-means, Rand index (ARI)", "k-means ARI", "higher"),
    Measure("cluster/accuracy", "k-means, accuracy", "k-means accuracy", "higher"),
    Measure("robust/accuracy", "Probe under noise, mean accuracy", "Accuracy under noise", "higher"),
    Measure("robust/mse", "Restored from noise, mean squared error", "Error from noise", "lower", ratios=True),
    Measure("vae/bound", "Evidence lower bound, nats", "Evidence bound", "higher"),
    Measure("vae/iw_bound", "Importance-weighted bound, nats", "Weighted bound", "higher"),
    Measure("sample/frechet", "Samples, Fréchet distance", "Fréchet distance", "lower", ratios=True),
    Measure("sample/frechet_floor", "Real rows, Fréchet distance", "Fréchet, real rows"),
    Measure("vae/active_units", "Active latent units", "Active units"),
    Measure("contraction/norm", "Norm of the encoder's Jacobian", "Jacobian norm"),
    Measure("contraction/relative", "Norm of the Jacobian / spread of the codes", "Relative Jacobian"),
    Measure("units/mean_activation", "Mean activity of a unit", "Mean activity"),
    Measure("units/dead", "Share of units that never move", "Dead units"),
    Measure("units/saturated", "Share of activities at their bounds", "Saturated units"),
)
"""The measures in the order of the report."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One measure in the report: means of all study rows, their differences, and a verdict."""

    measure: Measure
    means: dict[str, float]
    """Means over seeds, by study row."""
    cells: dict[str, str]
    """Mean and spread as text, by study row."""
    verdict: Verdict | None
    """None where nothing is compared."""
    words: str
    """Which study row is best, in words; empty for measures that are only described."""
    pairs: tuple[Pair, ...]
    """All pairs of study rows."""

    def shown_pairs(self) -> Iterator[tuple[Pair, str, str, str]]:
        """Yield pairs with difference and ends of the interval as text: all pairs of a dozen study rows, else those of
        the rows with the best means and the references."""
        rows = set(self.means)
        if self.verdict and len(rows) > SHOWN_ROWS:
            references = self.verdict.references
            ranked = [row for row in self.verdict.ranked if row not in references]
            rows = {*ranked[: SHOWN_ROWS - len(references)], *references}
        show = self.measure.show_difference
        for pair in self.pairs:
            if pair.first in rows and pair.second in rows:
                yield pair, show(pair.difference), show(pair.low), show(pair.high)


def compare_measures(trials: Sequence[Trial], dropped: Collection[str] = ()) -> list[Comparison]:
    """Compare the study rows by each measure that at least one of them has.

    Args:
        dropped: study rows that a race dropped: they are compared in pairs, but no verdict names them, since they lack
            seeds.
    """
    comparisons = (_compare(measure, trials, dropped) for measure in MEASURES)
    return [comparison for comparison in comparisons if comparison]


def worth_of_pretraining(comparisons: Sequence[Comparison], rows: Sequence[str]) -> list[str]:
    """Say for each of these study rows what its training without labels is worth: how much higher the test accuracy of
    its finetuned classifier is than that of the same network finetuned from random weights. Empty without labels."""
    finetuned = [one for one in comparisons if one.measure.name == "finetuned/accuracy"]
    known = {*rows, "random"} - {"pca"}
    pairs = [pair for one in finetuned for pair in one.pairs if {pair.first, pair.second} <= known]
    return worth(pairs, "random")


def _compare(measure: Measure, trials: Sequence[Trial], dropped: Collection[str]) -> Comparison | None:
    by_seed = _values(trials, measure._replace(points=""))
    if not by_seed:
        return None
    means = {row: float(np.nanmean(values)) for row, values in by_seed.items()}
    cells = {row: _cell(measure, values) for row, values in by_seed.items()}
    pairs: tuple[Pair, ...] = ()
    verdict, words = None, ""
    references = list(dict.fromkeys(trial.row for trial in trials if trial.is_reference))
    judged = {row: mean for row, mean in means.items() if row not in dropped}
    if measure.better and len(judged) > 1:
        pairs = compare(_values(trials, measure), ratios=measure.ratios)
        verdict = judge(judged, pairs, measure.better == "higher", references)
        words = verdict.words()
    elif measure.better:
        words = "; ".join(f"only {row} has it, {cell}: not compared." for row, cell in cells.items())
    return Comparison(measure=measure, means=means, cells=cells, verdict=verdict, words=words, pairs=pairs)


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
