"""Reads the values of the columns of a table as arrays: features, labels and split marks.

Functions raise an InputError that names the file, column and row where a value is missing or cannot be used.
"""

from collections.abc import Sequence
from decimal import Decimal
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aecore.config.experiment import Data
from aecore.config.facts import Facts, TableColumns
from aecore.config.resolve import resolve_likelihood
from aecore.core.errors import InputError, short_repr
from aecore.data.cells import CellError, exact_decimals, find_decoder, is_number, is_text, plain, short_type
from aecore.data.columns import Columns, exclusion
from aecore.data.files import Batch, short_reason
from aecore.data.splits import SPLITS

SPLIT_OF_MARK = {name: name for name in SPLITS} | {
    "training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"
}  # fmt: skip
"""The split that a mark stands for, whatever the mark's case."""
_FITS = 2.0**62
"""A difference of this size, even if it is rounded, surely fits into 64 bits."""


def read_features(batch: Batch, columns: Columns, table: TableColumns, channels: int | None = None) -> np.ndarray:
    """Return the features of a batch, (rows, *shape), uint8 or float32; values too large for float32 are infinite, and
    missing ones NaN.

    Args:
        table: what is subtracted from numbers, which texts a category can be, and whether values may be missing.
        channels: channels of encoded images, see `cells.Decoder`.
    """
    return as_float32(read_exactly(batch, columns, table, channels))


def read_exactly(batch: Batch, columns: Columns, table: TableColumns, channels: int | None = None) -> np.ndarray:
    """Return the same as `read_features`, but numbers of tables as float64, and numbers in lists in their own type."""
    first = columns.features[0]
    kind = batch.table.schema.field(first).type
    imputes, is_table = table.missing == "impute", bool(table.features)
    for name in columns.features:
        if not (imputes and is_table):
            _refuse_nulls(batch, name, len(columns.features) > 1)
    if is_table:
        offsets = table.offsets or [0] * len(columns.features)
        texts = table.categories or [()] * len(columns.features)
        read = zip(columns.features, offsets, texts, strict=True)
        x = np.concatenate([_read_column(batch, *each) for each in read], 1)
    else:
        decode = find_decoder(kind, imputes)
        if decode is None:
            raise InputError(
                f"data.column: column {first} holds {short_type(kind)}, neither images nor vectors; name another"
            )
        try:
            x = decode(batch.table[first].combine_chunks(), channels)
        except CellError as error:
            raise InputError(f"{batch.place(first, error.offset)}: {error}") from error
    is_missing = np.isnan(x) if imputes or table.categories else np.False_
    # there are many values that are NaN, and rows are known by their bytes
    return np.where(is_missing, np.nan, x) if is_missing.any() else x


def _refuse_nulls(batch: Batch, name: str, has_others: bool) -> None:
    column = batch.table[name]
    if not column.null_count:
        return
    place = batch.place(name, int(np.argmax(column.is_null().to_numpy())))
    kind = batch.table.schema.field(name).type
    ways = ["train with --data.missing impute"] if is_number(kind) or is_text(kind) else []
    ways += [f"train without the column: {exclusion([name])}"] if has_others else []
    raise InputError(f"{place}: the value is missing; {', or '.join(['fill it or drop the row', *ways])}")


def _read_column(batch: Batch, name: str, offset: float, texts: Sequence[str]) -> np.ndarray:
    """Return the values of a feature of a table, (rows, values)."""
    return one_hot(checked(batch, name), texts) if texts else _shifted(batch, name, offset)


def one_hot(column: pa.Array, texts: Sequence[str]) -> np.ndarray:
    """Return a column of text as (rows, texts), float32: 1 for the text that it is, 0 for the others, and NaN where it
    is missing or is none of the texts."""
    found = pc.index_in(column, pa.array(texts, column.type)).fill_null(-1).to_numpy(zero_copy_only=False)
    rows = np.eye(len(texts), dtype=np.float32)[found]
    rows[found < 0] = np.nan
    return rows


def _shifted(batch: Batch, name: str, offset: float) -> np.ndarray:
    """Return a column of numbers minus an offset, (rows, 1); missing values are NaN."""
    column = batch.table[name].combine_chunks()
    if not column.null_count:
        return shifted(numbers(batch, name), offset)[:, None]
    present = batch._replace(table=batch.table.select([name]).filter(column.is_valid()))
    values = shifted(numbers(present, name), offset)
    x = np.full((len(column), 1), np.nan, values.dtype)
    x[column.is_valid().to_numpy(zero_copy_only=False), 0] = values
    return x


def refuse_absent(absent: np.ndarray, table: TableColumns, rows: str) -> None:
    """Raise an InputError for the first feature that has no value in some rows.

    Args:
        absent: whether each value of a row is missing in all of them, (features,).
        rows: what the rows are called.
    """
    if not absent.any():
        return
    first = int(absent.argmax())
    if table.features:
        name = table.features[table.owners[first]]
        raise InputError(f"data.path: column {name} has no value in {rows}; leave it out with {exclusion([name])}")
    raise InputError(f"data.path: feature {first} of the vectors has no value in {rows}; leave it out of them")


