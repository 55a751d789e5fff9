"""The evaluation of one job: test scores and figures of the selected weights."""

import importlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod

import numpy as np
import torch
from torch import Tensor

from aecore.config.specs import EvaluateSpec
from aecore.core.imports import fast_imports
from aecore.data.splits import Arrays
from aecore.data.stream import Stream
from aecore.evaluation import metrics
from aecore.evaluation.figures import model as figures
from aecore.evaluation.scoring import (
    _MAPPED,
    _SHOWN,
    _bound,
    _classify,
    _codes,
    _numpy,
    _over,
    _same_noise,
    _splits,
    unit_images,
)
from aecore.models import generation
from aecore.models.corruption import corrupt
from aecore.models.prepare import Prepare
from aecore.models.rebuild import build_layer, build_stack
from aecore.models.stack import Stack
from aecore.models.storage import Result
from aecore.stages.context import Run, all_test_rows, held
from aecore.stages.rows import prepared
from aecore.variants import Denoising, Sparse, Variational


def evaluate(
    spec: EvaluateSpec, run: Run, *, data: Arrays | Stream, layers: Sequence[Result] = (),
    finetuned: Result | None = None,
) -> Result:  # fmt: skip
    """Score the selected weights on the test split, once, and draw what they learned.

    Codes, reconstructions and units are those of the unsupervised model: the unrolled autoencoder where it was
    finetuned to reconstruct, else the pretrained layers, since a classifier has no decoder. Of a streamed set, accuracy
    and reconstruction error are those of all test rows, everything else is of its sample.
    """
    from threadpoolctl import threadpool_limits

    if spec.pictures:
        # here, since two threads that import parts of scikit-learn at once may each find the other's half made
        with fast_imports():
            for name in ("sklearn.linear_model", "sklearn.manifold", "sklearn.neighbors"):
                importlib.import_module(name)
    importlib.import_module("scipy.linalg")  # brings a BLAS of its own, which is to be limited, too
    # figures are drawn while the measures are taken; scikit-learn sets the same limit here and there and then puts back
    # what it found, which of two threads may be what the other has set
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(1) as pen:
        return _evaluate(spec, run, data, layers, finetuned, pen)


def _evaluate(
    spec: EvaluateSpec, run: Run, data: Arrays | Stream, layers: Sequence[Result], finetuned: Result | None,
    pen: ThreadPoolExecutor,
) -> Result:  # fmt: skip
    prepare = prepared(data, run.device)
    everything, data = data, held(data)
    scores: dict[str, float] = {}
    pictures: dict[str, Future[bytes]] = {}
    table: np.ndarray | None = None
    if finetuned is not None and spec.task == "classify":
        table = np.zeros((len(spec.classes),) * 2, np.int64)
        for rows in all_test_rows(everything, run):
            assert rows.y is not None
            table += metrics.confusion(rows.y, _classify(finetuned, prepare, rows.x, run.device), len(spec.classes))
        accuracy = float(table.trace() / table.sum())
        low, high = metrics.accuracy_interval(accuracy, int(table.sum()))
        scores |= {"test/accuracy": accuracy, "test/error": 1 - accuracy}
        scores |= {"test/accuracy_low": low, "test/accuracy_high": high}

    stack, codes = None, None
    if finetuned is not None and spec.task == "reconstruct":
        stack = build_stack(finetuned)
    elif layers:
        stack = Stack([build_layer(result) for result in layers])
    if stack is not None:
        stack = stack.to(run.device).eval()
        x = metrics.over_batches(prepare, data.test.x, run.device)
        reconstruction = _over(stack.reconstruct, x, stack)
        scores["test/reconstruction_mse"] = metrics.reconstruction_mse(x, reconstruction)
        if isinstance(everything, Stream):
            scores["test/reconstruction_mse"] = _streamed_mse(stack, prepare, everything, run)
        reconstruction = reconstruction[:_SHOWN].clone()  # not all rows as floats, until the end
        if spec.pictures:
            train, _, test = codes = [_codes(stack, prepare, split, run.device) for split in _splits(data)]
            plane = train.shape[1] == 2  # small enough to show every training row
            shown = (train, data.train.y) if plane else (test[:_MAPPED], data.test.y)
            pictures["codes"] = pen.submit(figures.codes_map, *shown, spec.classes, "training" if plane else "test")
            pictures["reconstructions"] = pen.submit(
                figures.reconstructions, _numpy(x[:_SHOWN]).copy(), _numpy(reconstruction),
                scores["test/reconstruction_mse"],
            )  # fmt: skip
            units = unit_images(stack, prepare, data.train.x[:2048], run.device)
            pictures["units"] = pen.submit(figures.units, units)
            pictures |= _variant_pictures(spec, stack, x, test, pen)
            if isinstance(spec.variant, Variational) and list(stack)[-1].spec.stochastic:
                scores |= _bound(stack, spec.variant, x)
        del x
    if spec.pictures:
        if table is not None:
            pictures["confusion"] = pen.submit(figures.confusion, table, spec.classes)
        named = {f"layer {n}": result.config for n, result in enumerate(layers, 1)}
        if finetuned is not None:
            named["finetuning"] = finetuned.config
        pictures["loss_curves"] = pen.submit(figures.loss_curves, named)
    if codes and data.train.y is not None and data.validation.y is not None and data.test.y is not None:
        train, validation, test = codes
        probe = metrics.linear_probe((train, data.train.y), (validation, data.validation.y))
        scores["probe/accuracy"] = float((probe.predict(test) == data.test.y).mean())
        scores["knn/accuracy"] = float((metrics.nearest((train, data.train.y), test) == data.test.y).mean())
    return Result({}, {}, scores, {name: picture.result() for name, picture in pictures.items()})


