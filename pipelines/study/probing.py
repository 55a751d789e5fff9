"""Probes of a study: of each kind of trial one is computed with few steps, where the trials themselves would run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aecore.config.specs import LoadSpec
from pipelines.cluster.connection import start_ray
from pipelines.cluster.device import are_fake
from pipelines.cluster.placement import options_of
from pipelines.cluster.resources import Resources
from pipelines.execution.chain import as_task
from pipelines.execution.compute import load_rows
from pipelines.execution.probe import probe
from pipelines.graph.work import guessed_seconds, shape_of
from pipelines.study.cost import Cost, Machine, Sample, cost_of_plan
from pipelines.study.plan import TrialPlan
from pipelines.study.worker import share_of_row

if TYPE_CHECKING:
    from ray import ObjectRef


def probed_samples(
    groups: Sequence[Sequence[TrialPlan]], machine: Machine, resources: Resources
) -> list[Sample]:  # fmt: skip
    """Probe one trial of each shape, or one group of trials that a GPU trains as one; all probes run side by side.

    Returns:
        The stages of the probed trials, with the seconds of each as CPU-seconds. Nothing is kept in MLflow.
    """
    start_ray()
    import ray

    kinds = {cost_of_plan(group[-1])[0]: group for group in groups}
    data: dict[str, ObjectRef] = {}
    """The rows of each data set, by the keys of the stages that load them."""
    tasks = []
    for group in kinds.values():
        key, load = next((k, one.spec) for k, one in group[0].stages().items() if isinstance(one.spec, LoadSpec))
        if key not in data:
            data[key] = ray.remote(num_cpus=1)(load_rows).remote(load)
        share = share_of_row(group[0].row, machine.share)
        lasts = [plan.stage for plan in (group if share.gpus else group[-1:])]
        options = options_of(share, resources) | {"name": "probe"}
        tasks.append(as_task(probe).options(**options).remote(lasts, share, are_fake(), [data[key]]))
    seconds = {key: one for probed in ray.get(tasks) for key, one in probed.items()}
    stages = {key: stage for group in kinds.values() for plan in group for key, stage in plan.stages().items()}
    return [
        Sample(shape_of([stages[key]]), guessed_seconds(stages[key]), Cost(cpu_seconds=one))
        for key, one in seconds.items()
    ]
