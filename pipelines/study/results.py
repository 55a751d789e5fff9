"""The results of a study's trials for the report, read back from MLflow."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from aecore.evaluation.trial import REFERENCES, Trial
from pipelines.execution.compute import restore
from pipelines.study.plan import TrialPlan
from pipelines.study.trials import Endings

if TYPE_CHECKING:
    from pipelines.store.runs import Tracker

Runs = Mapping[str, tuple[str, dict[str, float]]]
"""Id and metrics of each finished run, by the key of its stage."""


def finished_runs(plans: Sequence[TrialPlan], tracker: "Tracker") -> Runs:
    """Return id and metrics of the run of each finished stage of the trials."""
    keys = {key for plan in plans for key, stage in plan.stages().items() if stage.kept}
    runs = {key: tracker.finished(key) for key in keys}
    return {key: run for key, run in runs.items() if run}


def trial_of(plan: TrialPlan, tracker: "Tracker", runs: Runs, epochs: int, endings: Endings) -> Trial:
    """Return the outcome of a trial, finished or not, in the form that the report reads.

    Args:
        epochs: Passes over the training rows that each trial may spend.
    """
    key, planned = plan.stage.key, 0 if plan.kind in REFERENCES else epochs
    error = endings.errors.get(key, "did not run")
    trial = Trial(
        plan.row, plan.settings, plan.seed, plan.kind, "failed", error, epochs_planned=planned
    )  # fmt: skip
    if key in endings.stopped:
        return trial._replace(status="stopped", error="", epochs_used=endings.stopped[key])
    if key not in runs:
        return trial
    run_id, _ = runs[key]
    result = restore(run_id, tracker)
    if result is None:
        return trial._replace(error="its result is lost; start the study again")
    curves = dict(result.config)
    stages = [stage for stage in plan.stages().values() if stage.key in runs and stage.key != key]
    spent = {stage.key: runs[stage.key][1] for stage in stages}
    unsupervised = [stage.key for stage in stages if getattr(stage.spec, "variant", None) is not None]
    return trial._replace(
        status="finished",
        error="",
        run_id=run_id,
        metrics=result.metrics,
        history=tuple(curves.pop("history")),
        curves=curves,
        arrays=result.weights,
        epochs_used=round(sum(spent[key].get("epochs", 0) for key in unsupervised)),
        seconds=sum(metrics.get("train_seconds", 0) for metrics in spent.values()),
    )
