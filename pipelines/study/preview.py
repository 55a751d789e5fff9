"""What `--plan` prints of a study: its trials, which are finished, and what the others will cost."""

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pipelines.cluster.connection import nodes_at_hand
from pipelines.cluster.resources import Resources
from pipelines.study.cost import (
    Forecast,
    describe,
    finished_samples,
    forecast,
    groups_of,
    machine_for,
    plans_of_search,
)
from pipelines.study.plan import TrialPlan, describe_plans
from pipelines.study.probing import probed_samples
from pipelines.study.schema import Study
from pipelines.study.sets import StudySet, are_many
from pipelines.study.sets import describe as describe_sets

if TYPE_CHECKING:
    from pipelines.store.runs import Tracker


_LISTED = 3
"""The trials of each data set that are listed where there are many sets."""


def preview(
    study: Study, sets: Sequence[StudySet], resources: Resources, tracker: "Tracker | None", run_id: str | None,
    probes: bool,
) -> Iterator[str]:  # fmt: skip
    """Yield what is read of each data set and a line for each of its trials, then the forecast of what those that are
    not finished will cost. Where there are many sets, a line tells of each, and a few of its trials follow.

    Args:
        tracker: The store of results, if there is one yet.
        run_id: The study's run, if there is one yet.
        probes: Compute a few steps of each kind of trial first; else no Ray is started.
    """
    records = tracker.trials_of(run_id) if tracker and run_id else {}
    finished = {key: record.run_id for key, record in records.items() if record.is_finished}
    missing: list[TrialPlan] = []
    for one in sets:
        plans = one.plans()
        left = [plan for plan in plans if plan.stage.key not in finished]
        missing += left
        lines = list(describe_plans(one.study, plans, finished))
        counts = f"{len(plans)} trials, {len(plans) - len(left)} finished"
        if are_many(sets):
            counts = f"{one.summary()}; {counts}"
            lines = [*lines[:_LISTED], *([f"... and {len(lines) - _LISTED} more"] if lines[_LISTED:] else [])]
        else:
            yield from describe_sets([one])
        if one.name:
            yield f"{one.name}: {counts}"
        yield from lines
    if not missing and study.search != "optuna":
        yield "all trials are finished: nothing to compute"
        return
    yield from describe(forecast_study(study, sets, resources, missing, tracker, probes), study.scheduler != "none")


def forecast_study(
    study: Study, sets: Sequence[StudySet], resources: Resources, missing: Sequence[TrialPlan],
    tracker: "Tracker | None", probes: bool = False,
) -> Forecast:  # fmt: skip
    """Return what the missing trials of a study will cost; those that Optuna will choose are added here."""
    nodes = nodes_at_hand()
    with warnings.catch_warnings(action="ignore"):  # the settings are only examples
        for one in sets:
            chosen = plans_of_search(one.study, one.facts, one.numerics)
            missing = [*missing, *(plan.of_set(one.name) for plan in chosen)]
    groups = groups_of(missing, study, resources, nodes)
    machine = machine_for(groups, resources, nodes)
    probed = probed_samples(groups, machine, resources) if probes else []
    return forecast(missing, machine, finished_samples(tracker) if tracker else [], probed)
