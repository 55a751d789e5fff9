"""A user's own Parquet: which columns hold what, and their values as arrays.

Images may be `struct<bytes, path>` (as Hugging Face writes them), encoded bytes (PNG, JPEG), Arrow fixed-shape tensors
or nested fixed-size lists; feature vectors are lists of numbers, or the table's numeric columns taken together.
"""

import ctypes
import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from aecore.config.experiment import Data
from aecore.config.facts import Facts
from aecore.config.resolve import resolve_likelihood
from aecore.core.errors import InputError, hide_secrets, join_names, short_repr
from aecore.data.splits import row_ids

_LABELS = ("label", "labels", "target", "class", "y")
_SPLIT = "split"
_MODES = {1: "L", 3: "RGB"}
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow may take encoded bytes for; some of the others start programs."""
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}
_ALTERED = "{} is damaged, or was changed while the job ran; write it again or start again"
_MOST_BYTES, _MOST_ROWS = 2**31, 2**22
"""Largest local set, as arrays, whose values are checked before a job starts: some seconds."""
_DECODING = 16
"""Decoding an image takes about so many times longer a byte than reading an array."""
_BATCH_ROWS, _BATCH_BYTES, _PIECE_BYTES = 4096, 2**23, 2**24
_NAMED = 4
"""Candidates that a message names."""


class Columns(NamedTuple):
    """Which columns of a table are what."""

    features: tuple[str, ...]
    """One column of images or vectors, or several of single numbers."""
    labels: str | None
    split: str | None


class Rows(NamedTuple):
    """Some rows, or all, in order."""

    x: np.ndarray
    """(rows, *shape), uint8 or float32, finite."""
    y: np.ndarray | None
    """(rows,) int64 class numbers."""
    marks: np.ndarray | None
    """(rows,) train, validation or test."""


class Piece(NamedTuple):
    """Neighbouring row groups of a file, which are read together."""

    file: str
    groups: tuple[int, ...]
    first: int
    """Number of the first row in the whole set."""
    row: int
    """Its number in the file."""
    rows: int


class _Source(NamedTuple):
    filesystem: pafs.FileSystem
    files: list[str]
    schema: pa.Schema
    columns: Columns


def inspect(data: Data) -> Facts:
    """Digest, shape, classes and number of rows; labels are read, images are not but for the first.

    Raises:
        InputError: not readable as the module docstring describes.
    """
    source = _source(data)
    digest, rows = hashlib.sha256(), 0
    for file in source.files:
        digest.update(_digest(source.filesystem, file))
        metadata = _open(source.filesystem, file).metadata
        rows += metadata.num_rows
        if not metadata.schema.to_arrow_schema().equals(source.schema):
            raise InputError(
                f"data.path: {file} has other columns than {source.files[0]}; write all files with one schema"
            )
    if not rows:
        raise InputError(f"data.path: {data.path} has no rows; write some")
    columns = source.columns
    first = next(_tables(source, columns.features, 1), None)
    if first is None:
        raise InputError(f"data.path: {_ALTERED.format(data.path)}")
    file, row, head = first
    x = _features(file, head, columns, row)
    if not x.size or x.ndim > 4:
        raise InputError(
            f"column {columns.features[0]}: a row has the shape {x.shape[1:]}; a vector has (features), an image "
            "(height, width) or (height, width, channels)"
        )
    classes: tuple[str, ...] = ()
    if columns.labels:
        values: set[Any] = set()
        for file, row, table in _tables(source, [columns.labels], 1 << 16):
            values.update(_labels(file, table, columns.labels, row)[0])
        if not values:
            raise InputError(f"data.path: {_ALTERED.format(data.path)}")
        classes = tuple(str(value) for value in sorted(values))
        if len(classes) < 2:
            raise InputError(f"column {columns.labels}: one class only ({classes[0]}); use --data.labels null")
    levels = 256 if x.dtype == np.uint8 else 0
    digest.update(f"{columns.features} {columns.labels} {columns.split}".encode())
    return Facts(digest=digest.hexdigest(), shape=x.shape[1:], levels=levels, classes=classes, rows=rows)


def load(data: Data, facts: Facts) -> Rows:
    """All rows.

    Raises:
        InputError: a value that cannot be used, told with its file, column and row; or no feature that varies.
    """
    parts = list(_parts(data, facts))
    x = np.concatenate([part.x for part in parts])
    _constant(x.min(0), x.max(0), len(x))
    return Rows(x, *_joined(parts))


def survey(data: Data, facts: Facts) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None] | None:
    """The checks of `load` in one pass that keeps no features: each row's `row_ids` (rows,), and labels and marks.

    Returns:
        None where it is left to `load`, in a task: far away, or too large to be read twice.

    Raises:
        InputError: as `load`.
    """
    source = _source(data)
    encoded = _is_encoded(source.schema.field(source.columns.features[0]).type)
    size = facts.rows * prod(facts.shape) * (_DECODING if encoded else 1 if facts.levels else 4)
    if not isinstance(source.filesystem, pafs.LocalFileSystem) or size > _MOST_BYTES or facts.rows > _MOST_ROWS:
        return None
    bare, hashes, low, high = [], [], np.array(np.inf), np.array(-np.inf)
    for part in _parts(data, facts):
        low, high = np.minimum(low, part.x.min(0)), np.maximum(high, part.x.max(0))
        hashes.append(row_ids(part.x))
        bare.append(part._replace(x=np.empty(0)))
    constant = _constant(low, high, facts.rows)
    if len(facts.shape) == 1 and constant.any():  # pixels at the border of images often are
        names = source.columns.features
        first = int(constant.argmax())
        where = names[first] if len(names) > 1 else f"number {first} of {names[0]}"
        warnings.warn(
            f"data.path: {constant.sum()} of {constant.size} features never vary and carry nothing (the first: "
            f"{where}); leave them out",
            stacklevel=2,
        )
    return np.concatenate(hashes), *_joined(bare)


def pieces(data: Data, facts: Facts, size: int | None = None) -> tuple[Piece, ...]:
    """The set in pieces of so many bytes of values, 16 MB by default, or of one row group where that is larger."""
    source = _source(data)
    most = max(1, (size or _PIECE_BYTES) // (prod(facts.shape) * (1 if facts.levels else 4)))
    found: list[Piece] = []
    first = 0
    for file in source.files:
        metadata, row = _open(source.filesystem, file).metadata, 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if found and found[-1].file == file and found[-1].rows + rows <= most:
                last = found.pop()
                found.append(last._replace(groups=(*last.groups, group), rows=last.rows + rows))
            elif rows:
                found.append(Piece(file, (group,), first, row, rows))
            first, row = first + rows, row + rows
    return tuple(found)


def marks(data: Data, piece: Piece) -> np.ndarray | None:
    """What the set says of the split of each row of a piece ("train", "validation", "test"), or None."""
    filesystem, columns = _of_piece(data, piece)
    if columns.split is None:
        return None
    tables = _batches(filesystem, piece.file, [_SPLIT], 1 << 16, piece.groups, piece.row)
    return np.concatenate([_marks(piece.file, table, row) for row, table in tables])


def read(data: Data, facts: Facts, piece: Piece) -> Iterator[Rows]:
    """The rows of a piece, some megabytes at a time, each checked.

    Raises:
        InputError: a value that cannot be used, told with its file, column and row.
    """
    filesystem, columns = _of_piece(data, piece)
    number = {name: n for n, name in enumerate(facts.classes)}
    kind = resolve_likelihood(data, facts)
    bounded = not facts.levels and kind.endswith("bernoulli")
    beyond = f"{kind} needs values in [0, 1]; rescale them or set --data.likelihood gaussian"
    wanted = [*columns.features, *filter(None, (columns.labels, columns.split))]
    size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // (4 * prod(facts.shape))))
    file, count = piece.file, 0
    for row, table in _batches(filesystem, file, wanted, size, piece.groups, piece.row):
        x = _features(file, table, columns, row, _MODES.get(facts.shape[0]))
        if x.shape[1:] != facts.shape:
            raise InputError(f"{file} row {row}: shape {x.shape[1:]}, the first row has {facts.shape}; make them equal")
        if x.dtype != np.uint8:
            _refuse(~np.isfinite(x), "a value is not finite, or beyond 32 bits; clean the data", file, columns, row)
        if bounded:
            _refuse((x < 0) | (x > 1), beyond, file, columns, row)
        y = marked = None
        if columns.labels:
            values, indices = _labels(file, table, columns.labels, row)
            numbers = [number.get(str(value), -1) for value in values]
            if -1 in numbers:
                raise InputError(f"data.path: {_ALTERED.format(file)}")
            y = np.array(numbers, np.int64)[indices]
        if columns.split:
            marked = _marks(file, table, row)
        count += len(x)
        yield Rows(x, y, marked)
    give_back()
    if count != piece.rows:
        raise InputError(f"data.path: {_ALTERED.format(file)}")


def give_back() -> None:
    """Give memory that was freed back to the system, which allocators would keep: some 100 MB a process."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


