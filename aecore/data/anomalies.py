"""Anomaly studies: which labels mark anomalies, and how many anomalies training and validation hold."""

import re
import warnings
from collections.abc import Sequence

import numpy as np

from aecore.config.experiment import Data
from aecore.config.facts import Facts, RowKinds
from aecore.core.errors import InputError, join_names
from aecore.data.columns import find_name
from aecore.data.splits import SPLITS, asked_share


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


def count_kinds(anomalous: np.ndarray, splits: Sequence[np.ndarray]) -> tuple[RowKinds, ...]:
    """Return `Facts.kinds`.

    Args:
        anomalous: (rows,) 1 for anomalies and 0 for normal rows.
        splits: the row numbers of each split.
    """
    unused = np.setdiff1d(np.arange(len(anomalous)), np.concatenate(splits))
    counts = [np.bincount(anomalous[rows], minlength=2).tolist() for rows in (*splits, unused)]
    return tuple(RowKinds(normal=normal, anomalies=anomalies) for normal, anomalies in counts)


def warn_of_few(data: Data, facts: Facts) -> None:
    """Warn if training or validation holds a smaller share of anomalies than is asked for."""
    share = asked_share(data) or 0.0
    for split, kinds in zip(SPLITS[:2], facts.kinds, strict=False):
        asked = round(share / (1 - share) * kinds.normal)
        # of rows that `data.limit` draws, the share is rounded once more
        if kinds.anomalies + (data.limit is not None) < asked:
            warnings.warn(
                f"data.contamination: {kinds.anomalies / kinds.rows:.2%} of the {kinds.rows:,} {split} rows are "
                f"anomalies, not {share:.2%}, as the data have no more for them",
                stacklevel=3,
            )


def describe_anomalies(data: Data, facts: Facts) -> str:
    """Say which labels mark anomalies and, where it is known, how many rows have them; nothing without anomalies."""
    if not facts.has_anomalies:
        return ""
    words = f"{join_names(data.anomaly)} {'marks' if len(data.anomaly) == 1 else 'mark'} anomalies"
    if not facts.kinds:
        return words
    count = sum(kinds.anomalies for kinds in facts.kinds)
    return f"{words}: {count:,} of {facts.rows:,} rows, {100 * count / facts.rows:.2g} %"


def describe_kinds(facts: Facts) -> list[str]:
    """Say in a line how many normal rows and anomalies each split has; no line where this is not known."""

    def words(kinds: RowKinds) -> str:
        named = [(kinds.normal, "normal row"), (kinds.anomalies, "anomaly")]
        plural = {"normal row": "normal rows", "anomaly": "anomalies"}
        return " and ".join(f"{count:,} {name if count == 1 else plural[name]}" for count, name in named if count)

    parts = [f"{name} {words(kinds)}" for name, kinds in zip((*SPLITS, "not used"), facts.kinds, strict=False)]
    used = [part for part, kinds in zip(parts, facts.kinds, strict=True) if kinds.rows]
    return [f"splits: {'; '.join(used)}"] if used else []
