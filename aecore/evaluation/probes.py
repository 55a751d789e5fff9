"""How well classes are predicted: by a linear probe of frozen codes, by nearest neighbours, and by a classifier."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from aecore.core.notes import Notes, left_out, sampled
from aecore.data.splits import Arrays, split_off
from aecore.evaluation.sampling import sample_rows
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
_MOST_PRODUCTS = 2**30
"""Most training rows x units x classes of a probe, which its fit multiplies some hundred times: a second each."""
_TREE_UNITS, _MOST_PAIRS, _FEWEST_COMPARED = 6, 2**32, 1000
"""Codes of so few units are searched in a tree, which is quick for any number of rows. Of others, the most pairs of a
training and a test row whose distances are computed, and the fewest test rows that suffice."""


class Probe(NamedTuple):
    """A linear classifier of frozen codes, which is being fitted in threads; whoever uses it waits for it."""

    scaler: Any
    """Standardises the codes."""
    candidates: Sequence[Callable[[], tuple[float, Any]]]
    """Each waits for a fitted model, and returns it behind its accuracy on the validation rows."""
    rows: int
    """Number of training rows to which it is fitted."""

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


def only_class(labels: BySplit, classes: Sequence[str]) -> str:
    """Say in words that all training rows are of one class, so that no class can be read out of codes; else empty."""
    one = (labels.train == labels.train[0]).all()
    return f"all {len(labels.train):,} training rows are of class {classes[labels.train[0]]}" if one else ""


def notes_on_accuracy(labels: BySplit, *measures: str) -> Notes:
    """Return a note on accuracies where test rows are of classes that no training row has."""
    unseen = int((~np.isin(labels.test, labels.train)).sum())
    text = f"counts as wrong {unseen:,} of {len(labels.test):,} test rows, of whose class there is no training row"
    return dict.fromkeys(measures, text) if unseen else {}


def linear_probe(threads: Threads, train: Labelled, validation: Labelled) -> Probe:
    """Fit a multinomial logistic regression to standardised codes; its regularisation is chosen on validation. There
    must be two classes. Of very many rows, units and classes a sample of the rows is used."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    codes, truth = train
    classes = len(np.unique(truth))
    if codes.size * classes > _MOST_PRODUCTS:
        rows = sample_rows(len(codes), max(_MOST_PRODUCTS // (codes.shape[1] * classes), 10 * classes), truth)
        codes, truth = codes[rows], truth[rows]
    scaler = StandardScaler().fit(codes)
    x, validation_x = scaler.transform(codes), scaler.transform(validation[0])

    def fit(strength: float) -> tuple[float, Any]:
        # a gradient of 1e-3 is far below what accuracy resolves, and takes a third of the default tolerance's time
        model = LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(x, truth)
        return model.score(validation_x, validation[1]), model

    return Probe(scaler, [threads.start(fit, strength) for strength in PROBE_STRENGTHS], len(truth))


def compared_rows(labels: BySplit, units: int) -> np.ndarray:
    """Return the numbers of the test rows whose neighbours are looked for, in codes of so many units: all, or as many
    as the number of training rows allows. The expected accuracy is the same."""
    rows = len(labels.test)
    most = rows if units <= _TREE_UNITS else max(_MOST_PAIRS // len(labels.train), _FEWEST_COMPARED)
    return sample_rows(rows, most, labels.test)


def nearest(
    threads: Threads, train: Labelled, codes: np.ndarray, neighbours: int = 5, tree: bool = True
) -> Callable[[], np.ndarray]:  # fmt: skip
    """Start to classify codes (rows, units) by vote of the nearest training codes (Euclidean); return a function that
    waits for their class numbers (rows,).

    Args:
        tree: let scikit-learn search codes of at most 15 units in a tree. Of a million rows with more than 10 units
            this may take ten times as long as all distances.
    """
    from sklearn.neighbors import KNeighborsClassifier

    algorithm = "auto" if tree else "brute"
    model = KNeighborsClassifier(min(neighbours, len(train[0])), algorithm=algorithm).fit(*train)
    starts = range(0, len(codes), _NEAREST_ROWS)
    parts = [threads.start(model.predict, codes[start : start + _NEAREST_ROWS]) for start in starts]
    return lambda: np.concatenate([part() for part in parts])


def few_rows(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the numbers of `count` labelled training rows, fewer than all, stratified by label; each class is among
    them if there are as many rows as classes."""
    return split_off(np.arange(len(labels)), labels, count, "labels", seed, subset=True)[1]


def probe_of_few_labels(threads: Threads, count: int, seed: int, codes: BySplit, labels: BySplit) -> Probe | None:
    """Fit a probe to `count` labelled training rows, fewer than all; None if they lack a class. A classifier finetuned
    with as many labels and the same seed has the same rows."""
    rows = few_rows(labels.train, count, seed)
    if len(np.unique(labels.train[rows])) < len(np.unique(labels.train)):
        return None
    return linear_probe(threads, (codes.train[rows], labels.train[rows]), (codes.validation, labels.validation))


def read_out(
    threads: Threads, codes: BySplit, labels: BySplit, classes: Sequence[str]
) -> tuple[Probe | None, Callable[[], np.ndarray] | None, Notes]:
    """Start to read classes out of codes, by a linear probe and by nearest neighbours.

    Returns:
        The probe; a function that waits for whether each of the `compared_rows` is classified right by its neighbours;
        and notes. Probe and neighbours are None where all training rows are of one class.
    """
    if reason := only_class(labels, classes):
        return None, None, left_out(reason, "probe/accuracy", "knn/accuracy")
    train, test = (codes.train, labels.train), (codes.test, labels.test)
    probe = linear_probe(threads, train, (codes.validation, labels.validation))
    rows = compared_rows(labels, codes.test.shape[1])
    every = len(rows) == len(labels.test)
    neighbours = nearest(threads, train, test[0] if every else test[0][rows], tree=every)
    notes = notes_on_accuracy(labels, "probe/accuracy", "knn/accuracy")
    notes |= sampled(probe.rows, len(labels.train), "training", "probe/accuracy")
    notes |= sampled(len(rows), len(labels.test), "test", "knn/accuracy")
    return probe, lambda: neighbours() == labels.test[rows], notes


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
