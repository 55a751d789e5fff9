"""What a study knows of a trial once it has ended."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

REFERENCES: tuple[Literal["pca", "random"], ...] = ("pca", "random")
"""What every study contains unasked."""


class Trial(NamedTuple):
    """One variant with one choice of settings and one seed."""

    row: str
    """The study's name for the variant; `pca` and `random` are the references."""
    settings: dict[str, Any]
    """What was searched, by dotted name; empty without a search."""
    seed: int
    kind: str
    """The variant's kind, or `pca` or `random`."""
    status: Literal["finished", "stopped", "failed"]
    """`stopped` by the scheduler (ASHA), or `failed` with `error`."""
    error: str = ""
    run_id: str = ""
    """Its MLflow run."""
    metrics: Mapping[str, float] = {}
    """Final measures; see `aecore.evaluation` for their names."""
    history: tuple[Mapping[str, float], ...] = ()
    """Metrics of each epoch of unsupervised training; `val/reconstruction` is the curve to draw."""
    curves: Mapping[str, Any] = {}
    """JSON: see `aecore.evaluation`."""
    arrays: Mapping[str, np.ndarray] = {}
    """Values per test row, pictures and maps; see `aecore.evaluation`."""
    epochs_planned: int = 0
    epochs_used: int = 0
    """Passes over the training rows, shared stages counted once for each trial that uses them."""
    seconds: float = 0.0
    """Device- or CPU-seconds that computing it took, retries included; 0 when restored."""

    @property
    def name(self) -> str:
        """For people."""
        return trial_name(self.row, self.settings, self.seed)


def trial_name(row: str, settings: Mapping[str, Any], seed: int) -> str:
    """A trial's name, for people."""
    said = (
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items()
    )
    return " ".join([row, *said, f"seed={seed}"])
