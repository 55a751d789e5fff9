"""What frozen codes tell of the classes: a linear probe, nearest neighbours, and how few labels the probe needs."""

from typing import Any, NamedTuple

import numpy as np

from aecore.core.imports import fast_imports
from aecore.data.splits import Arrays, split_off
from aecore.evaluation.scoring import Codes

Labelled = tuple[np.ndarray, np.ndarray]
"""Codes (rows, units) and class numbers (rows,)."""
PROBE_STRENGTHS = (0.01, 0.1, 1.0)
"""Inverse regularisation strengths that the linear probe tries; the best on validation is taken."""


class Labels(NamedTuple):
    """The class numbers of a data set, one array (rows,) per split."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Probe(NamedTuple):
    """A linear classifier of frozen codes."""

    scaler: Any
    model: Any

    def predict(self, codes: np.ndarray) -> np.ndarray:
        """Return the class numbers (rows,) of codes (rows, units)."""
        return self.model.predict(self.scaler.transform(codes))


def labels_of(data: Arrays) -> Labels | None:
    """Return the labels of all splits, or None where a split has none."""
    if data.train.y is None or data.validation.y is None or data.test.y is None:
        return None
    return Labels(data.train.y, data.validation.y, data.test.y)


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
        # a tolerance of 1e-3 on the gradient is far below what accuracy resolves and takes a third of the default's
        # time; the products are so narrow that two threads take up to twice as long as one
        with threadpool_limits(1, "blas"):
            model = LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(x, train[1])
        candidates.append((model.score(validation_x, validation[1]), model))
    return Probe(scaler, max(candidates, key=lambda scored: scored[0])[1])


def nearest(train: Labelled, codes: np.ndarray, neighbours: int = 5) -> np.ndarray:
    """Return the class numbers (rows,) of codes (rows, units), by vote of the nearest training codes (Euclidean)."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(min(neighbours, len(train[0]))).fit(*train).predict(codes)


def probe_with_few_labels(count: int, seed: int, codes: Codes, labels: Labels) -> float:
    """Return the test accuracy of a probe that is fitted to `count` labelled training rows, fewer than there are.

    They are the rows that a classifier finetuned with as many labels and the same seed is given.
    """
    rows = split_off(np.arange(len(labels.train)), labels.train, count, "labels", seed)[1]
    probe = linear_probe((codes.train[rows], labels.train[rows]), (codes.validation, labels.validation))
    return float((probe.predict(codes.test) == labels.test).mean())
