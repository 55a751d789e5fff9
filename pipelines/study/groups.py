"""Groups of trials that are trained together as one: they differ in numbers alone (see `aecore.training.fused`)."""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil

from aecore.core.fingerprint import fingerprint
from pipelines.study.plan import TrialPlan, reference_groups

_MOST_AS_ONE = 64
"""Most trials of a group, since a lost worker costs all of them. The training sees to memory."""


def groups_of(plans: Sequence[TrialPlan], gpus: int | None) -> list[list[TrialPlan]]:
    """Divide trials into the groups that Ray Tune runs as one trial each.

    All seeds of a reference without settings are one group, since they share most of their stages.

    Args:
        gpus: Number of GPUs. There are at least so many groups if possible, so that no GPU is idle, but not many more:
            a GPU trains one large group faster than several small ones side by side. None makes each of the
            other trials a group of its own.
    """
    references = reference_groups(plans)
    others = [plan for plan in plans if not plan.is_fixed_reference]
    if gpus is None:
        return [*references, *([plan] for plan in others)]
    groups: list[list[TrialPlan]] = []
    for same in alike(others):
        count = max(ceil(len(same) * gpus / len(others)), ceil(len(same) / _MOST_AS_ONE))
        groups += _in_equal_parts(same, min(count, len(same)))
    return [*references, *groups]


def alike(plans: Sequence[TrialPlan]) -> list[list[TrialPlan]]:
    """Group the trials that differ in numbers alone, in order."""
    kinds: dict[str, list[TrialPlan]] = {}
    for plan in plans:
        kinds.setdefault(_all_but_numbers(plan), []).append(plan)
    return list(kinds.values())


def _in_equal_parts(plans: Sequence[TrialPlan], count: int) -> list[list[TrialPlan]]:
    """Cut a sequence into `count` parts whose lengths differ by at most one."""
    bounds = [len(plans) * part // count for part in range(count + 1)]
    return [list(plans[start:end]) for start, end in pairwise(bounds)]


def _all_but_numbers(plan: TrialPlan) -> str:
    """Return a hash of all but the numbers of a trial; trials of equal hash can be trained together as one."""
    specs = [stage.spec.model_dump(mode="json") for stage in plan.stages().values() if stage.trains]
    for spec in specs:
        spec["seed"] = None
        spec["fit"] = {name: spec["fit"][name] for name in ("epochs", "batch_size")}
        for name, value in (spec["variant"] or {}).items():
            if isinstance(value, float):
                spec["variant"][name] = bool(value)  # a weight of 0 leaves its term out
    return fingerprint(*specs)
