"""Racing: a study's seeds are trained in rounds, and a row that is worse than the best gets no further seeds."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from aecore.evaluation.statistics import Pair, compare
from aecore.evaluation.trial import Dropped
from aecore.evaluation.verdicts import judge

FIRST_SEEDS = 2
"""Number of seeds of the first round. The spread over seeds is pooled over the rows, so two are enough to see by."""
_SPENT = 0.1
"""Part of the level that all looks before the last spend together. With half of it up to 9 % of replayed races dropped
a row that ties in the full study, at few trials less (`python -m tests.benchmarks.racing`)."""


class Goal(NamedTuple):
    """The measure on the test rows by which study rows race; the report compares them by it in the same way."""

    metric: str
    points: str
    """Name of the array with a value per test row."""
    higher: bool
    """Whether more is better."""
    ratios: bool
    """Whether rows are compared by their ratio, as is done with errors."""


GOALS = {
    "reconstruction": Goal("test/reconstruction_mse", "sse", False, True),
    "probe": Goal("probe/accuracy", "correct/probe", True, False),
    "finetuned": Goal("finetuned/accuracy", "correct/finetuned", True, False),
}
"""What study rows race by, for each measure that a study may choose settings by (`choose`)."""


def rounds(seeds: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the seeds of each round: two in the first and one in each further round."""
    return [tuple(seeds[:FIRST_SEEDS]), *((seed,) for seed in seeds[FIRST_SEEDS:])]


def drop(values: Mapping[str, np.ndarray], goal: Goal, planned: int, dropped: Collection[str] = ()) -> list[Dropped]:
    """Return the study rows that are worse than the best; to be called after each round but the last.

    Rows are compared as in the report: all pairs, by seed and by test row, with Holm's correction. Who looks several
    times finds more that is not there than who looks once. So a tenth of the level is divided among the looks before
    the last, and the last, which is the report's, keeps the whole level: at most 5.5 % of races find something false,
    where 5 % of full studies may. The race is over when one row is left.

    Args:
        values: for each racing row, dropped or not, an array (seeds, test rows) of the seeds trained so far. A seed
            that a row lacks is NaN. The references do not race, since the best variant is looked for even if PCA is
            better than all. (seeds,) will do where a measure has no value per test row.
        planned: Number of seeds of the whole study.
        dropped: Rows that were dropped before. They are no longer judged, but help to estimate the spread over seeds.

    Returns:
        The rows dropped now, the best of them first. A row without any value is never dropped.
    """
    known = {row: array for row, array in values.items() if np.isfinite(array).any()}
    means = {row: float(np.nanmean(array)) for row, array in known.items() if row not in dropped}
    looks = planned - FIRST_SEEDS
    if len(means) < 2 or looks < 1:
        return []
    pairs = compare(known, replicates=0, ratios=goal.ratios)
    corrected = [pair._replace(adjusted=min(1.0, pair.adjusted * looks / _SPENT)) for pair in pairs]
    best = judge(means, corrected, goal.higher).best
    worse = sorted(means.keys() - best, key=lambda row: -means[row] if goal.higher else means[row])
    return [Dropped(row, len(values[row]), _reason(row, best[0], pairs, goal)) for row in worse]


def _reason(row: str, best: str, pairs: Sequence[Pair], goal: Goal) -> str:
    """Say by how much a row is worse than the best, with the 95 % interval."""
    pair = next(pair for pair in pairs if {row, best} == {pair.first, pair.second})
    sign = 1 if (pair.first == best) == goal.higher else -1
    sizes = (sign * value for value in (pair.difference, pair.low, pair.high))
    size, *ends = (100 * float(np.expm1(value) if goal.ratios else value) for value in sizes)
    unit = "%" if goal.ratios else "points"
    return f"worse than {best} by {size:.1f} {unit} [{min(ends):.1f}, {max(ends):.1f}] after {pair.seeds} seeds"
