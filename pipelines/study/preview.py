"""What `--plan` prints of a study: its trials, which are finished, and what the others will cost."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from aecore.config.facts import Facts
from pipelines.cluster.connection import nodes_at_hand
from pipelines.cluster.resources import Resources
from pipelines.study.cost import describe, finished_samples, forecast, groups_of, machine_for, plans_of_search
from pipelines.study.plan import describe_plans, plan_trials
from pipelines.study.probing import probed_samples
from pipelines.study.schema import Study

if TYPE_CHECKING:
    from pipelines.store.runs import Tracker


def preview(
    study: Study, facts: Facts, resources: Resources, tracker: "Tracker | None", probes: bool
) -> Iterator[str]:  # fmt: skip
    """Yield a line for each trial of a study, then the forecast of what those that are not finished will cost.

    Args:
        tracker: The store of results, if there is one yet.
        probes: Compute a few steps of each kind of trial first; else no Ray is started.
    """
    plans = plan_trials(study, facts, resources.numerics)
    found = {plan.stage.key: tracker.find(plan.stage.key) for plan in plans} if tracker else {}
    finished = {key: run_id for key, run_id in found.items() if run_id}
    yield from describe_plans(study, plans, finished)
    missing = [plan for plan in plans if plan.stage.key not in finished]
    missing += plans_of_search(study, facts, resources.numerics)
    if not missing:
        yield "all trials are finished: nothing to compute"
        return
    nodes = nodes_at_hand()
    groups = groups_of(missing, study, resources, nodes)
    machine = machine_for(groups, resources, nodes)
    probed = probed_samples(groups, machine, resources) if probes else []
    expected = forecast(missing, machine, finished_samples(tracker) if tracker else [], probed)
    yield from describe(expected, bound=study.scheduler != "none")
