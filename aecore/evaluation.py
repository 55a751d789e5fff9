"""What a trained model is worth: `evaluate` for the report of one job, `measure` for the comparison of a study.

Both score the selected weights on the test split; nothing is chosen by what they find there.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import nan, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aecore import figures, generation, metrics
from aecore.corruption import Noise, corrupt, drawn
from aecore.data import Arrays, Split, cut
from aecore.imports import quickly
from aecore.jacobian import squared_norm
from aecore.networks import Prepare, Stack
from aecore.specs import EvaluateSpec, MeasureSpec
from aecore.stages import Run, all_test_rows, build_classifier, build_layer, build_stack, held, prepared, scoring_rows
from aecore.storage import Result
from aecore.stream import Stream
from aecore.variants import Denoising, Sparse, Variational

NOISES: dict[Noise, tuple[float, ...]] = {
    "gaussian": (0.1, 0.2, 0.3, 0.5),
    "masking": (0.1, 0.25, 0.5, 0.75),
    "salt_and_pepper": (0.1, 0.2, 0.3, 0.5),
}
"""Levels of the robustness curves, beside 0."""
RADII = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Lengths of the steps of the contraction curve (Rifai et al. 2011, sec. 5.3), in units of the input."""
RESTORED: tuple[Noise, float] = ("gaussian", 0.3)
"""The corruption of the pictures that set all variants side by side."""
_ROWS = 256  # of the exact Jacobians
_SAMPLES = 2000  # of the Frechet distance
_SHOWN, _MAPPED = 12, 1000


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
        with quickly():
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
    size = scoring_rows(stack.first.spec)
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


def measure(
    spec: MeasureSpec, run: Run, *, data: Arrays | Stream, stack: Result | None = None, layers: Sequence[Result] = (),
    classifiers: Sequence[Result] = (), judge: Result | None = None,
) -> Result:  # fmt: skip
    """All that a study compares, the same for every variant and for the references.

    Args:
        stack: the autoencoder, where it was trained as a whole.
        layers: its layers, where they were only pretrained.
        classifiers: finetuned from it with `spec.labels` labelled rows each.
        judge: a classifier of the data, in whose code samples are compared with real rows.

    Returns:
        A result with `metrics`; curves in `config`: `history` of training, `labels` (counts, probe, finetuned),
        `robustness` by noise (levels, mse, accuracy), `contraction` (radius, ratio); and arrays in `weights`: `sse`
        (rows,) and `correct/...` (rows,) of the test rows; with `spec.pictures` also `inputs`, `reconstructed`,
        `corrupted`, `restored`, `filters`, `codes` and, of more rows and all units, to be mapped, `map`, its
        `map_labels`, and of a variational one `samples` and `manifold`.
    """
    prepare = prepared(data, run.device)
    data = held(data)
    net = build_stack(stack) if stack is not None else Stack([build_layer(result) for result in layers])
    net = net.to(run.device).eval()
    x = metrics.over_batches(prepare, data.test.x, run.device)
    scores, arrays = _reconstruction(net, prepare, data, x)
    curves: dict[str, Any] = {"history": (stack or layers[-1]).config["history"]}
    codes = [_codes(net, prepare, split, run.device) for split in _splits(data)]
    probe = None
    if data.train.y is not None and data.validation.y is not None and data.test.y is not None:
        probe = metrics.linear_probe((codes[0], data.train.y), (codes[1], data.validation.y))
        arrays["correct/probe"] = probe.predict(codes[2]) == data.test.y
        arrays["correct/knn"] = metrics.nearest((codes[0], data.train.y), codes[2]) == data.test.y
        scores["val/probe_accuracy"] = float((probe.predict(codes[1]) == data.validation.y).mean())
        found = metrics.clusters(codes[0], (codes[2], data.test.y), len(spec.classes))
        scores |= {f"cluster/{name}": value for name, value in found.items()}
        right = [_classify(c, prepare, data.test.x, run.device) == data.test.y for c in classifiers]
        curves["labels"] = {
            "counts": [min(count, len(data.train.x)) for count in spec.labels],
            "probe": [
                _probe_with(count, spec.seed, codes, data)
                if count < len(data.train.x)
                else float(arrays["correct/probe"].mean())
                for count in spec.labels
            ],
            "finetuned": [float(r.mean()) for r in right],
        }
        if right:
            arrays["correct/finetuned"] = right[-1]
        for name in ("probe", "knn", "finetuned"):
            if f"correct/{name}" in arrays:
                scores[f"{name}/accuracy"] = float(arrays[f"correct/{name}"].mean())
    curves["robustness"] = _robustness(net, x, probe, data.test.y)
    for name in ("accuracy", "mse"):
        values = [v for curve in curves["robustness"].values() for v in curve.get(name, ())[1:]]
        if values:
            scores[f"robust/{name}"] = float(np.mean(values))
    scores |= _units(net, codes[2])
    found, curves["contraction"] = _contraction(net, x, codes[2])
    scores |= found
    if isinstance(spec.variant, Variational):
        scores |= _bound(net, spec.variant, x)
        if judge is not None:
            scores |= _frechet(net, judge, prepare, data, run.device)
    if spec.pictures:
        arrays |= _pictures(net, spec, x, codes[2], data.test.y)
    return Result(curves, arrays, scores)


