"""Reads a user's own Parquet files as a data set: its facts, and its checked rows, all at once or in pieces.

Images may be `struct<bytes, path>` (as Hugging Face writes them), encoded bytes (PNG, JPEG), Arrow fixed-shape tensors
or nested fixed-size lists; feature vectors are lists of numbers, or the table's numeric columns taken together.
Functions raise an InputError if files are not readable or not of this form, or if a value cannot be used; the message
names the value's file, column and row.
"""

import ctypes
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from pyarrow import fs as pafs

from aecore.config.experiment import Data
from aecore.config.facts import Facts, TableColumns
from aecore.core.errors import InputError, escape_unprintable, join_names
from aecore.core.types import Shape, describe_shape
from aecore.data.anomalies import describe_anomalies
from aecore.data.cells import encoded_images, is_encoded
from aecore.data.files import Batch, file_digest, open_file, read_batches
from aecore.data.folders import filesystem_at, join_paths
from aecore.data.labels import check_key, find_classes, label_numbers
from aecore.data.marks import classes_of_folders, describe_listing
from aecore.data.numbers import Spread
from aecore.data.parts import Part
from aecore.data.sets import ParquetSet, Piece, Source, divide, open_set
from aecore.data.splits import Rows, content_hashes
from aecore.data.tables import learn_columns
from aecore.data.values import (
    as_float32,
    check_features,
    read_exactly,
    read_features,
    read_labels,
    read_marks,
    refuse_absent,
)

BATCH_BYTES, _BATCH_ROWS = 2**23, 4096
"""Largest size of a batch that is read at once, in bytes of float32 values and in rows."""
_LABEL_ROWS = 1 << 16
"""Rows of a batch where only labels or split marks are read."""
MAX_SURVEY_BYTES, _MAX_SURVEY_ROWS = 2**31, 2**22
"""Largest local set, as arrays, whose values are checked before a job starts; the check takes some seconds."""
_DECODING_COST = 16
"""Decoding an image takes about this many times longer per byte than reading an array."""
_MAX_HEADERS, _MAX_HEADER_BYTES = 2**17, 2**31
"""Most images, and most bytes of images, whose headers are read before a job starts; that takes some seconds."""
_CHANGED = "data.path: {} is damaged, or was changed while the job ran; write it again, or start the job again"


def identify(data: Data, like: TableColumns | None = None) -> Facts:
    """Return digest, shape, classes and number of rows; this reads all labels and the headers of images, but decodes
    only the first image or vector. For `like` see `find_columns`."""
    source = open_set(data, like)
    source, table = learn_columns(data, source, like)
    columns, column_of_labels = source.columns, source.columns.labels
    digest, rows, labels = hashlib.sha256(), 0, set[Any]()
    for number, file in enumerate(source.files):
        digest.update(file_digest(source.filesystem, file))
        opened = open_file(source.filesystem, file)
        if not opened.metadata.num_rows:
            continue
        rows += opened.metadata.num_rows
        source.check(Part(file, opened.schema_arrow), data, like)
        if source.marks.labels:
            labels.add(source.marks.labels[number])
        elif column_of_labels:
            for batch in read_batches(opened, file, [column_of_labels], _LABEL_ROWS):
                labels.update(read_labels(batch, column_of_labels)[0])
    first = next(source.batches(columns.features, 1), None)
    if first is None:
        raise InputError(_CHANGED.format(join_paths(data.path)))
    x = read_features(first, columns, table)
    if not x.size or x.ndim > 4:
        raise InputError(
            f"data.column: a row of column {columns.features[0]} has the shape {x.shape[1:]}; write vectors "
            "(features), or images (height, width) or (height, width, channels)"
        )
    classes: tuple[str, ...] = ()
    if source.marks.label_key:
        classes = classes_of_folders(labels, source.marks.label_key)
        check_key(data, source.marks.label_key, classes, rows)
    elif column_of_labels:
        if not labels:
            raise InputError(_CHANGED.format(join_paths(data.path)))
        classes = find_classes(data, column_of_labels, labels, rows)
    digest.update(f"{columns.features} {columns.labels} {columns.split}".encode())
    if table.offsets:
        digest.update(f" minus {table.offsets}".encode())
    if table.categories:
        digest.update(f" texts {table.categories}".encode())
    levels = 256 if x.dtype == np.uint8 else 0
    shape: Shape = x.shape[1:]
    if data.missing == "impute" and (levels or len(shape) > 1):
        raise InputError(
            "data.missing: impute is for tables and for vectors of floating-point numbers, not for pictures and bytes; "
            "use refuse"
        )
    if is_encoded(source.first.schema.field(columns.features[0]).type):
        colour, turned = _read_headers(source, shape)
        shape = (3 if colour else 1, *shape[1:])
        if turned:  # earlier versions read such images as they are stored; their results must not be restored
            digest.update(b" upright")
    for marks in filter(None, (source.marks.splits, source.marks.labels)):  # else names are not part of the digest
        digest.update(f" {marks}".encode())
    return Facts(
        digest=digest.hexdigest(), shape=shape, levels=levels, classes=classes, rows=rows,
        columns=table,
    )  # fmt: skip


