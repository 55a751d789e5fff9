"""A race: all study rows get seeds in rounds, and a row that is worse than the best gets no further seeds."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from aecore.evaluation.racing import GOALS, drop, rounds
from aecore.evaluation.trial import Dropped, in_set
from pipelines.host.messages import say
from pipelines.study.plan import TrialPlan
from pipelines.study.schema import Study
from pipelines.study.search import PlanOf

Scores = Callable[[Sequence[TrialPlan]], Mapping[str, np.ndarray]]
"""Returns the values of the finished ones of some trials, each an array (test rows,), by the keys of the trials."""


class Race:
    """The trials of all study rows, as a source of trials: round after round, without the rows that were dropped."""

    ahead = True

    def __init__(self, study: Study, plan_of: PlanOf, scores: Scores) -> None:
        self.study, self.plan_of, self._scores = study, plan_of, scores
        self.dropped: list[Dropped] = []
        self._rows = list(study.variants)
        """The rows that still race."""
        self._rounds = rounds(study.seeds)
        self._trained: list[TrialPlan] = []
        self._left: list[TrialPlan] = []
        """Trials of this round that were not handed out."""
        self._running = 0
        self._known: dict[str, np.ndarray] = {}
        """Scores of earlier rounds, by the keys of trials."""

    def next(self) -> TrialPlan | None:
        """Return a trial of this round; after the last one of the round has ended, one of the next round."""
        if not self._left and not self._running and self._rounds:
            if self._trained:
                self._drop()
            seeds = self._rounds.pop(0)
            if len(self._rows) > 1 or not self._trained:
                self._left = [self.plan_of(row, {}, seed) for seed in seeds for row in self._rows]
        if not self._left:
            return None
        self._running += 1
        self._trained.append(self._left[0])
        return self._left.pop(0)

    def ended(self, plan: TrialPlan, value: float | None) -> None:
        """Take the end of a trial."""
        self._running -= 1

    def _drop(self) -> None:
        """Drop the rows that are worse than the best one on the seeds trained so far."""
        goal = GOALS[self.study.choose]
        self._known |= self._scores([plan for plan in self._trained if plan.stage.key not in self._known])
        scores = self._known
        if not scores:
            return
        seeds = sorted({plan.seed for plan in self._trained})
        blank = np.full_like(next(iter(scores.values())), np.nan, dtype=np.float64)
        values = {row: np.array([blank] * len(seeds)) for row in self.study.variants}
        for plan in self._trained:
            if plan.stage.key in scores:
                values[plan.row][seeds.index(plan.seed)] = scores[plan.stage.key]
        for one in drop(values, goal, len(self.study.seeds), [before.row for before in self.dropped]):
            say(in_set(self._trained[0].data, f"{one.row}: dropped, {one.words}"))
            self.dropped.append(one)
            self._rows.remove(one.row)
