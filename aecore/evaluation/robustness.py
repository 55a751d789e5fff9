"""How well a model reads corrupted rows: its error and the probe's accuracy by the level of each noise."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from aecore.core.types import Noise
from aecore.evaluation.probes import Probe
from aecore.evaluation.reconstruction import observed_count, squared_error
from aecore.evaluation.scoring import batch_rows, fixed_noise, to_numpy
from aecore.models.corruption import corrupt, draw_noise
from aecore.models.stack import Stack

NOISES: dict[Noise, tuple[float, ...]] = {
    "gaussian": (0.1, 0.2, 0.3, 0.5),
    "masking": (0.1, 0.25, 0.5, 0.75),
    "salt_and_pepper": (0.1, 0.2, 0.3, 0.5),
}
"""Levels of each noise in the curves, besides 0."""


def robustness_curves(stack: Stack, x: Tensor, probe: Probe | None, y: np.ndarray | None) -> dict[str, Any]:
    """Measure reconstruction and probe on corrupted test rows, with the same noise for every model.

    Args:
        x, y: the preprocessed test rows and their class numbers.
        probe: a probe that was fitted to clean codes, where there are labels.

    Returns:
        For each noise `levels`, `mse` of the restored rows against the clean ones, per feature, and with a probe its
        `accuracy`; each a list with a value per level.
    """

    def point(noise: Noise, level: float, draw: Tensor) -> dict[str, float]:
        error, codes = 0.0, []
        size = batch_rows(stack)
        with torch.no_grad():
            for clean, part in zip(x.split(size), draw.split(size), strict=True):
                code = stack.encode(corrupt(clean, noise, level, part))
                error += squared_error(clean, stack.mean(code))
                codes.append(to_numpy(code.flatten(1)))
        scores = {"mse": error / observed_count(x)}
        if probe is not None:
            scores["accuracy"] = float((probe.predict(np.concatenate(codes)) == y).mean())
        return scores

    clean = point("gaussian", 0.0, x)
    curves: dict[str, Any] = {}
    for noise, levels in NOISES.items():
        with fixed_noise(x.device):
            draw = draw_noise(x, noise)
        points = [clean, *(point(noise, level, draw) for level in levels)]
        curves[noise] = {"levels": [0.0, *levels], **{name: [p[name] for p in points] for name in clean}}
    return curves


def mean_robustness(curves: dict[str, Any]) -> dict[str, float]:
    """Return the means of `robustness_curves` over all noises and all levels above 0."""
    means = {}
    for name in ("accuracy", "mse"):
        if values := [value for curve in curves.values() for value in curve.get(name, ())[1:]]:
            means[f"robust/{name}"] = float(np.mean(values))
    return means
