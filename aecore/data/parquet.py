"""Reads a user's own Parquet files as a data set: its facts, and its checked rows, all at once or in pieces.

Images may be `struct<bytes, path>` (as Hugging Face writes them), encoded bytes (PNG, JPEG), Arrow fixed-shape tensors
or nested fixed-size lists; feature vectors are lists of numbers, or the table's numeric columns taken together.
Functions raise an InputError if files are not readable or not of this form, or if a value cannot be used; the message
names the value's file, column and row.
"""

import ctypes
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from aecore.config.experiment import Data
from aecore.config.facts import Facts, TableColumns
from aecore.config.resolve import resolve_likelihood
from aecore.core.errors import InputError, join_names
from aecore.core.types import Shape, describe_shape
from aecore.data.cells import encoded_images, is_encoded, is_number
from aecore.data.columns import Columns, described, find_columns
from aecore.data.files import Batch, file_digest, filesystem_of, list_files, open_file, read_batches
from aecore.data.numbers import Spread, find_offsets
from aecore.data.splits import Rows, content_hashes
from aecore.data.values import as_float32, numbers, read_exactly, read_features, read_labels, read_marks

PIECE_BYTES = 2**24
"""Largest size of a piece, in bytes of its values."""
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
_MANY_CLASSES, _FEW_ROWS = 20, 10
"""With more classes than the first number, integers that leave numbers out, or that on average fewer rows than the
second have, are taken for a measured value."""
_CHANGED = "data.path: {} is damaged, or was changed while the job ran; write it again, or start the job again"


class Piece(NamedTuple):
    """Consecutive row groups of a file, which are read together."""

    file: str
    groups: tuple[int, ...]
    first_id: int
    """Number that the piece's first row has in the whole set."""
    first_row: int
    """Number that the piece's first row has in the file."""
    rows: int


class _Source(NamedTuple):
    filesystem: pafs.FileSystem
    files: list[str]
    schema: pa.Schema
    columns: Columns

    def batches(self, columns: Sequence[str], size: int) -> Iterator[Batch]:
        for file in self.files:
            yield from read_batches(self.filesystem, file, columns, size)


def _open_source(data: Data, like: TableColumns | None = None) -> _Source:
    assert data.path is not None
    filesystem, files = list_files(data.path)
    schema = open_file(filesystem, files[0]).schema_arrow
    return _Source(filesystem, files, schema, find_columns(data, schema, like))


def identify(data: Data, like: TableColumns | None = None) -> Facts:
    """Return digest, shape, classes and number of rows; this reads all labels and the headers of images, but decodes
    only the first image or vector. For `like` see `find_columns`."""
    source = _open_source(data, like)
    digest, rows = hashlib.sha256(), 0
    for file in source.files:
        digest.update(file_digest(source.filesystem, file))
        metadata = open_file(source.filesystem, file).metadata
        rows += metadata.num_rows
        if not metadata.schema.to_arrow_schema().equals(source.schema):
            raise InputError(
                f"data.path: {file} has other columns than {source.files[0]}; write all files with one schema"
            )
    if not rows:
        raise InputError(f"data.path: {data.path} has no rows; name data that have some")
    columns = source.columns
    first = next(source.batches(columns.features, 1), None)
    if first is None:
        raise InputError(_CHANGED.format(data.path))
    x = read_features(first, columns)
    if not x.size or x.ndim > 4:
        raise InputError(
            f"data.column: a row of column {columns.features[0]} has the shape {x.shape[1:]}; write vectors "
            "(features), or images (height, width) or (height, width, channels)"
        )
    classes = _find_classes(data, source, rows) if columns.labels else ()
    digest.update(f"{columns.features} {columns.labels} {columns.split}".encode())
    offsets = _find_offsets(data, source) if like is None else like.offsets
    if offsets:
        digest.update(f" minus {offsets}".encode())
    levels = 256 if x.dtype == np.uint8 else 0
    shape: Shape = x.shape[1:]
    if is_encoded(source.schema.field(columns.features[0]).type):
        colour, turned = _read_headers(source, shape)
        shape = (3 if colour else 1, *shape[1:])
        if turned:  # earlier versions read such images as they are stored; their results must not be restored
            digest.update(b" upright")
    return Facts(
        digest=digest.hexdigest(), shape=shape, levels=levels, classes=classes, rows=rows,
        columns=described(columns, source.schema, offsets, like),
    )  # fmt: skip