def _constant(low: np.ndarray, high: np.ndarray, rows: int) -> np.ndarray:
    """Which features have one value in all rows."""
    constant = np.asarray(low == high)
    if constant.all() and rows > 1:
        raise InputError(f"data.path: all {rows} rows are equal, so there is nothing to learn; name data that vary")
    return constant


def _joined(parts: list[Rows]) -> tuple[np.ndarray | None, np.ndarray | None]:
    y = [part.y for part in parts if part.y is not None]
    marks = [part.marks for part in parts if part.marks is not None]
    return np.concatenate(y) if y else None, np.concatenate(marks) if marks else None


def _parts(data: Data, facts: Facts) -> Iterator[Rows]:
    """All rows, batch by batch, each checked."""
    count = 0
    for piece in pieces(data, facts):
        yield from read(data, facts, piece)
        count += piece.rows
    if count != facts.rows:
        raise InputError(f"data.path: {_ALTERED.format(data.path)}")


def _refuse(bad: np.ndarray, wrong: str, file: str, columns: Columns, row: int) -> None:
    """Raise for the first of the values (rows, *shape) that is bad."""
    if bad.any():
        n, feature = divmod(int(bad.argmax()), prod(bad.shape[1:]))
        name = columns.features[feature if len(columns.features) > 1 else 0]
        raise InputError(f"{file} column {name} row {row + n}: {wrong}")


