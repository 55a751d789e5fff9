"""Training steps as CUDA graphs: captured once, then replayed with one launch.

On a GPU a small layer's step is some fifty kernels of a few microseconds each, which a CPU cannot launch as fast as the
GPU runs them.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from aecore.data.files import short_reason
from aecore.training.job import Job
from aecore.training.memory import is_out_of_memory

_WARM_STEPS = 3
"""Steps before the capture, in which libraries choose their kernels and allocate what they keep."""


def can_be_captured(job: Job) -> bool:
    """Return whether the steps of a fit are replayed as a CUDA graph."""
    return job.device.type == "cuda" and job.is_simple


class Replayed:
    """A training step on tensors of fixed shapes, which is captured at its fourth call and replayed from then on.

    Everything else that the step reads (weights, the optimiser's state, a learning rate) must lie at the same address
    at every call and is read anew. Random numbers go on from step to step, since a replay advances the generator.
    """

    def __init__(self, step: Callable[..., None]) -> None:
        self.step = step
        self.calls = 0
        self.stream = _side_stream(torch.cuda.current_device()) if torch.cuda.is_available() else None
        self.inputs: tuple[Tensor, ...] = ()
        self.replay: Callable[[], Any] | None = None

    def __call__(self, *inputs: Tensor) -> None:
        self.calls += 1
        if self.calls <= _WARM_STEPS:
            with _on_stream(self.stream):  # gradients are summed up on the stream that they were first made on
                self.step(*inputs)
            return
        if self.replay is None:
            self.inputs = tuple(tensor.clone() for tensor in inputs)
            self.replay = capture(partial(self.step, *self.inputs), self.stream)
        for place, tensor in zip(self.inputs, inputs, strict=True):
            place.copy_(tensor)
        self.replay()


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Return the stream on which this process takes the steps that it captures on a device.

    It is the same for all fits, since the library of products keeps memory for each stream that it has worked on.
    """
    return torch.cuda.Stream(device)


def capture(step: Callable[[], None], stream: torch.cuda.Stream | None) -> Callable[[], Any]:
    """Capture a step as a CUDA graph without executing it, and return a function that executes it.

    A step that cannot be captured is returned as it is, after a warning.

    Raises:
        RuntimeError: memory was not enough; see `is_out_of_memory`.
    """
    pool = torch.cuda.graph_pool_handle()
    random = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        graph = torch.cuda.CUDAGraph()
        # Errors concern this thread alone: others, a logger's for example, may use the device meanwhile. The outer
        # block returns to the present stream, which torch 2.11 does not do after a capture that failed.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            step()
    except (RuntimeError, MemoryError) as error:
        if random is not None:
            _clean_up(pool, random)
        if is_out_of_memory(error):
            raise
        message = f"a step cannot be captured as a CUDA graph ({short_reason(error)}): trained without one"
        warnings.warn(message, stacklevel=2)
        return step
    return graph.replay


def _clean_up(pool: Any, random: Tensor) -> None:
    """Let torch's allocator and generator work on after a capture that failed.

    Args:
        pool: handle of the memory that the capture allocated from.
        random: the generator's state before the capture.
    """
    device = torch.cuda.current_device()
    # Where a capture ends in an error, torch before 2.12 does not tell its allocator that it has ended
    # (pytorch/pytorch#180395), and the next `empty_cache` or capture of the process fails. Where the allocator knows,
    # the first call raises.
    with suppress(RuntimeError):
        # private: no public function ends an allocation and frees its pool; torch 2.12 and later do so themselves
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)  # private, for the same reason
    # the generator waits for the capture's end as well: it gets a new state
    fresh = torch.Generator(f"cuda:{device}").set_state(random)
    torch.cuda.default_generators[device].graphsafe_set_state(fresh.graphsafe_get_state())


@contextmanager
def _on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run the block on another stream, after the current stream's earlier work and before its later work."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
