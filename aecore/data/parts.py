"""Compares the schemas of the files of one data set: only what is read must be alike, and mean the same."""

from collections import Counter
from typing import NamedTuple

import pyarrow as pa

from aecore.config.experiment import Data
from aecore.config.facts import TableColumns
from aecore.core.errors import InputError, join_names
from aecore.data.cells import find_decoder, is_encoded, is_number, is_text, plain_type, short_type
from aecore.data.columns import LABEL_NAMES, Columns, find_columns, find_name, folded, label_names


class Part(NamedTuple):
    """A file of a data set and its schema."""

    file: str
    schema: pa.Schema


def check_part(part: Part, first: Part, columns: Columns, data: Data, like: TableColumns | None = None) -> None:
    """Raise an InputError if a file does not hold the `columns` that were found in the set's first file.

    Order, nullability, metadata and columns that are not read may differ, and types may differ in width or encoding.
    """
    counts, read = Counter(part.schema.names), {*columns.names}
    for name in columns.names:
        if (count := counts[name]) > 1:
            raise InputError(f"data.path: {part.file} has {count} columns called {name}; give each a name of its own")
        if not count:
            raise _missing(name, part, first, _way_out(name, columns, like))
        kinds = [each.schema.field(name).type for each in (part, first)]
        meanings = [_meaning(kind, name == columns.labels) for kind in kinds]
        if meanings[0] != meanings[1]:
            raise _retyped(name, part, first)
    # what is left out of the first file on purpose is left out of the others
    unread = {name for name, _ in columns.left_out if is_number(first.schema.field(name).type)}
    if columns.labels or data.labels is None:
        unread |= {name for name in part.schema.names if folded(name) in label_names(data)}
    fields = [field for field in part.schema if field.name in read or field.name not in unread]
    exclude = tuple(name for name in data.exclude if find_name(name, [field.name for field in fields]))
    try:
        schema = pa.schema(fields, metadata=part.schema.metadata)
        own_columns = find_columns(data.model_copy(update={"exclude": exclude}), schema, like)
    except InputError as error:
        raise InputError(f"{error} (in {part.file}, unlike {first.file})") from error
    # columns of text that only some files have cannot be read, and are left out as if they had too many texts
    texts = {name for name in own_columns.features if is_text(part.schema.field(name).type)}
    for name in sorted(set(own_columns.names) - read - texts):
        if name in first.schema.names:
            raise _retyped(name, part, first)
        raise _missing(name, first, part, _way_out(name, own_columns, like))


def _retyped(name: str, part: Part, first: Part) -> InputError:
    own, before = (short_type(each.schema.field(name).type) for each in (part, first))
    return InputError(
        f"data.path: column {name} holds {own} in {part.file}, but {before} in {first.file}; write all files with one "
        "type"
    )


def _missing(name: str, part: Part, other: Part, way_out: str) -> InputError:
    return InputError(
        f"data.path: {part.file} has no column {name}, but {other.file} has; its columns are "
        f"{join_names(part.schema.names)}; {way_out}"
    )


def _way_out(name: str, columns: Columns, like: TableColumns | None) -> str:
    """Say what to do about a column that some files lack, given the columns of a file that has it."""
    if name == columns.labels:  # as files for testing of a competition do
        exclude = "" if name.casefold() in LABEL_NAMES else f" --data.exclude {name}"
        return f"name in data.path only files that have labels, or set --data.labels null{exclude}"
    if name in columns.features and len(columns.features) > 1 and not (like and like.features):
        return f"name in data.path only files that have it, or leave it out with --data.exclude {name}"
    return "give all files the same columns"


def _meaning(kind: pa.DataType, is_label: bool) -> str:
    """Return what the values of a column are, whatever their width and encoding."""
    if is_label and pa.types.is_boolean(plain_type(kind)):
        return "truth value"  # the class True is not the class 1
    if is_number(kind):
        return "number"
    if is_text(kind):
        return "text"
    if is_encoded(kind):
        return "image"
    if find_decoder(kind) is None:
        return str(kind)
    inner = kind
    while (deeper := getattr(inner, "value_type", None)) is not None:
        inner = deeper
    return "bytes" if pa.types.is_uint8(inner) else "numbers"  # bytes stay bytes, other numbers become float32