def _labels(file: str, table: pa.Table, name: str, row: int) -> tuple[list[Any], np.ndarray]:
    """The labels that occur, and which of them each row has."""
    array = _plain(file, table, name)
    if array.null_count:
        first = row + int(array.is_null().to_numpy(zero_copy_only=False).argmax())
        raise InputError(
            f"{file} column {name} row {first}: some labels are missing; drop those rows or --data.labels null"
        )
    encoded = array.dictionary_encode()
    values, indices = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    for number, value in enumerate(values):
        if isinstance(value, int) and value < 0:
            raise InputError(
                f"{file} column {name} row {row + int((indices == number).argmax())}: {value} is no class (it often "
                "marks rows without a label); drop those rows or --data.labels null"
            )
    return values, indices


def _marks(file: str, table: pa.Table, row: int) -> np.ndarray:
    values = _plain(file, table, _SPLIT).to_pylist()
    for n, value in enumerate(values):
        if value not in _SPLITS:
            raise InputError(f"{file} row {row + n}: split is {short_repr(value)}; use train, validation or test")
    return np.array([_SPLITS[value] for value in values], "<U10")


def _plain(file: str, table: pa.Table, name: str) -> pa.Array:
    """A column of integers or text without its dictionary."""
    array = table[name].combine_chunks()
    array = array.cast(array.type.value_type) if pa.types.is_dictionary(array.type) else array
    try:
        array.validate(full=True)
    except pa.ArrowException as error:
        raise InputError(f"{file} column {name}: damaged text ({_line(error)}); write it again") from error
    return array


def _source(data: Data) -> _Source:
    filesystem, files = _files(data)
    schema = _open(filesystem, files[0]).schema_arrow
    return _Source(filesystem, files, schema, _columns(data, schema))


def _digest(filesystem: pafs.FileSystem, file: str) -> bytes:
    digest = hashlib.sha256()
    try:
        with filesystem.open_input_stream(file) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data.path: cannot read {file} ({_line(error)}); check its permissions") from error
    return digest.digest()


def _tables(source: _Source, columns: Sequence[str], size: int) -> Iterator[tuple[str, int, pa.Table]]:
    """Some columns, up to `size` rows at once, each with its file and the number that its first row has there."""
    for file in source.files:
        for row, table in _batches(source.filesystem, file, columns, size):
            yield file, row, table


def _batches(
    filesystem: pafs.FileSystem, file: str, columns: Sequence[str], size: int, groups: Sequence[int] | None = None,
    row: int = 0,
) -> Iterator[tuple[int, pa.Table]]:  # fmt: skip
    """Some columns of a file, or of some of its row groups, the first of which begins at `row`."""
    try:
        chosen = {} if groups is None else {"row_groups": list(groups)}
        for batch in _open(filesystem, file).iter_batches(batch_size=size, columns=list(columns), **chosen):
            if len(batch):
                yield row, pa.Table.from_batches([batch])
            row += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} row {row}: cannot be read ({_line(error)}); write the file again") from error


