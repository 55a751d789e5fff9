"""What a worker of Ray Tune does: it computes the stages of one trial, or of several as one, on a share of a device."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aecore.config.facts import Facts
from aecore.config.specs import FinetuneSpec, LoadSpec, Numerics
from aecore.core.imports import fast_imports
from aecore.evaluation.trial import REFERENCES
from pipelines.cluster.share import Share
from pipelines.execution.assignment import Assignment, Opened
from pipelines.execution.journal import Computed
from pipelines.execution.trial import compute_trials
from pipelines.execution.trial_journal import Results
from pipelines.graph.stage import Stage
from pipelines.host.messages import one_line
from pipelines.study.plan import TrialPlan, plan_trial
from pipelines.study.schema import Study

if TYPE_CHECKING:
    from ray import ObjectRef

_TELL_SECONDS = 1.0
"""Least time between two reports of a trial to Tune where no scheduler uses them."""
Choice = tuple[str, dict[str, Any], int]
"""Row, settings and seed of a trial."""


def choices(config: Mapping[str, Any] | None) -> list[Choice]:
    """Return the study's trials that one of Tune's trials consists of, read from the config of Tune's trial. Tune
    forgets the config of a trial that never started; then none are returned."""
    if config is None:
        return []
    if "trials" in config:
        return [(one["row"], one["settings"], one["seed"]) for one in config["trials"]]
    return [(config["row"], settings_in(config), config["seed"])]


def settings_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the searched settings from the config of one of Tune's trials."""
    return {name.removeprefix("set:"): value for name, value in config.items() if name.startswith("set:")}


def config_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they stand in the config of one of Tune's trials."""
    return {f"set:{name}": value for name, value in settings.items()}


def share_of_row(row: str, share: Share) -> Share:
    """Return the share of a study row's trials: `share`, but no GPU for PCA, which scikit-learn computes on CPUs, with
    classifiers so small that they are trained there as well."""
    return Share(0, share.cpus) if row == "pca" else share


def compute_trial(
    config: dict[str, Any],
    *,
    study: Study,
    facts: Facts,
    numerics: Numerics,
    assignment: Assignment,
    data: "list[ObjectRef]",
) -> None:
    """Compute one of Tune's trials: one trial of the study, or several that are trained together as one.

    All stages are restored or computed in this process. Tune gets a report per epoch if there is a scheduler, else at
    most one per second, to be displayed. The last report holds the measure by which a search chooses, or the errors of
    the trials that failed, or, by the keys of trials, the open runs of those that were trained and are to be measured:
    on GPUs tasks that the driver submits measure them, unless a search waits for the measure.
    """
    with fast_imports():
        import ray
        from ray import tune

    plans = [plan_trial(study, *choice, facts, numerics) for choice in choices(config)]
    measured_elsewhere = assignment.share.gpus > 0 and "trials" in config
    assignment = replace(assignment, share=share_of_row(plans[0].row, assignment.share))
    load = next(stage for stage in plans[0].stages().values() if isinstance(stage.spec, LoadSpec))
    told_at = 0.0

    def tell(stage: Stage, epoch: int, metrics: dict[str, float]) -> None:
        nonlocal told_at
        whole = isinstance(stage.spec, FinetuneSpec) and stage.spec.task == "reconstruct"
        # a report waits for Tune's loop
        if whole and (study.scheduler != "none" or time.monotonic() - told_at > _TELL_SECONDS):
            score = metrics["val/reconstruction"]
            # Tune wants every metric in every report; Optuna goes by the last one
            tune.report({"epoch": epoch, "score": score, "chosen": score})
            told_at = time.monotonic()

    assignments = [replace(assignment, tags=plan.tags(), tell=tell) for plan in plans]
    results: Results = {load.key: ray.get(data[0])}
    outcomes = compute_trials([plan.stage for plan in plans], assignments, results, up_to_last=measured_elsewhere)
    tune.report(_last_report(study, plans, outcomes, results))


def _last_report(
    study: Study, plans: Sequence[TrialPlan], outcomes: Sequence[Computed | Opened | Exception], results: Results
) -> dict[str, Any]:  # fmt: skip
    """Return a trial's last report to Tune; raise the error of a trial that consists of one trial of the study."""
    ended = list(zip(plans, outcomes, strict=True))
    errors = {
        plan.stage.key: one_line(f"{type(outcome).__name__}: {outcome}", 300)
        for plan, outcome in ended
        if isinstance(outcome, Exception)
    }
    trained = {plan.stage.key: outcome for plan, outcome in ended if isinstance(outcome, Opened)}
    report: dict[str, Any] = {"epoch": study.budget.epochs, "errors": errors, "trained": trained}
    if plans[0].kind in REFERENCES:
        # epoch 0, which no scheduler judges, since other trials are not to be compared with references
        return report | {"epoch": 0, "score": math.nan, "chosen": math.nan}
    if len(plans) > 1:
        return report
    (plan,), (outcome,) = plans, outcomes
    if isinstance(outcome, Exception):
        raise outcome
    if isinstance(outcome, Computed):
        score = outcome.result.config["history"][-1]["val/reconstruction"]
        return report | {"score": score, "chosen": outcome.result.metrics[study.choose_metric]}
    stack = plan.stage.inputs["stack"]
    assert isinstance(stack, Stage)
    score = results[stack.key].result.config["history"][-1]["val/reconstruction"]
    return report | {"score": score, "chosen": score}
