"""Data sets: named ones and your own Parquet, to arrays in three splits.

`inspect` runs on the driver: streamed passes that learn the digest, the shape and the classes, check the values, and
keep nothing. `load` runs in a task: it reads the rows once, leaves uint8 as uint8, and splits them.
"""

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from aecore.config.experiment import Data
from aecore.config.facts import Facts
from aecore.config.resolve import resolve_standardize
from aecore.core.errors import InputError
from aecore.data import parquet
from aecore.data.named import _DIGITS, _SETS, _digest, _digits_file, _download, _load_torchvision
from aecore.data.splits import Arrays, Split, _split, row_ids

if TYPE_CHECKING:
    pass


_LEAST = float(np.finfo(np.float32).tiny)
"""Spread of a feature whose reciprocal float32 still holds."""


def inspect(data: Data) -> Facts:
    """Digest, shape and classes of a data set, downloading it first where that is needed.

    Raises:
        InputError: the data are missing, unreadable, not of the form that the README describes, or cannot be split.
    """
    y = ids = None
    facts = identify(data)
    marks = np.repeat(["train", "test"], _SETS[data.name].rows) if data.name in _SETS else None
    for field, size in (("validation", data.validation), ("test", data.test)):
        if size >= facts.rows:
            raise InputError(f"data.{field}: {size:g} rows asked for, the data have {facts.rows}; ask for fewer")
    if data.name == "parquet":
        found = parquet.survey(data, facts)
        if found is None:
            return facts
        ids, y, marks = found
        parquet.give_back()
    if ids is None and data.split == "content":
        return facts  # which is which shows when the rows are read
    train, _, test = _split(data, facts, y, marks, ids, facts.rows)
    if ids is not None and (copies := np.isin(ids[test], ids[train]).sum()):
        warnings.warn(
            f"data.path: {copies} of the {len(test)} test rows are equal to training rows, so that the test rewards "
            "memory too; drop the copies",
            stacklevel=2,
        )
    return facts


def identify(data: Data) -> Facts:
    """What `inspect` learns, of data that need not be fit to train on.

    Raises:
        InputError: the data are missing, unreadable, or not of the form that the README describes.
    """
    if data.name == "parquet":
        facts = parquet.inspect(data)
    elif data.name == "digits":
        facts = Facts(digest=_digest([_digits_file()]), shape=(1, 8, 8), levels=17, classes=_DIGITS, rows=1_797)
    else:
        named = _SETS[data.name]
        files = [data.root / name for name in named.files]
        if not all(file.is_file() for file in files):
            _download(data, named)
        facts = Facts(digest=_digest(files), shape=named.shape, levels=256, classes=named.classes, rows=sum(named.rows))
    return facts if data.labels is not None else facts.model_copy(update={"classes": ()})


def load(data: Data, facts: Facts) -> Arrays:
    """Read and split the rows; standardisation is fitted on the training rows alone.

    Raises:
        InputError: a row cannot be read, or a split would be empty.
    """
    x, y, marks = rows(data, facts)
    ids = row_ids(x) if data.split == "content" else None
    train, validation, test = (
        Split(x[rows], None if y is None else y[rows]) for rows in _split(data, facts, y, marks, ids, len(x))
    )
    return Arrays(train, validation, test, *scaling(data, facts, [train.x]))


def rows(data: Data, facts: Facts) -> parquet.Rows:
    """All rows in their order.

    Raises:
        InputError: a row cannot be read.
    """
    if data.name == "parquet":
        x, y, marks = parquet.load(data, facts)
    elif data.name == "digits":
        from sklearn.datasets import load_digits

        bunch = load_digits()
        x, y, marks = bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int64), None
    else:
        x, y, marks = _load_torchvision(data, _SETS[data.name])
    return parquet.Rows(x, None if data.labels is None else y, marks)


def scaling(data: Data, facts: Facts, chunks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`shift` and `scale` of `Arrays`, from training rows that come in chunks (Chan et al. 1983, eq. 2.1); these are
    read only where features are standardised."""
    if not resolve_standardize(data, facts):
        return np.zeros((), np.float32), np.asarray(1 / (facts.levels - 1) if facts.levels else 1, np.float32)
    count, mean, squares = 0, np.zeros(facts.shape), np.zeros(facts.shape)
    for chunk in chunks:
        values = chunk.astype(np.float64)
        centre = values.mean(0)
        apart, total = centre - mean, count + len(values)
        squares += np.square(values - centre).sum(0) + apart**2 * count * len(values) / total
        mean, count = mean + apart * len(values) / total, total
    spread = np.sqrt(squares / count)
    # a constant feature carries nothing: left at zero instead of divided by zero
    return mean.astype(np.float32), (1 / np.where(spread > _LEAST, spread, 1)).astype(np.float32)
