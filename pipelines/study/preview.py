"""What `--plan` prints of a study: its trials, which are finished, and what the others will cost."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from aecore.config.facts import Facts
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
from pipelines.study.plan import TrialPlan, describe_plans, plan_trials
from pipelines.study.probing import probed_samples
from pipelines.study.schema import Study

if TYPE_CHECKING:
    from pipelines.store.runs import Tracker


def preview(
    study: Study, facts: Facts, resources: Resources, tracker: "Tracker | None", run_id: str | None, probes: bool
) -> Iterator[str]:  # fmt: skip
    """Yield a line for each trial of a study, then the forecast of what those that are not finished will cost.

    Args:
        tracker: The store of results, if there is one yet.
        run_id: The study's run, if there is one yet.
        probes: Compute a few steps of each kind of trial first; else no Ray is started.
    """
    plans = plan_trials(study, facts, resources.numerics)
    records = tracker.trials_of(run_id) if tracker and run_id else {}
    finished = {key: record.run_id for key, record in records.items() if record.is_finished}
    yield from describe_plans(study, plans, finished)
    missing = [plan for plan in plans if plan.stage.key not in finished]
    if not missing and study.search != "optuna":
        yield "all trials are finished: nothing to compute"
        return
    yield from describe(forecast_study(study, facts, resources, missing, tracker, probes), study.scheduler != "none")


def forecast_study(
    study: Study, facts: Facts, resources: Resources, missing: Sequence[TrialPlan], tracker: "Tracker | None",
    probes: bool = False,
) -> Forecast:  # fmt: skip
    """Return what the missing trials of a study will cost; those that Optuna will choose are added here."""
    nodes = nodes_at_hand()
    missing = [*missing, *plans_of_search(study, facts, resources.numerics)]
    groups = groups_of(missing, study, resources, nodes)
    machine = machine_for(groups, resources, nodes)
    probed = probed_samples(groups, machine, resources) if probes else []
    return forecast(missing, machine, finished_samples(tracker) if tracker else [], probed)
