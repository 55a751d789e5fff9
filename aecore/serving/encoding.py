"""A data set through a trained model into Parquet, piece by piece: a file is whole, or it is not there.

A piece's rows and its file are the same in every attempt, so that what an earlier one has finished is left as it is,
and each row of the input has one row in the output.
"""

import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from aecore.config.experiment import Data
from aecore.config.facts import Facts
from aecore.core.errors import InputError
from aecore.data import parquet
from aecore.data.dataset import rows
from aecore.data.parquet import Piece, Rows, filesystem_of
from aecore.models.spec import LayerSpec
from aecore.models.storage import Result

SCHEMA = "1"
"""Of the files' columns and of how a set is cut into pieces; raised with every change."""
_PIECE_BYTES, _CHUNK_BYTES = 2**23, 2**23
_SAMPLES = 10_000
"""Rows of a piece that is sampled."""
Way = Literal["encode", "decode", "sample"]


@dataclass(frozen=True)
class Work:
    """What is to be made of which rows, and where it goes."""

    way: Way
    model: str
    """models:/NAME/VERSION."""
    digest: str
    """Of the model's files."""
    data: Data | None
    facts: Facts | None
    """None of both where there is nothing to read."""
    rows: int
    output: str
    """Folder or URI."""
    batch_size: int | None = None
    """Rows that the model takes at once; None leaves it to the model."""

    @property
    def identity(self) -> dict[str, str]:
        """What the rows of the output are decided by; the metadata of each file."""
        source = self.facts.digest if self.facts else f"{self.rows} samples"
        labels = str(self.data.labels) if self.data else ""
        return {
            "diabolo.schema": SCHEMA, "diabolo.made_by": self.way, "diabolo.model": self.model,
            "diabolo.model.digest": self.digest, "diabolo.data.digest": source, "diabolo.labels": labels,
        }  # fmt: skip

    def pieces(self) -> tuple[Piece, ...]:
        """What one file each is made of."""
        if self.data is not None and self.facts is not None and self.data.name == "parquet":
            return parquet.pieces(self.data, self.facts, _PIECE_BYTES)
        name, size = ("", _SAMPLES) if self.data is None or self.facts is None else (
            self.data.name, max(1, _PIECE_BYTES // (prod(self.facts.shape) * (1 if self.facts.levels else 4)))
        )  # fmt: skip
        return tuple(Piece(name, (), n, n, min(size, self.rows - n)) for n in range(0, self.rows, size))


def fit_data(result: Result, data: Data, facts: Facts, model: str) -> Data:
    """The data as the model wants them read.

    Raises:
        InputError: they are not of the kind that it was trained on.
    """
    first = LayerSpec.model_validate(result.config["layers"][0])
    if facts.shape != first.in_shape:
        raise InputError(
            f"data: a row has the shape {facts.shape}, {model} reads {first.in_shape}; name data like its own"
        )
    scale = result.weights["prepare.scale"]
    levels = 0 if scale.ndim or scale == 1 else round(1 / float(scale)) + 1
    if not scale.ndim and levels != facts.levels:
        said = [f"integers below {n}" if n else "floating-point numbers" for n in (facts.levels, levels)]
        raise InputError(f"data: values are {said[0]}, {model} reads {said[1]}; write them as its own were")
    return data.model_copy(update={"likelihood": first.likelihood})


def fit_codes(data: Data, facts: Facts, last: LayerSpec, model: str, digest: str) -> None:
    """Raises an InputError where the data are not codes of this model, whose last layer is `last`."""
    assert data.path is not None
    kept, _ = _footer(filesystem_of(data.path)[0], parquet.pieces(data, facts)[0].file)
    if kept.get("diabolo.model.digest") != digest or facts.shape != (prod(last.code_shape),):
        raise InputError(
            f"decode: {data.path} holds codes of {kept.get('diabolo.model', 'an unknown model')}, not of {model}; name "
            "the folder that jobs.encode wrote with it"
        )


def whole(work: Work) -> set[int]:
    """Numbers of the pieces whose files are there, and whole; what a killed attempt left behind is removed.

    Raises:
        InputError: the folder holds something else.
    """
    filesystem, folder = filesystem_of(work.output)
    pieces = work.pieces()
    found: set[int] = set()
    try:
        filesystem.create_dir(folder, recursive=True)
        inside = filesystem.get_file_info(pafs.FileSelector(folder))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"output: cannot write to {work.output} ({' '.join(str(error).split())[:120]})") from error
    names = {_file(number): number for number in range(len(pieces))}
    for info in inside:
        if info.base_name.startswith(".part-"):
            filesystem.delete_file(info.path)
            continue
        if not info.base_name.endswith(".parquet"):
            continue
        with suppress(pa.ArrowException, OSError):  # damaged: written again
            kept, rows = _footer(filesystem, info.path)
            for key, value in work.identity.items():
                if kept.get(key) != value:
                    what = f"{key} {kept[key][:40]}, not {value[:40]}" if key in kept else "not made by this command"
                    raise InputError(f"output: {info.path} is of another job ({what}); name another --output")
            number = names.get(info.base_name)
            if number is not None and rows == pieces[number].rows:
                found.add(number)
    return found


