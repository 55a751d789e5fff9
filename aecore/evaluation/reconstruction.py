"""How well rows are reconstructed: squared errors of what the first layer reads."""

from math import nan

import numpy as np
import torch
from torch import Tensor

from aecore.data.splits import Arrays
from aecore.evaluation.scoring import CACHED_ROWS, over_batches, over_prepared, to_numpy
from aecore.models.prepare import Prepare
from aecore.models.stack import Stack


def reconstruction_mse(x: Tensor, reconstruction: Tensor) -> float:
    """Return the squared error per feature, that is its mean over rows and features."""
    parts = zip(x.split(CACHED_ROWS), reconstruction.split(CACHED_ROWS), strict=True)
    return sum(squared_error(rows, reconstructed) for rows, reconstructed in parts) / x.numel()


def squared_error(x: Tensor, reconstruction: Tensor) -> float:
    """Return the squared error summed over rows and features, in double precision."""
    return float((x - reconstruction).square().sum(dtype=torch.float64))


def row_errors(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the squared error per feature of each row, (rows,)."""
    return (x - reconstruction).square().flatten(1).mean(1)


def reconstruction_errors(
    stack: Stack, prepare: Prepare, data: Arrays, x: Tensor
) -> tuple[dict[str, float], np.ndarray]:
    """Measure the reconstruction of the test rows, and of the validation rows, by which settings are chosen.

    Args:
        x: the preprocessed test rows.

    Returns:
        The metrics, and the squared error of each test row, summed over features, (rows,). `test/unexplained` is the
        squared error as a share of the error that the training rows' mean would make.
    """
    errors = over_prepared(lambda rows: (rows - stack.reconstruct(rows)).square().flatten(1).sum(1), x, stack)
    total = float(errors.sum(dtype=torch.float64))
    centre = over_batches(prepare, data.train.x, x.device).mean(0)
    spread = reconstruction_mse(x, centre.expand_as(x)) * x.numel()
    validation = over_batches(prepare, data.validation.x, x.device)
    metrics = {
        "test/reconstruction_mse": total / x.numel(),
        "test/reconstruction_sse": total / len(x),
        "test/unexplained": total / spread if spread else nan,
        "val/reconstruction_mse": reconstruction_mse(validation, over_prepared(stack.reconstruct, validation, stack)),
    }
    return metrics, to_numpy(errors)
