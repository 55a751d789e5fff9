"""A user's own Parquet: which columns hold what, and their values as arrays.

Images may be `struct<bytes, path>` (as Hugging Face writes them), encoded bytes (PNG, JPEG), Arrow fixed-shape tensors
or nested fixed-size lists; feature vectors are lists of numbers, or the table's numeric columns taken together.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from aecore.config import Data
from aecore.errors import InputError
from aecore.specs import Facts

_LABELS = ("label", "labels", "target", "class", "y")
_SPLIT = "split"
_MODES = {1: "L", 3: "RGB"}
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}


_PIECE_BYTES, _CHUNK_BYTES = 2**24, 2**23


class Columns(NamedTuple):
    """Which columns of a table are what."""

    features: tuple[str, ...]
    """One column of images or vectors, or several of single numbers."""
    labels: str | None
    split: str | None


def inspect(data: Data) -> Facts:
    """Digest, shape, classes and number of rows; labels are read, images are not but for the first.

    Raises:
        InputError: not readable as the module docstring describes.
    """
    filesystem, files = _files(data)
    digest, schema, rows = hashlib.sha256(), None, 0
    for file in files:
        with filesystem.open_input_stream(file) as stream:
            inner = hashlib.sha256()
            while chunk := stream.read(1 << 20):
                inner.update(chunk)
            digest.update(inner.digest())
        metadata = _open(data, filesystem, file).metadata
        rows += metadata.num_rows
        found = metadata.schema.to_arrow_schema()
        if schema is not None and not found.equals(schema):
            raise InputError(f"data.path: {file} has other columns than {files[0]}; write all files with one schema")
        schema = found
    if not rows:
        raise InputError(f"data.path: {data.path} has no rows; write some")
    assert schema is not None
    columns = _columns(data, schema)
    first = next(f for f in files if _open(data, filesystem, f).metadata.num_rows)
    head = next(_open(data, filesystem, first).iter_batches(batch_size=1, columns=list(columns.features)))
    x = _features(data, pa.Table.from_batches([head]), columns, 0)
    classes: tuple[str, ...] = ()
    if columns.labels:
        names: set[Any] = set()
        for file in files:
            table = _open(data, filesystem, file).read(columns=[columns.labels])
            names |= set(table[columns.labels].unique().to_pylist())
        if None in names:
            raise InputError(f"column {columns.labels}: some labels are missing; drop those rows or --data.labels null")
        classes = tuple(str(name) for name in sorted(names))
        if len(classes) < 2:
            raise InputError(f"column {columns.labels}: one class only ({classes[0]}); use --data.labels null")
    levels = 256 if x.dtype == np.uint8 else 0
    digest.update(f"{columns.features} {columns.labels} {columns.split}".encode())
    return Facts(digest=digest.hexdigest(), shape=x.shape[1:], levels=levels, classes=classes, rows=rows)


class Piece(NamedTuple):
    """Neighbouring row groups of a file, which are read together."""

    file: str
    groups: tuple[int, ...]
    first: int
    """Number of the first row in the whole set."""
    rows: int


def pieces(data: Data, facts: Facts) -> tuple[Piece, ...]:
    """The set in pieces of some 16 MB of values, or of one row group where that is larger."""
    filesystem, files = _files(data)
    most = max(1, _PIECE_BYTES // (prod(facts.shape) * (1 if facts.levels else 4)))
    found: list[Piece] = []
    first = 0
    for file in files:
        metadata = _open(data, filesystem, file).metadata
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if found and found[-1].file == file and found[-1].rows + rows <= most:
                last = found.pop()
                found.append(Piece(file, (*last.groups, group), last.first, last.rows + rows))
            elif rows:
                found.append(Piece(file, (group,), first, rows))
            first += rows
    return tuple(found)


def marks(data: Data, piece: Piece) -> np.ndarray | None:
    """What the set says of the split of each row of a piece ("train", "validation", "test"), or None."""
    source = _open(data, _filesystem(data)[0], piece.file)
    if _SPLIT not in source.schema_arrow.names:
        return None
    column = source.read_row_groups(list(piece.groups), columns=[_SPLIT])[_SPLIT]
    return np.array([_mark(piece.file, piece.first + n, value) for n, value in enumerate(column.to_pylist())])


def read(data: Data, facts: Facts, piece: Piece) -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]:
    """The rows of a piece, some megabytes at a time: features (rows, *shape), class numbers (rows,) or None, split
    marks (rows,) or None.

    Raises:
        InputError: a value that cannot be used; the message names its row.
    """
    source = _open(data, _filesystem(data)[0], piece.file)
    columns = _columns(data, source.schema_arrow)
    wanted = [*columns.features, *filter(None, (columns.labels, columns.split))]
    number = {name: n for n, name in enumerate(facts.classes)}
    most = max(1, min(4096, _CHUNK_BYTES // (4 * prod(facts.shape))))
    row = piece.first
    for batch in source.iter_batches(batch_size=most, row_groups=list(piece.groups), columns=wanted):
        table = pa.Table.from_batches([batch])
        x = _features(data, table, columns, row, _MODES.get(facts.shape[0]))
        if x.shape[1:] != facts.shape:
            raise InputError(
                f"{piece.file} row {row}: shape {x.shape[1:]}, the first row has {facts.shape}; make them equal"
            )
        if x.dtype != np.uint8 and not np.isfinite(x).all():
            bad = row + int(np.argwhere(~np.isfinite(x).reshape(len(x), -1).all(1))[0, 0])
            raise InputError(f"{piece.file} row {bad}: a value is not finite; clean the data")
        y = marked = None
        if columns.labels:
            y = np.array([number[str(v)] for v in table[columns.labels].to_pylist()], dtype=np.int64)
        if columns.split:
            values = table[columns.split].to_pylist()
            marked = np.array([_mark(piece.file, row + n, v) for n, v in enumerate(values)])
        yield x, y, marked
        row += len(x)


def load(data: Data, facts: Facts) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """All rows, as `read` gives them.

    Raises:
        InputError: a value that cannot be used; the message names its row.
    """
    xs, ys, marked = zip(*(chunk for piece in pieces(data, facts) for chunk in read(data, facts, piece)), strict=True)
    return np.concatenate(xs), _joined(ys), _joined(marked)


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    found = [part for part in parts if part is not None]
    return np.concatenate(found) if found else None


def _mark(file: str, row: int, value: Any) -> str:
    if value not in _SPLITS:
        raise InputError(f"{file} row {row}: split is {value!r}; use train, validation or test")
    return _SPLITS[value]


def _filesystem(data: Data) -> tuple[pafs.FileSystem, str]:
    assert data.path is not None
    return pafs.FileSystem.from_uri(data.path) if "://" in data.path else (pafs.LocalFileSystem(), data.path)


def _files(data: Data) -> tuple[pafs.FileSystem, list[str]]:
    assert data.path is not None
    try:
        filesystem, path = _filesystem(data)
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            return filesystem, [path]
        if info.type == pafs.FileType.Directory:
            inside = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
            files = sorted(i.path for i in inside if i.type == pafs.FileType.File and i.path.endswith(".parquet"))
            if files:
                return filesystem, files
            raise InputError(f"data.path: no .parquet file in {data.path}; name the folder that has them")
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data.path: cannot open {data.path} ({_line(error)}); check the address") from error
    raise InputError(f"data.path: {data.path} does not exist; name a Parquet file, folder or URI")


def _open(data: Data, filesystem: pafs.FileSystem, file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, filesystem=filesystem)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"data.path: {file} is not a readable Parquet file ({_line(error)}); write it again"
        ) from error


def _columns(data: Data, schema: pa.Schema) -> Columns:
    split = _SPLIT if _SPLIT in schema.names else None
    usual = next((name for name in _LABELS if name in schema.names), None)
    labels = data.labels
    if labels == "auto":
        labels = usual
    elif labels is not None and labels not in schema.names:
        raise InputError(f"data.labels: no column {labels}; there are {', '.join(schema.names)}")
    if labels is not None and not (pa.types.is_integer(kind := schema.field(labels).type) or _is_text(kind)):
        raise InputError(f"column {labels}: labels are {kind}; use integers or strings")
    # labels that are not wanted are no features either, nor is the index that pandas writes
    apart = {usual, labels, split}
    rest = [field for field in schema if field.name not in apart and not field.name.startswith("__index_level_")]
    if data.column is not None:
        if data.column not in schema.names:
            raise InputError(f"data.column: no column {data.column}; there are {', '.join(schema.names)}")
        return Columns((data.column,), labels, split)
    candidates = [field.name for field in rest if _reader(field.type)]
    if len(candidates) > 1:
        raise InputError(
            f"data.column: {' and '.join(candidates)} could all be the images; name one with --data.column"
        )
    if candidates:
        return Columns((candidates[0],), labels, split)
    numbers = tuple(field.name for field in rest if _is_number(field.type))
    if numbers:
        return Columns(numbers, labels, split)
    raise InputError(
        f"data.path: no column of images, vectors or numbers among {', '.join(schema.names)}; "
        "the README's Parquet part says what is read"
    )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _reader(kind: pa.DataType) -> Callable[[pa.ChunkedArray, int, str | None], np.ndarray] | None:
    """How to turn a column of this type into (rows, *shape), or None where it is neither images nor vectors."""
    if pa.types.is_struct(kind):
        names = {kind.field(n).name for n in range(kind.num_fields)}
        return (lambda column, row, mode: _decode(_struct_bytes(column), row, mode)) if "bytes" in names else None
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return lambda column, row, mode: _decode(column.to_pylist(), row, mode)
    if isinstance(kind, pa.FixedShapeTensorType):
        return lambda column, row, mode: _channels_first(column.combine_chunks().to_numpy_ndarray())
    inner, sizes = kind, []
    while pa.types.is_fixed_size_list(inner) or pa.types.is_list(inner) or pa.types.is_large_list(inner):
        sizes.append(getattr(inner, "list_size", None))
        inner = inner.value_type
    if sizes and _is_number(inner):
        return lambda column, row, mode: _channels_first(_lists(column, sizes, row))
    return None


def _features(data: Data, table: pa.Table, columns: Columns, row: int, mode: str | None = None) -> np.ndarray:
    """Features of a table whose first row is row number `row` of the data: (rows, *shape), uint8 or float32.

    Args:
        mode: of encoded images, grey (L) or colour (RGB); that of the first one by default.
    """
    for name in columns.features:
        if table[name].null_count:
            missing = row + int(np.argmax(table[name].is_null().to_numpy()))
            raise InputError(f"column {name} row {missing}: missing; fill it or drop the row")
    if len(columns.features) > 1 or _reader(table.schema.field(columns.features[0]).type) is None:
        if not all(_is_number(table.schema.field(name).type) for name in columns.features):
            kind = table.schema.field(columns.features[0]).type
            raise InputError(f"column {columns.features[0]}: {kind} is neither images nor vectors; name another column")
        return np.stack([table[name].to_numpy().astype(np.float32) for name in columns.features], 1)
    reader = _reader(table.schema.field(columns.features[0]).type)
    assert reader is not None
    try:
        x = reader(table[columns.features[0]], row, mode)
    except InputError as error:
        raise InputError(f"column {columns.features[0]} {error}") from error
    return x if x.dtype == np.uint8 else x.astype(np.float32)


def _struct_bytes(column: pa.ChunkedArray) -> list[bytes | None]:
    return pa.chunked_array([chunk.field("bytes") for chunk in column.chunks], pa.binary()).to_pylist()


def _decode(encoded: list[bytes | None], row: int, mode: str | None) -> np.ndarray:
    """Encoded images to (rows, channels, height, width) uint8, all of one mode: the given, else the first one's."""
    from PIL import Image

    images: list[np.ndarray] = []
    for n, raw in enumerate(encoded):
        if raw is None:
            raise InputError(f"row {row + n}: no bytes; store the images in the file, not as paths")
        try:
            with Image.open(io.BytesIO(raw)) as image:
                mode = mode or ("L" if image.mode in ("1", "L", "LA", "I", "I;16", "F") else "RGB")
                pixels = np.asarray(image.convert(mode))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"row {row + n}: not a readable image ({_line(error)}); replace it") from error
        pixels = pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
        if images and pixels.shape != images[0].shape:
            raise InputError(f"row {row + n}: image of shape {pixels.shape}, others {images[0].shape}; resize them")
        images.append(pixels)
    return np.stack(images)


def _lists(column: pa.ChunkedArray, sizes: list[int | None], row: int) -> np.ndarray:
    """Nested lists of numbers to (rows, *sizes); sizes that the type does not fix must agree over the rows."""
    array = column.combine_chunks()
    shape = [len(array)]
    for size in sizes:
        if size is None:
            lengths = np.diff(array.offsets.to_numpy())
            if len(set(lengths.tolist())) > 1:
                first = row + int(np.argmax(lengths != lengths[0]))
                raise InputError(f"row {first}: list of another length than the others; make them equal")
            size = int(lengths[0])
        shape.append(size)
        array = array.flatten()
    if array.null_count:
        raise InputError(f"row {row}: a value within the lists is missing; fill it")
    return array.to_numpy(zero_copy_only=False).reshape(shape)


def _channels_first(x: np.ndarray) -> np.ndarray:
    """(rows, height, width[, channels]) to (rows, channels, height, width); vectors as they are."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