def describe(data: Data, facts: Facts, divided: bool = True) -> list[str]:
    """Say which rows and columns are read, and which columns are left out and why.

    Args:
        divided: say also how the rows are split.
    """
    source = open_set(data, facts.columns)
    columns, table = source.columns, facts.columns
    column, told = columns.labels or source.marks.label_key, f"{len(facts.classes)} classes"
    labels = f"{column} ({describe_anomalies(data, facts) or told})" if column else "none"
    unmarked = "drawn" if data.split == "drawn" else "by content"
    split = columns.split or ("by the names" if source.marks.splits else unmarked)
    splits = f"; split: {split}" if divided else ""
    lines = [
        f"data: {facts.rows:,} rows, {describe_shape(facts.shape)}",
        *describe_listing(source.listing, source.marks),
        f"columns: {join_names(columns.features)}; labels: {labels}{splits}",
    ]
    if columns.left_out:
        lines.append(f"left out: {join_names([f'{name} ({reason})' for name, reason in columns.left_out])}")
    texts = zip(table.features, table.categories, strict=False)
    if one_hot := [f"{name} ({len(each)} texts)" for name, each in texts if each]:
        lines.append(f"one-hot: {join_names(one_hot)}")
    if moved := [name for name, offset in zip(table.features, table.offsets, strict=False) if offset]:
        lines.append(f"read minus a number near their values, which 32 bits would not tell apart: {join_names(moved)}")
    return [escape_unprintable(line) for line in lines]


def _read_headers(source: ParquetSet, shape: Shape) -> tuple[bool, bool]:
    """Say whether any image of a set has colour, and whether any is stored in another orientation than it is shown in.

    One image in colour makes all of them colour. Of a very large set only the first images are looked at: a later image
    in colour is refused when it is read.
    """
    from aecore.data.images import read_header  # imports Pillow

    column = source.columns.features[0]
    colour = grey = turned = False
    count = size = 0
    for batch in source.batches([column], _batch_rows(shape)):
        for offset, raw in enumerate(encoded_images(batch.table[column].combine_chunks())):
            header = read_header(raw)
            if header and header.colour and grey and not colour:
                place = batch.place(column, offset)
                warnings.warn(
                    f"{place}: the image has colour, those before it are grey; all are read in colour", stacklevel=3
                )
            if header:
                colour, grey, turned = colour or header.colour, grey or not header.colour, turned or header.turned
            count, size = count + 1, size + len(raw or b"")
        if (colour and turned) or count >= _MAX_HEADERS or size >= _MAX_HEADER_BYTES:
            break
    return colour, turned


