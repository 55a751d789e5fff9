"""Anomaly studies: how many normal rows and anomalies each split holds, in numbers and in words."""

import warnings
from collections.abc import Sequence

import numpy as np

from aecore.config.experiment import Data
from aecore.config.facts import Facts, RowKinds
from aecore.core.errors import join_names
from aecore.data.splits import SPLITS, asked_share


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
