"""What a worker of Ray Tune does: it computes the stages of one trial, or of several as one, on a share of a device."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from aecore.config.specs import FinetuneSpec, LoadSpec
from aecore.core.imports import fast_imports
from pipelines.cluster.share import Share
from pipelines.execution.assignment import Assignment, Opened
from pipelines.execution.chain import may_pass
from pipelines.execution.journal import Computed
from pipelines.execution.trial import compute_trials
from pipelines.execution.trial_journal import Results
from pipelines.graph.stage import Stage
from pipelines.host.messages import one_line
from pipelines.study.plan import TrialPlan
from pipelines.study.schema import Study
from pipelines.study.sets import StudySet

if TYPE_CHECKING:
    from ray import ObjectRef

_TELL_SECONDS = 1.0
"""Least time between two reports of a trial to Tune where no scheduler uses them."""
Choice = tuple[str, dict[str, Any], int]
"""Row, settings and seed of a trial."""


class SharedSet(NamedTuple):
    """A data set of a study in Ray's memory, where each trial looks up the one that it needs."""

    planned: "ObjectRef"
    """The reference to the `StudySet`."""
    rows: "ObjectRef"


def choices(config: Mapping[str, Any]) -> list[Choice]:
    """Return the study's trials that one of Tune's trials consists of, read from the config of Tune's trial."""
    return [(one["row"], one["settings"], one["seed"]) for one in config["trials"]]


def share_of_row(row: str, share: Share) -> Share:
    """Return the share of a study row's trials: `share`, but no GPU for PCA, which scikit-learn computes on CPUs, with
    classifiers so small that they are trained there as well."""
    return Share(0, share.cpus) if row == "pca" else share


def compute_trial(
    config: dict[str, Any],
    *,
    sets: Mapping[str, SharedSet],
    assignment: Assignment,
) -> None:
    """Compute one of Tune's trials: one trial of the study, or several that are trained together as one.

    All stages are restored or computed in this process. Tune gets a report per epoch if there is a scheduler, else at
    most one per second, to be displayed. The last report holds the measure by which a search chooses, the errors of
    the trials that failed, and, by the keys of trials, the open runs of those that were trained and are to be measured:
    on GPUs tasks that the driver submits measure them.

    Args:
        sets: The data sets of the study, by name.
    """
    with fast_imports():
        import ray
        from ray import tune

    here: StudySet
    here, rows = ray.get(list(sets[config["data"]]))
    study = here.study
    plans = [here.plan(*choice) for choice in choices(config)]
    measured_elsewhere = assignment.share.gpus > 0
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

    assignments = [replace(assignment, tags={**assignment.tags, **plan.tags()}, tell=tell) for plan in plans]
    results: Results = {load.key: rows}
    outcomes = compute_trials([plan.stage for plan in plans], assignments, results, up_to_last=measured_elsewhere)
    tune.report(_last_report(study, plans, outcomes, results))


def _last_report(
    study: Study, plans: Sequence[TrialPlan], outcomes: Sequence[Computed | Opened | Exception], results: Results
) -> dict[str, Any]:  # fmt: skip
    """Return a trial's last report to Tune. Errors are reported, with whether they may pass, and not raised, so that
    Tune knows of no errors but lost workers."""
    ended = list(zip(plans, outcomes, strict=True))
    errors = {
        plan.stage.key: (one_line(f"{type(outcome).__name__}: {outcome}", 300), may_pass(outcome))
        for plan, outcome in ended
        if isinstance(outcome, Exception)
    }
    trained = {plan.stage.key: outcome for plan, outcome in ended if isinstance(outcome, Opened)}
    report: dict[str, Any] = {"epoch": study.budget.epochs, "errors": errors, "trained": trained, "ended": True}
    (plan, outcome), *others = ended
    if errors or others or plan.is_fixed_reference:
        # epoch 0, which no scheduler judges: other trials are not to be compared with references
        return report | {"epoch": 0, "score": math.nan, "chosen": math.nan}
    # of a trial that measured itself, its measures have the curves of training too
    last = outcome if isinstance(outcome, Computed) else results[plan.trained.key]
    history = last.result.config["history"]
    # only ASHA goes by the score, and random weights have no epochs
    score = history[-1]["val/reconstruction"] if history else math.nan
    return report | {"score": score, "chosen": last.result.metrics.get(study.choose_metric, score)}
