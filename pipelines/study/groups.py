"""Which trials train as one: those that differ in numbers alone (see `aecore.training.fused`)."""

from collections.abc import Sequence
from math import ceil

from aecore.core.fingerprint import fingerprint
from pipelines.study.plan import TrialPlan, reference_groups
from pipelines.study.trial import REFERENCES

_MOST_AS_ONE = 64
"""Most trials of one group, all of which a lost worker costs; memory is looked after where they train."""


def groups_of(plans: Sequence[TrialPlan], at_once: int | None) -> list[list[TrialPlan]]:
    """Divide trials into the groups that Ray Tune runs as one trial each.

    The references of each kind are one group, since seeds share what a reference is made of.

    Args:
        at_once: Groups that run at the same time on GPUs: there are at least as many, so that no GPU is idle; None
            where every other trial is a group of its own.
    """
    references = reference_groups(plans)
    others = [plan for plan in plans if plan.kind not in REFERENCES]
    if at_once is None:
        return [*references, *([plan] for plan in others)]
    return [*references, *alike(others, max(1, min(_MOST_AS_ONE, ceil(len(others) / at_once))))]


def alike(plans: Sequence[TrialPlan], most: int) -> list[list[TrialPlan]]:
    """Group trials that differ in numbers alone, at most so many together, in order."""
    kinds: dict[str, list[TrialPlan]] = {}
    for plan in plans:
        kinds.setdefault(_all_but_numbers(plan), []).append(plan)
    return [same[start : start + most] for same in kinds.values() for start in range(0, len(same), most)]


def _all_but_numbers(plan: TrialPlan) -> str:
    """Return what a trial's training must have in common with those that it is trained with as one."""
    specs = [stage.spec.model_dump(mode="json") for stage in plan.stages().values() if stage.trains]
    for spec in specs:
        spec["seed"] = None
        spec["fit"] = {name: spec["fit"][name] for name in ("epochs", "batch_size")}
        for name, value in (spec["variant"] or {}).items():
            if isinstance(value, float):
                spec["variant"][name] = bool(value)  # a weight of 0 leaves its term out
    return fingerprint(*specs)
