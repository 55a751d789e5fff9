"""Which differences between variants hold: paired comparisons over seeds and test rows."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.05
_BINS = 2048
_CHUNK = 4_000_000  # weights drawn at a time: about 100 MB
_REPLICATES_PER_PAIR = 200  # else Holm's factor times the smallest possible p, 2 / (replicates + 1), nears the level


class Pair(NamedTuple):
    """`first` minus `second`, over the seeds that both have."""

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    adjusted: float
    """p after Holm's correction for all pairs of the measure."""
    seeds: int

    @property
    def holds(self) -> bool:
        return self.adjusted < LEVEL


class Verdict(NamedTuple):
    """Who is best by a measure, as far as the pairs can tell."""

    best: tuple[str, ...]
    """The row with the best mean, then every row that is not significantly worse, by their means."""
    references: tuple[str, ...]
    """The references among the rows compared."""
    above: tuple[str, ...]
    """Rows significantly better than every reference."""
    seeds: tuple[int, int]
    """The fewest and the most seeds that the leader shares with another row."""

    def words(self) -> str:
        """The finding as sentences; a tie is called a tie."""
        leader = self.best[0]
        if len(self.best) == 1:
            said = f"{leader} wins{', a reference' if leader in self.references else ''}"
        else:
            fewest, most = self.seeds
            with_seeds = f"{fewest} to {most} seeds" if fewest < most else f"{most} seed{'' if most == 1 else 's'}"
            said = f"{listed(self.best)} tie (no difference that holds at {100 * LEVEL:g} % with {with_seeds})"
            held = [name for name in self.best if name in self.references]
            if held:
                said += f", {listed(held)} among them as {'references' if len(held) > 1 else 'a reference'}"
        if self.references:
            every = f"{'both ' if len(self.references) == 2 else ''}{listed(self.references)}"
            said += f". Better than {every}: {listed(self.above) if self.above else 'none'}"
        return said + "."


class Gain(NamedTuple):
    """By how much one model is better than another on the same rows, with a 95 % interval."""

    rows: int
    mean: float
    low: float
    high: float


def gain(better: np.ndarray, replicates: int = 4000) -> Gain:
    """The mean of paired differences (rows,) of two given models, and its interval by the percentile bootstrap over
    rows.

    Two rows are added, one for each model, as large as the largest difference: of a handful of rows that differ, all
    for one model, resamples alone would make a finding (four against none; the exact test of signs wants six). It is
    Agresti & Min's (2005) half a pair in each cell, doubled. Where there are many distinct values, neighbours are drawn
    together. Deterministic; half a second at any number of rows. Without rows all is NaN.
    """
    if not len(better):
        return Gain(0, np.nan, np.nan, np.nan)
    most = np.abs(better).max()
    padded = np.sort(np.append(better, [most, -most]).astype(np.float64))
    values, counts = np.unique(padded, return_counts=True)
    if len(values) > _BINS:
        parts = np.array_split(padded, _BINS)
        values, counts = np.array([part.mean() for part in parts]), np.array([len(part) for part in parts])
    drawn = np.random.default_rng(0).multinomial(len(padded), counts / len(padded), replicates)
    low, high = np.quantile(drawn @ values / len(padded), [0.025, 0.975])
    return Gain(len(better), float(better.mean()), float(low), float(high))


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def holm(p: np.ndarray) -> np.ndarray:
    """p values (tests,) corrected so that the chance of any false finding stays below the level (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def _resampled(values: np.ndarray, replicates: int) -> np.ndarray:
    """Means (replicates, series) of `values` (series, points) over points drawn with replacement, alike for all."""
    rng = np.random.default_rng(0)
    points = values.shape[1]
    means = np.empty((replicates, len(values)))
    step = max(1, _CHUNK // points)
    for start in range(0, replicates, step):
        count = min(step, replicates - start)
        drawn = rng.integers(points, size=(count, points))
        drawn += np.arange(count)[:, None] * points
        weights = np.bincount(drawn.ravel(), minlength=count * points).reshape(count, points)
        means[start : start + count] = weights @ values.T / points
    return means


def _draws_of_t(freedom: int, count: int) -> np.ndarray:
    """Student's t in random order, its quantiles at equal steps: the tails are exact at any count."""
    quantiles = stdtrit(freedom, (np.arange(count) + 0.5) / count)
    return np.random.default_rng(freedom).permutation(quantiles)


