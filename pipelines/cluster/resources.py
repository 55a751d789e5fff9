"""The computing resources that a user asks for."""

import math
from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from aecore.config.specs import Numerics
from aecore.core.fingerprint import Frozen
from aecore.core.types import Precision


class Resources(Frozen):
    """How and where to compute. No part of any key, except `precision` and `compile`, which change the numbers."""

    gpus: Annotated[float | None, Field(ge=0)] = None
    """Share of a GPU per stage that trains, from 0 to 1; null takes an eighth, a quarter, a half or all of one, as the
    stage's memory needs, where the cluster has GPUs."""
    accelerator: str | None = None
    """Type of GPU to train on by Ray's name for it, such as A10G or H100; null takes any."""
    labels: dict[str, str] = Field({})
    """Labels of the nodes to train on, as Ray's label selectors, such as {"ray.io/market-type": "on-demand"}."""
    cpus: PositiveInt | None = None
    """CPUs per stage, which is also its number of threads; null takes all CPUs of the smallest node, at most 8, and
    beside a share of a GPU at most half of the same share of the CPUs."""
    workers: PositiveInt = 1
    """Workers that train each stage together, each with `gpus` (0 or 1) and `cpus`; two or more take half a minute to
    start."""
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
    def _check_gpus(self) -> Self:
        if self.gpus is not None and self.gpus > 1:
            raise ValueError(
                f"resources.gpus: {self.gpus:g} asked for a stage, but a worker computes on one GPU and the others "
                f"would idle; use resources.workers {math.ceil(self.gpus)} with resources.gpus 1"
            )
        if self.workers > 1 and self.gpus not in (None, 0, 1):
            raise ValueError(
                f"resources.gpus: {self.gpus:g} for each of {self.workers} workers, but NCCL refuses workers that "
                "share a GPU; use resources.gpus 1, or resources.workers 1"
            )
        return self

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
