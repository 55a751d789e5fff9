"""How a trained model is applied to many rows: in batches, on its device, in the precision of its training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aecore.core.types import Precision
from aecore.data.splits import Arrays, Split
from aecore.models.autoencoder import Batch
from aecore.models.prepare import Prepare
from aecore.models.rebuild import build_classifier, build_layer, build_stack
from aecore.models.stack import Stack
from aecore.models.storage import Result
from aecore.training.numerics import numerics

CACHED_ROWS = 512
"""Rows whose values fit into a CPU's cache: passing over memory that is new each time takes ten times as long."""


class BySplit(NamedTuple):
    """An array per split: the codes (rows, units) of a data set, or its class numbers (rows,)."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def precision_of(result: Result) -> Precision:
    """Return the precision in which the model in `result` was trained; older results and references name none."""
    return result.config.get("precision", "fp32")


@contextmanager
def as_trained(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute networks within the block with the arithmetic of a training of this precision."""
    with numerics(precision, device) as autocast, autocast():
        yield


class TrainedStack(Stack):
    """An autoencoder on its device and in eval mode, whose methods compute with the arithmetic of its training.

    They return float32 in every precision, since sums over rows and features lose too much in bf16. Its layers, called
    one by one, compute with whatever arithmetic is set where they are called.
    """

    def __init__(self, stack: Stack, precision: Precision, device: torch.device) -> None:
        super().__init__(list(stack))
        self.to(device).eval()
        self.precision, self.device = precision, device

    def encode(self, x: Batch) -> Batch:
        with as_trained(self.precision, self.device):
            return super().encode(x).float()

    def posterior(self, x: Batch) -> tuple[Batch, Batch]:
        with as_trained(self.precision, self.device):
            mean, log_variance = super().posterior(x)
        return mean.float(), log_variance.float()

    def decode(self, code: Batch) -> Batch:
        with as_trained(self.precision, self.device):
            return super().decode(code).float()


def build_trained(whole: Result | None, layers: Sequence[Result], device: torch.device) -> TrainedStack:
    """Build the autoencoder that was trained as a whole or, if there is none, that of the pretrained layers."""
    stack = build_stack(whole) if whole is not None else Stack([build_layer(result) for result in layers])
    return TrainedStack(stack, precision_of(whole if whole is not None else layers[-1]), device)


def over_batches(
    fn: Callable[[Tensor], Tensor], x: np.ndarray | Tensor, device: torch.device, batch_size: int = 2048
) -> Tensor:
    """Apply `fn` to the rows of `x` in batches on `device`, without gradients; the results stay there as one tensor."""

    def apply(start: int) -> Tensor:
        rows = x[start : start + batch_size]
        return fn(rows if isinstance(rows, Tensor) else torch.tensor(rows, device=device))

    with torch.no_grad():
        first = apply(0)
        if len(x) <= batch_size:
            return first
        results = first.new_empty((len(x), *first.shape[1:]))  # filled in place: no second copy of all results
        results[:batch_size] = first
        for start in range(batch_size, len(x), batch_size):
            results[start : start + batch_size] = apply(start)
        return results


def batch_rows(stack: Stack) -> int:
    """Return how many rows `stack` scores at once, as a CPU's cache and the decoder's outputs allow."""
    return min(CACHED_ROWS, stack.first.spec.scoring_rows)


def over_prepared(fn: Callable[[Tensor], Tensor], x: Tensor, stack: Stack) -> Tensor:
    """Apply `fn` to preprocessed rows in batches of the size that suits `stack`."""
    return over_batches(fn, x, x.device, batch_rows(stack))


def encode_splits(stack: Stack, prepare: Prepare, data: Arrays, device: torch.device) -> BySplit:
    """Return the codes of all three splits."""

    def codes(split: Split) -> np.ndarray:
        return to_numpy(over_batches(lambda rows: stack.encode(prepare(rows)).flatten(1), split.x, device))

    return BySplit(codes(data.train), codes(data.validation), codes(data.test))


def classify(result: Result, prepare: Prepare, raw: np.ndarray, device: torch.device) -> np.ndarray:
    """Return the class numbers (rows,) that the finetuned classifier in `result` gives to raw rows."""
    classifier = build_classifier(result).to(device).eval()
    with as_trained(precision_of(result), device):
        return to_numpy(over_batches(lambda rows: classifier(prepare(rows)).argmax(1), raw, device))


@contextmanager
def fixed_noise(device: torch.device) -> Iterator[None]:
    """Seed torch's generators with 0 for a block, so that every model meets the same noise; restore them after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def to_numpy(x: Tensor) -> np.ndarray:
    """Return a tensor as an array on the host; on a CPU both share their memory."""
    return x.detach().cpu().numpy()
