"""Torch's global settings that decide numbers: how products are computed, and the random generators."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from aecore.core.types import Precision

Autocast = Callable[[], AbstractContextManager]
"""Makes the context in which a model is called."""


@contextmanager
def numerics(precision: Precision, device: torch.device) -> Iterator[Autocast]:
    """Set how float32 products are computed within the block, and yield a function that makes a model's context.

    `fp32` multiplies with all 24 bits, `tf32` lets a GPU round the factors to 11 bits, `bf16` computes products in
    bfloat16 by torch's autocast. Convolutions follow. Whatever calls a trained model, or the frozen layers below it,
    has to do so in a block of the fit's precision and, as autocast is local to a call, in the yielded context.
    """
    # torch's older names, since torch refuses to read a setting that both its older and newer names (fp32_precision)
    # have set, and its compiler reads the older ones
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield partial(_in_bfloat16, device.type) if precision == "bf16" else nullcontext
    finally:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = convolutions


def _in_bfloat16(device_type: str) -> AbstractContextManager:
    """Return a context in which products are computed in bfloat16.

    Autocast keeps no cache of cast weights: a CUDA graph would hold on to casts that were made before its capture, or
    that are freed after it (torch's notes on CUDA graphs), and fits have the same numbers replayed and step by step.
    """
    return torch.autocast(device_type, torch.bfloat16, cache_enabled=False)


class RandomState(NamedTuple):
    """The states of the random generators that a fit draws from."""

    cpu: Tensor
    gpu: Tensor | None
    """The state of the fit's GPU; None for a fit on the CPU."""


def get_random_state(device: torch.device) -> RandomState:
    """Return the states of the generators that are used on `device`."""
    return RandomState(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Let the generators go on from `state`."""
    torch.set_rng_state(state.cpu)
    if state.gpu is not None:
        torch.cuda.set_rng_state(state.gpu, device)


@contextmanager
def own_random_state(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Restore torch's random generators after the block; seed them before the block if a `seed` is given."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(seed)
        yield