def _footer(filesystem: pafs.FileSystem, file: str) -> tuple[dict[str, str], int]:
    """What a file says of itself, and its rows."""
    metadata = pq.read_metadata(file, filesystem=filesystem)
    said = metadata.metadata or {}
    return {k.decode(): v.decode() for k, v in said.items() if k.startswith(b"diabolo.")}, metadata.num_rows


class Worker:
    """Makes the files of one job, one after the other."""

    def __init__(self, work: Work, result: Result) -> None:
        from aecore.serving.model import Model  # the driver needs no torch

        self.work, self.pieces, self.model = work, work.pieces(), Model(result)
        self.model.batch = work.batch_size or self.model.batch
        self.filesystem, self.folder = filesystem_of(work.output)

    def __call__(self, number: int) -> int:
        """Make a piece's file; its rows.

        Raises:
            InputError: a row cannot be used.
        """
        piece, count = self.pieces[number], 0
        part = f"{self.folder}/.{_file(number)}.{uuid.uuid4().hex[:12]}"
        writer = None
        with self.filesystem.open_output_stream(part) as stream:
            for columns in self._columns(piece):
                table = _table(piece, count, columns, self._file_name(piece))
                if writer is None:
                    schema = table.schema.with_metadata(self.work.identity)
                    texts = [field.name for field in schema if pa.types.is_dictionary(field.type)]
                    writer = pq.ParquetWriter(stream, schema, use_dictionary=texts, write_statistics=["id"])
                writer.write_table(table)
                count += len(table)
            assert writer is not None and count == piece.rows
            writer.close()
        self.filesystem.move(part, f"{self.folder}/{_file(number)}")
        return count

    def _columns(self, piece: Piece) -> Iterator[dict[str, np.ndarray]]:
        work, model = self.work, self.model
        if work.way == "sample":
            for start in range(piece.row, piece.row + piece.rows, model.batch):
                count = min(model.batch, piece.row + piece.rows - start)
                yield {"sample": model.sample(count, seed=start)}
            return
        assert work.data is not None and work.facts is not None
        for x, y, _ in _read(work.data, work.facts, piece):
            if work.way == "decode":
                yield {"reconstruction": model.decode(x)}
            else:
                label = {} if y is None else {"label": np.array(work.facts.classes)[y]}
                yield model.measure(x) | label

    def _file_name(self, piece: Piece) -> str:
        """Below the folder that the data were named by, so that it stays where the folder is moved."""
        data = self.work.data
        root = filesystem_of(data.path)[1].rstrip("/") if data is not None and data.path else ""
        return piece.file.removeprefix(f"{root}/") if piece.file != root else piece.file.rpartition("/")[2]


def _file(number: int) -> str:
    return f"part-{number:06}.parquet"


def _read(data: Data, facts: Facts, piece: Piece) -> Iterator[Rows]:
    if data.name == "parquet":
        yield from parquet.read(data, facts, piece)
        return
    x, y, _ = _rows(data, facts)
    size = max(1, _CHUNK_BYTES // (4 * prod(facts.shape)))
    for start in range(piece.row, piece.row + piece.rows, size):
        own = slice(start, min(start + size, piece.row + piece.rows))
        yield Rows(x[own], None if y is None else y[own], None)


_rows = lru_cache(1)(rows)
"""A named set is read once by each process."""


def _table(piece: Piece, count: int, columns: dict[str, np.ndarray], file: str) -> pa.Table:
    """Some rows of a piece, the first of which is its row number `count`."""
    size = len(next(iter(columns.values())))
    number = np.arange(count, count + size)
    arrays = {"id": pa.array(piece.first + number)}
    if piece.file:
        arrays["file"] = pa.DictionaryArray.from_arrays(np.zeros(size, np.int32), [file])
        arrays["row"] = pa.array(piece.row + number)
    return pa.table(arrays | {name: _array(values) for name, values in columns.items()})


def _array(values: np.ndarray) -> pa.Array:
    """One value a row; vectors as fixed-size lists, images as tensors."""
    if values.dtype.kind == "U":
        return pa.array(values).dictionary_encode()
    if values.ndim == 1:
        return pa.array(values)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), prod(values.shape[1:]))
    if values.ndim == 2:
        return flat
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), values.shape[1:]), flat)
