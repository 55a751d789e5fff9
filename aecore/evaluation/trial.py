"""The result of a trial of a study: what the report reads."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from aecore.core.notes import describe
from aecore.core.types import Detector

Reference = Detector | Literal["random"]
REFERENCES: tuple[Reference, ...] = ("pca", "random")
"""The study rows that every study contains besides its variants: PCA, and the base's network with random weights."""
ANOMALY_REFERENCES: tuple[Reference, ...] = ("knn", "iforest", "lof", "pca", "random")
"""Those of a study of anomalies: the distance to nearest neighbours, an isolation forest, the local outlier factor, the
error of PCA, and the base's network with random weights."""


def is_reference(kind: str) -> bool:
    """Say whether trials of this kind are of a reference, not of a variant."""
    return kind in (*REFERENCES, *ANOMALY_REFERENCES)


class Trial(NamedTuple):
    """A trial that has ended: one study row (a variant or a reference) with one choice of settings and one seed."""

    row: str
    """Name of the study row: the study's name for the variant, or `pca` or `random`."""
    settings: dict[str, Any]
    """The values of the searched fields, by dotted name; empty where nothing is searched."""
    seed: int
    kind: str
    """The variant's kind, or the reference's name."""
    status: Literal["finished", "stopped", "failed"]
    """`stopped` means early, by the scheduler (ASHA); `failed` comes with an `error`."""
    error: str = ""
    run_id: str = ""
    """The trial's MLflow run."""
    metrics: Mapping[str, float] = {}
    """Final measures; `aecore.evaluation` lists their names."""
    history: tuple[Mapping[str, float], ...] = ()
    """The metrics of each epoch of unsupervised training; the report draws `val/reconstruction`."""
    curves: Mapping[str, Any] = {}
    """Measures that are curves, as plain JSON; see `aecore.evaluation`."""
    arrays: Mapping[str, np.ndarray] = {}
    """Values per test row, pictures and maps; see `aecore.evaluation`.

    `history`, `curves` and `arrays` are large, and so they are empty until the report reads them for the trials that it
    compares."""
    epochs_planned: int = 0
    epochs_used: int = 0
    """Passes over the training rows. Those of a shared stage count for each trial that uses the stage."""
    seconds: float = 0.0
    """Seconds that training the trial's stages took, retries and the former training of restored stages included."""
    cpu_seconds: float = 0.0
    """CPU-seconds spent on the trial (its share of CPUs times wall seconds), all attempts included."""
    gpu_seconds: float = 0.0
    """GPU-seconds spent on the trial, likewise."""
    number: int = 0
    """Place of the trial in the order in which trials were started."""
    data: str = ""
    """Name of the data set, where a study has several."""

    @property
    def is_reference(self) -> bool:
        """Whether the trial is of a reference, not of a variant."""
        return is_reference(self.kind)

    @property
    def name(self) -> str:
        """The trial's name in messages and in the report."""
        return in_set(self.data, trial_name(self.row, self.settings, self.seed))

    @property
    def notes(self) -> list[str]:
        """The notes on the trial's measures, as lines: which are left out or were taken on a sample, and why."""
        return describe(self.curves.get("notes", {}))


class Dropped(NamedTuple):
    """A study row that racing dropped, since it was worse than the best."""

    row: str
    after_seeds: int
    """Number of seeds with which the row was trained."""
    words: str
    """Why it was dropped, in a sentence."""


def study_status(trials: Sequence[Trial]) -> Literal["finished", "partial", "failed"]:
    """Return how a study ended: `partial` if some trials failed, `failed` if no trial of a variant finished."""
    if not any(trial.status == "finished" and not trial.is_reference for trial in trials):
        return "failed"
    return "partial" if any(trial.status == "failed" for trial in trials) else "finished"


def trial_name(row: str, settings: Mapping[str, Any], seed: int) -> str:
    """Return a trial's name as people read it, such as `plain finetune.lr=0.001 seed=0`."""
    values = (f"{value:.4g}" if isinstance(value, float) else value for value in settings.values())
    return " ".join([row, *map("{}={}".format, settings, values), f"seed={seed}"])


def in_set(data: str, name: str) -> str:
    """Return the name of a trial or row with that of its data set before it, where a study has several."""
    return f"{data}: {name}" if data else name
