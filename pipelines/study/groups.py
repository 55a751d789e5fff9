"""Groups of trials that are trained together as one: they differ in numbers alone (see `aecore.training.fused`)."""

import json
from collections.abc import Sequence

from pipelines.study.plan import TrialPlan


def alike(plans: Sequence[TrialPlan]) -> list[list[TrialPlan]]:
    """Group the trials of a data set that differ in numbers alone, in order."""
    kinds: dict[tuple[str, str], list[TrialPlan]] = {}
    for plan in plans:
        kinds.setdefault((plan.data, _all_but_numbers(plan)), []).append(plan)
    return list(kinds.values())


def reference_groups(plans: Sequence[TrialPlan]) -> list[list[TrialPlan]]:
    """Return the trials of each reference, all seeds on a data set as a group.

    The trials of a group share most of their stages, so one trial of Ray Tune computes the whole group.
    """
    groups: dict[tuple[str, str], list[TrialPlan]] = {}
    for plan in plans:
        if plan.is_fixed_reference:
            groups.setdefault((plan.data, plan.row), []).append(plan)
    return list(groups.values())


def _all_but_numbers(plan: TrialPlan) -> str:
    """Return all but the numbers of a trial as text; trials of equal text can be trained together as one."""
    specs = [stage.spec.model_dump(mode="json") for stage in plan.stages().values() if stage.trains]
    for spec in specs:
        spec["seed"] = None
        spec["fit"] = {name: spec["fit"][name] for name in ("epochs", "steps", "batch_size")}
        for name, value in (spec["variant"] or {}).items():
            if isinstance(value, float):
                spec["variant"][name] = bool(value)  # a weight of 0 leaves its term out
    return json.dumps(specs, sort_keys=True)
