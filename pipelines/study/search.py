"""Optuna chooses the settings of a study row with the first seed; the best settings are then run with the others."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from pipelines.study.plan import TrialPlan
from pipelines.study.schema import Range, Study

if TYPE_CHECKING:
    import optuna

PlanOf = Callable[[str, dict[str, Any], int], TrialPlan]
"""Returns the plan of a trial: row, settings, seed."""
Tried = tuple[dict[str, Any], float]
"""Settings that were tried, and their value of the measure to choose by, NaN where a scheduler stopped them."""
_RANDOM_SHARE, _MOST_RANDOM = 1 / 3, 10
"""Share of the settings that are drawn at random before Optuna's sampler models the others, and the most of them (the
sampler's own default)."""


def new_search(count: int, seed: int, highest: bool) -> "optuna.Study":
    """Return a search of Optuna's in memory.

    Args:
        count: Number of settings that will be tried, of which the first third, at most ten, are drawn at random.
        highest: Whether more is better.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=min(_MOST_RANDOM, ceil(_RANDOM_SHARE * count)), seed=seed, constant_liar=True
    )  # fmt: skip
    return optuna.create_study(sampler=sampler, direction="maximize" if highest else "minimize")


class Search:
    """The settings of one study row, as a source of trials: chosen by Optuna, then the best ones with further seeds.

    The sampler is the tree-structured Parzen estimator (Bergstra et al. 2011). Several trials may run at once: a trial
    that runs counts as a poor one meanwhile, so that the next differs from it.
    """

    ahead = False

    def __init__(self, study: Study, row: str, plan_of: PlanOf, tried: Sequence[Tried]):
        """
        Args:
            tried: What an earlier call of the same study has tried with the first seed.
        """
        import optuna

        self.study, self.row, self.plan_of = study, row, plan_of
        self._space = {name: _distribution(values) for name, values in study.space(row).items()}
        count = study.budget.settings
        self._optuna = new_search(count, study.seeds[0] + len(tried), study.chooses_highest)
        self._left = max(0, count - len(tried))
        self._open: dict[str, optuna.Trial] = {}
        """Trials that have not ended, by the keys of their stages."""
        self._best: list[TrialPlan] | None = None
        """The trials of the best settings with further seeds that have not been handed out; None before the search has
        ended."""
        for settings, value in tried:
            params = {
                name: _json(one) if isinstance(study.space(row)[name], list) else one for name, one in settings.items()
            }
            if math.isfinite(value):
                made = optuna.trial.create_trial(params=params, distributions=self._space, value=value)
                self._optuna.add_trial(made)

    def next(self) -> TrialPlan | None:
        """Return a trial of the next settings; after the last, the best settings with the next seed."""
        while self._left:
            self._left -= 1
            trial = self._optuna.ask(self._space)
            plan = self.plan_of(self.row, self._decoded(trial.params), self.study.seeds[0])
            if plan.stage.key in self._open or self._is_known(trial.params):
                self._optuna.tell(trial, state=_state("FAIL"))  # the same settings give the same result
                continue
            self._open[plan.stage.key] = trial
            return plan
        if self._best is None and not self._open:
            self._best = self._with_further_seeds()
        return self._best.pop(0) if self._best else None

    def ended(self, plan: TrialPlan, value: float | None) -> None:
        """Tell Optuna the value of a trial; one without a value failed."""
        trial = self._open.pop(plan.stage.key, None)
        if trial is not None and value is None:
            self._optuna.tell(trial, state=_state("FAIL"))
        elif trial is not None:
            self._optuna.tell(trial, value)

    def _with_further_seeds(self) -> list[TrialPlan]:
        complete = [trial for trial in self._optuna.get_trials(deepcopy=False) if trial.state == _state("COMPLETE")]
        if not complete:
            return []
        best = self._decoded(self._optuna.best_trial.params)
        return [self.plan_of(self.row, best, seed) for seed in self.study.seeds[1:]]

    def _is_known(self, params: Mapping[str, Any]) -> bool:
        known = self._optuna.get_trials(deepcopy=False)
        return any(trial.params == params and trial.state == _state("COMPLETE") for trial in known)

    def _decoded(self, params: Mapping[str, Any]) -> dict[str, Any]:
        space = self.study.space(self.row)
        return {
            name: json.loads(value) if isinstance(space[name], list) else value for name, value in params.items()
        }  # fmt: skip


def _distribution(values: list[Any] | Range) -> "optuna.distributions.BaseDistribution":
    """Return the values of a setting as Optuna takes them: those of a list as JSON, since some are lists."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(values, list):
        return CategoricalDistribution([_json(value) for value in values])
    return FloatDistribution(values.low, values.high, log=values.log)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _state(name: str) -> "optuna.trial.TrialState":
    from optuna.trial import TrialState

    return TrialState[name]
