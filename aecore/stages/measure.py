"""What a trained model is worth: `evaluate` for the report of one job, `measure` for the comparison of a study.

Both score the selected weights on the test split; nothing is chosen by what they find there.
"""

from collections.abc import Sequence
from math import nan, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aecore.config.specs import MeasureSpec
from aecore.core.types import Noise
from aecore.data.splits import Arrays, cut
from aecore.data.stream import Stream
from aecore.evaluation import metrics
from aecore.evaluation.scoring import _MAPPED, _SHOWN, _bound, _classify, _codes, _numpy, _over, _same_noise, _splits
from aecore.models import generation
from aecore.models.corruption import corrupt, draw_noise
from aecore.models.jacobian import squared_norm
from aecore.models.prepare import Prepare
from aecore.models.rebuild import build_classifier, build_layer, build_stack
from aecore.models.stack import Stack
from aecore.models.storage import Result
from aecore.stages.context import Run, held
from aecore.stages.rows import prepared
from aecore.variants import Variational

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
        size = min(metrics.CACHED_ROWS, net.first.spec.scoring_rows)
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
            draw = draw_noise(x, noise)
        points = [clean, *(point(noise, level, draw) for level in levels)]
        curves[noise] = {"levels": [0.0, *levels], **{name: [p[name] for p in points] for name in clean}}
    return curves


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
