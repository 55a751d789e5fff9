"""The arrays that figures of a study are drawn from: the same test rows and the same noise for every model."""

from math import prod

import numpy as np
import torch
from torch import Tensor

from aecore.core.types import Noise
from aecore.evaluation.sampling import first_rows
from aecore.evaluation.scoring import fixed_noise, to_numpy
from aecore.models import generation
from aecore.models.corruption import corrupt
from aecore.models.stack import Stack

SHOWN_ROWS = 12
"""Test rows that are shown as pictures, always the first ones."""
MAPPED_ROWS = 1000
"""Test rows whose codes are shown in a plane, always the same; see `first_rows`."""
RESTORED: tuple[Noise, float] = ("gaussian", 0.3)
"""The corruption of the pictures that set all variants side by side."""


def study_arrays(
    stack: Stack, x: Tensor, codes: np.ndarray, y: np.ndarray | None, sampled: bool
) -> dict[str, np.ndarray]:
    """Return the arrays of one model that the report of a study shows, by name.

    Args:
        x, codes, y: the preprocessed test rows, their codes (rows, units) and their class numbers.
        sampled: whether the model is variational, so that images can be drawn from its prior.
    """
    shown, mapped = x[:SHOWN_ROWS], first_rows(y, len(codes), MAPPED_ROWS)
    with fixed_noise(x.device):
        corrupted = corrupt(shown[: SHOWN_ROWS // 2], *RESTORED)
    with torch.no_grad():
        arrays = {
            "inputs": to_numpy(shown),
            "reconstructed": to_numpy(stack.reconstruct(shown)),
            "corrupted": to_numpy(corrupted),
            "restored": to_numpy(stack.reconstruct(corrupted)),
            "codes": codes[:64, :256],
            # not yet in a plane, since mapping takes seconds and a report shows only one seed per study row
            "map": codes[mapped],
        }
        if y is not None:
            arrays["map_labels"] = y[mapped]
        first = stack.first
        if first.spec.kind == "dense":
            weight = first.encoder.affine.weight[:16]
            arrays["filters"] = to_numpy(weight.view(len(weight), *first.spec.in_shape))
        if sampled:
            arrays["samples"] = to_numpy(generation.samples(stack, 100))
            if prod(stack.code_shape) == 2:
                arrays["manifold"] = to_numpy(generation.manifold(stack))
    return {name: np.ascontiguousarray(value) for name, value in arrays.items()}
