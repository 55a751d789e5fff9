"""Instructions that a worker gets along with a stage: store, parent run, share of the cluster, checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aecore.training.checkpoint import Checkpoints
from pipelines.cluster.device import are_fake
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share
from pipelines.graph.stage import Stage
from pipelines.host.environment import has_embedded_ray

if TYPE_CHECKING:
    from aecore.training.team import Team
    from pipelines.store.runs import Tracker

StoreAddress = tuple[Any, ...]
"""The fields of a `Tracker`, sent instead, since receiving a `Tracker` means to import MLflow first."""

Tell = Callable[[Stage, int, dict[str, float]], None]
"""Function that is called once per epoch with the stage, the epoch's number (from 1) and the epoch's metrics."""


class Opened(NamedTuple):
    """The open run of a trial that was trained and is to be measured by another process."""

    run_id: str
    files: str
    """The URI of the run's artifacts, among which the trained stages lie."""
    attempt: int
    last_epoch: int
    """The last epoch that is logged already."""
    metrics: Mapping[str, float]
    """The last value of each metric that the run has."""
    totals: Mapping[str, float]
    """Epochs and seconds of the training."""
    spent: Mapping[str, float]
    """CPU and GPU seconds, those of earlier attempts included."""
    known: Mapping[str, str]
    """The runs of stages that were not trained for this trial but restored, by key."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Where a stage is computed and where its result goes; nothing in an assignment is part of the stage's key.

    A chained task, a trial of a study and a member of a worker group compute a stage in the same way. Only their
    assignments differ.
    """

    store: StoreAddress
    parent: str
    """The MLflow run in which the stage's run is nested."""
    job: str = ""
    """The name of that run, which becomes part of the name of the stage's run; a trial's name says enough."""
    share: Share
    known: Mapping[str, str] = field(default_factory=dict)
    """The runs of finished stages, by key, which need not be looked for."""
    opened: "Opened | None" = None
    """The trial's run, where another process has opened it and trained the trial."""
    quiet: bool = False
    """Whether nothing but warnings is printed and epochs are logged rarely, as in a study, which has many stages."""
    fake_gpus: bool = False
    """Whether the cluster's GPUs are only pretended, so that the stage computes on the CPU."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Further tags of the stage's run."""
    team: "Team | None" = None
    """The workers that train the stage together, if there are several."""
    tell: Tell | None = None
    """Called after each epoch. An exception raised in this function ends the stage."""
    checkpoint_folder: str | None = None
    """Folder or URI below which each stage has a folder for its checkpoints; None writes none."""
    checkpoint_seconds: float = 30.0
    """Least time between two checkpoints of a stage."""
    parts: int = 1
    """Parts into which a batch is cut, whose gradients are added up; 2 where memory did not suffice for 1."""
    reads_alone: bool = False
    """Whether rows on disk are read in this process, as in trials side by side, instead of by tasks of the cluster."""

    def checkpoints(self, stage: Stage) -> Checkpoints | None:
        """Return the checkpoints of a stage; None where none are written."""
        if self.checkpoint_folder is None:
            return None
        return checkpoints_of(stage, self.checkpoint_folder, self.checkpoint_seconds)


def assign(tracker: "Tracker", parent: str, share: Share, resources: Resources, in_study: bool = False) -> Assignment:
    """Return what whoever computes a stage of a job must know: the store, the parent run, the share of the machine and
    the place of checkpoints.

    Args:
        parent: The job's MLflow run.
        share: CPUs and GPUs of each stage.
        in_study: The stages belong to trials of a study, which run side by side.
    """
    from pipelines.store.lease import held_leases

    return Assignment(
        store=tuple(tracker._replace(leases=held_leases())),
        parent=parent,
        share=share,
        fake_gpus=are_fake(),
        checkpoint_folder=checkpoint_folder(tracker.uri, resources.storage_path),
        checkpoint_seconds=resources.checkpoint_every,
        reads_alone=in_study,
        quiet=in_study,
    )


def checkpoint_folder(store_uri: str, storage_path: str | None) -> str | None:
    """Return the folder or URI for checkpoints: `storage_path`, else a folder beside a local store or, with an embedded
    Ray, in the working directory. Return None on a cluster with a remote store, whose nodes may share no folder."""
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
