"""A data set, named or Parquet: its facts, its rows in memory, and their scaling.

The driver calls `inspect`, which reads the data in streamed passes and keeps no rows. A worker calls `load`, which
reads the rows once and leaves uint8 values as uint8.
"""

import warnings
from collections.abc import Iterable

import numpy as np

from aecore.config.experiment import Data
from aecore.config.facts import Facts, TableColumns
from aecore.config.resolve import resolve_in_memory, resolve_standardize
from aecore.core.errors import InputError
from aecore.core.types import describe_shape
from aecore.data import named, parquet
from aecore.data.anomalies import count_rows, describe_anomalies, describe_row_counts, warn_of_few
from aecore.data.labels import are_anomalies, only_anomalies
from aecore.data.numbers import SMALLEST_SPREAD, Moments
from aecore.data.splits import (
    SPLITS,
    Arrays,
    Rows,
    Split,
    content_hashes,
    hide_labels,
    missing_classes,
    split_rows,
)
from aecore.data.values import refuse_absent


def inspect(data: Data, like: TableColumns | None = None) -> Facts:
    """Return digest, shape, classes and number of rows of a data set, after checking its values and its splits.

    A named set is downloaded first where that is needed. Warnings say how many test rows equal training rows, and which
    classes a split lacks.

    Args:
        like: the columns that a model was trained on: a table's columns are matched to them by name, and its numbers
            are read as they were read for the model. None if the data are read for no earlier model.

    Raises:
        InputError: the data are missing, unreadable, not of the form that jobs/DATA.md describes, or cannot be split.
    """
    facts = identify(data, like)
    for field, size in (("validation", data.validation), ("test", data.test)):
        if size >= facts.rows:
            raise InputError(f"data.{field}: {size:g} rows requested, but there are only {facts.rows}; request fewer")
    labels = hashes = None
    if data.name == "parquet":
        survey = parquet.survey(data, facts, strict=like is None or bool(like.features))
        if survey is None:
            return facts
        hashes, labels, marks = survey
        parquet.release_memory()
    else:
        marks = named.split_marks(data)
        if data.split == "content":
            return facts  # the split depends on the values, which only `load` reads
        labels = are_anomalies(data, facts, named.load_labels(data)) if facts.has_anomalies else None
    train, validation, test = split_rows(data, facts, facts.rows, labels, marks, hashes)
    if hashes is not None and (copies := np.isin(hashes[test], hashes[train]).sum()):
        warnings.warn(
            f"data.path: {copies} of the {len(test)} test rows are equal to training rows, so the test also rewards "
            "memorising them; remove the copies",
            stacklevel=2,
        )
    if labels is not None and facts.has_anomalies:
        if data.split == "drawn" and resolve_in_memory(data, facts) == "never":
            return facts  # these rows are not drawn but split one by one, as they are read
        facts = facts.model_copy(update={"row_counts": count_rows(labels, [train, validation, test])})
        warn_of_few(data, facts)
        return facts
    if labels is None or not facts.classes:
        return facts
    missing = missing_classes(facts.classes, *(labels[rows] for rows in (train, validation, test)))
    if missing:
        warnings.warn(f"data: {missing}; accuracies say nothing of a class that a split lacks", stacklevel=2)
    return facts.model_copy(update={"trained_classes": len(np.unique(labels[train]))})


def identify(data: Data, like: TableColumns | None = None) -> Facts:
    """Return digest, shape, classes and number of rows of a data set, without the checks that only training needs; an
    InputError says what is wrong. For `like` see `inspect`."""
    facts = parquet.identify(data, like) if data.name == "parquet" else named.identify(data)
    if data.anomaly:
        return only_anomalies(data, facts)
    return facts if data.labels is not None else facts.model_copy(update={"classes": ()})


def describe(data: Data, facts: Facts, divided: bool = True) -> list[str]:
    """Say in some lines which rows and columns of a data set are read, and what is left out and why.

    Args:
        divided: say also how the rows are split.
    """
    counts = describe_row_counts(facts) if divided else []
    if data.name == "parquet":
        return parquet.describe(data, facts, divided) + counts
    labels = f"{len(facts.classes)} classes" if facts.classes else "labels are not used"
    if facts.has_anomalies:
        labels = f"label{'' if len(data.anomaly) == 1 else 's'} {describe_anomalies(data, facts)}"
    return [f"data: {data.name}, {facts.rows:,} rows, {describe_shape(facts.shape)}, {labels}", *counts]


def load(data: Data, facts: Facts) -> Arrays:
    """Read all rows and split them; scaling is computed from the training rows alone.

    Raises:
        InputError: a row cannot be read, or a split would be empty.
    """
    x, y, marks = load_rows(data, facts)
    hashes = content_hashes(x) if data.split == "content" else None
    parts = zip(SPLITS, split_rows(data, facts, len(x), y, marks, hashes), strict=True)
    train, validation, test = (hide_labels(facts, split, Split(x, y).take(n)) for split, n in parts)
    return Arrays(train, validation, test, *scaling(data, facts, [train.x]), fill_values(facts, train.x))


def load_rows(data: Data, facts: Facts) -> Rows:
    """Read all rows in their order; an InputError says which row cannot be read."""
    rows = parquet.load(data, facts) if data.name == "parquet" else named.load(data)
    if data.name != "parquet" and rows.y is not None and facts.has_anomalies:
        rows = rows._replace(y=are_anomalies(data, facts, rows.y))
    return rows if data.labels is not None else rows._replace(y=None)


def scaling(data: Data, facts: Facts, chunks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return `shift` and `scale`: the first layer reads (x - shift) * scale.

    Where features are standardised, mean and standard deviation of each feature are computed from the training rows in
    which it is not missing; rows come in chunks. Otherwise no chunk is read, and integers are scaled to [0, 1]. The
    values of categories, 0 and 1, stay as they are.
    """
    if not resolve_standardize(data, facts):
        return np.zeros((), np.float32), np.asarray(1 / (facts.levels - 1) if facts.levels else 1, np.float32)
    moments = Moments()
    for chunk in chunks:
        moments.add(chunk.astype(np.float64))
    mean, spread = moments.mean, moments.deviation
    for start, stop in facts.columns.blocks:
        mean[start:stop], spread[start:stop] = 0, 1
    # a constant feature carries no information: it becomes zero, and nothing is divided by zero
    return mean.astype(np.float32), (1 / np.where(spread > SMALLEST_SPREAD, spread, 1)).astype(np.float32)


def fill_values(facts: Facts, x: np.ndarray) -> np.ndarray | None:
    """Return what is read in place of missing values, float32 (*shape,): the median of a number over the training rows
    `x`, and the shares of a category's texts among them. None where no value can be missing.

    Unlike zeros, the shares are what the first layer reads on average, so that a row without a category lies among the
    rows that it was trained on.

    Raises:
        InputError: a feature is missing in all training rows.
    """
    columns = facts.columns
    if columns.missing == "refuse" and not columns.blocks:
        return None
    refuse_absent(np.isnan(x).all(0), columns, "the training rows")
    fill = np.nanmedian(x, 0)
    for start, stop in columns.blocks:
        fill[start:stop] = np.nanmean(x[:, start:stop], 0, dtype=np.float64)
    return fill.astype(np.float32)
