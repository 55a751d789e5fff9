"""Finetuning: all weights of a stack are trained together, with labels or without."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aecore.anomaly.score import fit_score
from aecore.config.specs import FinetuneSpec
from aecore.core.fingerprint import derive_seed
from aecore.core.types import Precision
from aecore.data.splits import Arrays, Split
from aecore.data.stream import Stream
from aecore.evaluation.probes import few_rows
from aecore.evaluation.reconstruction import observed_mean, row_errors
from aecore.evaluation.scoring import TrainedStack, as_trained, over_batches
from aecore.models.classifier import Classifier
from aecore.models.layers import Layer
from aecore.models.prepare import Prepare
from aecore.models.rebuild import build_autoencoder, build_layer, build_stack, get_weights, set_weights
from aecore.models.stack import Stack
from aecore.models.storage import Result, Weights
from aecore.stages.context import Context, rows_in_memory
from aecore.stages.rows import preprocessing, set_fill, training_rows
from aecore.stages.training import Training, curves, summary, train
from aecore.training.job import Fitted, Job
from aecore.training.numerics import get_random_state, own_random_state
from aecore.training.objective import Objective

_BATCH_ROWS, _REFERENCE_ROWS = 2048, 2000
_FEWEST_BATCHES = 20
"""An epoch with few labels repeats its rows until it has about so many batches."""


def finetune(spec: FinetuneSpec, context: Context, **inputs: Any) -> Result:
    """Train all weights together, starting from the weights in the inputs, see `prepare`.

    The task `classify` puts a softmax head on the code and minimises the cross-entropy of its logits; the epoch with
    the fewest validation errors is kept. `reconstruct` trains the unrolled autoencoder (Hinton & Salakhutdinov 2006).

    Returns:
        A result with the model in `weights` and its preprocessing in `prepare.*`. A result that is to be served also
        has

        - `autoencoder.*`, with its layers in the config's `autoencoder`: the autoencoder that a classifier was
          finetuned from, since a classifier has no decoder;
        - `reference.*` of at most 2,000 validation rows, with which new data are compared: `error` (rows,), the squared
          error of reconstruction per feature; `code` (rows, units); `label` (rows,); and `mean` and `std` (features,)
          of what the first layer reads, where values are missing over the `observed` rows (features,);
        - `anomaly.*`, where the spec asks for it: the default score of anomalies, see
          `aecore.anomaly.score.FittedScore`.
    """
    return train(prepare(spec, context, **inputs))


def prepare(
    spec: FinetuneSpec, context: Context, *, data: Arrays | Stream, layers: Sequence[Result] = (),
    stack: Result | None = None, parent: Result | None = None,
) -> Training:  # fmt: skip
    """Return the job that `finetune` fits, and the function that makes the result of it.

    Training starts from exactly the weights of the pretrained `layers`, or of a `stack` that was trained as a whole, or
    of a `parent`, a model that was finetuned another day; the parent's head is taken over if the classes are the same.
    Without any of them it starts from random weights.
    """
    if spec.labels is not None:
        least = _FEWEST_BATCHES * spec.fit.batch_size if spec.fit.steps is None else 0
        data = few_labels(rows_in_memory(data), spec.labels, spec.seed, least)
    device, precision, supervised = context.device, spec.numerics.precision, spec.task == "classify"
    prepare = preprocessing(data, device)
    rows = training_rows(data, prepare, context, prod(spec.layers[0].in_shape), supervised, precision)
    seed = derive_seed(spec.seed, "finetune")
    with own_random_state(device, seed):
        net, model = _build(spec, layers, stack, parent)
        model = model.to(device)
        set_fill(net.first.encoder, data)  # the classifier's too; a parent's data are of another day
        random = get_random_state(device)
    arrays = rows_in_memory(data)
    # a result that is not served needs no rows, so `finish` does not hold them in memory
    validation, example = (arrays.validation, arrays.train.x[:4]) if spec.served else (None, None)
    known = (arrays.train, arrays.validation) if spec.anomalies != "none" else None

    def finish(fitted: Fitted) -> Result:
        config = {
            "task": spec.task, "classes": list(spec.classes), "precision": precision,
            "layers": [layer.model_dump(mode="json") for layer in spec.layers], **curves(fitted), "autoencoder": None,
            "columns": spec.columns.model_dump(mode="json"),
        }  # fmt: skip
        scores = summary(fitted)
        if supervised:
            scores["best/accuracy"] = 1 - scores["best/error"]
        weights = get_weights(model) | {f"prepare.{name}": value for name, value in get_weights(prepare).items()}
        if validation is None:
            return Result(config, weights, scores)
        autoencoder: Stack | None = net
        if supervised:
            autoencoder = _unsupervised(layers, stack, parent)
            autoencoder = autoencoder and autoencoder.to(device)
        if supervised and autoencoder is not None:
            config["autoencoder"] = [layer.spec.model_dump(mode="json") for layer in autoencoder]
            weights |= {f"autoencoder.{name}": value for name, value in get_weights(autoencoder).items()}
        if known is not None:
            weights |= anomaly_weights(TrainedStack(net, precision, device), prepare, known, spec)
        reference = reference_rows(model, autoencoder, prepare, validation, precision)
        weights |= {f"reference.{name}": value for name, value in reference.items()}
        return Result(config, weights, scores, example=example)

    job = Job(
        objective=Objective(model, rows.read, None if supervised else spec.variant), train=rows.train,
        validation=rows.validation, spec=spec.fit, seed=seed, device=device, precision=precision,
        compile=spec.numerics.compile, monitor="error" if supervised else "loss",
        scoring_rows=spec.layers[0].scoring_rows, report=context.report, team=context.team,
        checkpoints=context.checkpoints, device_share=context.device_share, parts=context.parts, random=random,
    )  # fmt: skip
    return Training(job, finish)


def _build(
    spec: FinetuneSpec, layers: Sequence[Result], stack: Result | None, parent: Result | None
) -> tuple[Stack, Stack | Classifier]:
    """Return an autoencoder and the model to train: this autoencoder, or a classifier that shares its encoders."""
    # drawn before any trained weights are read: the control's head is the same as the pretrained net's
    net = Stack([Layer(layer) for layer in spec.layers])
    head = Classifier([layer.encoder for layer in net], len(spec.classes)) if spec.task == "classify" else None
    for layer, result in zip(net, layers, strict=True) if layers else ():
        set_weights(layer, result.weights)
    if stack is not None:
        set_weights(net, stack.weights)
    model = head or net
    if parent is not None:
        own, same = model.state_dict(), parent.config["classes"] == list(spec.classes)
        weights = {name: torch.tensor(value) for name, value in parent.weights.items() if name in own}
        model.load_state_dict(own | {n: v for n, v in weights.items() if same or not n.startswith("head.")})
    return net, model


def _unsupervised(layers: Sequence[Result], stack: Result | None, parent: Result | None) -> Stack | None:
    """Return the autoencoder that a classifier was finetuned from; None if that started from random weights."""
    if parent is not None:
        return build_autoencoder(parent)
    pretrained = list(build_stack(stack)) if stack is not None else [build_layer(result) for result in layers]
    return Stack(pretrained) if pretrained else None


def reference_rows(
    model: Classifier | Stack, autoencoder: Stack | None, prepare: Prepare, rows: Split, precision: Precision = "fp32"
) -> Weights:
    """Return `mean`, `std`, `code`, `error` and `label` of some validation rows, for the result of `finetune`; where
    values are missing, `observed` as well."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows.x))[:_REFERENCE_ROWS])
    device = prepare.shift.device
    x = over_batches(prepare, rows.x[chosen], device)
    model.eval()
    reference = _moments(x.flatten(1))
    with torch.no_grad():
        with as_trained(precision, device):
            reference["code"] = torch.cat([model.encode(part).flatten(1).float() for part in x.split(_BATCH_ROWS)])
        if autoencoder is not None:
            trained = TrainedStack(autoencoder, precision, device)
            parts = x.split(trained.first.spec.scoring_rows)
            reference["error"] = torch.cat([row_errors(part, trained.reconstruct(part)) for part in parts])
    label = {} if rows.y is None else {"label": rows.y[chosen]}
    return {name: value.cpu().numpy() for name, value in reference.items()} | label