def _streamed_mse(stack: Stack, prepare: Prepare, data: Stream, run: Run) -> float:
    """Squared error a feature, over all test rows."""
    total, values = 0.0, 0
    size = stack.first.spec.scoring_rows
    for rows in all_test_rows(data, run):
        for start in range(0, len(rows.x), size):  # as floats, a chunk and all made of it would be hundreds of MB
            x = metrics.over_batches(prepare, rows.x[start : start + size], run.device)
            total += metrics.reconstruction_mse(x, _over(stack.reconstruct, x, stack)) * x.numel()
            values += x.numel()
    return total / values


def _variant_pictures(
    spec: EvaluateSpec, stack: Stack, x: Tensor, codes: np.ndarray, pen: ThreadPoolExecutor
) -> dict[str, Future[bytes]]:
    """What there is to see of this variant alone; x and its codes are the test rows."""
    images = x.ndim == 4
    with torch.no_grad():
        if isinstance(spec.variant, Denoising) and images:
            # half more noise than it was trained with: what it does where it has not been
            level = 1.5 * spec.variant.level
            with _same_noise(x.device):
                noisy = corrupt(x[:_SHOWN], spec.variant.noise, level)
            name = f"{spec.variant.noise.replace('_', ' ')} noise, {level:g}"
            restored = _numpy(stack.reconstruct(noisy))
            return {"restored": pen.submit(figures.triptych, _numpy(x[:_SHOWN]), _numpy(noisy), restored, name)}
        if isinstance(spec.variant, Sparse):
            return {"activations": pen.submit(figures.activations, codes[:64])}
        if isinstance(spec.variant, Variational) and images:
            walks = generation.traversals(stack, x), generation.interpolation(stack, x)
            titles = "One code at a time from -3 to 3, the most active first", "From one test row's code to another's"
            drawn = {
                "samples": pen.submit(
                    figures.image_grid, _numpy(generation.samples(stack, 100)), 10, "Drawn from the prior"
                ),
                "traversals": pen.submit(figures.image_grid, _numpy(walks[0]), generation.STEPS, titles[0]),
                "interpolation": pen.submit(figures.image_grid, _numpy(walks[1]), generation.STEPS, titles[1]),
            }
            if prod(stack.code_shape) == 2:
                drawn["manifold"] = pen.submit(
                    figures.image_grid,
                    _numpy(generation.manifold(stack)),
                    10,
                    "The plane of codes, at quantiles of the prior",
                )
            return drawn
    return {}
