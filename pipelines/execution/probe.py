"""Probes: stages are computed with few epochs and rows, to learn how long they take. Their results are not kept."""

import math
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from aecore.config.specs import FinetuneSpec, LoadSpec, PretrainSpec
from aecore.core.imports import fast_imports
from aecore.data.splits import Arrays, Split
from aecore.data.stream import Stream
from aecore.models.storage import Result
from pipelines.cluster.device import device_of
from pipelines.cluster.share import Share
from pipelines.execution.compute import import_for_evaluation, inputs_of, stages_below
from pipelines.graph.stage import Stage
from pipelines.graph.work import epoch_rows, epoch_steps

if TYPE_CHECKING:
    from ray import ObjectRef

    from aecore.stages.context import Context

_STEPS, _MOST_STEPS = 100, 300
"""Steps that are measured at least, where the stage has so many, and most steps of an epoch."""
_MEASURED_ROWS = 60_000
"""Most training rows of what is measured besides training, such as the measures of a trial."""

_LONG_SECONDS = 10.0
"""Seconds of a measure beside which what happens only once in a process does not matter."""


def probe(lasts: Sequence[Stage], share: Share, fake_gpus: bool, data: "list[ObjectRef]") -> dict[str, float]:
    """Return `expected_seconds` of graphs, from a Ray task.

    Args:
        data: The reference to the data, in a list.
    """
    import ray

    with redirect_stdout(sys.stderr):
        import_for_evaluation()  # a worker imports once, whatever number of trials it computes
        return expected_seconds(lasts, share, fake_gpus, ray.get(data[0]))


def expected_seconds(
    lasts: Sequence[Stage], share: Share, fake_gpus: bool, data: Arrays | Stream
) -> dict[str, float]:  # fmt: skip
    """Compute graphs with few epochs and rows in this process, and return how long their stages would take.

    Of data that are read from disk only the sample in memory is used.

    Args:
        lasts: The last stage of each graph. Graphs that differ in numbers alone are trained as one on a GPU.
        share: The share of the machine that this process has.
        fake_gpus: Whether the cluster's GPUs are only pretended.

    Returns:
        The seconds of each stage by its key, its part of the seconds where several were trained as one.
    """
    with fast_imports():
        import torch

        from aecore.stages.context import Context, rows_in_memory

    torch.set_num_threads(share.cpus)
    arrays = rows_in_memory(data)
    device = Context(device=device_of(share, fake_gpus), device_share=share.gpus or 1.0)
    values: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for step in zip_longest(*([*stages_below(last), last] for last in lasts)):
        stages = {stage.key: stage for stage in step if stage is not None and stage.key not in values}
        training = [stage for stage in stages.values() if stage.trains]
        if training:
            _train(training, device, arrays, values, seconds)
        for stage in (stage for stage in stages.values() if not stage.trains):
            _compute(stage, Context(), arrays, values, seconds)
    return seconds


def _train(
    stages: Sequence[Stage], context: "Context", arrays: Arrays, values: dict[str, Any], seconds: dict[str, float]
) -> None:
    """Train stages for few steps, as one if that is possible; add their results and the seconds of all their steps."""
    from aecore.stages.training import train_as_one

    rows = {stage.key: _some(arrays, _MOST_STEPS * _spec(stage).fit.batch_size) for stage in stages}
    shared = {len(one.train.x): one for one in rows.values()}  # stages are trained as one on the same rows only
    rows = {key: shared[len(one.train.x)] for key, one in rows.items()}
    trainings = (
        stage.preparation()(_shortened(_spec(stage), arrays), context, **_inputs(stage, rows[stage.key], values))
        for stage in stages
    )
    for stage, result in zip(stages, train_as_one(trainings), strict=True):
        if isinstance(result, Exception):
            raise result
        spec = _spec(stage)
        measured = epoch_rows(_shortened(spec, arrays), len(rows[stage.key].train.x))
        whole = epoch_rows(spec, len(arrays.train.x)) / measured
        epochs = [epoch["seconds"] for epoch in result.config["history"]]
        values[stage.key] = result
        # the first epoch also starts threads and fills caches
        seconds[stage.key] = whole * spec.fit.epochs * statistics.median(epochs[1:] or epochs)


def _compute(
    stage: Stage, context: "Context", arrays: Arrays, values: dict[str, Any], seconds: dict[str, float]
) -> None:
    """Compute a stage that trains nothing from the results so far; add its result and its seconds on all rows."""
    if isinstance(stage.spec, LoadSpec):
        values[stage.key] = arrays
        return
    some = _some(arrays, _MEASURED_ROWS)
    inputs = _inputs(stage, some, values)
    spent = 0.0
    for _ in range(2):  # the first time also imports and compiles, which costs a worker seconds once
        started_at = time.perf_counter()
        result: Result = stage.function()(stage.spec, context, **inputs)
        spent = time.perf_counter() - started_at
        if spent > _LONG_SECONDS:
            break
    values[stage.key] = result
    seconds[stage.key] = spent * len(arrays.train.x) / len(some.train.x)


def _spec(stage: Stage) -> PretrainSpec | FinetuneSpec:
    assert isinstance(stage.spec, PretrainSpec | FinetuneSpec)
    return stage.spec


def _shortened(spec: PretrainSpec | FinetuneSpec, arrays: Arrays) -> PretrainSpec | FinetuneSpec:
    """Return the spec of a stage that trains for few epochs, of few steps."""
    steps = min(math.ceil(epoch_steps(spec, len(arrays.train.x))), _MOST_STEPS)
    epochs = min(spec.fit.epochs, 2 + _STEPS // steps)
    fit: dict[str, Any] = {"epochs": epochs, "steps": spec.fit.steps and epochs * steps}
    return spec.model_copy(update={"fit": spec.fit.model_copy(update=fit)})


def _inputs(stage: Stage, arrays: Arrays, values: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a stage's function, with `arrays` for the data."""
    parents = stage.parents()
    return inputs_of(stage, [arrays if isinstance(one.spec, LoadSpec) else values[one.key] for one in parents])


def _some(arrays: Arrays, most: int) -> Arrays:
    """Return at most so many training rows, spread evenly over all, and the same share of the other rows."""
    share = min(1.0, most / len(arrays.train.x))
    if share == 1:
        return arrays

    def take(split: Split) -> Split:
        count = max(2, round(share * len(split.x)))
        return split.take(np.linspace(0, len(split.x) - 1, count).astype(int))

    return arrays._replace(train=take(arrays.train), validation=take(arrays.validation), test=take(arrays.test))