def anomaly_weights(
    stack: TrainedStack, prepare: Prepare, known: tuple[Split, Split], spec: FinetuneSpec
) -> Weights:  # fmt: skip
    """Return the default score of anomalies, fitted to training and validation rows, as `anomaly.*` for the result of
    `finetune`."""
    train, validation = (over_batches(prepare, split.x, stack.device) for split in known)
    return fit_score(stack, train, validation, spec.anomalies == "mixed").to_weights()


def _moments(x: Tensor) -> dict[str, Tensor]:
    """Return mean and standard deviation of each feature, (features,), and where values are missing the number of rows
    in which the feature is not."""
    if not x.isnan().any():
        return {"mean": x.mean(0), "std": x.std(0, correction=0)}
    mean = observed_mean(x)
    return {"mean": mean, "std": observed_mean((x - mean).square()).sqrt(), "observed": (~x.isnan()).sum(0)}


def few_labels(data: Arrays, count: int, seed: int, least: int) -> Arrays:
    """Return the data with `count` training rows, stratified by label.

    The rows are repeated until there are some `least` of them, so that in an epoch few labels get as many steps, and as
    few scores on validation, as many labels do.
    """
    x, y = data.train
    rows = few_rows(y, count, seed) if y is not None and count < len(x) else np.arange(len(x))
    rows = np.tile(rows, max(1, least // len(rows)))
    return data._replace(train=Split(x[rows], None if y is None else y[rows]))
