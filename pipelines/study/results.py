"""The results of a study's trials for the report, read back from MLflow."""

from typing import TYPE_CHECKING

from aecore.evaluation.trial import Trial
from pipelines.execution.compute import restore
from pipelines.study.agenda import Endings
from pipelines.study.plan import TrialPlan

if TYPE_CHECKING:
    from pipelines.store.record import Record
    from pipelines.store.runs import Tracker

_SPENT = ("epochs", "train_seconds", "cpu_seconds", "gpu_seconds")
"""Metrics of a trial's run that are no measures."""


def trial_of(plan: TrialPlan, record: "Record | None", epochs: int, endings: Endings) -> Trial:
    """Return the outcome of a trial, finished or not, in the form that the report reads, without its history, curves
    and arrays; see `read`.

    Args:
        record: The trial's run, if there is one; see `Tracker.trials_of`.
        epochs: Passes over the training rows, or parts of the budget's steps, that each trial may spend.
    """
    key, planned = plan.stage.key, 0 if plan.is_reference else epochs
    error = endings.errors.get(key, "did not run")
    trial = Trial(
        plan.row, plan.settings, plan.seed, plan.kind, "failed", error, epochs_planned=planned, data=plan.data
    )
    if record is not None:
        trial = trial._replace(
            run_id=record.run_id, seconds=record.metrics.get("train_seconds", 0.0),
            cpu_seconds=record.metrics.get("cpu_seconds", 0.0), gpu_seconds=record.metrics.get("gpu_seconds", 0.0),
        )  # fmt: skip
    if key in endings.stopped:
        return trial._replace(status="stopped", error="", epochs_used=endings.stopped[key])
    if record is None or not record.is_finished:
        return trial
    return trial._replace(
        status="finished",
        error="",
        metrics={name: value for name, value in record.metrics.items() if name not in _SPENT},
        # runs of versions before 0.2 do not tell how many
        epochs_used=round(record.metrics.get("epochs", planned)),
    )


def read(trial: Trial, tracker: "Tracker") -> Trial:
    """Return a finished trial with its history, curves and arrays, which are downloaded; leave others as they are."""
    if trial.status != "finished":
        return trial
    result = restore(trial.run_id, tracker)
    if result is None:
        return trial._replace(status="failed", error="its result is lost; start the study again")
    curves = dict(result.config)
    return trial._replace(history=tuple(curves.pop("history")), curves=curves, arrays=result.weights)
