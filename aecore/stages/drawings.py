"""The figures of one job's model: their arrays are computed here, and drawn in a thread."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aecore.config.specs import EvaluateSpec
from aecore.data.splits import Arrays
from aecore.evaluation.figures import model as figures
from aecore.evaluation.figures.look import plane
from aecore.evaluation.pictures import MAPPED_ROWS, SHOWN_ROWS
from aecore.evaluation.sampling import first_rows
from aecore.evaluation.scoring import BySplit, fixed_noise, to_numpy
from aecore.evaluation.threads import Threads
from aecore.models import generation
from aecore.models.corruption import corrupt
from aecore.models.stack import Stack
from aecore.variants import Denoising, Sparse, Variational

_DRAWN_ROWS = 100_000
"""Most training rows that are drawn in the plane of a code of two units."""


class Pen:
    """Draws figures one after the other in a thread, while the caller goes on measuring."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread
        self._drawings: dict[str, Future[bytes]] = {}

    def draw(self, name: str, figure: Callable[..., bytes], *args: Any) -> None:
        """Start to draw a figure; from here on nothing may write to the arrays among `args`."""
        self._drawings[name] = self._thread.submit(figure, *args)

    def figures(self) -> dict[str, bytes]:
        """Wait for all figures; return them as PNG by name."""
        return {name: drawing.result() for name, drawing in self._drawings.items()}


def map_codes(threads: Threads, codes: BySplit, data: Arrays, classes: Sequence[str]) -> Callable[[], bytes]:
    """Start to put the codes of test rows into a plane, or of training rows if the code has two units and needs no map;
    return the function that waits for it and draws the figure."""
    units = codes.train.shape[1]
    shown, y, most, split = codes.test, data.test.y, MAPPED_ROWS, "test"
    if units == 2:
        shown, y, most, split = codes.train, data.train.y, _DRAWN_ROWS, "training"
    rows = first_rows(y, len(shown), most)
    points = threads.start(plane, shown[rows])
    labels = y[rows] if y is not None and classes else None
    return lambda: figures.codes_map(points(), units, labels, classes, split)


def draw_variant(pen: Pen, spec: EvaluateSpec, stack: Stack, x: Tensor, codes: np.ndarray) -> None:
    """Draw the figures that only this variant has; `x` and `codes` (rows, units) are those of the test rows."""
    images = x.ndim == 4
    with torch.no_grad():
        if isinstance(spec.variant, Denoising) and images:
            _draw_restored(pen, spec.variant, stack, x[:SHOWN_ROWS])
        elif isinstance(spec.variant, Sparse):
            pen.draw("activations", figures.activations, codes[:64])
        elif isinstance(spec.variant, Variational) and images:
            _draw_generated(pen, stack, x)


def _draw_restored(pen: Pen, variant: Denoising, stack: Stack, x: Tensor) -> None:
    level = 1.5 * variant.level  # half more noise than in training shows what the model does beyond it
    with fixed_noise(x.device):
        noisy = corrupt(x, variant.noise, level)
    name = f"{variant.noise.replace('_', ' ')} noise, {level:g}"
    pen.draw("restored", figures.triptych, to_numpy(x), to_numpy(noisy), to_numpy(stack.reconstruct(noisy)), name)


def _draw_generated(pen: Pen, stack: Stack, x: Tensor) -> None:
    def draw(name: str, images: Tensor, columns: int, title: str) -> None:
        pen.draw(name, figures.image_grid, to_numpy(images), columns, title)

    steps = generation.STEPS
    draw("samples", generation.samples(stack, 100), 10, "Drawn from the prior")
    title = "One code at a time from -3 to 3, the most active first"
    draw("traversals", generation.traversals(stack, x), steps, title)
    if len(x) > 1:
        draw("interpolation", generation.interpolation(stack, x), steps, "From one test row's code to another's")
    if prod(stack.code_shape) == 2:
        draw("manifold", generation.manifold(stack), 10, "The plane of codes, at quantiles of the prior")
