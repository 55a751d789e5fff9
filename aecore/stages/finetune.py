"""Finetuning: all weights of a stack trained together, with labels or without."""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch

from aecore.config.specs import FinetuneSpec
from aecore.core.fingerprint import derive_seed
from aecore.data.splits import Arrays, Split, split_off
from aecore.data.stream import Stream
from aecore.evaluation.reconstruction import row_errors
from aecore.evaluation.scoring import over_batches
from aecore.models.classifier import Classifier
from aecore.models.layers import Layer
from aecore.models.prepare import Prepare
from aecore.models.rebuild import build_autoencoder, build_layer, build_stack, get_weights, set_weights
from aecore.models.stack import Stack
from aecore.models.storage import Result, Weights
from aecore.stages.context import Run, held
from aecore.stages.pretrain import _curves, _seeded, _summary
from aecore.stages.rows import _rows, prepared
from aecore.training.objective import Objective

if TYPE_CHECKING:
    pass


_BATCH_ROWS, _REFERENCE_ROWS = 2048, 2000


def finetune(
    spec: FinetuneSpec, run: Run, *, data: Arrays | Stream, layers: Sequence[Result] = (), stack: Result | None = None,
    parent: Result | None = None,
) -> Result:  # fmt: skip
    """Train all weights together, starting from exactly those of the pretrained `layers`, or of a `stack` that was
    trained as a whole, or from those of a `parent`, finetuned another day, whose head is taken over where the classes
    are the same; or from random ones where there are none.

    `classify` puts a softmax head on the code and minimises cross-entropy on its logits; the epoch with the fewest
    validation errors is kept. `reconstruct` trains the unrolled autoencoder (Hinton & Salakhutdinov 2006).

    Returns:
        A result with the model in `weights` and, behind `prepare.`, its preprocessing. Where it is to be served, also

        - `autoencoder.*`, its layers in the config's `autoencoder`: what a classifier was finetuned from, since it has
          no decoder of its own;
        - `reference.*` of at most 2,000 validation rows, what new data are compared with: `error` (rows,) of
          reconstruction, squared, a feature; `code` (rows, units); `label` (rows,); and `mean` and `std` (features,) of
          what the first layer reads.
    """
    if spec.labels is not None:
        data = _labelled(held(data), spec.labels, spec.seed, spec.fit.batch_size)
    prepare = prepared(data, run.device)
    supervised = spec.task == "classify"
    train, validation, read = _rows(data, prepare, run, prod(spec.layers[0].in_shape), labelled=supervised)
    seed = derive_seed(spec.seed, "finetune")
    with _seeded(seed):
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
            given = {name: torch.tensor(value) for name, value in parent.weights.items() if name in own}
            model.load_state_dict(own | {n: v for n, v in given.items() if same or not n.startswith("head.")})
        model = model.to(run.device)

        objective = Objective(model, read, None if supervised else spec.variant)
        fitted = run.fit(
            model, objective, train, validation, spec.fit, seed=seed, device=run.device,
            scored=objective.scored,
            monitor="error" if supervised else "loss",
            precision=spec.numerics.precision, compile=spec.numerics.compile, report=run.report,
            scoring_rows=spec.layers[0].scoring_rows, team=run.team, checkpoints=run.checkpoints,
            parts=run.parts,
        )  # fmt: skip
    config = {
        "task": spec.task,
        "classes": list(spec.classes),
        "layers": [layer.model_dump(mode="json") for layer in spec.layers],
        **_curves(fitted),
    }
    summary = _summary(fitted)
    if supervised:
        summary["best/accuracy"] = 1 - summary["best/error"]
    weights = get_weights(model) | {f"prepare.{name}": value for name, value in get_weights(prepare).items()}
    config["autoencoder"] = None
    if not spec.served:
        return Result(config, weights, summary)
    autoencoder: Stack | None = net
    if supervised:
        if parent is not None:
            autoencoder = build_autoencoder(parent)
        else:
            before = list(build_stack(stack)) if stack is not None else [build_layer(result) for result in layers]
            autoencoder = Stack(before) if before else None
        autoencoder = autoencoder and autoencoder.to(run.device)
    if supervised and autoencoder is not None:
        config["autoencoder"] = [layer.spec.model_dump(mode="json") for layer in autoencoder]
        weights |= {f"autoencoder.{name}": value for name, value in get_weights(autoencoder).items()}
    found = _reference(model, autoencoder, prepare, held(data).validation, run.device)
    weights |= {f"reference.{name}": value for name, value in found.items()}
    return Result(config, weights, summary, example=held(data).train.x[:4])


def _reference(
    model: Classifier | Stack, autoencoder: Stack | None, prepare: Prepare, rows: Split, device: torch.device
) -> Weights:
    """What a model makes of some of the rows that it was chosen by."""
    drawn = np.sort(np.random.default_rng(0).permutation(len(rows.x))[:_REFERENCE_ROWS])
    x = over_batches(prepare, rows.x[drawn], device)
    model.eval()
    found = {"mean": x.flatten(1).mean(0), "std": x.flatten(1).std(0, correction=0)}
    with torch.no_grad():
        found["code"] = torch.cat([model.encode(part).flatten(1) for part in x.split(_BATCH_ROWS)])
        if autoencoder is not None:
            autoencoder.eval()
            parts = x.split(autoencoder.first.spec.scoring_rows)
            found["error"] = torch.cat([row_errors(part, autoencoder.reconstruct(part)) for part in parts])
    label = {} if rows.y is None else {"label": rows.y[drawn]}
    return {name: value.cpu().numpy() for name, value in found.items()} | label


def _labelled(data: Arrays, count: int, seed: int, batch_size: int) -> Arrays:
    """`count` training rows, stratified by label, repeated until an epoch has some 20 batches: a few labels get as many
    steps and as few looks at validation as many do."""
    x, y = data.train
    rows = split_off(np.arange(len(x)), y, count, "labels", seed)[1] if count < len(x) else np.arange(len(x))
    rows = np.tile(rows, max(1, 20 * batch_size // len(rows)))
    return data._replace(train=Split(x[rows], None if y is None else y[rows]))
