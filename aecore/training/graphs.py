"""Steps as CUDA graphs: captured once, then replayed with one launch.

On a GPU a small layer's step is some fifty kernels of a few microseconds each, which a CPU cannot launch as fast as the
GPU runs them.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aecore.data.files import short_reason
from aecore.data.stream import Shuffled
from aecore.training.job import Job
from aecore.training.memory import is_out_of_memory

_WARM_STEPS = 3
"""Steps before the capture, in which libraries choose their kernels and allocate what they keep."""


def can_be_captured(job: Job) -> bool:
    """Return whether the steps of a fit are replayed as a CUDA graph.

    A streamed set is limited by its reading, a team's messages and a compiled step are not captured, and bfloat16 is
    untried.
    """
    plain = job.team.size == 1 and not job.compile and job.precision != "bf16"
    return job.device.type == "cuda" and plain and not isinstance(job.train, Shuffled)


class Replayed:
    """A step that trains in place on tensors of always the same shapes, captured at its fourth call.

    Whatever else it reads (weights, the optimiser's state, a learning rate) must lie at the same place at every step
    and is read anew at each. Random numbers go on from step to step, since a replay moves the device's generator on.
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
            with _on_stream(self.stream):  # gradients are summed up on the stream that they were first made on
                self.step(*inputs)
            return
        if self.replay is None:
            self.inputs = tuple(tensor.clone() for tensor in inputs)
            self.replay = capture(partial(self.step, *self.inputs), self.stream)
        for place, tensor in zip(self.inputs, inputs, strict=True):
            place.copy_(tensor)
        self.replay()


def capture(step: Callable[[], None], stream: torch.cuda.Stream | None) -> Callable[[], Any]:
    """Capture a step without doing it, and return what does it.

    A step that cannot be captured is returned as it is, after a warning.

    Raises:
        RuntimeError: memory was not enough; see `is_out_of_memory`.
    """
    generators = _generators()
    try:
        graph = torch.cuda.CUDAGraph()
        # errors concern this thread alone: others, a logger's for example, may use the device meanwhile
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    except (RuntimeError, MemoryError) as error:
        for generator, state in generators:
            # a capture that was broken off leaves its generator waiting for the capture's end: it gets a new state
            fresh = torch.Generator(generator.device)
            fresh.set_state(state)
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
        if is_out_of_memory(error):
            raise
        message = f"a step cannot be captured as a CUDA graph ({short_reason(error)}): trained without one"
        warnings.warn(message, stacklevel=2)
        return step
    return graph.replay


def _generators() -> list[tuple[torch.Generator, Tensor]]:
    """Return the present GPU's random generator with its state; none without a GPU."""
    if not torch.cuda.is_available():
        return []
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    return [(generator, generator.get_state())]


@contextmanager
def _on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on another stream, in order with what the current one does."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
