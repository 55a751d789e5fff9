"""How far a code moves when its input does."""

from math import prod

import numpy as np
import torch
from torch import Tensor

from aecore.core.notes import Notes, sampled
from aecore.models.jacobian import squared_norm
from aecore.models.stack import Stack
from aecore.training.numerics import numerics

RADII = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Lengths of the steps of the contraction curve, in units of the input (Rifai et al. 2011, sec. 5.3)."""
_JACOBIAN_ROWS, _STEPPED_ROWS = 256, 1000
_MOST_PRODUCTS, _FEWEST_ROWS = 2**40, 8
"""Most products of the Jacobian's backward passes, some half a minute on a core; and the fewest rows it is computed
of."""


def contraction(
    stack: Stack, x: Tensor, codes: np.ndarray, notes: Notes
) -> tuple[dict[str, float], dict[str, list[float]]]:  # fmt: skip
    """Measure the encoder's contraction at the preprocessed test rows `x` with codes (rows, units).

    Returns:
        The mean Frobenius norm of the encoder's Jacobian over the first 256 rows, also relative to the spread of the
        codes (the root of their total variance); and the curve of how far codes move per length of a step in a random
        direction, by the step's length: `radius` and `ratio`, means over the first 1,000 rows. All are computed in
        fp32, whatever the precision of training: the difference of two codes in bf16 is mostly their rounding. Where
        256 rows of a large network would take minutes the norm is that of fewer rows, which is added to `notes`.
    """
    x = stack.filled(x)
    with torch.no_grad(), numerics("fp32", x.device):
        # one layer's Jacobian may have a closed form
        encoder = stack.first if len(stack.layers) == 1 else Stack(list(stack))
        count, most = _jacobian_rows(stack), min(len(x), _JACOBIAN_ROWS)
        norm = float(squared_norm(encoder, x[:count], None).sqrt().mean())
        notes |= sampled(min(count, most), most, "test", "contraction/norm", "contraction/relative")
        rows = x[:_STEPPED_ROWS]
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(rows.shape, generator=generator).to(x.device).flatten(1)
        direction = (direction / direction.norm(dim=1, keepdim=True)).view_as(rows)
        code = encoder.encode(rows).flatten(1)
        ratio = [
            float(((encoder.encode(rows + r * direction).flatten(1) - code).norm(dim=1) / r).mean()) for r in RADII
        ]
    metrics = {"contraction/norm": norm}
    spread = float(np.sqrt(codes.var(0).sum()))
    if spread > 0:
        metrics["contraction/relative"] = norm / spread
    return metrics, {"radius": list(RADII), "ratio": ratio}


def _jacobian_rows(stack: Stack) -> int:
    """Return the number of rows of which the Jacobian is computed: a backward pass through all weights per row and unit
    of the code, unless one layer has a closed form."""
    if len(stack.layers) == 1:
        return _JACOBIAN_ROWS
    weights = sum(weight.numel() for layer in stack for weight in layer.encoder.parameters())
    return min(_JACOBIAN_ROWS, max(_FEWEST_ROWS, _MOST_PRODUCTS // (weights * prod(stack.code_shape))))
