"""How well classes are predicted: counts of confusions and the accuracy with its sampling error."""

import numpy as np


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
    return {
        "test/accuracy": accuracy,
        "test/error": 1 - accuracy,
        "test/accuracy_low": low,
        "test/accuracy_high": high,
    }
