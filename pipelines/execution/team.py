"""A training stage whose batches are split between several workers: a Ray Train worker group."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from aecore.core.errors import DeviceError, InputError, OutageError
from pipelines.cluster.resources import Resources
from pipelines.execution.assignment import Assignment
from pipelines.execution.compute import Work, compute_stage, inputs_of, train_along
from pipelines.execution.journal import Computed
from pipelines.graph.stage import Stage
from pipelines.host.scratch import scratch

if TYPE_CHECKING:
    from ray import ObjectRef


def is_trained_by_team(stage: Stage, resources: Resources) -> bool:
    """Return whether a stage trains a model, and with more than one worker."""
    return resources.workers > 1 and stage.trains


def compute_in_team(
    stage: Stage, assignment: Assignment, resources: Resources, references: "Sequence[ObjectRef]"
) -> Computed:  # fmt: skip
    """Train a stage with a Ray Train worker group and return it finished; the group's first member logs and commits it.

    If a worker is lost, the group ends, and the driver tries the stage again from its last checkpoint. Ray Train itself
    makes no further attempt: its attempts and the driver's would be multiplied.

    Args:
        references: References to the results of `stage.parents()`; each member fetches the results itself.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    # Any: the trainer's hints know neither a loop that returns something nor a range of workers
    loop: Any = partial(_work_as_member, stage, assignment, list(references))
    workers: Any = resources.workers
    if resources.min_workers is not None:
        workers = (resources.min_workers, resources.workers)
    share = assignment.share
    scaling: Any = ray.train.ScalingConfig  # its hints lack label_selector
    with redirect_stdout(sys.stderr), scratch() as folder:
        trainer = TorchTrainer(
            loop,
            scaling_config=scaling(
                num_workers=workers,
                use_gpu=share.gpus > 0,
                resources_per_worker={"CPU": share.cpus, "GPU": share.gpus},
                accelerator_type=resources.accelerator if share.gpus else None,
                label_selector=resources.labels or None,
            ),
            # with a name that was used before, Ray Train would continue the earlier run
            run_config=ray.train.RunConfig(
                name=f"{stage.key[:16]}-{uuid4().hex[:8]}",
                storage_path=resources.storage_path or str(folder),
                failure_config=ray.train.FailureConfig(max_failures=0),
            ),
        )
        try:
            return cast(Any, trainer.fit()).return_value
        except ray.train.TrainingFailedError as error:
            raise what_happened(error) from error


def what_happened(error: Exception) -> Exception:
    """Return the failure that explains the end of a worker group.

    That is an error of the stage itself, if a member raised one; else the loss of a member, since the others then fail
    because their messages stay without an answer; else whatever the first failure is.
    """
    from ray.exceptions import RayError, RayTaskError

    failures: list[Exception] = list(getattr(error, "worker_failures", {}).values())
    failures = failures or [getattr(error, "controller_failure", error)]
    # Ray Train wraps the loss of a member into an error of its own
    causes = [getattr(failure, "health_check_failure", failure) for failure in failures]
    kinds = InputError | DeviceError | ArithmeticError | MemoryError | OutageError
    own = [cause for cause in causes if isinstance(cause, kinds)]
    lost = [cause for cause in causes if isinstance(cause, RayError) and not isinstance(cause, RayTaskError)]
    return (own or lost or causes)[0]


def _work_as_member(
    stage: Stage, assignment: Assignment, references: "Sequence[ObjectRef]"
) -> Computed | None:  # fmt: skip
    """Do the work of one member of the group; only the first one logs, commits and returns the finished stage."""
    import ray.train

    from aecore.training.team import Team

    context = ray.train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    work = Work(stage, replace(assignment, team=team), inputs_of(stage, ray.get(list(references))))
    if team.rank:
        train_along(work)
        return None
    return compute_stage(work)
