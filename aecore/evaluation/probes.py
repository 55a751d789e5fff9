"""How well classes are predicted: by a linear probe of frozen codes, by nearest neighbours, and by a classifier."""

from typing import Any, NamedTuple

import numpy as np

from aecore.core.imports import fast_imports
from aecore.data.splits import Arrays, split_off
from aecore.evaluation.scoring import BySplit

Labelled = tuple[np.ndarray, np.ndarray]
"""Codes (rows, units) and class numbers (rows,)."""
PROBE_STRENGTHS = (0.01, 0.1, 1.0)
"""Inverse regularisation strengths that the linear probe tries; the best on validation is taken."""


class Probe(NamedTuple):
    """A linear classifier of frozen codes, with the scaler of these."""

    scaler: Any
    model: Any

    def predict(self, codes: np.ndarray) -> np.ndarray:
        """Return the class numbers (rows,) of codes (rows, units)."""
        return self.model.predict(self.scaler.transform(codes))


def labels_of(data: Arrays) -> BySplit | None:
    """Return the labels of all splits, or None where a split has none."""
    if data.train.y is None or data.validation.y is None or data.test.y is None:
        return None
    return BySplit(data.train.y, data.validation.y, data.test.y)


def linear_probe(train: Labelled, validation: Labelled) -> Probe:
    """Fit a multinomial logistic regression to standardised codes; its regularisation is chosen on validation."""
    with fast_imports():
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    scaler = StandardScaler().fit(train[0])
    x, validation_x = scaler.transform(train[0]), scaler.transform(validation[0])
    candidates = []
    for strength in PROBE_STRENGTHS:
        # a gradient of 1e-3 is far below what accuracy resolves, and takes a third of the default tolerance's time; the
        # products are so narrow that two threads take up to twice as long as one
        with threadpool_limits(1, "blas"):
            model = LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(x, train[1])
        candidates.append((model.score(validation_x, validation[1]), model))
    return Probe(scaler, max(candidates, key=lambda scored: scored[0])[1])


def nearest(train: Labelled, codes: np.ndarray, neighbours: int = 5) -> np.ndarray:
    """Return the class numbers (rows,) of codes (rows, units), by vote of the nearest training codes (Euclidean)."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(min(neighbours, len(train[0]))).fit(*train).predict(codes)


def probe_with_few_labels(count: int, seed: int, codes: BySplit, labels: BySplit) -> float:
    """Return the test accuracy of a probe with `count` labelled training rows, fewer than all. A classifier finetuned
    with as many labels and the same seed has the same rows."""
    rows = split_off(np.arange(len(labels.train)), labels.train, count, "labels", seed)[1]
    probe = linear_probe((codes.train[rows], labels.train[rows]), (codes.validation, labels.validation))
    return float((probe.predict(codes.test) == labels.test).mean())


def confusion(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """Count the pairs of classes, (classes, classes): true class by row, predicted class by column."""
    return np.bincount(truth * classes + prediction, minlength=classes * classes).reshape(classes, classes)


def accuracy_interval(accuracy: float, rows: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy for the sampling of `rows` test rows (Wilson 1927)."""
    z = 1.959964
    centre = (accuracy + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * np.sqrt(accuracy * (1 - accuracy) / rows + z * z / (4 * rows * rows))
    return float(centre - half), float(centre + half)


def accuracy_metrics(table: np.ndarray) -> dict[str, float]:
    """Return accuracy and error of the test rows that `table` counts, and the accuracy's 95 % interval."""
    accuracy = float(table.trace() / table.sum())
    low, high = accuracy_interval(accuracy, int(table.sum()))
    metrics = {"test/accuracy": accuracy, "test/error": 1 - accuracy}
    return metrics | {"test/accuracy_low": low, "test/accuracy_high": high}