def _batch_rows(shape: Shape) -> int:
    """Return how many rows of this shape are read at once."""
    return max(1, min(_BATCH_ROWS, BATCH_BYTES // (4 * prod(shape))))


def load(data: Data, facts: Facts) -> Rows:
    """Read all rows and check their values."""
    spread = Spread()
    rows = _concatenate(list(_read_all(data, facts, spread.add)))
    _refuse_equal_rows(spread, facts.rows)
    return rows


def survey(data: Data, facts: Facts, strict: bool = True) -> Rows | None:
    """Check all values, as `load` does, in one pass that holds no features in memory.

    Args:
        strict: refuse columns whose values float32 does not tell apart; else a warning names the first.

    Returns:
        All rows, with their `content_hashes` (rows,) in place of x. None if the set is remote or too large to be read
        twice: only `load` checks such a set, in the worker that needs its rows.
    """
    source = open_set(data, facts.columns)
    if source.marks.problem:
        raise InputError(source.marks.problem)
    encoded = is_encoded(source.first.schema.field(source.columns.features[0]).type)
    cost = facts.rows * facts.row_bytes * (_DECODING_COST if encoded else 1)
    remote = not isinstance(source.filesystem, pafs.LocalFileSystem)
    if remote or cost > MAX_SURVEY_BYTES or facts.rows > _MAX_SURVEY_ROWS:
        return None
    spread, batches = Spread(), []
    for batch in _read_all(data, facts, spread.add):
        batches.append(batch._replace(x=content_hashes(batch.x)))
    table, names = facts.columns, source.columns.features
    refuse_absent(spread.absent, table, "any row")
    _refuse_equal_rows(spread, facts.rows)
    if lost := spread.lost(table.cells or names):
        if strict:
            raise InputError(lost)
        warnings.warn(lost, stacklevel=2)
    constant = spread.constant
    if table.blocks:  # a text that no row has says nothing of the others of its column
        owners = np.array(table.owners)
        constant = np.array([constant[owners == number].all() for number in range(len(names))])
    if len(facts.shape) == 1 and constant.any():  # pixels at the border of images often are
        first = int(constant.argmax())
        feature = names[first] if len(names) > 1 else f"number {first} of {names[0]}"
        warnings.warn(
            f"data.path: {constant.sum()} of {constant.size} features never vary and carry no information (the first: "
            f"{feature}); leave them out",
            stacklevel=2,
        )
    return _concatenate(batches)


def read_apart(data: Data, facts: Facts, piece: Piece) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return which rows of a piece are anomalies, (rows,), or None if this is not known, and the split that the set
    names for each row, (rows,), or None if it names none. No features are read."""
    source = piece.known
    if not facts.has_anomalies:
        source = source._replace(columns=source.columns._replace(labels=None), label=None)
    names, numbers_of = source.columns._replace(features=()).names, label_numbers(data, facts)
    if not names:
        y = None if source.label is None else np.full(piece.rows, numbers_of[source.label])
        return y, None if source.split is None else np.full(piece.rows, source.split)
    opened = open_file(filesystem_at(data), piece.file)
    batches = read_batches(opened, piece.file, names, _LABEL_ROWS, piece.groups, piece.first_row)
    parts = [Rows(np.empty(0), *_labels_and_marks(batch, source, numbers_of)) for batch in batches]
    return _concatenate(parts)[1:]


def read(
    data: Data, facts: Facts, piece: Piece, look: Callable[[np.ndarray], None] | None = None
) -> Iterator[Rows]:  # fmt: skip
    """Read the rows of a piece, some megabytes at a time, and check each value.

    Args:
        look: is called with the features (rows, *shape) of each batch, in the precision in which they are written.
    """
    columns, numbers_of = piece.known.columns, label_numbers(data, facts)
    size, count = _batch_rows(facts.shape), 0
    opened = open_file(filesystem_at(data), piece.file)  # not the set's other files, which may be thousands
    for batch in read_batches(opened, piece.file, columns.names, size, piece.groups, piece.first_row):
        if not {*columns.names} <= {*batch.table.column_names}:
            raise InputError(_CHANGED.format(piece.file))
        exact = read_exactly(batch, columns, facts.columns, facts.shape[0])
        x = as_float32(exact)
        check_features(x, batch, columns, data, facts)
        if look:
            look(exact)
        count += len(x)
        yield Rows(x, *_labels_and_marks(batch, piece.known, numbers_of))
    release_memory()
    if count != piece.rows:
        raise InputError(_CHANGED.format(piece.file))


def _labels_and_marks(
    batch: Batch, source: Source, numbers_of: Mapping[str, int]
) -> tuple[np.ndarray | None, np.ndarray | None]:  # fmt: skip
    """Return the labels of a batch as `Rows.y` holds them, and its split marks (rows,), from columns or else from the
    names of files and folders; None where neither has them.

    Args:
        numbers_of: see `label_numbers`.
    """
    columns, rows = source.columns, len(batch.table)
    labels = marks = y = None
    if columns.labels:
        labels = read_labels(batch, columns.labels)
    elif source.label is not None:
        labels = [source.label], np.zeros(rows, np.int64)
    if columns.split:
        marks = read_marks(batch, columns.split)
    elif source.split is not None:
        marks = np.full(rows, source.split)
    if labels is not None:
        found = [numbers_of.get(str(label), -1) for label in labels[0]]
        if -1 in found:
            raise InputError(_CHANGED.format(batch.file))
        y = np.array(found, np.int64)[labels[1]]
    return y, marks


def release_memory() -> None:
    """Return freed memory to the operating system.

    The C library's allocator otherwise keeps what large batches have taken for its own later use, some 100 MB per
    process. `malloc_trim` exists only in glibc; elsewhere this does nothing.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _read_all(data: Data, facts: Facts, look: Callable[[np.ndarray], None]) -> Iterator[Rows]:
    count = 0
    for piece in divide(data, facts):
        yield from read(data, facts, piece, look)
        count += piece.rows
    if count != facts.rows:
        raise InputError(_CHANGED.format(join_paths(data.path)))


def _concatenate(batches: Sequence[Rows]) -> Rows:
    x, labels, marks = ([values for values in column if values is not None] for column in zip(*batches, strict=True))
    return Rows(np.concatenate(x), np.concatenate(labels) if labels else None, np.concatenate(marks) if marks else None)


def _refuse_equal_rows(spread: Spread, rows: int) -> None:
    """Raise an InputError if all features are constant."""
    if spread.constant.all() and rows > 1:
        raise InputError(f"data.path: all {rows} rows are equal, so there is nothing to learn; name data that vary")
