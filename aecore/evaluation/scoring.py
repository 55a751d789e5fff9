"""Applying a trained model to many rows, for all measures alike."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from aecore.data.splits import Arrays, Split
from aecore.evaluation import metrics
from aecore.models import generation
from aecore.models.prepare import Prepare
from aecore.models.rebuild import build_classifier
from aecore.models.stack import Stack
from aecore.models.storage import Result
from aecore.variants import Variational

_SHOWN, _MAPPED = 12, 1000


@contextmanager
def _same_noise(device: torch.device) -> Iterator[None]:
    """What is drawn meanwhile is the same for every model."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


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
    return metrics.over_batches(fn, x, x.device, min(metrics.CACHED_ROWS, stack.first.spec.scoring_rows))


def _splits(data: Arrays) -> tuple[Split, Split, Split]:
    return data.train, data.validation, data.test


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
