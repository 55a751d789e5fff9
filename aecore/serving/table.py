"""What a model is asked about: tables whose columns are matched by name, and arrays.

Missing values are refused, unless the model was trained with them (`data.missing` impute).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from math import prod
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from aecore.config.facts import TableColumns
from aecore.core.errors import InputError, join_names, short_repr
from aecore.data.columns import find_name, resembling
from aecore.data.tables import unknown_texts
from aecore.data.values import as_float32, shifted

_NUMBERS = "biuf"
"""Kinds of numpy's types that are numbers or truth values."""
_REMEDY = "correct it or leave the row out"
_MISSING = f"the value is missing; {_REMEDY}"


def read_table(table: Any, columns: TableColumns) -> np.ndarray:
    """Return the rows of a table as a model that was trained on `columns` reads them: (rows, values), float32, with NaN
    for what is missing. So is a text that the model does not know, of which a warning tells.

    Args:
        table: a DataFrame (of pandas, Arrow, Polars or what else has `to_pandas`), a mapping from names to values, a
            list of such mappings or one row as a Series with names, whose columns are matched by name; or an array, a
            list of rows or a frame without names (0, 1, ...), whose columns are taken by position.
            Columns hold numbers or truth values of any type: numpy's, pandas' nullable types, Arrow's, Decimal; or
            text, where the model was trained with text.

    Raises:
        InputError: a column is missing, unknown or of another kind, or a value cannot be used.
    """
    frame, names = _as_frame(table), {*columns.features}
    if frame.shape[1] == 1 and frame.columns[0] not in names and not names.isdisjoint(frame.index):
        frame = frame.T  # a row of a frame, which is a Series
    frame = frame.iloc[:, _find_columns(frame, columns)].set_axis(columns.features, axis=1)
    if columns.categories:
        values = _read_mixed(frame, columns)
    elif not columns.offsets and all(isinstance(kind, np.dtype) and kind.kind in _NUMBERS for kind in frame.dtypes):
        values = frame.to_numpy(np.float64)
    else:
        offsets = columns.offsets or [0] * len(columns.features)
        read = zip(columns.features, offsets, strict=True)
        values = np.stack([_read_numbers(frame[name], name, offset) for name, offset in read], 1)
    rows = as_float32(values)
    _refuse_missing(rows, values, columns, lambda number: f"column {columns.cells[number]}")
    return rows


def _read_mixed(frame: pd.DataFrame, columns: TableColumns) -> np.ndarray:
    """Return the rows of a table that has columns of text, (rows, values), float64."""
    offsets, parts = columns.offsets or [0] * len(columns.features), []
    for name, offset, texts in zip(columns.features, offsets, columns.categories, strict=True):
        if texts:
            parts.append(_read_texts(frame[name], name, texts, columns.missing == "impute"))
        else:
            parts.append(_read_numbers(frame[name], name, offset)[:, None])
    return np.concatenate(parts, 1)


def _read_texts(column: pd.Series, name: str, texts: Sequence[str], imputes: bool) -> np.ndarray:
    """Return the one-hot values of a column of text, (rows, texts); those of missing and unknown texts are NaN."""
    values = column.astype(object)
    missing = values.isna().to_numpy()
    if missing.any() and not imputes:
        raise InputError(f"input: row {missing.argmax()} column {name}: {_MISSING}")
    for row, value in enumerate(values):
        if not (missing[row] or isinstance(value, str)):
            raise InputError(f"input: row {row} column {name}: {short_repr(value, 40)} is no text; write text")
    numbers = pd.Index(texts, dtype=object).get_indexer(pd.Index(values))
    if unknown := values[(numbers < 0) & ~missing].unique().tolist():
        warnings.warn(f"input: {unknown_texts(name, unknown)}", stacklevel=6)
    x = np.eye(len(texts))[numbers]
    x[numbers < 0] = np.nan
    return x


def write_table(rows: np.ndarray, columns: TableColumns) -> pd.DataFrame:
    """Return rows (rows, values) as the frame from which `read_table` reads them; of a category, its largest value
    counts."""
    if not columns.categories:
        return pd.DataFrame(rows.astype(np.float64) + (columns.offsets or 0), columns=list(columns.features))
    owners, offsets = np.array(columns.owners), columns.offsets or [0] * len(columns.features)
    frame: dict[str, Any] = {}
    for number, (name, offset, texts) in enumerate(zip(columns.features, offsets, columns.categories, strict=True)):
        values = rows[:, owners == number].astype(np.float64)
        if texts:
            frame[name] = [None if np.isnan(row).any() else texts[row.argmax()] for row in values]
        else:
            frame[name] = values[:, 0] + offset
    return pd.DataFrame(frame)


def read_array(rows: Any, imputes: bool = False) -> np.ndarray:
    """Return rows (rows, *shape) of images or vectors as an array, after checking that each value is a finite number;
    an InputError names the row.

    Args:
        imputes: values may be missing, that is None or NaN.
    """
    array = np.asarray(rows)
    if imputes and array.dtype == object:
        with suppress(TypeError, ValueError):
            array = array.astype(np.float64)
    if array.dtype.kind not in _NUMBERS:
        raise InputError(f"input: the values are {array.dtype}, not numbers; write numbers")
    if array.dtype.kind == "f" and array.ndim:
        flat = array.reshape(len(array), prod(array.shape[1:]))
        table = TableColumns(missing="impute" if imputes else "refuse")
        _refuse_missing(flat, flat, table, lambda number: f"feature {number}")
    return array