def describe(data: Data, facts: Facts) -> list[str]:
    """Say which rows and columns are read, and which columns are left out and why."""
    source = _open_source(data, facts.columns)
    columns, offsets = source.columns, facts.columns.offsets
    labels = f"{columns.labels} ({len(facts.classes)} classes)" if columns.labels else "none"
    lines = [
        f"data: {facts.rows:,} rows, {describe_shape(facts.shape)}, in {len(source.files):,} files",
        f"columns: {join_names(columns.features)}; labels: {labels}; split: {columns.split or 'drawn'}",
    ]
    if columns.left_out:
        lines.append(f"left out: {join_names([f'{name} ({reason})' for name, reason in columns.left_out])}")
    if moved := [name for name, offset in zip(columns.features, offsets, strict=False) if offset]:
        lines.append(f"read minus a number near their values, which 32 bits would not tell apart: {join_names(moved)}")
    return lines


def _read_headers(source: _Source, shape: Shape) -> tuple[bool, bool]:
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


def _find_offsets(data: Data, source: _Source) -> tuple[int | float, ...]:
    """Look at some rows of a table and return `TableColumns.offsets`; nothing where values must keep their range."""
    names = source.columns.features
    is_table = all(is_number(source.schema.field(name).type) for name in names)
    if not is_table or data.likelihood not in ("auto", "gaussian"):
        return ()
    sample = next(source.batches(names, _batch_rows((2 * len(names),))), None)
    if sample is None or any(sample.table[name].null_count for name in names):
        return ()  # reading refuses missing values
    return find_offsets([numbers(sample, name) for name in names])


def _find_classes(data: Data, source: _Source, rows: int) -> tuple[str, ...]:
    """Return the names of the classes, in the order of their labels."""
    column = source.columns.labels
    assert column is not None
    labels: set[Any] = set()
    for batch in source.batches([column], _LABEL_ROWS):
        labels.update(read_labels(batch, column)[0])
    if not labels:
        raise InputError(_CHANGED.format(data.path))
    classes = tuple(str(label) for label in sorted(labels))
    if len(classes) < 2:
        raise InputError(
            f"data.labels: all rows of column {column} have one class ({classes[0]}); use --data.labels null"
        )
    numeric = all(isinstance(label, int) for label in labels)
    if data.labels == "auto" and _is_doubtful([*labels] if numeric else [], len(labels), rows):
        raise InputError(
            f"data.labels: column {column} has {len(classes)} different values in {rows} rows, so it may be measured "
            f"rather than a label; write --data.labels {column}, or --data.labels null"
        )
    return classes


def _is_doubtful(numbers_of: Sequence[int], classes: int, rows: int) -> bool:
    """Say whether so many different labels, these numbers or else texts, are rather a measured value or the names of
    the rows than classes."""
    if not numbers_of:
        return classes > _MANY_CLASSES and 2 * classes > rows
    gaps = max(numbers_of) - min(numbers_of) >= classes
    return classes > _MANY_CLASSES and (gaps or _FEW_ROWS * classes > rows)


def load(data: Data, facts: Facts) -> Rows:
    """Read all rows and check their values."""
    spread = Spread()
    rows = _concatenate(list(_read_all(data, facts, spread.add)))
    _refuse_equal_rows(spread, facts.rows)
    return rows


def survey(data: Data, facts: Facts) -> Rows | None:
    """Check all values, as `load` does, in one pass that holds no features in memory.

    Returns:
        All rows, with their `content_hashes` (rows,) in place of x. None if the set is remote or too large to be read
        twice: only `load` checks such a set, in the worker that needs its rows.
    """
    source = _open_source(data, facts.columns)
    encoded = is_encoded(source.schema.field(source.columns.features[0]).type)
    cost = facts.rows * facts.row_bytes * (_DECODING_COST if encoded else 1)
    remote = not isinstance(source.filesystem, pafs.LocalFileSystem)
    if remote or cost > MAX_SURVEY_BYTES or facts.rows > _MAX_SURVEY_ROWS:
        return None
    spread, batches = Spread(), []
    for batch in _read_all(data, facts, spread.add):
        batches.append(batch._replace(x=content_hashes(batch.x)))
    names = source.columns.features
    _refuse_equal_rows(spread, facts.rows)
    spread.refuse_lost(names)
    constant = spread.constant
    if len(facts.shape) == 1 and constant.any():  # pixels at the border of images often are
        first = int(constant.argmax())
        feature = names[first] if len(names) > 1 else f"number {first} of {names[0]}"
        warnings.warn(
            f"data.path: {constant.sum()} of {constant.size} features never vary and carry no information (the first: "
            f"{feature}); leave them out",
            stacklevel=2,
        )
    return _concatenate(batches)


