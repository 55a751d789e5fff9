"""What whoever computes a stage is told beside the stage itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aecore.training.checkpoint import Checkpoints
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share
from pipelines.graph.stage import Stage
from pipelines.host.environment import has_embedded_ray

if TYPE_CHECKING:
    from aecore.training.team import Team
    from pipelines.store.runs import Tracker

StoreAddress = tuple[Any, ...]
"""The fields of a `Tracker`. It travels in their place, so that whoever receives it need not import MLflow first."""

Tell = Callable[[Stage, int, dict[str, float]], None]
"""Called once per epoch of a stage's training with the epoch's number, from 1, and its metrics."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Where a stage is computed, where its result goes and who is told; nothing here reaches the numbers.

    A chained task, a trial of a study and a member of a worker group compute a stage in the same way and differ in this
    object alone.
    """

    store: StoreAddress
    parent: str
    """The MLflow run in which the stage's run is nested."""
    share: Share
    tags: Mapping[str, str] = field(default_factory=dict)
    """Further tags of the stage's run."""
    team: "Team | None" = None
    """The workers that train the stage together, if there are several."""
    tell: Tell | None = None
    """Told of each epoch. What it raises ends the stage."""
    checkpoint_folder: str | None = None
    """Folder or URI below which each stage has a folder for its checkpoints; None writes none."""
    checkpoint_seconds: float = 30.0
    """Least time between two checkpoints of a stage."""
    parts: int = 1
    """Into how many parts a batch is cut whose gradients are added up; 2 where memory did not suffice for 1."""
    reads_alone: bool = False
    """Rows on disk are read in this process and not by tasks of the cluster, as trials side by side do."""

    def checkpoints(self, stage: Stage) -> Checkpoints | None:
        """Return where the stage keeps how far it has come, if anywhere."""
        if self.checkpoint_folder is None:
            return None
        return checkpoints_of(stage, self.checkpoint_folder, self.checkpoint_seconds)


def assign(tracker: "Tracker", parent: str, share: Share, resources: Resources, in_study: bool = False) -> Assignment:
    """Return the assignment of the stages of a job.

    Args:
        parent: The job's MLflow run.
        share: What each stage gets of the cluster.
        in_study: The stages belong to trials of a study, which run side by side.
    """
    from pipelines.store.lease import held_leases

    return Assignment(
        store=tuple(tracker._replace(leases=held_leases())),
        parent=parent,
        share=share,
        checkpoint_folder=checkpoint_folder(tracker.uri, resources.storage_path),
        checkpoint_seconds=resources.checkpoint_every,
        reads_alone=in_study,
    )


def checkpoint_folder(store_uri: str, storage_path: str | None) -> str | None:
    """Return where checkpoints go: to `storage_path`, else beside a local store or, with an embedded Ray, into the
    working directory; nowhere on a cluster whose nodes share no folder that is known here."""
    if storage_path is not None:
        return storage_path
    if store_uri.startswith("sqlite:///"):
        return str(Path(store_uri.removeprefix("sqlite:///")).parent / "checkpoints")
    return str(Path.cwd() / "checkpoints") if has_embedded_ray() else None


def checkpoints_of(stage: Stage, folder: str, seconds: float = 30.0) -> Checkpoints:
    """Return the checkpoints of a stage below a folder or URI.

    Args:
        seconds: Least time between two checkpoints.
    """
    return Checkpoints(f"{folder}/{stage.key}", seconds)
