"""Groups of trials that are trained together as one: they differ in numbers alone (see `aecore.training.fused`)."""

from collections.abc import Sequence
from math import ceil

from aecore.core.fingerprint import fingerprint
from aecore.evaluation.trial import REFERENCES
from pipelines.study.plan import TrialPlan, reference_groups

_MOST_AS_ONE = 64
"""Most trials of a group, since a lost worker costs all of them. The training sees to memory."""


def groups_of(plans: Sequence[TrialPlan], at_once: int | None) -> list[list[TrialPlan]]:
    """Divide trials into the groups that Ray Tune runs as one trial each.

    All seeds of a reference (PCA, random weights) are one group, since they share most of their stages.

    Args:
        at_once: Number of groups that run at the same time on GPUs. The trials are spread over so many groups if
            possible, so that no GPU is idle. None makes each trial that is no reference a group of its own.
    """
    references = reference_groups(plans)
    others = [plan for plan in plans if plan.kind not in REFERENCES]
    if at_once is None:
        return [*references, *([plan] for plan in others)]
    return [*references, *alike(others, max(1, min(_MOST_AS_ONE, ceil(len(others) / at_once))))]


def alike(plans: Sequence[TrialPlan], most: int) -> list[list[TrialPlan]]:
    """Group trials that differ in numbers alone, in order; each group has at most `most` trials."""
    kinds: dict[str, list[TrialPlan]] = {}
    for plan in plans:
        kinds.setdefault(_all_but_numbers(plan), []).append(plan)
    return [same[start : start + most] for same in kinds.values() for start in range(0, len(same), most)]


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
