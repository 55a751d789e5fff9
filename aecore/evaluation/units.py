"""Measures and images of the units of a code: how active they are, and which inputs they stand for."""

import numpy as np
import torch

from aecore.models.prepare import Prepare
from aecore.models.stack import Stack
from aecore.training.numerics import numerics


def unit_activity(stack: Stack, codes: np.ndarray) -> dict[str, float]:
    """Measure the activity of the units in codes (rows, units).

    Returns:
        The mean absolute activation; the share of units that never move (`dead`: their standard deviation is at most
        1 % of the largest); and, where the activation is bounded, the share of activations within 5 % of its bounds
        (`saturated`; Rifai et al. 2011, sec. 5.2).
    """
    spread = codes.std(0)
    metrics = {
        "units/mean_activation": float(np.abs(codes).mean()),
        "units/dead": float((spread <= 0.01 * spread.max()).mean()),
    }
    activation = list(stack)[-1].spec.activation
    if activation == "sigmoid":
        metrics["units/saturated"] = float(((codes < 0.05) | (codes > 0.95)).mean())
    elif activation == "tanh":
        metrics["units/saturated"] = float((np.abs(codes) > 0.9).mean())
    return metrics


def unit_images(
    stack: Stack, prepare: Prepare, raw: np.ndarray, device: torch.device, count: int = 16
) -> list[np.ndarray]:
    """Return what the first `count` units of each layer stand for: one array (units, *shape of the data) per layer.

    A unit of a dense first layer is shown by its weights. A unit further up is raised by two standard deviations above
    the mean code of the rows `raw`; its image is the difference that this makes to the decoded mean code. Of a
    convolutional layer, the unit in the centre of each channel is raised. As differences, images are computed in fp32.
    """
    images = []
    with torch.inference_mode(), numerics("fp32", device):
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
