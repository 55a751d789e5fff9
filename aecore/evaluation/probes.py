"""How well classes are predicted: by a linear probe of frozen codes, by nearest neighbours, and by a classifier."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from aecore.data.splits import Arrays, split_off
from aecore.evaluation.scoring import BySplit
from aecore.evaluation.threads import Threads

Labelled = tuple[np.ndarray, np.ndarray]
"""Codes (rows, units) and class numbers (rows,)."""
PROBE_STRENGTHS = (0.01, 0.1, 1.0)
"""Inverse regularisation strengths that the linear probe tries; the best on validation is taken."""
PROBE_MODULES = ("sklearn.linear_model", "sklearn.neighbors")
"""What the threads that fit probes and find neighbours import."""
_NEAREST_ROWS = 1024
"""Rows whose neighbours a thread finds: a multiple of scikit-learn's 256, so that distances are rounded as without."""


class Probe(NamedTuple):
    """A linear classifier of frozen codes, which is being fitted in threads; whoever uses it waits for it."""

    scaler: Any
    """Standardises the codes."""
    candidates: Sequence[Callable[[], tuple[float, Any]]]
    """Each waits for a fitted model, and returns it behind its accuracy on the validation rows."""

    def predict(self, codes: np.ndarray) -> np.ndarray:
        """Return the class numbers (rows,) of codes (rows, units)."""
        _, best = max((candidate() for candidate in self.candidates), key=lambda scored: scored[0])
        return best.predict(self.scaler.transform(codes))

    def accuracy(self, test: Labelled) -> float:
        """Return the share of rows that are classified right."""
        codes, truth = test
        return float((self.predict(codes) == truth).mean())


def labels_of(data: Arrays) -> BySplit | None:
    """Return the labels of all splits, or None where a split has none."""
    if data.train.y is None or data.validation.y is None or data.test.y is None:
        return None
    return BySplit(data.train.y, data.validation.y, data.test.y)


def linear_probe(threads: Threads, train: Labelled, validation: Labelled) -> Probe:
    """Fit a multinomial logistic regression to standardised codes; its regularisation is chosen on validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train[0])
    x, validation_x = scaler.transform(train[0]), scaler.transform(validation[0])

    def fit(strength: float) -> tuple[float, Any]:
        # a gradient of 1e-3 is far below what accuracy resolves, and takes a third of the default tolerance's time
        model = LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(x, train[1])
        return model.score(validation_x, validation[1]), model

    return Probe(scaler, [threads.start(fit, strength) for strength in PROBE_STRENGTHS])


def nearest(
    threads: Threads, train: Labelled, codes: np.ndarray, neighbours: int = 5
) -> Callable[[], np.ndarray]:  # fmt: skip
    """Start to classify codes (rows, units) by vote of the nearest training codes (Euclidean); return a function that
    waits for their class numbers (rows,)."""
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(min(neighbours, len(train[0]))).fit(*train)
    starts = range(0, len(codes), _NEAREST_ROWS)
    parts = [threads.start(model.predict, codes[start : start + _NEAREST_ROWS]) for start in starts]
    return lambda: np.concatenate([part() for part in parts])


def probe_of_few_labels(threads: Threads, count: int, seed: int, codes: BySplit, labels: BySplit) -> Probe:
    """Fit a probe to `count` labelled training rows, fewer than all. A classifier finetuned with as many labels and the
    same seed has the same rows."""
    rows = split_off(np.arange(len(labels.train)), labels.train, count, "labels", seed)[1]
    return linear_probe(threads, (codes.train[rows], labels.train[rows]), (codes.validation, labels.validation))


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
