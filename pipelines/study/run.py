"""A study from its first trial to its last: what is finished is restored, the rest runs on Ray Tune."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from aecore.evaluation.racing import GOALS
from aecore.evaluation.trial import Dropped, Trial
from pipelines.cluster.resources import Resources
from pipelines.execution.chain import compute
from pipelines.study.agenda import Agenda, Endings
from pipelines.study.cost import Cost, Forecast
from pipelines.study.desk import reason_of
from pipelines.study.plan import TrialPlan, shared_stages
from pipelines.study.preview import forecast_study
from pipelines.study.race import Race
from pipelines.study.results import read, trial_of
from pipelines.study.schema import Study
from pipelines.study.search import Search
from pipelines.study.sets import StudySet
from pipelines.study.spending import spent_by_row
from pipelines.study.trials import TrialRunner

if TYPE_CHECKING:
    from pipelines.store.record import Record
    from pipelines.store.runs import Tracker

Say = Callable[[str], None]
_PARENT = "mlflow.parentRunId"
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
    forecast: Forecast | None
    """What the missing trials were to cost; None where none was missing."""
    spent: dict[str, Cost]
    """What this command has spent; see `spent_by_row`."""
    dropped: dict[str, list[Dropped]]
    """The study rows that races dropped, by data set."""


def run(
    study: Study, sets: Sequence[StudySet], tracker: "Tracker", parent: str, resources: Resources, say: Say
) -> Ended:  # fmt: skip
    """Restore the trials that are finished already and run the others; Ray starts only if a trial is missing.

    The data sets come one after another, so that a study which is interrupted has whole sets, and the trials of the
    next set begin as soon as those of the last leave room. Searches and races take turns instead: each knows more the
    longer it waits.

    Args:
        parent: The study's MLflow run.
    """
    # trials side by side with one thread each are faster than one trial after another with all threads
    resources = resources if resources.cpus else resources.model_copy(update={"cpus": 1})
    runner = TrialRunner(study, sets, tracker, parent, resources)
    agenda = Agenda(resources.retries)
    before = tracker.trials_of(parent)
    races: dict[str, Race] = {}
    if study.scheduler == "race":
        races = {one.name: Race(one.study, one.plan, partial(_scores, tracker, parent, one.study)) for one in sets}
    planned = [one.plans() for one in sets]
    known = [[m for m in plans if not races or m.is_reference] for plans in planned]
    _restore(known, before, agenda, study.scheduler == "asha", say)
    if races:
        agenda.before = {key: math.nan for key, record in before.items() if record.is_finished}
        agenda.sources += races.values()
    for one in sets if study.search == "optuna" else ():
        agenda.sources += [_search(one, row, _may_be_of(one, sets, before), agenda) for row in one.study.searched_rows]
    expected, shared = None, []
    if agenda.has_work():
        missing = [m for plans in planned for m in plans if not _is_finished(before, m.stage.key)]
        expected = forecast_study(study, sets, resources, missing, tracker)
        shared = _compute_shared_stages(runner, agenda, say)
    if agenda.has_work():
        runner.run(agenda)
    after = tracker.trials_of(parent)
    _close_runs(agenda, after, tracker, runner)
    trials = [
        trial_of(plan, after.get(key), study.budget.epochs, agenda.endings)._replace(number=number)
        for number, (key, plan) in enumerate(agenda.plans.items())
    ]
    new = [trial for key, trial in zip(agenda.plans, trials, strict=True) if not _is_finished(before, key)]
    finished = [key for key in agenda.plans if _is_finished(after, key)]
    # trials that other studies have finished are restored, too
    computed = [m for m in finished if not _is_finished(before, m) and after[m].tags.get(_PARENT) == parent]
    return Ended(
        trials, len(shared) + len(computed), len(finished) - len(computed), expected,
        spent_by_row(new, sum(shared, Cost()), runner.spending.of_this_command()),
        {name: race.dropped for name, race in races.items()},
    )  # fmt: skip


def _is_finished(records: Records, key: str) -> bool:
    return key in records and records[key].is_finished


def _restore(
    planned: Sequence[Sequence[TrialPlan]], before: Records, agenda: Agenda, asha: bool, say: Say
) -> None:  # fmt: skip
    """Put the trials of each data set on the agenda, and those that are finished or that ASHA has stopped among the
    ended ones."""
    waiting = 0
    for plans in planned:
        missing = []
        for plan in plans:
            record = before.get(plan.stage.key)
            if record and record.is_finished:
                agenda.plans[plan.stage.key] = plan
            elif record and record.stopped is not None and asha:
                agenda.plans[plan.stage.key] = plan
                agenda.endings.stopped[plan.stage.key] = record.stopped
            else:
                missing.append(plan)
        waiting += len(missing)
        agenda.add(missing)
    total = sum(map(len, planned))
    if waiting < total:
        say(f"{total - waiting} of {total} trials restored")


def _may_be_of(one: StudySet, sets: Sequence[StudySet], records: Records) -> list["Record"]:
    """Return the trials that may be of a data set, the oldest first: those of which no tag says that they are of
    another set of the study."""
    others = {other.name for other in sets} - {one.name}
    return [record for record in reversed(list(records.values())) if record.tags.get("data") not in others]


def _scores(tracker: "Tracker", parent: str, study: Study, plans: Sequence[TrialPlan]) -> dict[str, np.ndarray]:
    """Return by key what the finished ones of some trials reached on each test row, in the measure of the race."""
    goal, records = GOALS[study.choose], tracker.trials_of(parent)
    scores = {}
    for plan in plans:
        trial = read(trial_of(plan, records.get(plan.stage.key), study.budget.epochs, Endings()), tracker)
        if trial.status == "finished" and goal.metric in trial.metrics:
            scores[plan.stage.key] = trial.arrays.get(goal.points, np.array([trial.metrics[goal.metric]]))
    return scores


def _search(one: StudySet, row: str, before: Sequence["Record"], agenda: Agenda) -> Search:
    """Return the search of a row's settings on a data set; it goes on from what an earlier call has finished."""
    study, tried = one.study, []
    for record in before:
        if record.tags.get("row") != row or not (record.is_finished or record.stopped):
            continue
        settings, seed = json.loads(record.tags["settings"]), int(record.tags["seed"])
        if not study.contains(row, settings) or (plan := one.plan(row, settings, seed)).stage.key != record.key:
            continue  # the row was another one then
        agenda.plans[record.key] = plan
        value = record.metrics.get(study.choose_metric, math.nan) if record.is_finished else math.nan
        if record.is_finished:
            agenda.before[record.key] = value
        else:
            agenda.endings.stopped[record.key] = record.stopped or 0
        if seed == study.seeds[0]:
            tried.append((settings, value))
    return Search(study, row, one.plan, tried)


