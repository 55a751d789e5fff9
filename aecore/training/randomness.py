"""The state of torch's random generators: seeded for a block, read, and set."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class RandomState(NamedTuple):
    """The states of the generators that a fit draws from."""

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
    """Restore the generators after a block, and seed them before it where a `seed` is given."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(seed)
        yield