def _of_piece(data: Data, piece: Piece) -> tuple[pafs.FileSystem, Columns]:
    """What a piece is read with; the set's other files, of which there may be thousands, are not looked at."""
    assert data.path is not None
    filesystem, _ = filesystem_of(data.path)
    return filesystem, _columns(data, _open(filesystem, piece.file).schema_arrow)


def filesystem_of(path: str) -> tuple[pafs.FileSystem, str]:
    """Where a path or URI lies, and its path there."""
    return pafs.FileSystem.from_uri(path) if "://" in path else (pafs.LocalFileSystem(), path)


def _files(data: Data) -> tuple[pafs.FileSystem, list[str]]:
    assert data.path is not None
    try:
        filesystem, path = filesystem_of(data.path)
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


def _open(filesystem: pafs.FileSystem, file: str) -> pq.ParquetFile:
    try:
        # buffers read ahead are kept to the end; only from far away they are worth it
        far = not isinstance(filesystem, pafs.LocalFileSystem)
        opened = pq.ParquetFile(file, filesystem=filesystem, pre_buffer=far)
        _ = opened.schema_arrow.names  # these are read as late as they are asked for
        return opened
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.path: {file} is not a readable Parquet file ({_line(error)}); write it again"
        ) from error


def _columns(data: Data, schema: pa.Schema) -> Columns:
    if len(set(schema.names)) < len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise InputError(f"data.path: several columns are called {twice}; give each a name of its own")
    split = _SPLIT if _SPLIT in schema.names else None
    if split and not _is_text(kind := schema.field(split).type):
        raise InputError(f"column {split}: marks are {_type(kind)}; use train, validation and test, or another name")
    usual = next((name for name in _LABELS if name in schema.names), None)
    labels = data.labels
    if labels == "auto":
        labels = usual
    elif labels is not None and labels not in schema.names:
        raise InputError(f"data.labels: no column {labels}; there are {join_names(schema.names)}")
    if labels is not None and not (pa.types.is_integer(kind := schema.field(labels).type) or _is_text(kind)):
        raise InputError(f"column {labels}: labels are {_type(kind)}; use integers or strings")
    # labels that are not wanted are no features either, nor is the index that pandas writes
    apart = {usual, labels, split}
    rest = [field for field in schema if field.name not in apart and not field.name.startswith("__index_level_")]
    if data.column is not None:
        if data.column not in schema.names:
            raise InputError(f"data.column: no column {data.column}; there are {join_names(schema.names)}")
        if data.column in (labels, split):
            raise InputError(
                f"data.column: {data.column} holds the {'labels' if data.column == labels else 'splits'}; "
                "name the images or vectors"
            )
        return Columns((data.column,), labels, split)
    candidates = [field.name for field in rest if _reader(field.type)]
    if len(candidates) > 1:
        raise InputError(
            f"data.column: {' and '.join(candidates[:_NAMED])} could all be the images; name one with --data.column"
        )
    if candidates:
        return Columns((candidates[0],), labels, split)
    numbers = tuple(field.name for field in rest if _is_number(field.type))
    if numbers:
        return Columns(numbers, labels, split)
    raise InputError(
        f"data.path: no column of images, vectors or numbers among {join_names(schema.names)}; "
        "the README's Parquet part says what is read"
    )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_encoded(kind: pa.DataType) -> bool:
    """Whether a column of this type holds encoded images."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _reader(kind: pa.DataType) -> Callable[[pa.Array, int, str | None], np.ndarray] | None:
    """How to turn a column of this type into (rows, *shape), or None where it is neither images nor vectors."""
    if _is_encoded(kind):
        nested = pa.types.is_struct(kind)
        return lambda array, row, mode: _decode((array.field("bytes") if nested else array).to_pylist(), row, mode)
    if isinstance(kind, pa.FixedShapeTensorType) and _is_number(kind.value_type):
        return lambda array, row, mode: _channels_first(_tensors(array, row))
    inner = kind
    while _is_list(inner):
        inner = inner.value_type
    if inner is not kind and _is_number(inner):
        return lambda array, row, mode: _channels_first(_lists(array, row))
    return None


def _features(file: str, table: pa.Table, columns: Columns, row: int, mode: str | None = None) -> np.ndarray:
    """Features of a table whose first row is row number `row` of the file: (rows, *shape), uint8 or float32.

    Args:
        mode: of encoded images, grey (L) or colour (RGB); that of the first one by default.
    """
    for name in columns.features:
        if table[name].null_count:
            missing = row + int(np.argmax(table[name].is_null().to_numpy()))
            raise InputError(f"{file} column {name} row {missing}: missing; fill it or drop the row")
    first = columns.features[0]
    kind = table.schema.field(first).type
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, which is refused
        if len(columns.features) > 1 or _is_number(kind):
            return np.stack([table[name].to_numpy().astype(np.float32) for name in columns.features], 1)
        reader = _reader(kind)
        if reader is None:
            raise InputError(f"column {first}: {_type(kind)} is neither images nor vectors; name another column")
        try:
            x = reader(table[first].combine_chunks(), row, mode)
        except InputError as error:
            raise InputError(f"{file} column {first} {error}") from error
        return x if x.dtype == np.uint8 else x.astype(np.float32)


def _decode(encoded: list[bytes | None], row: int, mode: str | None) -> np.ndarray:
    """Encoded images to (rows, channels, height, width) uint8, all of one mode: the given, else the first one's."""
    from PIL import Image, UnidentifiedImageError

    images: list[np.ndarray] = []
    for n, raw in enumerate(encoded):
        if raw is None:
            raise InputError(f"row {row + n}: no bytes; store the images in the file, not as paths")
        try:
            with Image.open(io.BytesIO(raw), formats=_FORMATS) as image:
                if image.mode[0] in "IF":  # Pillow would clip them
                    raise InputError(f"row {row + n}: image of mode {image.mode}; store 8 bits a channel")
                mode = mode or ("L" if image.mode in ("1", "L", "LA") else "RGB")
                pixels = np.asarray(image.convert(mode))
        except InputError:
            raise
        except UnidentifiedImageError as error:
            raise InputError(f"row {row + n}: not a readable image ({', '.join(_FORMATS)}); replace it") from error
        except Exception as error:  # on damaged bytes Pillow raises almost anything
            raise InputError(f"row {row + n}: not a readable image ({_line(error)}); replace it") from error
        pixels = pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
        if images and pixels.shape != images[0].shape:
            raise InputError(f"row {row + n}: image of shape {pixels.shape}, others {images[0].shape}; resize them")
        images.append(pixels)
    return np.stack(images)


