"""What a user chooses of the cluster, and what each stage gets of it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from aecore.config.specs import Numerics
from aecore.core.fingerprint import Frozen
from aecore.core.types import Precision

if TYPE_CHECKING:
    pass


class Resources(Frozen):
    """How and where to compute. Not part of any key, but for `precision` and `compile`, which reach the numbers."""

    gpus: Annotated[float | None, Field(ge=0)] = None
    """GPUs a stage, fractions allowed; null takes 1 where the cluster has GPUs, else 0."""
    cpus: PositiveInt | None = None
    """CPUs a stage, and its threads; null takes all of the smallest node, at most 8."""
    workers: PositiveInt = 1
    """Workers that train each stage together, each with `gpus` and `cpus`; more than one take half a minute to
    start."""
    min_workers: PositiveInt | None = None
    """Fewest workers that may train a stage while the cluster has no room for all of them; null waits for all."""
    max_concurrent: PositiveInt | None = None
    """Trials of a study at once; null runs as many as the cluster holds."""
    storage_path: str | None = None
    """Folder or URI that all nodes can write, for what is in progress; null keeps it in `checkpoints/` beside a local
    MLflow store or, with a remote one and no cluster, in the working directory, and nowhere on a cluster: a stage that
    loses its worker then starts over."""
    checkpoint_every: PositiveFloat = 30.0
    """Seconds between two checkpoints of a stage, at the end of an epoch."""
    precision: Precision = "fp32"
    """Arithmetic of training: fp32, tf32 (CUDA only), or bf16 autocast."""
    compile: bool = False
    """Compile the training step with torch.compile; its start-up takes half a minute."""
    retries: NonNegativeInt = 3
    """Times a stage is computed again after its worker or node was lost, or a connection failed."""
    mlflow_patience: NonNegativeFloat = 600.0
    """Seconds to wait for an MLflow that does not answer; then the job fails, and what it computed is kept in its
    checkpoints. Training itself never waits."""

    @model_validator(mode="after")
    def _fewest_below_most(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"resources.min_workers: {self.min_workers} is more than resources.workers {self.workers}; swap them"
            )
        return self

    @property
    def folder(self) -> str:
        """The driver's, where Ray is embedded and so on the same disk."""
        return "" if os.environ.get("RAY_ADDRESS") else str(Path.cwd())

    @property
    def numerics(self) -> Numerics:
        """The part that reaches the numbers."""
        return Numerics(precision=self.precision, compile=self.compile)


class Share(NamedTuple):
    """What each stage gets of the cluster."""

    gpus: float
    cpus: int
    retries: int
    workers: int = 1
    min_workers: int | None = None
    storage_path: str | None = None
    checkpoint_every: float = 30.0
    folder: str = ""
    """The driver's, where Ray is embedded and so on the same disk."""
    study: bool = False
    """Many short stages for a comparison: without Ray Train's start-up."""
    halved: frozenset[str] = frozenset()
    """Keys of stages that ran out of their node's memory: their batches are cut in two."""
