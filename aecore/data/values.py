"""Reads the values of the columns of a table as arrays: features, labels and split marks.

Functions raise an InputError that names the file, column and row where a value is missing or cannot be used.
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from aecore.core.errors import InputError, short_repr
from aecore.data.cells import CellError, exact_decimals, find_decoder, is_number, plain, short_type
from aecore.data.columns import Columns, exclusion
from aecore.data.files import Batch, short_reason
from aecore.data.splits import SPLITS

SPLIT_OF_MARK = {name: name for name in SPLITS} | {
    "training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"
}  # fmt: skip
"""The split that a mark stands for, whatever the mark's case."""
_FITS = 2.0**62
"""A difference of this size, even if it is rounded, surely fits into 64 bits."""


def read_features(
    batch: Batch, columns: Columns, channels: int | None = None, offsets: Sequence[float] = ()
) -> np.ndarray:  # fmt: skip
    """Return the features of a batch, (rows, *shape), uint8 or float32; values too large for float32 are infinite.

    Args:
        channels: channels of encoded images, see `cells.Decoder`.
        offsets: numbers that are subtracted from the features before they become float32; see `TableColumns.offsets`.
    """
    return as_float32(read_exactly(batch, columns, channels, offsets))


def read_exactly(
    batch: Batch, columns: Columns, channels: int | None = None, offsets: Sequence[float] = ()
) -> np.ndarray:  # fmt: skip
    """Return the same as `read_features`, but numbers of tables as float64, and numbers in lists in their own type."""
    for name in columns.features:
        column = batch.table[name]
        if column.null_count:
            place = batch.place(name, int(np.argmax(column.is_null().to_numpy())))
            others = f", or train without the column: {exclusion([name])}" if len(columns.features) > 1 else ""
            raise InputError(f"{place}: the value is missing; fill it or drop the row{others}")
    first = columns.features[0]
    kind = batch.table.schema.field(first).type
    if len(columns.features) > 1 or is_number(kind):
        shifts = offsets or [0.0] * len(columns.features)
        return np.stack([shifted(numbers(batch, n), by) for n, by in zip(columns.features, shifts, strict=True)], 1)
    decode = find_decoder(kind)
    if decode is None:
        raise InputError(
            f"data.column: column {first} holds {short_type(kind)}, neither images nor vectors; name another"
        )
    try:
        return decode(batch.table[first].combine_chunks(), channels)
    except CellError as error:
        raise InputError(f"{batch.place(first, error.offset)}: {error}") from error


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
    array = _checked(batch, column) if array is None else array
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
    encoded = _checked(batch, column).dictionary_encode("encode")
    marks, indices = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    for index, mark in enumerate(marks):
        if (mark or "").casefold() not in SPLIT_OF_MARK:
            place = batch.place(column, int((indices == index).argmax()))
            raise InputError(
                f"{place}: the mark is {short_repr(mark)}; use train, validation or test, or leave the column out with "
                f"{exclusion([column])}"
            )
    return np.array([SPLIT_OF_MARK[mark.casefold()] for mark in marks], "<U10")[indices]


def _checked(batch: Batch, column: str) -> pa.Array:
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