def check_features(x: np.ndarray, batch: Batch, columns: Columns, data: Data, facts: Facts) -> None:
    """Raise an InputError if rows have another shape than the set's first row, or hold values that cannot be used."""
    table = facts.columns
    owners = table.owners

    def refuse(bad: np.ndarray, message: str) -> None:
        if bad.any():
            offset, value = divmod(int(bad.argmax()), prod(facts.shape))
            name = columns.features[owners[value] if owners else 0]
            raise InputError(f"{batch.place(name, offset)}: {message}")

    if x.shape[1:] != facts.shape:
        raise InputError(
            f"{batch.place(columns.features[0])}: the row has the shape {x.shape[1:]}, the set's first row "
            f"{facts.shape}; make all rows alike"
        )
    if x.dtype != np.uint8:
        bad, missing = ~np.isfinite(x), np.isnan(x)
        if table.missing == "impute":
            bad &= ~missing
        for start, stop in table.blocks:
            bad[:, start:stop] = False  # a text that the model does not know
        is_missing = len(facts.shape) == 1 and missing.flat[bad.argmax()]
        way_out = ", or train with --data.missing impute" if is_missing else ""
        refuse(bad, f"the value is not finite, or too large for 32 bits; correct it or drop the row{way_out}")
        if table.blocks or table.missing == "impute":
            refuse(missing & missing.all(1, keepdims=True), "no value of the row is known; drop it")
    likelihood = resolve_likelihood(data, facts)
    if not facts.levels and likelihood.endswith("bernoulli"):
        remedy = "rescale the values or set --data.likelihood gaussian"
        refuse((x < 0) | (x > 1), f"{likelihood} needs values in [0, 1]; {remedy}")


def as_float32(x: np.ndarray) -> np.ndarray:
    """Return x as float32, or as it is if it holds bytes; values that are too large become infinite."""
    with np.errstate(over="ignore"):
        return x if x.dtype == np.uint8 else x.astype(np.float32)


def shifted(values: np.ndarray, offset: float) -> np.ndarray:
    """Return values (rows,) minus an offset, as float64, or as float32 where that holds them as they are. Differences
    of integers are exact, however large the integers are."""
    rounded = values.astype(np.float64) - offset
    if offset and values.dtype.kind in "iu":
        whole = int(offset)
        # unsigned differences wrap around, so that the signed one is right if it fits
        exact = (values.astype(np.uint64) - np.uint64(whole % 2**64)).view(np.int64) - (offset - whole)
        return np.where(np.abs(rounded) < _FITS, exact, rounded)
    if offset:
        return rounded
    is_small = values.dtype.itemsize <= (4 if values.dtype.kind == "f" else 2)
    return values.astype(np.float32 if is_small else np.float64)


def numbers(batch: Batch, name: str) -> np.ndarray:
    """Return a column of single numbers, (rows,), in the type in which it is written."""
    return plain(batch.table[name].combine_chunks()).to_numpy(zero_copy_only=False)


def read_labels(batch: Batch, column: str) -> tuple[list[Any], np.ndarray]:
    """Return the different labels in a batch, and the index of each row's label among these, (rows,).

    Whole floating-point and decimal numbers count as integers.
    """
    array = exact_decimals(batch.table[column].combine_chunks())
    array = checked(batch, column) if array is None else array
    if array.null_count:
        place = batch.place(column, int(array.is_null().to_numpy(zero_copy_only=False).argmax()))
        raise InputError(f"{place}: the label is missing; drop such rows or set --data.labels null")
    encoded = array.dictionary_encode()
    labels, indices = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    for index, label in enumerate(labels):
        if problem := _problem_of(label):
            place = batch.place(column, int((indices == index).argmax()))
            raise InputError(f"{place}: {problem}")
    return [int(label) if isinstance(label, float | Decimal) else label for label in labels], indices


def _problem_of(label: Any) -> str | None:
    """Return why a value is not a class and what to do, or None if it may be one."""
    if isinstance(label, float | Decimal) and not (np.isfinite(float(label)) and label == int(label)):
        return f"{short_repr(float(label))} is not a class, as classes are integers or text; set --data.labels null"
    if isinstance(label, int | float | Decimal) and label < 0:
        return (
            f"{label} is not a class (it often marks rows without a label; classes of such names may be written as "
            "text); drop such rows or set --data.labels null"
        )
    return None


def read_marks(batch: Batch, column: str) -> np.ndarray:
    """Return the split for which each row is marked, (rows,), one of `splits.SPLITS`."""
    encoded = checked(batch, column).dictionary_encode("encode")
    marks, indices = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    for index, mark in enumerate(marks):
        if (mark or "").casefold() not in SPLIT_OF_MARK:
            place = batch.place(column, int((indices == index).argmax()))
            raise InputError(
                f"{place}: the mark is {short_repr(mark)}; use train, validation or test, or leave the column out with "
                f"{exclusion([column])}"
            )
    return np.array([SPLIT_OF_MARK[mark.casefold()] for mark in marks], "<U10")[indices]


def checked(batch: Batch, column: str) -> pa.Array:
    """Return a column of single values, after checking that its text is valid."""
    array = batch.table[column].combine_chunks()
    try:
        array = plain(array)
        array.validate(full=True)
    except pa.ArrowException as error:
        raise InputError(
            f"{batch.file} column {column}: damaged text ({short_reason(error)}); write the file again"
        ) from error
    return array
