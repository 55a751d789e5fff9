"""Optuna chooses the settings of a study row with the first seed; the best settings are then run with the others."""

import json
from collections.abc import Callable
from typing import Any

from aecore.evaluation.trial import trial_name
from pipelines.study.plan import TrialPlan
from pipelines.study.results import finished
from pipelines.study.trials import Endings, TrialRunner
from pipelines.study.worker import config_of, settings_in

Tried = dict[str, tuple[dict[str, Any], float]]
"""Each choice of settings that was tried and its value of the measure to choose by; keys are the settings as JSON."""


def search(runner: TrialRunner, row: str, say: Callable[[str], None]) -> tuple[list[TrialPlan], Endings]:
    """Search the settings of a study row, then run the best settings with the other seeds.

    Trials that an earlier call of the same study has finished count as tried.

    Returns:
        The plans of all trials of the study row, and the endings of the trials that did not finish.
    """
    study, first = runner.study, runner.study.seeds[0]
    tried: Tried = {}
    for record in finished(runner.tracker.trials_of(runner.parent)).values():
        if record.tags["row"] == row:
            settings = json.loads(record.tags["settings"])
            tried[_name(settings)] = settings, record.metrics[study.choose_metric]
    endings = Endings()
    left = study.budget.settings - len(tried)
    if left > 0:
        results = _fit(runner, row, tried, left)
        endings = runner.endings(results)
        records = finished(runner.tracker.trials_of(runner.parent))
        for settings in (settings_in(result.config) for result in results if result.config):
            if ended := records.get(runner.plan_of(row, settings, first).stage.key):
                tried[_name(settings)] = settings, ended.metrics[study.choose_metric]
            else:
                say(f"{trial_name(row, settings, first)}: did not finish")
    plans = [runner.plan_of(row, settings, first) for settings, _ in tried.values()]
    if tried:
        sign = -1 if study.choose == "probe" else 1
        best = min(tried.values(), key=lambda one: sign * one[1])[0]
        others = [runner.plan_of(row, best, seed) for seed in study.seeds[1:]]
        records = finished(runner.tracker.trials_of(runner.parent))
        endings.update(runner.run([m for m in others if m.stage.key not in records], say))
        plans += others
    return plans, endings


def _fit(runner: TrialRunner, row: str, tried: Tried, count: int) -> Any:
    """Let Optuna try `count` more settings, given the scores of those in `tried`; return Tune's results."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    study, first = runner.study, runner.study.seeds[0]
    space = {
        f"set:{name}": tune.choice(values)
        if isinstance(values, list)
        else (tune.loguniform if values.log else tune.uniform)(values.low, values.high)
        for name, values in study.space(row).items()
    }
    optuna = OptunaSearch(
        metric="chosen",
        mode="max" if study.choose == "probe" else "min",
        seed=first,
        points_to_evaluate=[config_of(settings) for settings, _ in tried.values()] or None,
        evaluated_rewards=[score for _, score in tried.values()] or None,
    )
    return runner.fit({"row": row, "seed": first, **space}, optuna, count)


def _name(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
