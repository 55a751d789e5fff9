"""What a search tells of a run of a stage or trial; importable without MLflow."""

from collections.abc import Mapping
from typing import Any, NamedTuple

OWN, TRAINED, MEASURED = "1", "trained.safetensors", "measured.safetensors"
"""Where a result lies among the artifacts of its run: in the folder `result`, or in a file with other results."""
STOPPED = "stopped.epoch"
"""Tag with the epoch after which a scheduler stopped a trial."""
EPOCH = "epoch/"
"""Prefix of the metrics of a trial's epochs, which sets them apart from its measures."""
LOAD = "system/"
"""Prefix of the metrics of the load of a run's machine."""
_MARK = "stage.key."


class Record(NamedTuple):
    """A run of a stage or trial.

    The run of a trial also holds the results of those stages of the trial that have no runs of their own.
    """

    run_id: str
    status: str
    files: str
    """The URI of the run's artifacts."""
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    """The last value of each metric, without the load of the machine and without the epochs of a trial."""

    @classmethod
    def of(cls, run: Any) -> "Record":
        """Return what is told of `run`, an `mlflow.entities.Run`."""
        metrics = {name: value for name, value in run.data.metrics.items() if not name.startswith((LOAD, EPOCH))}
        return cls(run.info.run_id, run.info.status, run.info.artifact_uri or "", run.data.tags, metrics)

    @property
    def key(self) -> str:
        """The key of the stage or of the trial's last stage."""
        return self.tags.get("stage.key", "")

    @property
    def is_finished(self) -> bool:
        """Whether the results count."""
        return self.status == "FINISHED"

    @property
    def stopped(self) -> int | None:
        """The epoch after which a scheduler stopped the trial, if one did."""
        return int(self.tags[STOPPED]) if self.tags.get(STOPPED) else None

    @property
    def places(self) -> dict[str, str]:
        """Where the results lie among the artifacts, by the keys of their stages."""
        marked = {name.removeprefix(_MARK): place for name, place in self.tags.items() if name.startswith(_MARK)}
        return {self.key: OWN, **marked}  # runs of early versions have no mark


def marker(key: str) -> str:
    """Return the name of a tag that only a run with the result of this stage has.

    MLflow's tables have an index of the names of tags and none of their values.
    """
    return f"{_MARK}{key}"


def foreign_marks(tags: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """Return the marks of a trial's run for stages whose results it will not hold: an earlier attempt announced them,
    and another run has them now.

    Args:
        tags: The run's tags.
        own: The tags of this attempt.
    """
    is_trial = any(place != OWN for name, place in own.items() if name.startswith(_MARK))
    return [name for name in tags if is_trial and name.startswith(_MARK) and name not in own]


def study_marker(study: str) -> str:
    """Return the name of a tag that only the trials of a study have; `study` is the id of the study's run."""
    return f"study.{study}"