def pieces(data: Data, facts: Facts, size: int | None = None) -> tuple[Piece, ...]:
    """Divide a set into pieces of at most `size` bytes of values (16 MB by default), but at least one row group."""
    source = _open_source(data, facts.columns)
    max_rows = max(1, (size or PIECE_BYTES) // facts.row_bytes)
    result: list[Piece] = []
    first_id = 0
    for file in source.files:
        metadata, first_row = open_file(source.filesystem, file).metadata, 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            last = result[-1] if result else None
            if last and last.file == file and last.rows + rows <= max_rows:
                result[-1] = last._replace(groups=(*last.groups, group), rows=last.rows + rows)
            elif rows:
                result.append(Piece(file, (group,), first_id, first_row, rows))
            first_id, first_row = first_id + rows, first_row + rows
    return tuple(result)


def split_marks(data: Data, facts: Facts, piece: Piece) -> np.ndarray | None:
    """Return the split that the set names for each row of a piece, (rows,), or None if it names none."""
    filesystem, columns = _open_piece(data, facts, piece)
    if columns.split is None:
        return None
    batches = read_batches(filesystem, piece.file, [columns.split], _LABEL_ROWS, piece.groups, piece.first_row)
    return np.concatenate([read_marks(batch, columns.split) for batch in batches])


def read(
    data: Data, facts: Facts, piece: Piece, look: Callable[[np.ndarray], None] | None = None
) -> Iterator[Rows]:  # fmt: skip
    """Read the rows of a piece, some megabytes at a time, and check each value.

    Args:
        look: is called with the features (rows, *shape) of each batch, in the precision in which they are written.
    """
    filesystem, columns = _open_piece(data, facts, piece)
    class_number = {name: number for number, name in enumerate(facts.classes)}
    size, count = _batch_rows(facts.shape), 0
    for batch in read_batches(filesystem, piece.file, columns.names, size, piece.groups, piece.first_row):
        exact = read_exactly(batch, columns, facts.shape[0], facts.columns.offsets)
        x = as_float32(exact)
        _check_features(x, batch, columns, data, facts)
        if look:
            look(exact)
        y = None
        if columns.labels:
            labels, indices = read_labels(batch, columns.labels)
            numbers = [class_number.get(str(label), -1) for label in labels]
            if -1 in numbers:
                raise InputError(_CHANGED.format(piece.file))
            y = np.array(numbers, np.int64)[indices]
        count += len(x)
        yield Rows(x, y, read_marks(batch, columns.split) if columns.split else None)
    release_memory()
    if count != piece.rows:
        raise InputError(_CHANGED.format(piece.file))


def release_memory() -> None:
    """Return freed memory to the operating system.

    The C library's allocator otherwise keeps what large batches have taken for its own later use, some 100 MB per
    process. `malloc_trim` exists only in glibc; elsewhere this does nothing.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _open_piece(data: Data, facts: Facts, piece: Piece) -> tuple[pafs.FileSystem, Columns]:
    """Return a piece's filesystem and columns. The set's other files, which may be thousands, are not opened."""
    assert data.path is not None
    filesystem, _ = filesystem_of(data.path)
    return filesystem, find_columns(data, open_file(filesystem, piece.file).schema_arrow, facts.columns)


def _read_all(data: Data, facts: Facts, look: Callable[[np.ndarray], None]) -> Iterator[Rows]:
    count = 0
    for piece in pieces(data, facts):
        yield from read(data, facts, piece, look)
        count += piece.rows
    if count != facts.rows:
        raise InputError(_CHANGED.format(data.path))


def _concatenate(batches: Sequence[Rows]) -> Rows:
    x, labels, marks = ([values for values in column if values is not None] for column in zip(*batches, strict=True))
    return Rows(np.concatenate(x), np.concatenate(labels) if labels else None, np.concatenate(marks) if marks else None)


def _refuse_equal_rows(spread: Spread, rows: int) -> None:
    """Raise an InputError if all features are constant."""
    if spread.constant.all() and rows > 1:
        raise InputError(f"data.path: all {rows} rows are equal, so there is nothing to learn; name data that vary")


def _check_features(x: np.ndarray, batch: Batch, columns: Columns, data: Data, facts: Facts) -> None:
    """Raise an InputError if rows have another shape than the set's first row, or hold values that cannot be used."""

    def refuse(bad: np.ndarray, message: str) -> None:
        if bad.any():
            offset, feature = divmod(int(bad.argmax()), prod(facts.shape))
            name = columns.features[feature if len(columns.features) > 1 else 0]
            raise InputError(f"{batch.place(name, offset)}: {message}")

    if x.shape[1:] != facts.shape:
        raise InputError(
            f"{batch.place(columns.features[0])}: the row has the shape {x.shape[1:]}, the set's first row "
            f"{facts.shape}; make all rows alike"
        )
    if x.dtype != np.uint8:
        refuse(~np.isfinite(x), "the value is not finite, or too large for 32 bits; correct it or drop the row")
    likelihood = resolve_likelihood(data, facts)
    if not facts.levels and likelihood.endswith("bernoulli"):
        remedy = "rescale the values or set --data.likelihood gaussian"
        refuse((x < 0) | (x > 1), f"{likelihood} needs values in [0, 1]; {remedy}")
