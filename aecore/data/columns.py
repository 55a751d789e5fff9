"""Finds the columns of features, labels and split marks in a Parquet table, and reads their values as arrays.

Functions raise an InputError that names the column, and the file and row where a value is missing or cannot be used.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from aecore.config.experiment import Data
from aecore.config.facts import TableColumns
from aecore.core.errors import InputError, join_names, short_repr
from aecore.data.cells import CellError, find_decoder, is_number, is_text, short_type
from aecore.data.files import Batch, short_reason
from aecore.data.splits import SPLITS

_LABEL_COLUMNS = ("label", "labels", "target", "class", "y")
SPLIT_COLUMN = "split"
_SPLIT_OF_MARK = {name: name for name in SPLITS} | {"valid": "validation", "val": "validation"}
_MAX_CANDIDATES = 4
"""Most columns that a message names as candidates for the features."""


class Columns(NamedTuple):
    """The columns of a table that are read."""

    features: tuple[str, ...]
    """One column of images or vectors, or several columns of single numbers."""
    labels: str | None
    split: str | None

    @property
    def names(self) -> list[str]:
        return [*self.features, *filter(None, (self.labels, self.split))]

    def described(self, schema: pa.Schema) -> TableColumns:
        """Return names and types of the columns, if each feature has a column of its own."""
        kinds = [schema.field(name).type for name in self.features]
        if not all(is_number(kind) for kind in kinds):
            return TableColumns()
        return TableColumns(features=self.features, types=tuple(map(str, kinds)), label=self.labels)


def find_columns(data: Data, schema: pa.Schema, like: TableColumns | None = None) -> Columns:
    """Find the columns of features, labels and split marks, by what the config names and by their types.

    Args:
        like: the columns that a model was trained on. Features are then returned in its order, whatever the order in
            the file; an InputError names a column that is missing or was not there.
    """
    if len(set(schema.names)) < len(schema.names):
        double = next(name for name in schema.names if schema.names.count(name) > 1)
        raise InputError(f"data.path: several columns are called {double}; give each a name of its own")
    split = SPLIT_COLUMN if SPLIT_COLUMN in schema.names else None
    if split and not is_text(kind := schema.field(split).type):
        raise InputError(
            f"data.path: column {split} holds {short_type(kind)}; use train, validation and test, or rename the column"
        )
    usual_labels = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
    labels = usual_labels if data.labels == "auto" else data.labels
    if labels is not None:
        if labels not in schema.names:
            raise InputError(f"data.labels: there is no column {labels}; the columns are {join_names(schema.names)}")
        if not (pa.types.is_integer(kind := schema.field(labels).type) or is_text(kind)):
            raise InputError(f"data.labels: column {labels} holds {short_type(kind)}; use integers or strings")
    # ignored labels are not features either, nor is the index that pandas writes
    others = {usual_labels, labels, split}
    rest = [field for field in schema if field.name not in others and not field.name.startswith("__index_level_")]
    if data.column is None:
        features = _find_features(rest, schema.names)
        return Columns(_matched(features, schema, like) if like else features, labels, split)
    if data.column not in schema.names:
        raise InputError(f"data.column: there is no column {data.column}; the columns are {join_names(schema.names)}")
    if data.column in (labels, split):
        content = "labels" if data.column == labels else "split marks"
        raise InputError(f"data.column: {data.column} holds the {content}; name the column of images or vectors")
    return Columns((data.column,), labels, split)


def _find_features(fields: Sequence[pa.Field], names: Sequence[str]) -> tuple[str, ...]:
    """Return the one column of images or vectors among the fields, or all columns of numbers if there is none."""
    candidates = [field.name for field in fields if find_decoder(field.type)]
    if len(candidates) > 1:
        raise InputError(
            f"data.column: {' and '.join(candidates[:_MAX_CANDIDATES])} could each hold the images or vectors; name "
            "one with --data.column"
        )
    features = tuple(candidates) or tuple(field.name for field in fields if is_number(field.type))
    if not features:
        raise InputError(
            f"data.path: no column of images, vectors or numbers among {join_names(names)}; jobs/DATA.md says what is "
            "read"
        )
    return features


def _matched(features: tuple[str, ...], schema: pa.Schema, like: TableColumns) -> tuple[str, ...]:
    """Return the features in the order of `like`, the columns that a model was trained on."""
    if not like.features or set(features) == set(like.features):
        return like.features or features
    for name, kind in zip(like.features, like.types, strict=True):
        if name not in schema.names:
            raise InputError(
                f"data.path: there is no column {name}, which the model was trained with; the columns are "
                f"{join_names(schema.names)}"
            )
        if name not in features:
            raise InputError(
                f"data.path: column {name} holds {short_type(schema.field(name).type)}, but the model was trained with "
                f"{kind}; write it as numbers"
            )
    extra = [name for name in features if name not in like.features and name != like.label]
    if extra:
        raise InputError(
            f"data.path: the model was not trained with {join_names(extra)}; leave such columns out of the file"
        )
    return like.features


def read_features(batch: Batch, columns: Columns, channels: int | None = None) -> np.ndarray:
    """Return the features of a batch, (rows, *shape), uint8 or float32; values too large for float32 are infinite.

    Args:
        channels: channels of encoded images, see `cells.Decoder`.
    """
    for name in columns.features:
        column = batch.table[name]
        if column.null_count:
            place = batch.place(name, int(np.argmax(column.is_null().to_numpy())))
            raise InputError(f"{place}: the value is missing; fill it or drop the row")
    first = columns.features[0]
    kind = batch.table.schema.field(first).type
    with np.errstate(over="ignore"):
        if len(columns.features) > 1 or is_number(kind):
            return np.stack([batch.table[name].to_numpy().astype(np.float32) for name in columns.features], 1)
        decode = find_decoder(kind)
        if decode is None:
            raise InputError(
                f"data.column: column {first} holds {short_type(kind)}, neither images nor vectors; name another"
            )
        try:
            x = decode(batch.table[first].combine_chunks(), channels)
        except CellError as error:
            raise InputError(f"{batch.place(first, error.offset)}: {error}") from error
        return x if x.dtype == np.uint8 else x.astype(np.float32)


def read_labels(batch: Batch, column: str) -> tuple[list[Any], np.ndarray]:
    """Return the different labels in a batch, and the index of each row's label among these, (rows,)."""
    array = _without_dictionary(batch, column)
    if array.null_count:
        place = batch.place(column, int(array.is_null().to_numpy(zero_copy_only=False).argmax()))
        raise InputError(f"{place}: the label is missing; drop such rows or set --data.labels null")
    encoded = array.dictionary_encode()
    labels, indices = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    for index, label in enumerate(labels):
        if isinstance(label, int) and label < 0:
            raise InputError(
                f"{batch.place(column, int((indices == index).argmax()))}: {label} is not a class (it often marks rows "
                "without a label); drop such rows or set --data.labels null"
            )
    return labels, indices


def read_marks(batch: Batch) -> np.ndarray:
    """Return the split for which each row is marked, (rows,), one of `splits.SPLITS`."""
    marks = _without_dictionary(batch, SPLIT_COLUMN).to_pylist()
    for offset, mark in enumerate(marks):
        if mark not in _SPLIT_OF_MARK:
            raise InputError(
                f"{batch.place(SPLIT_COLUMN, offset)}: the mark is {short_repr(mark)}; use train, validation or test"
            )
    return np.array([_SPLIT_OF_MARK[mark] for mark in marks], "<U10")


def _without_dictionary(batch: Batch, column: str) -> pa.Array:
    """Return a column of integers or text as a plain array, after checking that its text is valid."""
    array = batch.table[column].combine_chunks()
    array = array.cast(array.type.value_type) if pa.types.is_dictionary(array.type) else array
    try:
        array.validate(full=True)
    except pa.ArrowException as error:
        raise InputError(
            f"{batch.file} column {column}: damaged text ({short_reason(error)}); write the file again"
        ) from error
    return array
