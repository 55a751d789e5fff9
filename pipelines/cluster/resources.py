"""The computing resources that a user asks for."""

from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from aecore.config.specs import Numerics
from aecore.core.fingerprint import Frozen
from aecore.core.types import Precision


class Resources(Frozen):
    """How and where to compute. No part of any key, except `precision` and `compile`, which change the numbers."""

    gpus: Annotated[float | None, Field(ge=0)] = None
    """GPUs per stage, fractions allowed; null takes 1 where the cluster has GPUs, else 0."""
    cpus: PositiveInt | None = None
    """CPUs per stage, which is also its number of threads; null takes all CPUs of the smallest node, at most 8."""
    workers: PositiveInt = 1
    """Workers that train each stage together, each with `gpus` and `cpus`; two or more take half a minute to start."""
    min_workers: PositiveInt | None = None
    """Fewest workers that may train a stage while the cluster has no room for all of them; null waits for all."""
    max_concurrent: PositiveInt | None = None
    """Most trials of a study that run at once; null runs as many as the cluster holds."""
    storage_path: str | None = None
    """Folder or URI for checkpoints, which all nodes can write. null uses `checkpoints/` beside a local MLflow store;
    with a remote store and an embedded Ray, `checkpoints/` in the working directory; on a cluster with a remote store
    no checkpoints are written, and a stage that loses its worker starts over."""
    checkpoint_every: PositiveFloat = 30.0
    """Seconds between two checkpoints of a stage; they are written at the end of an epoch."""
    precision: Precision = "fp32"
    """Arithmetic of training: fp32, tf32 (CUDA only), or bf16 autocast."""
    compile: bool = False
    """Compile the training step with torch.compile, which takes half a minute to start."""
    retries: NonNegativeInt = 3
    """Times a stage is computed again after its worker or node was lost, or after a connection failed."""
    mlflow_patience: NonNegativeFloat = 600.0
    """Seconds to wait for an MLflow that does not answer; then the job fails, and what it computed stays in its
    checkpoints. Training itself never waits."""

    @model_validator(mode="after")
    def _min_workers_is_at_most_workers(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"resources.min_workers: {self.min_workers} is more than resources.workers {self.workers}; swap them"
            )
        return self

    @property
    def numerics(self) -> Numerics:
        """The fields that change the numbers and are hashed into the keys of the stages."""
        return Numerics(precision=self.precision, compile=self.compile)
