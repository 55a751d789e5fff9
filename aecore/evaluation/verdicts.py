"""Verdicts on a measure in words: which study rows are best, which tie, and what pretraining is worth."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from aecore.evaluation.statistics import LEVEL, Pair

_LISTED_NAMES = 12


class Verdict(NamedTuple):
    """The study row that is best by a measure, and those that tie with it, as their difference is not significant."""

    best: tuple[str, ...]
    """The study row with the best mean, then every row that is not significantly worse, in the order of their means."""
    references: tuple[str, ...]
    """The references among the study rows compared."""
    above: tuple[str, ...]
    """Study rows that are significantly better than every reference."""
    seeds: tuple[int, int]
    """The fewest and the most seeds that the leader shares with another row."""
    ranked: tuple[str, ...]
    """All study rows, the best mean first."""

    def words(self) -> str:
        """Say the verdict in sentences; a tie is called a tie."""
        leader = self.best[0]
        if len(self.best) == 1:
            text = f"{leader} wins{', a reference' if leader in self.references else ''}"
        else:
            fewest, most = self.seeds
            with_seeds = f"{fewest} to {most} seeds" if fewest < most else f"{most} seed{'' if most == 1 else 's'}"
            text = f"{listed(self.best)} tie (no difference that holds at {100 * LEVEL:g} % with {with_seeds})"
            tied = [name for name in self.best if name in self.references]
            if tied:
                text += f", {listed(tied)} among them as {'references' if len(tied) > 1 else 'a reference'}"
        if self.references:
            every = f"{'both ' if len(self.references) == 2 else ''}{listed(self.references)}"
            text += f". Better than {every}: {listed(self.above) if self.above else 'none'}"
        return f"{text}."


def judge(means: Mapping[str, float], pairs: Sequence[Pair], higher: bool, references: Sequence[str] = ()) -> Verdict:
    """Return the verdict on a measure, from the mean of each study row over its seeds and from the result of `compare`.

    Args:
        higher: whether more is better.
        references: the study rows to beat; names that `means` lacks are left out.
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
        ranked=tuple(ranked),
    )


def worth(pairs: Sequence[Pair], control: str) -> list[str]:
    """Say for each study row what its pretraining is worth: its accuracy minus that of a control, which is the same
    network trained from random weights.

    Args:
        pairs: the result of `compare` on accuracies, as shares of the rows; the pairs without the control are left out.

    Returns:
        A sentence per study row, with the difference and its 95 % interval in percentage points. A difference that is
        no finding after the correction is called none.
    """
    sentences = []
    for pair in pairs:
        if control not in (pair.first, pair.second) or not pair.seeds:
            continue
        row, sign = (pair.first, 1) if pair.second == control else (pair.second, -1)
        gain, *ends = (100 * sign * value for value in (pair.difference, pair.low, pair.high))
        size = f"{gain:+.2f} points of accuracy"
        if np.isfinite(ends).all():
            size += f" (95 % interval {min(ends):+.2f} to {max(ends):+.2f})"
        holds = "is worth" if gain > 0 else "does harm"
        verdict = f"{holds}: {size}" if pair.holds else f"makes no difference that holds: {size}"
        sentences.append(f"The pretraining of {row} {verdict}.")
    return sentences


def listed(names: Sequence[str]) -> str:
    """Write names as in "a, b and c"; of more than a dozen the first ten and the number of the others."""
    if len(names) > _LISTED_NAMES:
        names = [*names[: _LISTED_NAMES - 2], f"{len(names) - _LISTED_NAMES + 2} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