def _compute_shared_stages(runner: TrialRunner, agenda: Agenda, say: Say) -> list[Cost]:
    """Compute the stages that several trials need; return the costs of those that were computed now. The trials that
    need one which fails fail, for its reason."""
    plans = agenda.waiting()
    stages = shared_stages(plans)
    if not stages:
        return []
    say(f"{len(stages)} stages that several trials share come first")
    failures: dict[str, Exception] = {}
    outcomes = compute(stages, runner.tracker, runner.parent, runner.resources, say, failures)
    found = {plan.stage.key: [failures[key] for key in plan.stages() if key in failures] for plan in plans}
    agenda.refuse({key: reason_of(errors[0]) for key, errors in found.items() if errors})
    runner.known |= {stage.key: outcomes[stage.name].run_id for stage in stages if stage.name in outcomes}
    seconds = [one.metrics.get("train_seconds", 0.0) for one in outcomes.values() if not one.restored]
    share = runner.share_of(stages)
    costs = [Cost.of(share, each) for each in seconds]
    runner.spending.add(sum(costs, Cost()))
    return costs


def _close_runs(agenda: Agenda, records: Records, tracker: "Tracker", runner: TrialRunner) -> None:
    """End the runs of trials that the scheduler stopped or whose worker died before it ended them."""
    for key, record in records.items():
        if record.status != "RUNNING":
            continue
        if key in agenda.endings.stopped:
            tracker.stop_trial(record.run_id, agenda.endings.stopped[key])
            runner.clear_checkpoints(agenda.plans[key])
        elif key in agenda.endings.errors:
            tracker.fail_trial(record.run_id, agenda.endings.errors[key])
