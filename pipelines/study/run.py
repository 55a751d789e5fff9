"""A study from its first trial to its last: what is finished is restored, the rest runs on Ray Tune."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from aecore.config.facts import Facts
from aecore.evaluation.trial import Trial
from pipelines.cluster.resources import Resources
from pipelines.execution.chain import compute
from pipelines.study.plan import plan_trials, shared_stages
from pipelines.study.results import finished, trial_of
from pipelines.study.schema import Study
from pipelines.study.search import search
from pipelines.study.trials import LATE, Endings, TrialRunner

if TYPE_CHECKING:
    from pipelines.store.runs import Tracker

Say = Callable[[str], None]


class Ended(NamedTuple):
    """The trials of a study that has ended, and how many trials and shared stages were computed, how many restored."""

    trials: list[Trial]
    """All trials, the stopped and the failed ones included."""
    computed: int
    """Number of trials, and of stages that several trials share, that were computed."""
    restored: int
    """Number of trials that were finished before."""


def run(
    study: Study, facts: Facts, tracker: "Tracker", parent: str, resources: Resources, say: Say
) -> Ended:  # fmt: skip
    """Restore the trials that are finished already and run the others; Ray starts only if a trial is missing.

    Args:
        parent: The study's MLflow run.
    """
    # trials side by side with one thread each are faster than one trial after another with all threads
    resources = resources if resources.cpus else resources.model_copy(update={"cpus": 1})
    plans = plan_trials(study, facts, resources.numerics)
    runner = TrialRunner(study, facts, tracker, parent, resources)
    endings = Endings()
    earlier = tracker.trials_of(parent)
    before, shared = finished(earlier), 0
    for plan in plans:
        record = earlier.get(plan.stage.key)
        if plan.stage.key in before:
            say(f"{plan.name}: restored")
        elif study.scheduler == "asha" and record and (epoch := record.stopped) is not None:
            endings.stopped[plan.stage.key] = epoch
            say(f"{plan.name}: stopped at epoch {epoch} before")
    missing = [m for m in plans if m.stage.key not in before and m.stage.key not in endings.stopped]
    if missing:
        stages = shared_stages(runner.groups(missing))
        if stages:
            say(f"{len(stages)} stages that several trials share come first")
            outcomes = compute(stages, tracker, parent, resources, say, in_study=True)
            runner.known |= {stage.key: outcomes[stage.name].run_id for stage in stages}
            shared = sum(not outcome.restored for outcome in outcomes.values())
        ended = runner.run(missing, say)
        if runner.late:
            endings.errors |= {m.stage.key: LATE for m in missing}
        endings.update(ended)
    if study.search == "optuna":
        for row in study.variants:
            if study.space(row):
                searched, ended = search(runner, row, say)
                plans += searched
                endings.update(ended)
    after = tracker.trials_of(parent)
    trials = [trial_of(plan, after.get(plan.stage.key), study.budget.epochs, endings) for plan in plans]
    return Ended(trials, shared + len(finished(after).keys() - before.keys()), len(before))