def _lists(array: pa.Array, row: int) -> np.ndarray:
    """Nested lists of numbers to (rows, *sizes); sizes that the type does not fix must agree over the rows."""
    shape = [len(array)]
    while _is_list(array.type):
        if pa.types.is_fixed_size_list(array.type):
            size = array.type.list_size
        else:
            lengths = np.diff(array.offsets.to_numpy())
            size = int(lengths[0]) if len(lengths) else 0
            if (lengths != size).any():
                first = row + int((lengths != size).argmax()) // prod(shape[1:])
                raise InputError(f"row {first}: list of another length than the others; make them equal")
        shape.append(size)
        array = array.flatten()
        _refuse_missing(array, row, prod(shape[1:]))
    return array.to_numpy(zero_copy_only=False).reshape(shape)


def _tensors(array: pa.ExtensionArray, row: int) -> np.ndarray:
    """Fixed-shape tensors to (rows, *shape), in the order of axes that the type names."""
    kind, values = array.type, array.storage.flatten()
    _refuse_missing(values, row, prod(kind.shape))
    x = values.to_numpy(zero_copy_only=False).reshape(len(array), *kind.shape)
    return x.transpose(0, *(axis + 1 for axis in kind.permutation)) if kind.permutation else x


def _refuse_missing(values: pa.Array, row: int, each: int) -> None:
    """Raise for a null among `values`, of which each row has so many."""
    if values.null_count:
        first = int(values.is_null().to_numpy(zero_copy_only=False).argmax()) // each
        raise InputError(f"row {row + first}: a value within the lists is missing; fill it")


def _channels_first(x: np.ndarray) -> np.ndarray:
    """(rows, height, width[, channels]) to (rows, channels, height, width); vectors as they are."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _type(kind: pa.DataType) -> str:
    """The type's name, cut where it is long."""
    return f"{kind!s:.60}"


def _line(error: Exception) -> str:
    return hide_secrets(" ".join(str(error).split()))[:120]