def _reconstruction(
    net: Stack, prepare: Prepare, data: Arrays, x: Tensor
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Errors of the test rows x, and of the validation rows, by which settings are chosen."""
    errors = _over(lambda rows: (rows - net.reconstruct(rows)).square().flatten(1).sum(1), x, net)
    total = float(errors.sum(dtype=torch.float64))
    centre = metrics.over_batches(prepare, data.train.x, x.device).mean(0)
    spread = metrics.reconstruction_mse(x, centre.expand_as(x)) * x.numel()
    held_out = metrics.over_batches(prepare, data.validation.x, x.device)
    scores = {
        "test/reconstruction_mse": total / x.numel(),
        "test/reconstruction_sse": total / len(x),
        # of the squared error that the training rows' mean makes
        "test/unexplained": total / spread if spread else nan,
        "val/reconstruction_mse": metrics.reconstruction_mse(held_out, _over(net.reconstruct, held_out, net)),
    }
    return scores, {"sse": _numpy(errors)}


def _probe_with(count: int, seed: int, codes: list[np.ndarray], data: Arrays) -> float:
    """Test accuracy of the probe with `count` labelled rows, the same that the finetuned classifier had."""
    x, y = data.train
    assert y is not None and data.validation.y is not None and data.test.y is not None
    rows = cut(np.arange(len(x)), y, count, "labels", seed)[1]
    probe = metrics.linear_probe((codes[0][rows], y[rows]), (codes[1], data.validation.y))
    return float((probe.predict(codes[2]) == data.test.y).mean())


def _robustness(net: Stack, x: Tensor, probe: metrics.Probe | None, y: np.ndarray | None) -> dict[str, Any]:
    """Error of the clean test rows' restoration, and accuracy of the probe, by level of each noise."""

    def point(noise: Noise, level: float, draw: Tensor) -> dict[str, float]:
        error, codes = 0.0, []
        size = min(metrics.CACHED_ROWS, scoring_rows(net.first.spec))
        with torch.no_grad():
            for rows, own in zip(x.split(size), draw.split(size), strict=True):
                code = net.encode(corrupt(rows, noise, level, own))
                error += metrics.squared_error(rows, net.mean(code))
                codes.append(_numpy(code.flatten(1)))
        found = {"mse": error / x.numel()}
        if probe is not None:
            found["accuracy"] = float((probe.predict(np.concatenate(codes)) == y).mean())
        return found

    clean = point("gaussian", 0.0, x)
    curves: dict[str, Any] = {}
    for noise, levels in NOISES.items():
        with _same_noise(x.device):
            draw = drawn(x, noise)
        points = [clean, *(point(noise, level, draw) for level in levels)]
        curves[noise] = {"levels": [0.0, *levels], **{name: [p[name] for p in points] for name in clean}}
    return curves


@contextmanager
def _same_noise(device: torch.device) -> Iterator[None]:
    """What is drawn meanwhile is the same for every model."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _units(net: Stack, codes: np.ndarray) -> dict[str, float]:
    """Activity of the codes (rows, units): mean; share of units that never move; share of activations within 5 % of
    their bound, where they have one (Rifai et al. 2011, sec. 5.2)."""
    spread = codes.std(0)
    found = {
        "units/mean_activation": float(np.abs(codes).mean()),
        "units/dead": float((spread <= 0.01 * spread.max()).mean()),
    }
    activation = list(net)[-1].spec.activation
    if activation == "sigmoid":
        found["units/saturated"] = float(((codes < 0.05) | (codes > 0.95)).mean())
    elif activation == "tanh":
        found["units/saturated"] = float((np.abs(codes) > 0.9).mean())
    return found


def _contraction(net: Stack, x: Tensor, codes: np.ndarray) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The encoder's mean Jacobian norm, also in units of the codes' own spread, and how far codes move in random
    directions, by length of the step."""
    with torch.no_grad():
        encoder = net.first if len(net.layers) == 1 else net  # a layer's own may have a closed form
        norm = float(squared_norm(encoder, x[:_ROWS], None).sqrt().mean())
        rows = x[:_MAPPED]
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(rows.shape, generator=generator).to(x.device).flatten(1)
        direction = (direction / direction.norm(dim=1, keepdim=True)).view_as(rows)
        code = net.encode(rows).flatten(1)
        ratio = [float(((net.encode(rows + r * direction).flatten(1) - code).norm(dim=1) / r).mean()) for r in RADII]
    spread = float(np.sqrt(codes.var(0).sum()))
    found = {"contraction/norm": norm}
    if spread > 0:
        found["contraction/relative"] = norm / spread
    return found, {"radius": list(RADII), "ratio": ratio}


def _bound(net: Stack, variant: Variational, x: Tensor) -> dict[str, float]:
    """The evidence lower bound of the test rows, its parts, and, of binarised rows, the likelihood estimate; nats."""
    with _same_noise(x.device), torch.no_grad():
        binary = torch.bernoulli(x) if net.likelihood == "bernoulli" else x
        bound = generation.bound(net, binary if variant.binarize else x)
        found = {
            "vae/bound": -sum(bound.values()),
            "vae/reconstruction": bound["reconstruction"],
            "vae/kl": bound["kl"],
            "vae/active_units": generation.active_units(net, x),
        }
        if net.likelihood == "bernoulli":
            found["vae/iw_bound"] = generation.importance_weighted(net, binary)
    return found


def _frechet(net: Stack, judge: Result, prepare: Prepare, data: Arrays, device: torch.device) -> dict[str, float]:
    """Distance of samples from test rows in the code of the judge, beside that of training rows."""
    classifier = build_classifier(judge).to(device).eval()

    def features(rows: Tensor) -> np.ndarray:
        return _numpy(_over(lambda r: classifier.encode(r).flatten(1), rows, net))

    count = min(_SAMPLES, len(data.test.x), len(data.train.x))
    real, other = (metrics.over_batches(prepare, s.x[:count], device) for s in (data.test, data.train))
    drawn = generation.samples(net, count)
    return {
        "sample/frechet": metrics.frechet(features(drawn), features(real)),
        "sample/frechet_floor": metrics.frechet(features(other), features(real)),
    }


def _pictures(
    net: Stack, spec: MeasureSpec, x: Tensor, codes: np.ndarray, y: np.ndarray | None
) -> dict[str, np.ndarray]:
    shown = x[:_SHOWN]
    with _same_noise(x.device):
        corrupted = corrupt(shown[: _SHOWN // 2], *RESTORED)
    with torch.no_grad():
        found = {
            "inputs": _numpy(shown),
            "reconstructed": _numpy(net.reconstruct(shown)),
            "corrupted": _numpy(corrupted),
            "restored": _numpy(net.reconstruct(corrupted)),
            "codes": codes[:64, :256],
            "map": codes[:_MAPPED],  # as they are: only those that a report shows are mapped
        }
        if y is not None:
            found["map_labels"] = y[:_MAPPED]
        first = net.first
        if first.spec.kind == "dense":
            weight = first.encoder.affine.weight[:16]
            found["filters"] = _numpy(weight.view(len(weight), *first.spec.in_shape))
        if isinstance(spec.variant, Variational):
            found["samples"] = _numpy(generation.samples(net, 100))
            if prod(net.code_shape) == 2:
                found["manifold"] = _numpy(generation.manifold(net))
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def unit_images(
    stack: Stack, prepare: Prepare, raw: np.ndarray, device: torch.device, count: int = 16
) -> list[np.ndarray]:
    """What the first `count` units of each layer stand for: one array (units, *shape of the data) a layer.

    A dense first layer shows its weights. Units further up are raised by two standard deviations above the mean code
    and decoded; the image is the difference this makes. A convolutional unit is its channel's centre.
    """
    images = []
    with torch.inference_mode():
        h = prepare(torch.tensor(raw, device=device))
        first = stack.first.spec
        for depth, layer in enumerate(stack, 1):
            h = layer.encode(h)
            units = min(count, layer.spec.code_shape[0])
            if depth == 1 and first.kind == "dense":
                images.append(layer.encoder.affine.weight[:units].view(units, *first.in_shape).cpu().numpy())
                continue
            lower, mean, spread = Stack(list(stack)[:depth]), h.mean(0), h.std(0)
            raised = mean.repeat(units, *[1] * mean.ndim)
            for unit in range(units):
                place = (unit, *(side // 2 for side in mean.shape[1:]))
                raised[(unit, *place)] += 2 * spread[place]
            images.append((lower.mean(raised) - lower.mean(mean[None])).cpu().numpy())
    return images


def _classify(result: Result, prepare: Prepare, x: np.ndarray, device: torch.device) -> np.ndarray:
    """Class numbers (rows,) of raw rows."""
    classifier = build_classifier(result).to(device).eval()
    return _numpy(metrics.over_batches(lambda rows: classifier(prepare(rows)).argmax(1), x, device))


def _codes(stack: Stack, prepare: Prepare, split: Split, device: torch.device) -> np.ndarray:
    return _numpy(metrics.over_batches(lambda x: stack.encode(prepare(x)).flatten(1), split.x, device))


def _over(fn: Callable[[Tensor], Tensor], x: Tensor, stack: Stack) -> Tensor:
    """`fn` of the rows of x, in batches that hold what the stack's outputs take."""
    return metrics.over_batches(fn, x, x.device, min(metrics.CACHED_ROWS, scoring_rows(stack.first.spec)))


def _splits(data: Arrays) -> tuple[Split, Split, Split]:
    return data.train, data.validation, data.test


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
