"""How rows are divided into training, validation and test."""

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from aecore.config.experiment import Data
from aecore.config.facts import Facts
from aecore.core.errors import InputError

_SPLIT_SEED = 0
"""Splits belong to the data, not to the experiment: every seed and every variant sees the same ones."""
SPLITS = ("train", "validation", "test")


class Split(NamedTuple):
    """Rows of one split."""

    x: np.ndarray
    """(rows, *shape), uint8 or float32, as read."""
    y: np.ndarray | None
    """(rows,) int64 class numbers."""


class Arrays(NamedTuple):
    """A data set in memory. What a layer reads is (x - shift) * scale."""

    train: Split
    validation: Split
    test: Split
    shift: np.ndarray
    """float32, () or *shape."""
    scale: np.ndarray
    """float32, () or *shape."""


class Shares(NamedTuple):
    """Shares of the rows that are not marked otherwise; what is left over is not used."""

    test: float
    validation: float
    train: float


def _split(
    data: Data, facts: Facts, y: np.ndarray | None, marks: np.ndarray | None, ids: np.ndarray | None, rows: int
) -> tuple[np.ndarray, ...]:
    """Row numbers of train, validation and test.

    Args:
        marks: what the data say of each row ("train", "validation", "test"), or None.
        ids: of each row, where its content decides.

    Raises:
        InputError: a split would be empty, or training would have fewer rows than there are classes.
    """
    everything = np.arange(rows)
    if marks is not None and not (marks == "train").any():
        raise InputError("split: no row is marked train; mark some, or drop the column and let data.test cut them")
    if data.split == "content":
        assert ids is not None
        found = place(shares(data, count_marks(marks), rows), content(ids), marks)
        train, validation, test = (everything[found == number] for number in range(len(SPLITS)))
        refuse_empty([len(train), len(validation), len(test)])
    else:
        if marks is None:
            train, test = cut(everything, y, data.test, "data.test")
        else:
            train, test = everything[marks == "train"], everything[marks == "test"]
            if not len(test):
                train, test = cut(train, y, data.test, "data.test")
        if marks is not None and (marks == "validation").any():
            validation = everything[marks == "validation"]
        else:
            train, validation = cut(train, y, data.validation, "data.validation")
        if data.limit is not None and data.limit < len(train):
            _, train = cut(train, y, data.limit, "data.limit")
    if len(train) < max(2, len(facts.classes)):
        raise InputError(
            f"data: of {rows} rows {len(train)} are left to train on, fewer than "
            f"{f'the {len(facts.classes)} classes' if facts.classes else 'two'}; bring more, or cut off fewer "
            f"(data.test, data.validation, data.limit){', or --data.labels null' if facts.classes else ''}"
        )
    return train, validation, test


def cut(
    rows: np.ndarray, y: np.ndarray | None, size: float, field: str, seed: int = _SPLIT_SEED
) -> tuple[np.ndarray, np.ndarray]:
    """Cut `size` (a share below 1, else a number) off `rows`, stratified by label where each class has enough.

    Args:
        rows: row numbers, (rows,).
        y: the labels of all rows that the numbers may name, or None.
        field: the config field that asks, for the message.

    Returns:
        The rest and what was cut off, each in order.

    Raises:
        InputError: one of them would be empty.
    """
    count = int(size if size >= 1 else round(size * len(rows)))
    if not 0 < count < len(rows):
        raise InputError(f"{field}: {size:g} of {len(rows)} rows leaves a split empty; choose another size")
    shuffled = np.random.default_rng(seed).permutation(rows)
    if y is None:
        return np.sort(shuffled[count:]), np.sort(shuffled[:count])
    # spread each class evenly over the order, so that any prefix holds it in proportion
    labels = y[shuffled]
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    rank = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes if size])
    place = np.empty(len(rows))
    place[order] = rank
    even = shuffled[np.argsort(place, kind="stable")]
    return np.sort(even[count:]), np.sort(even[:count])


def shares(data: Data, marked: np.ndarray, rows: int) -> Shares:
    """Of a set that is split row by row. As by `cut`, test and validation are cut off the training rows where none are
    marked, then the limit.

    Args:
        marked: rows that are marked as of each of `SPLITS`, (3,).
    """
    train = marked[0] if marked.any() else rows
    parts = {"test": 0.0, "validation": 0.0}
    for name, size in (("test", data.test), ("validation", data.validation)):
        if not marked[SPLITS.index(name)]:
            share = size if size < 1 else size / max(train, 1)
            parts[name] = share * (1 - parts["test"] if name == "validation" and size < 1 else 1)
    rest = 1 - sum(parts.values())
    limit = rest if data.limit is None else min(rest, data.limit / max(train, 1))
    return Shares(parts["test"], parts["validation"], limit)


def place(shares: Shares, numbers: np.ndarray, marks: np.ndarray | None) -> np.ndarray:
    """Which of `SPLITS` each row is in, by its number in [0, 1) and what it is marked as; 3 is none."""
    drawn = np.array([2, 1, 0, 3])[np.searchsorted(np.cumsum(shares), numbers, side="right")]
    if marks is None:
        return drawn
    marked = np.array([SPLITS.index(mark) for mark in marks])
    return np.where(marked == 0, drawn, marked)


def content(ids: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each row, by its `row_ids`."""
    return (ids >> np.uint64(11)) / 2.0**53


def count_marks(marks: np.ndarray | None) -> np.ndarray:
    """Rows that are marked as of each of `SPLITS`, (3,)."""
    return np.array([0 if marks is None else int((marks == split).sum()) for split in SPLITS])


def refuse_empty(counts: Iterable[int]) -> None:
    """Raises an InputError where one of `SPLITS` has no rows."""
    for split, count in zip(SPLITS, counts, strict=True):
        if not count:
            raise InputError(f"data: no row is left for {split}; choose other sizes, or mark some rows {split}")


def row_ids(x: np.ndarray) -> np.ndarray:
    """A number (rows,) uint64 of each row of x (rows, *shape), of its values alone: copies have the same."""
    x = np.ascontiguousarray(x + np.float32(0) if x.dtype == np.float32 else x)  # no negative zeros
    digests = (
        hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in x.reshape(len(x), math.prod(x.shape[1:]))
    )
    return np.frombuffer(b"".join(digests), "<u8")
