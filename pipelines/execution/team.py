"""A training stage whose batches are split between several workers: a Ray Train worker group."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from pipelines.cluster.resources import Resources
from pipelines.execution.assignment import Assignment
from pipelines.execution.compute import Work, compute_stages, inputs_of, train_along
from pipelines.execution.journal import Computed
from pipelines.graph.stage import Stage
from pipelines.host.scratch import scratch

if TYPE_CHECKING:
    from ray import ObjectRef


def is_trained_by_team(stage: Stage, resources: Resources) -> bool:
    """Whether a stage trains, and with more than one worker."""
    return resources.workers > 1 and stage.trains


def compute_in_team(
    stage: Stage, assignment: Assignment, resources: Resources, references: "Sequence[ObjectRef]"
) -> Computed:  # fmt: skip
    """Compute a training stage as a Ray Train worker group; its first member logs and commits it.

    A lost worker ends the group. The driver then tries the stage again from its last checkpoint, as it does with a
    stage of one worker, so that the attempts of the two are not multiplied.

    Args:
        references: The results of `stage.parents()`, which each member fetches for itself.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    # Any: the trainer's hints know neither a loop that returns something nor a range of workers
    loop: Any = partial(_work_as_member, stage, assignment, list(references))
    workers: Any = resources.workers
    if resources.min_workers is not None:
        workers = (resources.min_workers, resources.workers)
    share = assignment.share
    with redirect_stdout(sys.stderr), scratch() as folder:
        trainer = TorchTrainer(
            loop,
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=share.gpus > 0,
                resources_per_worker={"CPU": share.cpus, "GPU": share.gpus},
            ),
            # a name that was used before would make Ray Train take that run up again
            run_config=ray.train.RunConfig(
                name=f"{stage.key[:16]}-{uuid4().hex[:8]}",
                storage_path=resources.storage_path or str(folder),
                failure_config=ray.train.FailureConfig(max_failures=0),
            ),
        )
        try:
            return cast(Any, trainer.fit()).return_value
        except ray.train.WorkerGroupError as error:
            # where one member raised an error and others were lost because of it, the error is what happened
            failures = error.worker_failures.values()
            raise min(failures, key=lambda failure: isinstance(failure, ray.exceptions.RayError)) from error


def _work_as_member(
    stage: Stage, assignment: Assignment, references: "Sequence[ObjectRef]"
) -> Computed | None:  # fmt: skip
    """What each member of the group does; only the first one keeps a journal and returns the finished stage."""
    import ray.train

    from aecore.training.team import Team

    context = ray.train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    work = Work(stage, replace(assignment, team=team), inputs_of(stage, ray.get(list(references))))
    if team.rank:
        train_along(work)
        return None
    (outcome,) = compute_stages([work])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
