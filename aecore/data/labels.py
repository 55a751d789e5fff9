"""What the labels of a data set say: the class of each row, or with `data.anomaly` whether it is an anomaly.

Functions raise an InputError if the labels do not look like classes, or do not tell anomalies from normal rows.
"""

import re
import shlex
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from aecore.config.experiment import Data
from aecore.config.facts import Facts
from aecore.core.errors import InputError, join_names
from aecore.data.columns import find_name
from aecore.data.marks import may_be_years

_MANY_CLASSES, _FEW_ROWS = 20, 10
"""With more classes than the first number, integers that leave numbers out, or that on average fewer rows than the
second have, are taken for a measured value."""


def find_classes(data: Data, column: str, labels: set[Any], rows: int) -> tuple[str, ...]:
    """Return the names of the classes, in the order of their labels."""
    classes = tuple(str(label) for label in sorted(labels))
    if len(classes) < 2 and not data.anomaly:
        raise InputError(
            f"data.labels: all rows of column {column} have one class ({classes[0]}); use --data.labels null"
        )
    if padded := [name for name in classes if name != name.strip() and name.strip() in classes]:
        warnings.warn(
            f"data.labels: the classes {padded[0]!r} and {padded[0].strip()!r} of column {column} differ in blanks "
            "alone, and count as two; remove the blanks if they are one",
            stacklevel=4,
        )
    numeric = all(isinstance(label, int) for label in labels)
    if data.labels == "auto" and _is_doubtful([*labels] if numeric else [], len(labels), rows):
        raise InputError(
            f"data.labels: column {column} has {len(classes)} different values in {rows} rows, so it may be measured "
            f"rather than a label; write --data.labels {shlex.quote(column)}, or --data.labels null"
        )
    return classes


def check_key(data: Data, key: str, classes: Sequence[str], rows: int) -> None:
    """Raise an InputError if the values of a folders' key are all the same, or if nobody named it and they are rather
    measured or years."""
    if len(classes) < 2 and not data.anomaly:
        raise InputError(f"data.labels: all rows have one class ({key}={classes[0]}); use --data.labels null")
    whole = [int(name) for name in classes if re.fullmatch(r"-?\d+", name)]
    is_doubtful = _is_doubtful(whole if len(whole) == len(classes) else [], len(classes), rows)
    if data.labels == "auto" and (is_doubtful or may_be_years(key, classes)):
        raise InputError(
            f"data.labels: the folders' key {key} has {len(classes)} different values in {rows} rows, {classes[0]} to "
            f"{classes[-1]}, so it may be measured or a year rather than a label; write --data.labels {key}, or "
            "--data.labels null"
        )


def _is_doubtful(numbers_of: Sequence[int], classes: int, rows: int) -> bool:
    """Say whether so many different labels, these numbers or else texts, are rather a measured value or the names of
    the rows than classes."""
    if not numbers_of:
        return classes > _MANY_CLASSES and 2 * classes > rows
    gaps = max(numbers_of) - min(numbers_of) >= classes
    return classes > _MANY_CLASSES and (gaps or _FEW_ROWS * classes > rows)


def only_anomalies(data: Data, facts: Facts) -> Facts:
    """Return the facts of a set with classes for a job to which labels tell nothing but anomalies (`data.anomaly`).

    Raises:
        InputError: there are no labels, no row has a label that marks anomalies, or all rows have one.
    """
    if not facts.classes:
        raise InputError(
            "data.anomaly: the data have no labels that could mark anomalies; name their column with --data.labels"
        )
    if all(label_numbers(data, facts).values()):
        raise InputError(
            f"data.anomaly: all rows are anomalies, labelled {join_names(facts.classes)}, and training needs normal "
            "rows; name only the values of anomalies, or add normal rows"
        )
    return facts.model_copy(update={"labels": facts.classes, "classes": ()})


def label_numbers(data: Data, facts: Facts) -> dict[str, int]:
    """Return the number that stands for each label in `Rows.y`: of its class or, with `data.anomaly`, 1 of anomalies
    and 0 of normal rows.

    Raises:
        InputError: no row has a label that `data.anomaly` names.
    """
    labels = facts.classes or facts.labels
    if not data.anomaly:
        return {label: number for number, label in enumerate(labels)}
    anomalous = {_label(value, labels) for value in data.anomaly}
    return {label: int(label in anomalous) for label in labels}


def _label(value: str, labels: Sequence[str]) -> str:
    """Return the label that a value means, which may be written in another case or as 1.0 for 1."""
    label = find_name(value, labels) or find_name(re.sub(r"\.0+$", "", value), labels)
    if label is None and len(labels) == 1:
        raise InputError(
            f"data.anomaly: all rows are normal, labelled {labels[0]}, and no row has the label {value}; name data "
            "with anomalies, or leave data.anomaly out"
        )
    if label is None:
        raise InputError(f"data.anomaly: no row has the label {value}; the labels are {join_names(labels)}")
    return label


def are_anomalies(data: Data, facts: Facts, labels: np.ndarray) -> np.ndarray:
    """Return 1 for anomalies and 0 for normal rows, (rows,), given the number of each row's label in `facts.labels`."""
    return np.array([*label_numbers(data, facts).values()], np.int64)[labels]
