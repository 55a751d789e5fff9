"""Pretraining: one layer is trained on the codes of the frozen layers below it."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import nn

from aecore.config.specs import PretrainSpec
from aecore.core.fingerprint import derive_seed
from aecore.data.splits import Arrays
from aecore.data.stream import Stream
from aecore.models.layers import Layer
from aecore.models.rebuild import build_layer, get_weights
from aecore.models.storage import Result
from aecore.stages.context import Context
from aecore.stages.rows import preprocessing, set_fill, training_rows
from aecore.stages.training import Training, curves, summary, train
from aecore.training.job import Fitted, Job
from aecore.training.numerics import get_random_state, own_random_state
from aecore.training.objective import Objective


def pretrain_layer(spec: PretrainSpec, context: Context, **inputs: Any) -> Result:
    """Train one layer by its variant's loss on the codes of the frozen layers below (Bengio et al. 2006).

    Args:
        inputs: the arguments `data` and `below` of `prepare`.
    """
    return train(prepare(spec, context, **inputs))


def prepare(spec: PretrainSpec, context: Context, *, data: Arrays | Stream, below: Sequence[Result] = ()) -> Training:
    """Return the job that `pretrain_layer` fits, and the function that makes the result of it.

    The codes of the layers below are computed here, on this device, without noise or dropout; they never travel.
    """
    device, precision = context.device, spec.numerics.precision
    layers = [build_layer(result).to(device).eval() for result in below]
    read = nn.Sequential(preprocessing(data, device), *(layer.encoder for layer in layers)).requires_grad_(False)
    rows = training_rows(data, read, context, prod(spec.layer.in_shape), labelled=False, precision=precision)
    seed = derive_seed(spec.seed, "pretrain", spec.number)
    with own_random_state(device, seed):
        layer = Layer(spec.layer).to(device)
        set_fill(layer.encoder, data)
        random = get_random_state(device)

    def finish(fitted: Fitted) -> Result:
        config = {"layer": spec.layer.model_dump(mode="json"), "precision": precision, **curves(fitted)}
        return Result(config, get_weights(layer), summary(fitted))

    job = Job(
        objective=Objective(layer, rows.read, spec.variant), train=rows.train, validation=rows.validation,
        spec=spec.fit, seed=seed, device=device, precision=precision, compile=spec.numerics.compile,
        scoring_rows=spec.layer.scoring_rows, report=context.report, team=context.team,
        checkpoints=context.checkpoints, device_share=context.device_share, parts=context.parts, random=random,
    )  # fmt: skip
    return Training(job, finish)
