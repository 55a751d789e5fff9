"""Steps as CUDA graphs: captured once, replayed with one launch.

On a GPU a small layer's step is some fifty kernels of microseconds each, which a CPU cannot launch as fast as they run.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

_WARM_STEPS = 3
"""Steps before the capture, in which libraries choose their kernels and allocate what they keep."""


class Replayed:
    """A step that trains in place on tensors of always the same shapes, captured at its fourth call.

    What it reads besides must lie at the same place at every step and is read anew at each: weights, the optimiser's
    state, a learning rate. Random numbers go on from step to step, since a replay moves the device's generator on.
    """

    def __init__(self, step: Callable[..., None]) -> None:
        self.step = step
        self.calls = 0
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.inputs: tuple[Tensor, ...] = ()
        self.replay: Callable[[], Any] | None = None

    def __call__(self, *inputs: Tensor) -> None:
        self.calls += 1
        if self.calls <= _WARM_STEPS:
            with _aside(self.stream):  # gradients are summed up on the stream that they first came on
                self.step(*inputs)
            return
        if self.replay is None:
            self.inputs = tuple(given.clone() for given in inputs)
            self.replay = capture(partial(self.step, *self.inputs), self.stream)
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.replay()


def capture(step: Callable[[], None], stream: torch.cuda.Stream | None) -> Callable[[], Any]:
    """What repeats all that `step` does on the device; it is not done yet. What cannot be captured is called instead,
    after a warning."""
    try:
        graph = torch.cuda.CUDAGraph()
        # in the thread's own mode: others, a logger's say, may use the device meanwhile
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    except (RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:160]
        warnings.warn(f"a step cannot be captured as a CUDA graph ({reason}): trained without one", stacklevel=2)
        return step
    return graph.replay


@contextmanager
def _aside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on another stream, in order with what the current one does."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
