"""Numbers that mean the same for every variant."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aecore.core.imports import fast_imports

Labelled = tuple[np.ndarray, np.ndarray]
"""Codes (rows, features) and class numbers (rows,)."""
_CLUSTERED_ROWS = 20_000
CACHED_ROWS = 512
"""Of a batch whose values a CPU's cache holds; passing over memory that is new each time takes ten times as long."""
PROBE_STRENGTHS = (0.01, 0.1, 1.0)
"""Inverse regularisation tried by the linear probe, chosen on validation."""


def over_batches(
    fn: Callable[[Tensor], Tensor], x: np.ndarray | Tensor, device: torch.device, batch_size: int = 2048
) -> Tensor:
    """`fn` applied to the rows of `x` in batches on `device`; the results together, there."""

    def of(start: int) -> Tensor:
        rows = x[start : start + batch_size]
        return fn(rows if isinstance(rows, Tensor) else torch.tensor(rows, device=device))

    with torch.no_grad():
        first = of(0)
        if len(x) <= batch_size:
            return first
        found = first.new_empty((len(x), *first.shape[1:]))  # in place: no second copy of it all
        found[:batch_size] = first
        for start in range(batch_size, len(x), batch_size):
            found[start : start + batch_size] = of(start)
        return found


def reconstruction_mse(x: Tensor, reconstruction: Tensor) -> float:
    """Squared error a feature: the mean over rows and features."""
    parts = zip(x.split(CACHED_ROWS), reconstruction.split(CACHED_ROWS), strict=True)
    return sum(squared_error(rows, again) for rows, again in parts) / x.numel()


def squared_error(x: Tensor, reconstruction: Tensor) -> float:
    """The sum over rows and features."""
    return float((x - reconstruction).square().sum(dtype=torch.float64))


def row_errors(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Squared error a feature of each row, (rows,)."""
    return (x - reconstruction).square().flatten(1).mean(1)


class Probe(NamedTuple):
    """A linear classifier of frozen codes."""

    scaler: Any
    model: Any

    def predict(self, codes: np.ndarray) -> np.ndarray:
        """Class numbers (rows,) of codes (rows, features)."""
        return self.model.predict(self.scaler.transform(codes))


def linear_probe(train: Labelled, validation: Labelled) -> Probe:
    """Multinomial logistic regression on standardised codes, regularisation chosen on validation.

    Args:
        train, validation: codes (rows, features) and class numbers (rows,).
    """
    with fast_imports():
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    scaler = StandardScaler().fit(train[0])
    x, held_out = scaler.transform(train[0]), scaler.transform(validation[0])
    fitted = []
    for strength in PROBE_STRENGTHS:
        # 1e-3 on the gradient is far below what accuracy resolves, and a third of the default's time; the products are
        # so narrow that two threads take up to twice as long as one
        with threadpool_limits(1, "blas"):
            probe = LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(x, train[1])
        fitted.append((probe.score(held_out, validation[1]), probe))
    return Probe(scaler, max(fitted, key=lambda scored: scored[0])[1])


def nearest(train: Labelled, codes: np.ndarray, neighbours: int = 5) -> np.ndarray:
    """Class numbers (rows,) of codes (rows, features) by vote of the nearest training codes, Euclidean."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(min(neighbours, len(train[0]))).fit(*train).predict(codes)


def clusters(train: np.ndarray, test: Labelled, count: int) -> dict[str, float]:
    """Agreement of k-means clusters with the classes: `nmi`, `ari`, and `accuracy` under the best one-to-one naming of
    clusters (Hungarian; Xie et al. 2016, eq. 10). Fitted on training codes, scored on test codes."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    found = KMeans(count, n_init=3, random_state=0).fit(train[:_CLUSTERED_ROWS]).predict(test[0])
    table = confusion(test[1], found, count)
    matched = table[linear_sum_assignment(-table)].sum()
    return {
        "nmi": float(normalized_mutual_info_score(test[1], found)),
        "ari": float(adjusted_rand_score(test[1], found)),
        "accuracy": float(matched / len(found)),
    }


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features (rows, features): the distance of their
    means, plus tr(A + B - 2 (A B)^(1/2)) of their covariances (Heusel et al. 2017, eq. 6)."""
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(covariance_a @ covariance_b).astype(complex)).real.sum()
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    return float(shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * roots)


def accuracy_interval(accuracy: float, rows: int) -> tuple[float, float]:
    """95 % interval of an accuracy for the sampling of `rows` test rows (Wilson 1927)."""
    z = 1.959964
    centre = (accuracy + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * np.sqrt(accuracy * (1 - accuracy) / rows + z * z / (4 * rows * rows))
    return float(centre - half), float(centre + half)


def confusion(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) counts: true class by row, predicted by column."""
    return np.bincount(truth * classes + prediction, minlength=classes * classes).reshape(classes, classes)
