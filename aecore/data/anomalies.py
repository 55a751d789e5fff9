"""Anomaly studies: how many normal rows and anomalies each split holds, in numbers and in words."""

import warnings
from collections.abc import Sequence

import numpy as np

from aecore.config.experiment import Data
from aecore.config.facts import Facts, RowCounts
from aecore.core.errors import join_names
from aecore.data.splits import SPLITS, asked_share


def count_rows(anomalous: np.ndarray, splits: Sequence[np.ndarray]) -> tuple[RowCounts, ...]:
    """Count the normal rows and the anomalies of each split and, last, of the rows in none: `Facts.row_counts`.

    Args:
        anomalous: (rows,) 1 for anomalies and 0 for normal rows.
        splits: the row numbers of each split.
    """
    unused = np.setdiff1d(np.arange(len(anomalous)), np.concatenate(splits))
    counts = [np.bincount(anomalous[rows], minlength=2).tolist() for rows in (*splits, unused)]
    return tuple(RowCounts(normal=normal, anomalies=anomalies) for normal, anomalies in counts)


def warn_of_few(data: Data, facts: Facts) -> None:
    """Warn if training or validation holds a smaller share of anomalies than is asked for."""
    share = asked_share(data) or 0.0
    for split, counts in zip(SPLITS[:2], facts.row_counts, strict=False):
        asked = round(share / (1 - share) * counts.normal)
        # of rows that `data.limit` draws, the share is rounded once more
        if counts.anomalies + (data.limit is not None) < asked:
            warnings.warn(
                f"data.contamination: {counts.anomalies / counts.rows:.2%} of the {counts.rows:,} {split} rows are "
                f"anomalies, not {share:.2%}, as the data have no more for them",
                stacklevel=3,
            )


def describe_anomalies(data: Data, facts: Facts) -> str:
    """Say which labels mark anomalies and, where it is known, how many rows have them; nothing without anomalies."""
    if not facts.has_anomalies:
        return ""
    words = f"{join_names(data.anomaly)} {'marks' if len(data.anomaly) == 1 else 'mark'} anomalies"
    if not facts.row_counts:
        return words
    count = sum(counts.anomalies for counts in facts.row_counts)
    return f"{words}: {count:,} of {facts.rows:,} rows, {100 * count / facts.rows:.2g} %"


def describe_row_counts(facts: Facts) -> list[str]:
    """Say in a line how many normal rows and anomalies each split has; no line where this is not known."""

    def words(counts: RowCounts) -> str:
        named = [(counts.normal, "normal row"), (counts.anomalies, "anomaly")]
        plural = {"normal row": "normal rows", "anomaly": "anomalies"}
        return " and ".join(f"{count:,} {name if count == 1 else plural[name]}" for count, name in named if count)

    parts = [f"{name} {words(counts)}" for name, counts in zip((*SPLITS, "not used"), facts.row_counts, strict=False)]
    used = [part for part, counts in zip(parts, facts.row_counts, strict=True) if counts.rows]
    return [f"splits: {'; '.join(used)}"] if used else []