def compare(values: Mapping[str, np.ndarray], replicates: int = 4000, ratios: bool = False) -> tuple[Pair, ...]:
    """All pairs of rows: mean difference, 95 % interval, two-sided p and p after Holm's correction.

    With `ratios` the difference is that of the logarithms of each seed's mean, all positive: errors spread in
    proportion to their size, so that a poor row's spread would hide what good rows differ by.

    `values` holds an array (seeds, test points) a row, or (seeds,) for measures that give one number a seed; the same
    seeds and points in every row. A seed that a row lacks is NaN there; a pair is compared on the seeds both have.

    With points: a hierarchical paired bootstrap. The points are drawn with replacement, the same draws for all rows,
    so that what is hard for every row cancels (Efron & Tibshirani 1993, ch. 8). The spread of the S seeds' mean
    differences is added as Student's t times their standard error, not by drawing the seeds with replacement too:
    S values drawn so understate the variance by (S - 1) / S, and even when scaled by sqrt(S / (S - 1)) have no tails
    (with 3 seeds some false finding in 53 % of simulated null studies of five rows). With one seed only points are
    drawn: the result then speaks of these weights, not of the method.

    With one number a seed: the t-test over seeds.

    The spread over seeds is the one pooled over all R rows that have every seed, with (R - 1)(S - 1) degrees of
    freedom, as in a two-way analysis of variance: a pair whose three seeds happen to agree is no finding. Where the
    pair's own is larger it is taken instead, with three times its S - 1 degrees of freedom, at most the pooled ones.
    Simulated null studies of ten rows find something false in 2 % with 3 seeds, and in 8 % where one row spreads five
    times as much as the others (5 seeds: 4 %); of differences of five standard deviations of a row 7 in 10 are found
    with 3 seeds, where the pairs' own spread alone would find 1 in 25. Differences that are all the same have p = 1 if
    zero, else 0. Fewer than two seeds allow no test: p = 1, the interval is NaN.

    Deterministic. At 10,000 points it takes about a second and 150 MB. Raises ValueError where shapes differ.
    """
    pairs = list(combinations(values, 2))
    if not pairs:
        return ()
    replicates = max(replicates, _REPLICATES_PER_PAIR * len(pairs))
    shapes = {array.shape for array in values.values()}
    if len(shapes) > 1:
        raise ValueError(f"rows are paired, but their (seeds, points) differ: {sorted(shapes)}")
    table = np.stack([np.asarray(array, np.float64) for array in values.values()])
    means = table.mean(2) if table.ndim == 3 else table
    means = np.log(means) if ratios else means
    place = {name: number for number, name in enumerate(values)}
    draws = None
    if table.ndim == 3:
        series = np.nan_to_num(table).reshape(-1, table.shape[2])
        draws = _resampled(series, replicates).reshape(replicates, *means.shape)
        draws = np.log(draws, where=draws > 0, out=np.zeros_like(draws)) if ratios else draws
    # differences of this size are rounding, not findings
    noise = 1e-12 * np.nanmax(np.abs(means), initial=0.0, where=np.isfinite(means))
    pooled, pooled_freedom = _pooled(means)
    found = []
    for first, second in pairs:
        a, b = place[first], place[second]
        common = np.flatnonzero(np.isfinite(means[a] + means[b]))
        gap = _without(means[a, common] - means[b, common], noise)
        if len(gap) == 0 or (draws is None and len(gap) < 2):
            found.append((float(gap.mean()) if len(gap) else np.nan, np.nan, np.nan, 1.0, len(gap)))
            continue
        spread = float(_without(gap.std(ddof=1), noise)) if len(gap) > 1 else 0.0
        freedom = len(gap) - 1
        if 0 < spread < pooled:
            spread, freedom = pooled, pooled_freedom
        elif pooled:
            freedom = min(3 * freedom, pooled_freedom)
        error = spread / np.sqrt(len(gap)) if len(gap) else 0.0
        if draws is None:
            width = stdtrit(freedom, 0.975) * error
            p = 2 * stdtr(freedom, -abs(gap.mean()) / error) if error else float(gap.mean() == 0)
            low, high = gap.mean() - width, gap.mean() + width
        else:
            sample = _without(draws[:, a, common] - draws[:, b, common], noise).mean(1)
            if error:
                sample = sample + _draws_of_t(freedom, replicates) * error
            low, high = np.quantile(sample, [0.025, 0.975])
            p = min(1, 2 * (1 + min((sample <= 0).sum(), (sample >= 0).sum())) / (replicates + 1))
        found.append((float(gap.mean()), float(low), float(high), float(p), len(gap)))
    adjusted = holm(np.array([p for *_, p, _ in found]))
    return tuple(
        Pair(*names, difference, low, high, p, float(corrected), seeds)
        for names, (difference, low, high, p, seeds), corrected in zip(pairs, found, adjusted, strict=True)
    )


def _pooled(means: np.ndarray) -> tuple[float, int]:
    """Standard deviation of a difference of two rows over seeds, pooled over `means` (rows, seeds), and its degrees of
    freedom: what rows and seeds together leave unexplained."""
    whole = means[np.isfinite(means).all(1)]
    freedom = (len(whole) - 1) * (means.shape[1] - 1)
    if len(whole) < 3 or freedom < 1:
        return 0.0, 0
    rest = whole - whole.mean(1, keepdims=True) - whole.mean(0) + whole.mean()
    return float(np.sqrt(2 * np.square(rest).sum() / freedom)), freedom


def resolution(seeds: int, rows: int) -> float:
    """The smallest mean difference that holds, in standard deviations of it over seeds (2 or more), were there no
    other spread and all rows alike: what Holm's correction asks of the first of all pairs."""
    pairs, freedom = rows * (rows - 1) // 2, (rows - 1) * (seeds - 1)
    return float(-stdtrit(freedom, LEVEL / 2 / pairs) / np.sqrt(seeds))


def _without(values: np.ndarray, noise: float) -> np.ndarray:
    return np.where(np.abs(values) <= noise, 0.0, values)


def judge(means: Mapping[str, float], pairs: Sequence[Pair], higher: bool, references: Sequence[str] = ()) -> Verdict:
    """The verdict on a measure from each row's mean over its seeds and the pairs that `compare` gave.

    `higher` says that more is better; `references` names rows to beat, of which those absent are left out.
    """
    ranked = sorted(means, key=lambda name: -means[name] if higher else means[name])
    known = {(pair.first, pair.second): pair for pair in pairs}
    between = known | {(second, first): pair for (first, second), pair in known.items()}

    def better(name: str, other: str) -> bool:
        pair = between[name, other]
        lead = pair.difference if pair.first == name else -pair.difference
        return pair.holds and (lead > 0) == higher

    leader = ranked[0]
    present = tuple(name for name in references if name in means)
    shared = [between[leader, name].seeds for name in ranked[1:]]
    return Verdict(
        best=tuple(name for name in ranked if name == leader or not better(leader, name)),
        references=present,
        above=tuple(
            name for name in ranked if present and name not in present and all(better(name, other) for other in present)
        ),
        seeds=(min(shared), max(shared)),
    )
