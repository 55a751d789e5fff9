"""Rows of a data set, and how they are divided into training, validation and test."""

import hashlib
from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from aecore.config.experiment import Data
from aecore.config.facts import Facts
from aecore.core.errors import InputError, join_names

SPLITS = ("train", "validation", "test")
UNUSED = len(SPLITS)
"""Number of the part, after those of `SPLITS`, with the rows that are not used."""
_SPLIT_SEED = 0
"""Splits belong to the data, not to the experiment: with every seed and every variant they are the same."""


class Rows(NamedTuple):
    """Rows of a data set in their order, before they are split."""

    x: np.ndarray
    """(rows, *shape), uint8 or float32, finite; NaN where a value is missing."""
    y: np.ndarray | None
    """(rows,) int64 class numbers, or with `data.anomaly` 1 for anomalies and 0 for normal rows; None without
    labels."""
    marks: np.ndarray | None
    """(rows,) the split that the data set itself names for each row, one of `SPLITS`; None if it names none."""


class Split(NamedTuple):
    """Rows of one split."""

    x: np.ndarray
    """(rows, *shape), uint8 or float32, as read."""
    y: np.ndarray | None
    """(rows,) int64 class numbers; None without labels. With `data.anomaly` only test rows have them, 1 for anomalies
    and 0 for normal rows."""

    def take(self, selected: np.ndarray) -> "Split":
        """Return the rows at the given indices, or where a mask is true."""
        return Split(self.x[selected], None if self.y is None else self.y[selected])


class Arrays(NamedTuple):
    """A data set in memory. The first layer reads (x - shift) * scale."""

    train: Split
    validation: Split
    test: Split
    shift: np.ndarray
    """float32, () or *shape."""
    scale: np.ndarray
    """float32, () or *shape."""
    fill: np.ndarray | None = None
    """What the first layer reads in place of a missing value, before it is shifted and scaled: float32, *shape. None
    where no value is missing."""


class Shares(NamedTuple):
    """The share of each split among the rows that are not marked validation or test; the remainder is not used."""

    test: float
    validation: float
    train: float


def split_rows(
    data: Data, facts: Facts, rows: int, labels: np.ndarray | None, marks: np.ndarray | None, hashes: np.ndarray | None
) -> tuple[np.ndarray, ...]:
    """Return the row numbers of train, validation and test, each in ascending order.

    Args:
        rows: number of rows in the data set.
        labels: class number of each row, or with `data.anomaly` whether it is an anomaly; or None.
        marks: the split that the data set names for each row, or None.
        hashes: `content_hashes` of the rows; needed where `data.split` is "content".

    Raises:
        InputError: a split would be empty, training would have fewer rows than there are classes, or with
            `data.anomaly` the test rows would not have both kinds.
    """
    if marks is not None and not (marks == "train").any():
        raise InputError(
            "data.path: no row is marked train, by column split or by names; mark some rows train, or leave out the "
            "column with --data.exclude split, or rename the files, so that splits are drawn"
        )
    if data.split == "content":
        assert hashes is not None
        shares = split_shares(data, count_marks(marks), rows, share_of_anomalies(data, [labels], [marks]))
        assigned = assign_splits(shares, positions_by_content(hashes), marks)
        train, validation, test = _rows_of(thin_anomalies(data, assigned, labels, marks, hashes))
    else:
        train, validation, test = _draw_splits(data, rows, labels, marks)
    check_not_empty([len(train), len(validation), len(test)])
    check_training_rows(len(train), rows, facts)
    if data.anomaly and labels is not None:
        check_test_rows(len(test), int(labels[test].sum()))
    return train, validation, test


