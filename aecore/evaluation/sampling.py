"""Samples of rows, for measures whose cost would outgrow the data."""

import numpy as np

from aecore.data.splits import split_off


def sample_rows(rows: int, most: int, labels: np.ndarray | None = None) -> np.ndarray:
    """Return the numbers of `most` of the rows, drawn at random and stratified by label, in ascending order; of all
    rows where there are no more. The draw is always the same.

    Args:
        labels: (rows,) class numbers.
    """
    everything = np.arange(rows)
    return everything if rows <= most else split_off(everything, labels, most, "sample", subset=True)[1]


def first_rows(labels: np.ndarray | None, rows: int, most: int) -> np.ndarray:
    """Return the numbers of the first `most` rows or, where a class is missing among these, as it is in a file that is
    sorted by class, of a stratified sample.

    Args:
        labels: (rows,) class numbers; None if there are none.
    """
    if labels is None or rows <= most or len(np.unique(labels[:most])) == len(np.unique(labels)):
        return np.arange(min(rows, most))
    return sample_rows(rows, most, labels)
