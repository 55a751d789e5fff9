"""A study from its first trial to its last: what is finished is restored, the rest runs on Ray Tune."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from aecore.config.facts import Facts
from aecore.evaluation.trial import Trial, study_status
from pipelines.cluster.resources import Resources
from pipelines.execution.chain import compute
from pipelines.study.agenda import Agenda
from pipelines.study.desk import reason_of
from pipelines.study.groups import reference_groups
from pipelines.study.plan import TrialPlan, plan_trials, shared_stages
from pipelines.study.results import trial_of
from pipelines.study.schema import Study
from pipelines.study.search import Search
from pipelines.study.trials import TrialRunner

if TYPE_CHECKING:
    from pipelines.store.record import Record
    from pipelines.store.runs import Tracker

Say = Callable[[str], None]
Records = Mapping[str, "Record"]
"""The runs of a study's trials, by key."""


class Ended(NamedTuple):
    """The trials of a study that has ended, and how many stages were finished now and before.

    A trial counts as one stage, beside the stages that several trials share.
    """

    trials: list[Trial]
    """All trials, the stopped and the failed ones included."""
    computed: int
    """Number of stages that were finished now."""
    restored: int
    """Number of trials that were finished before."""

    @property
    def status(self) -> Literal["finished", "partial", "failed"]:
        """`partial` if some trials failed, `failed` if no trial of a variant is finished."""
        return study_status(self.trials)


def run(
    study: Study, facts: Facts, tracker: "Tracker", parent: str, resources: Resources, say: Say
) -> Ended:  # fmt: skip
    """Restore the trials that are finished already and run the others; Ray starts only if a trial is missing.

    Args:
        parent: The study's MLflow run.
    """
    # trials side by side with one thread each are faster than one trial after another with all threads
    resources = resources if resources.cpus else resources.model_copy(update={"cpus": 1})
    runner = TrialRunner(study, facts, tracker, parent, resources)
    agenda = Agenda(resources.retries)
    before = tracker.trials_of(parent)
    _restore(plan_trials(study, facts, resources.numerics), before, agenda, say)
    for row in study.searched_rows if study.search == "optuna" else ():
        agenda.sources.append(_search(runner, row, before, agenda))
    shared = 0
    if agenda.has_work():
        shared = _compute_shared_stages(runner, agenda, say)
        runner.run(agenda)
    after = tracker.trials_of(parent)
    _close_runs(agenda, after, tracker)
    trials = [trial_of(plan, after, study.budget.epochs, agenda.endings) for plan in agenda.plans.values()]
    finished = [{key for key, record in records.items() if record.is_finished} for records in (before, after)]
    return Ended(trials, shared + len(finished[1] - finished[0]), len(finished[0] & agenda.plans.keys()))


def _restore(plans: Sequence[TrialPlan], before: Records, agenda: Agenda, say: Say) -> None:
    """Put trials that are not finished on the agenda, and those that are among the ended ones."""
    missing = []
    for plan in plans:
        record = before.get(plan.stage.key)
        if record and record.is_finished:
            agenda.plans[plan.stage.key] = plan
        elif record and record.stopped is not None:
            agenda.plans[plan.stage.key] = plan
            agenda.endings.stopped[plan.stage.key] = record.stopped
        else:
            missing.append(plan)
    if len(missing) < len(plans):
        say(f"{len(plans) - len(missing)} of {len(plans)} trials restored")
    agenda.add(missing)


def _search(runner: TrialRunner, row: str, before: Records, agenda: Agenda) -> Search:
    """Return the search of a row's settings; it goes on from what an earlier call has finished."""
    study, tried = runner.study, []
    for record in before.values():
        if record.is_finished and record.tags.get("row") == row:
            settings, seed = json.loads(record.tags["settings"]), int(record.tags["seed"])
            agenda.plans[record.key] = runner.plan_of(row, settings, seed)
            agenda.before[record.key] = record.metrics[study.choose_metric]
            if seed == study.seeds[0]:
                tried.append((settings, record.metrics[study.choose_metric]))
    return Search(study, row, runner.plan_of, tried)


def _compute_shared_stages(runner: TrialRunner, agenda: Agenda, say: Say) -> int:
    """Compute the stages that several trials need; return how many were computed now. The trials that need one which
    fails fail, for its reason."""
    plans = agenda.waiting()
    groups = [[plan] for plan in plans if not plan.is_fixed_reference] + reference_groups(plans)
    stages = shared_stages(groups)
    if not stages:
        return 0
    say(f"{len(stages)} stages that several trials share come first")
    failures: dict[str, Exception] = {}
    outcomes = compute(stages, runner.tracker, runner.parent, runner.resources, say, failures)
    found = {plan.stage.key: [failures[key] for key in plan.stages() if key in failures] for plan in plans}
    agenda.refuse({key: reason_of(errors[0]) for key, errors in found.items() if errors})
    return sum(not outcome.restored for outcome in outcomes.values())


def _close_runs(agenda: Agenda, records: Records, tracker: "Tracker") -> None:
    """End the runs of trials that the scheduler stopped or whose worker died before it ended them."""
    for key, record in records.items():
        if record.status != "RUNNING":
            continue
        if key in agenda.endings.stopped:
            tracker.stop_trial(record.run_id, agenda.endings.stopped[key])
        elif key in agenda.endings.errors:
            tracker.fail_trial(record.run_id, agenda.endings.errors[key])