def _rows_of(assigned: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the row numbers of train, validation and test, given the split of each row, (rows,)."""
    train, validation, test = (np.flatnonzero(assigned == number) for number in range(len(SPLITS)))
    return train, validation, test


def _draw_splits(
    data: Data, rows: int, labels: np.ndarray | None, marks: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw at random, stratified by label, the splits for which the data set marks no rows."""
    marked = np.full(rows, "train") if marks is None else marks
    train, validation, test = (np.flatnonzero(marked == split) for split in SPLITS)
    # where anomalies stay in training, nobody knows them there, so that only the test rows are stratified by them
    known = None if data.contamination == "mixed" else labels
    if not len(test):
        train, test = split_off(train, labels, data.test, "data.test")
    if not len(validation):
        train, validation = split_off(train, known, data.validation, "data.validation")
    if data.anomaly:  # before the limit, which counts the rows that training gets
        assigned = np.full(rows, UNUSED)
        for number, selected in enumerate((train, validation, test)):
            assigned[selected] = number
        train, validation, test = _rows_of(thin_anomalies(data, assigned, labels, marks))
    if data.limit is not None and data.limit < len(train):
        _, train = split_off(train, known, data.limit, "data.limit", subset=True)
    return train, validation, test


def asked_share(data: Data) -> float | None:
    """Return the share of anomalies that training and validation may hold, 0 for `clean`; None if all stay there."""
    if data.contamination == "mixed":
        return None
    return 0.0 if data.contamination == "clean" else data.contamination


def thin_anomalies(
    data: Data,
    assigned: np.ndarray,
    labels: np.ndarray | None,
    marks: np.ndarray | None,
    hashes: np.ndarray | None = None,
) -> np.ndarray:
    """Return the splits of rows with as many anomalies in training and in validation as `data.contamination` asks for;
    for `clean` and `mixed` the split of a row does not depend on the other rows.

    Anomalies that are taken out become test rows. They are not used where the data set marks splits, and where
    `data.split` is "content" and a share decides: it would move test rows into training when the data grow.

    Args:
        assigned: (rows,) index into `SPLITS` of each row, or `UNUSED`.
        labels: (rows,) 1 for anomalies and 0 for normal rows.
        marks: the split that the data set names for each row, or None.
        hashes: `content_hashes` of the rows; needed where `data.split` is "content" and a share decides.
    """
    share = asked_share(data)
    if not data.anomaly or share is None:
        return assigned
    assert labels is not None
    result = assigned.copy()
    by_content = data.split == "content" and share > 0
    elsewhere = UNUSED if by_content or marks is not None else SPLITS.index("test")
    for split in (SPLITS.index("train"), SPLITS.index("validation")):
        normal = int(((assigned == split) & (labels == 0)).sum())
        anomalies = np.flatnonzero((assigned == split) & (labels == 1))
        if by_content:
            assert hashes is not None
            anomalies = anomalies[np.argsort(hashes[anomalies], kind="stable")]
        else:
            anomalies = np.random.default_rng(_SPLIT_SEED).permutation(anomalies)
        result[anomalies[round(share / (1 - share) * normal) :]] = elsewhere
    return result


def split_off(
    rows: np.ndarray, labels: np.ndarray | None, size: float, field: str, seed: int = _SPLIT_SEED, subset: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draw some of the rows at random, each class in proportion to its share.

    A class that would be missing from one of the two parts gets a row there in exchange for one of the most frequent
    class, as long as the part has room for all classes. A class of one row can only be in one of them.

    Args:
        rows: row numbers, (rows,).
        labels: class numbers, indexed by row number; None draws regardless of classes.
        size: how many rows to draw: a share if below 1, else a number.
        field: config field that sets the size, for the error message.
        subset: the rows that are not drawn are not used, so that only the drawn ones need each class, also a class of
            one row.

    Returns:
        The row numbers that remain and those that were drawn, both in ascending order.

    Raises:
        InputError: one of the two parts would be empty.
    """
    count = int(size if size >= 1 else round(size * len(rows)))
    if not 0 < count < len(rows):
        raise InputError(f"{field}: {size:g} of {len(rows)} rows leaves a split empty; choose another size")
    order = np.random.default_rng(seed).permutation(rows)
    if labels is not None:
        # spread each class evenly over the order, so that any first part of it holds the classes in proportion
        shuffled_labels = labels[order]
        by_class = np.argsort(shuffled_labels, kind="stable")
        sizes = np.bincount(shuffled_labels)
        places = np.empty(len(rows))
        places[by_class] = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes if size])
        order = order[np.argsort(places, kind="stable")]
        drawn = np.arange(len(order)) < count
        sizes_of_rows = sizes[labels[order]]
        _complete(drawn, labels[order], sizes_of_rows >= (1 if subset else 2))
        if not subset:
            _complete(drawn[::-1], labels[order][::-1], sizes_of_rows[::-1] >= 2, False)
        return np.sort(order[~drawn]), np.sort(order[drawn])
    return np.sort(order[count:]), np.sort(order[:count])


def _complete(drawn: np.ndarray, labels: np.ndarray, shared: np.ndarray, side: bool = True) -> None:
    """Give each class a row where `drawn` is `side`, by exchanges with the class that has the most rows there.

    Args:
        drawn: (rows,) the part of each row, in the order in which rows are drawn; changed in place.
        labels: (rows,) class numbers.
        shared: (rows,) whether the row's class is to have a row there.
    """
    counts = np.bincount(labels[drawn == side], minlength=labels.max() + 1)
    for label in np.unique(labels[shared & (drawn != side)]):
        if counts[label] or (most := counts.argmax()) == label or counts[most] < 2:
            continue
        given = np.flatnonzero((labels == most) & (drawn == side))[-1]
        taken = np.flatnonzero((labels == label) & (drawn != side))[0]
        drawn[given], drawn[taken] = not side, side
        counts[label], counts[most] = 1, counts[most] - 1


def hide_labels(facts: Facts, split: str, rows: Split) -> Split:
    """Return rows of a split without their labels if these tell anomalies, which are only for the test."""
    return rows._replace(y=None) if facts.has_anomalies and split != "test" else rows


def share_of_anomalies(
    data: Data, labels: Sequence[np.ndarray | None], marks: Sequence[np.ndarray | None]
) -> float:  # fmt: skip
    """Return the share of anomalies among the rows that are marked train or not at all, from the labels and marks of
    each part of a set; 0 if the labels of these rows are not used, as nothing is taken out."""
    if not data.anomaly or asked_share(data) is None:
        return 0.0
    drawn = [y if m is None else y[m == "train"] for y, m in zip(labels, marks, strict=True) if y is not None]
    return sum(int(y.sum()) for y in drawn) / max(1, sum(map(len, drawn)))


def split_shares(data: Data, marked: np.ndarray, rows: int, anomalies: float = 0.0) -> Shares:
    """Return the shares by which `assign_splits` assigns each row without a look at the other rows.

    As in `split_rows`, test and validation are set aside from the training rows where no rows are marked for them; then
    `data.limit` applies. The sizes hold in expectation.

    Args:
        marked: how many rows are marked for each of `SPLITS`, (3,).
        rows: number of rows in the data set.
        anomalies: see `share_of_anomalies`. `data.limit` counts the rows that `thin_anomalies` leaves.
    """
    train = max(marked[0] if marked.any() else rows, 1)
    test = validation = 0.0
    if not marked[SPLITS.index("test")]:
        test = data.test if data.test < 1 else data.test / train
    if not marked[SPLITS.index("validation")]:
        validation = data.validation * (1 - test) if data.validation < 1 else data.validation / train
    rest = 1 - (test + validation)
    kept = min(1.0, (1 - anomalies) / (1 - (asked_share(data) or 0.0)))
    return Shares(test, validation, rest if data.limit is None else min(rest, data.limit / max(1, train * kept)))


def assign_splits(shares: Shares, positions: np.ndarray, marks: np.ndarray | None) -> np.ndarray:
    """Return for each row its split as an index into `SPLITS`, or 3 if the row is not used.

    The interval [0, 1) is divided into test, validation, train and unused, as wide as their shares. A row belongs to
    the part in which its position lies, unless it is marked validation or test.

    Args:
        positions: (rows,) in [0, 1), from `positions_by_content` or `positions_by_number`.
        marks: (rows,) the split that the data set names for each row, or None.
    """
    parts = np.array([SPLITS.index(split) for split in Shares._fields] + [len(SPLITS)])
    drawn = parts[np.searchsorted(np.cumsum(shares), positions, side="right")]
    if marks is None:
        return drawn
    marked = np.array([SPLITS.index(mark) for mark in marks])
    return np.where(marked == 0, drawn, marked)


def positions_by_content(hashes: np.ndarray) -> np.ndarray:
    """Return a number in [0, 1) for each row from its `content_hashes`: a row and its copies get the same number."""
    return (hashes >> np.uint64(11)) / 2.0**53


def positions_by_number(first: int, rows: int) -> np.ndarray:
    """Return a number in [0, 1) for each of `rows` row numbers from `first` on, always the same for the same row number
    (SplitMix64, Steele et al. 2014)."""
    z = (np.arange(first + 1, first + rows + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) / 2.0**64


def count_marks(marks: np.ndarray | None) -> np.ndarray:
    """Return how many rows are marked for each of `SPLITS`, (3,)."""
    return np.array([0 if marks is None else int((marks == split).sum()) for split in SPLITS])


def check_not_empty(counts: Iterable[int]) -> None:
    """Raise an InputError if one of `SPLITS` has no rows."""
    for split, count in zip(SPLITS, counts, strict=True):
        if not count:
            raise InputError(f"data: no row is left for {split}; choose other sizes, or mark some rows {split}")


def check_training_rows(count: int, rows: int, facts: Facts) -> None:
    """Raise an InputError if training gets fewer rows than there are classes, or than two."""
    if count < max(2, len(facts.classes)):
        raise InputError(
            f"data: training gets only {count} of {rows} rows, fewer than "
            f"{f'the {len(facts.classes)} classes' if facts.classes else 'two'}; provide more rows, or set aside fewer "
            f"(data.test, data.validation, data.limit){', or use --data.labels null' if facts.classes else ''}"
        )


def check_test_rows(rows: int, anomalies: int) -> None:
    """Raise an InputError if the test rows, of which so many are anomalies, are all of one kind."""
    if anomalies in (0, rows):
        lack, kind = ("an anomaly", "anomalies") if not anomalies else ("a normal row", "normal rows")
        raise InputError(
            f"data.anomaly: none of the {rows:,} test rows is {lack}, so there is nothing to tell apart; set aside "
            f"more rows (data.test), or mark some {kind} test"
        )


def missing_classes(classes: Sequence[str], train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> str:
    """Say in words which classes each of `SPLITS` lacks, from the class numbers of its rows; empty if it lacks none."""
    parts = []
    for split, labels in zip(SPLITS, (train, validation, test), strict=True):
        present = {*labels.tolist()}
        names = [name for number, name in enumerate(classes) if number not in present]
        if names:
            parts.append(f"no {'training' if split == 'train' else split} row is of class {join_names(names, 4)}")
    return ", ".join(parts)


def content_hashes(x: np.ndarray) -> np.ndarray:
    """Hash the values of each row of x (rows, *shape) to a 64-bit number, (rows,) uint64: equal rows get equal hashes,
    and 0.0 counts as equal to -0.0."""
    x = np.ascontiguousarray(x + np.float32(0) if x.dtype == np.float32 else x)  # -0.0 + 0.0 is 0.0
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in x.reshape(len(x), prod(x.shape[1:])))
    return np.frombuffer(b"".join(digests), "<u8")