def _as_frame(table: Any) -> pd.DataFrame:
    if hasattr(table, "to_pandas"):
        table = table.to_pandas()
    if isinstance(table, pd.DataFrame):
        return table
    single = isinstance(table, Mapping) and all(pd.api.types.is_scalar(value) for value in table.values())
    try:
        return pd.DataFrame([table] if single else table)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"input: a {type(table).__name__} that is no table ({short_repr(str(error))}); write a DataFrame, or an "
            "array (rows, features)"
        ) from error


def _find_columns(frame: pd.DataFrame, columns: TableColumns) -> list[int]:
    """Return the place in the frame of each column that the model reads."""
    known, names = columns.features, [str(name) for name in frame.columns]
    places = {name: place for place, name in enumerate(names)}
    if names and list(frame.columns) == list(range(len(names))):
        if len(names) != len(known):
            raise InputError(
                f"input: rows have {len(names)} values, but the model reads {len(known)}: {join_names(known)}"
            )
        return list(range(len(known)))
    if len(places) < len(names):
        double = next(name for place, name in enumerate(names) if places[name] != place)
        raise InputError(f"input: several columns are called {double}; give each a name of its own")
    if missing := [name for name in known if name not in places]:
        there = f"the columns are {join_names(names)}" if names else f"the model reads {join_names(known)}"
        there += resembling(missing, names)
        raise InputError(f"input: there is no column {join_names(missing)}, which the model was trained with; {there}")
    read = {*known}
    extra = [name for name in names if name not in read]
    label = find_name(columns.label, extra) if columns.label else None
    if unknown := [name for name in extra if name != label]:
        raise InputError(f"input: the model was not trained with {join_names(unknown)}; leave such columns out")
    if label is not None:
        warnings.warn(f"input: column {label} holds labels, and is left out", stacklevel=4)
    return [places[name] for name in known]


def _read_numbers(column: pd.Series, name: str, offset: float) -> np.ndarray:
    """Return the values of a column minus an offset, (rows,), float64; missing values are NaN."""
    if isinstance(column.dtype, pd.CategoricalDtype):  # whole numbers have no value for a missing one
        column = column.astype(object if column.hasnans else column.dtype.categories.dtype)
    if isinstance(column.dtype, pd.ArrowDtype) and pa.types.is_dictionary(column.dtype.pyarrow_dtype):
        column = column.astype(pd.ArrowDtype(column.dtype.pyarrow_dtype.value_type))
    kind = column.dtype
    if pd.api.types.is_integer_dtype(kind) and not column.hasnans:  # large integers are no float64
        return shifted(column.to_numpy(np.uint64 if kind.kind == "u" else np.int64), offset)
    if isinstance(kind, pd.ArrowDtype) and pa.types.is_decimal(kind.pyarrow_dtype):
        column, kind = column.astype(object), np.dtype(object)
    is_real = pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_complex_dtype(kind)
    if is_real or pd.api.types.is_bool_dtype(kind):
        return column.to_numpy(np.float64, na_value=np.nan) - offset
    if not pd.api.types.is_object_dtype(kind):
        raise InputError(f"input: column {name} holds {kind}, not numbers; write numbers")
    values = np.empty(len(column))
    for row, value in enumerate(column):
        if value is None or value is pd.NA:
            values[row] = np.nan
        elif isinstance(value, Real | Decimal | np.bool_):
            values[row] = _difference(value, offset)
        else:
            raise InputError(f"input: row {row} column {name}: {short_repr(value, 40)} is no number; write a number")
    return values


def _difference(value: Any, offset: float) -> float:
    """Return a number minus an offset; differences of integers and of decimal numbers are exact before they are
    rounded, and what is too large is infinite."""
    if isinstance(value, Decimal):
        return float(value - Decimal(offset)) if value.is_finite() else np.nan if value.is_nan() else float(value)
    try:
        return float((int(value) if isinstance(value, Integral) else float(value)) - offset)
    except OverflowError:
        return np.inf


def _refuse_missing(
    rows: np.ndarray, values: np.ndarray, columns: TableColumns, name_of: Callable[[int], str]
) -> None:  # fmt: skip
    """Raise an InputError for a row of which nothing is known, or for the first value that the model cannot read: one
    that is missing or, as a float32, not finite.

    Args:
        rows: the values as the model reads them.
        name_of: returns the name of a value by its number.
    """
    if (bad := ~np.isfinite(rows)).any():
        missing = np.isnan(rows)
        if missing.all(1).any() and (columns.missing == "impute" or columns.blocks):
            raise InputError(f"input: row {missing.all(1).argmax()}: no value of the row is known; leave the row out")
        if columns.missing == "impute":
            bad &= ~missing
        for start, stop in columns.blocks:
            bad[:, start:stop] = False  # a text that the model does not know
    if not bad.any():
        return
    row, number = (int(place[0]) for place in np.nonzero(bad))
    value = values[row, number]
    reason = _MISSING if np.isnan(value) else f"{value} is not finite in float32; {_REMEDY}"
    raise InputError(f"input: row {row} {name_of(number)}: {reason}")
