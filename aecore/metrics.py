"""Numbers that mean the same for every variant."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

PROBE_STRENGTHS = (0.01, 0.1, 1.0)
"""Inverse regularisation tried by the linear probe, chosen on validation."""


def over_batches(fn: Callable[[Tensor], Tensor], x: np.ndarray, device: torch.device, batch_size: int = 2048) -> Tensor:
    """`fn` applied to the rows of `x` in batches on `device`; the results together, there."""
    with torch.no_grad():
        starts = range(0, len(x), batch_size)
        return torch.cat([fn(torch.tensor(x[start : start + batch_size], device=device)) for start in starts])


def reconstruction_mse(x: Tensor, reconstruction: Tensor) -> float:
    """Squared error a feature: the mean over rows and features."""
    return float((x - reconstruction).square().mean(dtype=torch.float64))


def linear_probe(
    train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> float:
    """Test accuracy of multinomial logistic regression on standardised codes, regularisation chosen on validation.

    Each argument is codes (rows, features) and labels (rows,).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train[0])
    fitted = []
    for strength in PROBE_STRENGTHS:
        # 1e-3 on the gradient is far below what accuracy resolves, and a third of the default's time
        probe = LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(scaler.transform(train[0]), train[1])
        fitted.append((probe.score(scaler.transform(validation[0]), validation[1]), probe))
    best = max(fitted, key=lambda scored: scored[0])[1]
    return float(best.score(scaler.transform(test[0]), test[1]))


def knn(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], neighbours: int = 5) -> float:
    """Test accuracy of the k nearest training codes by Euclidean distance."""
    from sklearn.neighbors import KNeighborsClassifier

    return float(KNeighborsClassifier(min(neighbours, len(train[0]))).fit(*train).score(*test))


def accuracy_interval(accuracy: float, rows: int) -> tuple[float, float]:
    """95 % interval of an accuracy for the sampling of `rows` test rows (Wilson 1927)."""
    z = 1.959964
    centre = (accuracy + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * np.sqrt(accuracy * (1 - accuracy) / rows + z * z / (4 * rows * rows))
    return float(centre - half), float(centre + half)


def confusion(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) counts: true class by row, predicted by column."""
    return np.bincount(truth * classes + prediction, minlength=classes * classes).reshape(classes, classes)
