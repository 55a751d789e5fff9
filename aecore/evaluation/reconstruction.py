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
    """Return the squared error per feature, that is its mean over rows and features that are not missing."""
    parts = zip(x.split(CACHED_ROWS), reconstruction.split(CACHED_ROWS), strict=True)
    return sum(squared_error(rows, reconstructed) for rows, reconstructed in parts) / observed_count(x)


def squared_error(x: Tensor, reconstruction: Tensor) -> float:
    """Return the squared error summed over rows and features, in double precision."""
    return float(squares(x, reconstruction).sum(dtype=torch.float64))


def row_errors(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the squared error per feature of each row, (rows,), over the features that are not missing in it."""
    return squares(x, reconstruction).flatten(1).sum(1) / (~x.isnan()).flatten(1).sum(1)


def squares(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the squared error of each feature in each row, (rows, *shape); that of a missing one is 0."""
    return torch.where(x.isnan(), 0, x - reconstruction).square()


def observed_count(x: Tensor) -> int:
    """Return the number of values that are not missing."""
    return int((~x.isnan()).sum())


def observed_mean(x: Tensor) -> Tensor:
    """Return the mean of each feature over the rows in which it is not missing."""
    return torch.where(x.isnan(), 0, x).sum(0) / (~x.isnan()).sum(0).clamp(min=1)


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
    errors = over_prepared(lambda rows: squares(rows, stack.reconstruct(rows)).flatten(1).sum(1), x, stack)
    total = float(errors.sum(dtype=torch.float64))
    centre, count = observed_mean(over_batches(prepare, data.train.x, x.device)), observed_count(x)
    spread = reconstruction_mse(x, centre.expand_as(x)) * count
    validation = over_batches(prepare, data.validation.x, x.device)
    metrics = {
        "test/reconstruction_mse": total / count,
        "test/reconstruction_sse": total / len(x),
        "test/unexplained": total / spread if spread else nan,
        "val/reconstruction_mse": reconstruction_mse(validation, over_prepared(stack.reconstruct, validation, stack)),
    }
    return metrics, to_numpy(errors)
