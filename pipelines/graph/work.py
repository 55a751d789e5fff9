"""How much work stages are: the shape of their work, and a guess of its seconds. Nothing runs here."""

import math
from collections.abc import Iterable
from math import prod
from typing import Any

from aecore.config.needs import weight_count
from aecore.config.specs import FinetuneSpec, LoadSpec, PretrainSpec
from aecore.core.fingerprint import fingerprint, later_defaults
from aecore.models.spec import LayerSpec
from pipelines.graph.stage import Stage

_STEP_SECONDS = 5e-4
"""Seconds of a training step beside its products of matrices, and of a batch of validation."""
_OPERATIONS = 2e10
"""Multiplications and additions per second of one thread in training."""
_MEASURE_SECONDS, _ROW_SECONDS = 1.0, 1e-4
"""Seconds of a stage that trains nothing, and further seconds of it for each row of the data."""
_FEWEST_BATCHES = 20
"""An epoch with few labels repeats its rows until it has so many batches (`aecore.stages.finetune.prepare`)."""
_COUNTED = {"seed", "epochs", "steps", "labels", "pictures", "number", "lr", "warmup", "patience", "schedule"}
"""Fields of specs that do not change how long a step takes, or that the seconds are scaled by."""


def shape_of(stages: Iterable[Stage]) -> str:
    """Return a hash of what decides how long a step of these stages takes: layers, variant, batch size, precision.

    Stages of one shape differ in seeds, rates, levels and weights, and in their numbers of epochs, rows and labels.
    """
    kept = [(stage.fn, stage.spec) for stage in stages if stage.kept]
    parts = [(fn, _shape(spec.model_dump(mode="json", exclude=later_defaults(spec)))) for fn, spec in kept]
    return fingerprint(*sorted(parts, key=str))


def guessed_seconds(stage: Stage) -> float:
    """Return about how many seconds one thread takes for a stage, by its number of steps and operations.

    Between stages of one shape the ratio of these seconds is that of their work, so that they scale what was measured.
    """
    rows, spec = rows_of(stage), stage.spec
    if not isinstance(spec, PretrainSpec | FinetuneSpec):
        return _MEASURE_SECONDS + _ROW_SECONDS * rows if stage.kept else 0.0
    layers = [spec.layer] if isinstance(spec, PretrainSpec) else spec.layers
    operations = 6 * sum(map(_products, layers))  # two for each weight: forwards, and twice backwards
    if isinstance(spec, FinetuneSpec) and spec.task == "classify":
        operations //= 2  # no decoder
    steps, count = epoch_steps(spec, rows), epoch_rows(spec, rows)
    return spec.fit.epochs * (steps * _STEP_SECONDS + count * operations / _OPERATIONS)


def epoch_steps(spec: PretrainSpec | FinetuneSpec, rows: int) -> float:
    """Return how many steps a stage takes in an epoch, or in a part of its `steps`.

    Args:
        rows: Number of training rows of the data.
    """
    if spec.fit.steps is not None:
        return spec.fit.steps / spec.fit.epochs
    return math.ceil(epoch_rows(spec, rows) / spec.fit.batch_size)


def epoch_rows(spec: PretrainSpec | FinetuneSpec, rows: int) -> float:
    """Return how many rows a stage trains on in an epoch, or in a part of its `steps`.

    Args:
        rows: Number of training rows of the data.
    """
    labels = spec.labels if isinstance(spec, FinetuneSpec) else None
    count = rows if labels is None else min(labels, rows)
    if spec.fit.steps is not None:
        return spec.fit.steps / spec.fit.epochs * min(spec.fit.batch_size, count)
    return count if labels is None else count * max(1, _FEWEST_BATCHES * spec.fit.batch_size // count)


def rows_of(stage: Stage) -> int:
    """Return the number of rows of the data that a stage reads, the test rows included; 0 if it reads no data."""
    load = next((one.spec for one in (stage, *stage.parents()) if isinstance(one.spec, LoadSpec)), None)
    return min(load.facts.rows, load.data.limit or load.facts.rows) if load else 0


def _products(layer: LayerSpec) -> int:
    """Return how often the weights of a layer are multiplied for one row."""
    places = prod(layer.code_shape[1:]) if layer.kind == "conv" else 1
    return weight_count(layer) * places * (2 if layer.tied else 1)


def _shape(value: Any) -> Any:
    """Return a spec's values without those that do not change how long a step takes."""
    if isinstance(value, dict):
        return {name: _shape(one) for name, one in value.items() if name not in _COUNTED}
    if isinstance(value, list):
        return [_shape(one) for one in value]
    return bool(value) if isinstance(value, float) else value  # a weight of 0 leaves its term out
