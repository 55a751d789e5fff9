"""Applies a trained model to a data set and writes Parquet, one file per piece; a file appears when it is complete.

The division into pieces and the names of their files are the same in every attempt. So the files that an earlier
attempt has finished stay, and each row of the input has one row in the output. Functions raise an InputError if the
data do not suit the model, a row cannot be used, or the output folder belongs to another job.
"""

import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from aecore.config.experiment import Data
from aecore.config.facts import Facts, has_no_names, nameless
from aecore.core.errors import InputError, shorten
from aecore.core.types import Shape, describe_shape
from aecore.data import parquet
from aecore.data.dataset import load_rows
from aecore.data.files import filesystem_of, short_reason
from aecore.data.folders import filesystem_at
from aecore.data.sets import Piece, divide
from aecore.data.splits import Rows
from aecore.models.spec import LayerSpec
from aecore.models.storage import Result

SCHEMA = "2"
"""Version of the files' columns and of how a set is divided into pieces; raised with every change of these."""
PIECE_BYTES, _CHUNK_BYTES = 2**23, 2**23
"""Bytes of a piece's input, and of the input that is read at once from a set in memory."""
_SAMPLES_PER_PIECE = 10_000
UNFINISHED = ".part-"
"""Beginning of the names of unfinished files."""
_EXPLAINED_ABOVE, _EXPLAINED_ROWS = 95, 10
"""Rows whose `anomaly_score` is larger get reasons, and this many of the strangest rows that are read at once, so that
the strangest rows of all have them. Reasons for all rows would take three times as long as their scores."""
_REASONS = pa.list_(
    pa.struct(
        {"feature": pa.string(), "value": pa.string(), "expected": pa.string(), "contribution": pa.float32()}
    )
)  # fmt: skip
"""Arrow type of the column of reasons, whose records are those of `aecore.anomaly.reasons.Reason`."""
Operation = Literal["encode", "decode", "sample"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one job: the operation, the model, the input rows and the output folder."""

    operation: Operation
    model: str
    """models:/NAME/VERSION."""
    model_digest: str
    """Digest of the model's files."""
    data: Data | None
    """None where the operation is "sample", as are the facts."""
    facts: Facts | None
    rows: int
    """Number of rows of the input, or of samples."""
    output: str
    """Folder or URI."""
    batch_size: int | None = None
    """Rows that the model computes at once; None leaves the number to the model."""

    @property
    def identity(self) -> dict[str, str]:
        """All that decides the output's rows; each file holds it as metadata."""
        source = self.facts.digest if self.facts else f"{self.rows} samples"
        labels = str(self.data.labels) if self.data else ""
        return {
            "diabolo.schema": SCHEMA, "diabolo.made_by": self.operation, "diabolo.model": self.model,
            "diabolo.model.digest": self.model_digest, "diabolo.data.digest": source, "diabolo.labels": labels,
        }  # fmt: skip

    def pieces(self) -> tuple[Piece, ...]:
        """Divide the rows into pieces, each of which becomes one file."""
        if self.data is None or self.facts is None:
            name, size = "", _SAMPLES_PER_PIECE
        elif self.data.name == "parquet":
            return divide(self.data, self.facts, PIECE_BYTES)
        else:
            name, size = self.data.name, max(1, PIECE_BYTES // self.facts.row_bytes)
        return tuple(Piece(name, (), n, n, min(size, self.rows - n)) for n in range(0, self.rows, size))


def adapt_data(result: Result, data: Data, facts: Facts, model: str) -> Data:
    """Return the data's config with the likelihood that the model was trained with, so that values are checked for it;
    refuse data whose shape or range of values differs from what the model was trained on.

    A warning says so if the columns of a table cannot be matched by name.
    """
    first = LayerSpec.model_validate(result.config["layers"][0])
    if facts.shape != first.in_shape:
        raise InputError(
            f"data: the rows are {describe_shape(facts.shape)}, but {model} reads {describe_shape(first.in_shape)}; "
            f"{_shape_remedy(facts.shape, first.in_shape)}"
        )
    scale = result.weights["prepare.scale"]
    levels = 0 if scale.ndim or scale == 1 else round(1 / float(scale)) + 1
    if not scale.ndim and levels != facts.levels:
        own, read = (f"integers below {n}" if n else "floating-point numbers" for n in (facts.levels, levels))
        raise InputError(
            f"data: the values are {own}, but {model} reads {read}; write them like those that it was trained on"
        )
    if facts.columns.features and has_no_names(result.config):
        warnings.warn(nameless(model), stacklevel=2)
    return data.model_copy(update={"likelihood": first.likelihood})


def _shape_remedy(own: Shape, read: Shape) -> str:
    """Say what to do with rows of the shape `own` for a model that reads another shape."""
    if len(own) == len(read) == 3 and {own[0], read[0]} <= {1, 3}:
        steps = [f"resize the images to {read[1]} x {read[2]}"] if own[1:] != read[1:] else []
        steps += [f"store them in {'colour (RGB)' if read[0] == 3 else 'grey'}"] if own[0] != read[0] else []
        return " and ".join(steps)
    return "name data like those that it was trained on"


def check_codes(data: Data, facts: Facts, last: LayerSpec, model: str, model_digest: str) -> None:
    """Raise an InputError if the data are not codes of this model, whose last layer is `last`."""
    metadata, _ = _read_footer(filesystem_at(data), divide(data, facts)[0].file)
    if metadata.get("diabolo.model.digest") != model_digest or facts.shape != (prod(last.code_shape),):
        raise InputError(
            f"decode: {data.path} holds codes of {metadata.get('diabolo.model', 'an unknown model')}, not of {model}; "
            "name the folder that jobs.encode wrote with it"
        )


def find_finished(work: Work) -> set[int]:
    """Return the numbers of the pieces whose files are complete; remove the unfinished files of killed attempts."""
    filesystem, folder = filesystem_of(work.output, "output")
    pieces = work.pieces()
    finished: set[int] = set()
    try:
        filesystem.create_dir(folder, recursive=True)
        entries = filesystem.get_file_info(pafs.FileSelector(folder))
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise InputError(
            f"output: cannot write to {work.output} ({short_reason(error)}); name a folder that can be written to"
        ) from error
    numbers = {file_name(number): number for number in range(len(pieces))}
    for entry in entries:
        if entry.base_name.startswith(UNFINISHED):
            filesystem.delete_file(entry.path)
            continue
        if not entry.base_name.endswith(".parquet"):
            continue
        with suppress(pa.ArrowException, OSError):  # a damaged file is written again
            metadata, rows = _read_footer(filesystem, entry.path)
            _check_identity(entry.path, metadata, work)
            number = numbers.get(entry.base_name)
            if number is not None and rows == pieces[number].rows:
                finished.add(number)
    return finished


def _check_identity(file: str, metadata: dict[str, str], work: Work) -> None:
    for key, value in work.identity.items():
        if metadata.get(key) != value:
            reason = "not made by this command"
            if key in metadata:
                reason = f"{key} {shorten(metadata[key], 40)}, not {shorten(value, 40)}"
            raise InputError(f"output: {file} is of another job ({reason}); name another --output")


def _read_footer(filesystem: pafs.FileSystem, file: str) -> tuple[dict[str, str], int]:
    """Return the metadata that this module wrote into a file, and the file's number of rows."""
    footer = pq.read_metadata(file, filesystem=filesystem)
    metadata = footer.metadata or {}
    return {k.decode(): v.decode() for k, v in metadata.items() if k.startswith(b"diabolo.")}, footer.num_rows


class Worker:
    """Writes the files of one job, one after the other."""

    def __init__(self, work: Work, result: Result, device: Any = None) -> None:
        from aecore.serving.model import Model  # imports torch, which the driver does without

        self.work, self.pieces, self.model = work, work.pieces(), Model(result, device)
        self.model.batch = work.batch_size or self.model.batch
        self.filesystem, self.folder = filesystem_of(work.output, "output")

    def __call__(self, number: int) -> int:
        """Write the file of a piece and return its number of rows."""
        piece, count = self.pieces[number], 0
        unfinished = f"{self.folder}/{UNFINISHED}{number:06}.{uuid.uuid4().hex[:12]}"
        writer = None
        with self.filesystem.open_output_stream(unfinished) as stream:
            for columns in self._compute(piece):
                table = _table(piece, count, columns)
                if writer is None:
                    schema = table.schema.with_metadata(self.work.identity)
                    texts = [field.name for field in schema if pa.types.is_dictionary(field.type)]
                    writer = pq.ParquetWriter(stream, schema, use_dictionary=texts, write_statistics=["id"])
                writer.write_table(table)
                count += len(table)
            assert writer is not None and count == piece.rows
            writer.close()
        self.filesystem.move(unfinished, f"{self.folder}/{file_name(number)}")
        return count

    def _compute(self, piece: Piece) -> Iterator[dict[str, np.ndarray]]:
        """Yield the columns that the model computes from some rows at a time."""
        work, model = self.work, self.model
        if work.operation == "sample":
            for start in range(piece.first_row, piece.first_row + piece.rows, model.batch):
                count = min(model.batch, piece.first_row + piece.rows - start)
                yield {"sample": model.sample(count, seed=start)}
            return
        assert work.data is not None and work.facts is not None
        for x, y, _ in _read_piece(work.data, work.facts, piece):
            if work.operation == "decode":
                yield {"reconstruction": model.decode(x)}
            else:
                label = {} if y is None else {"label": np.array(work.facts.classes)[y]}
                columns = model.measure(x)
                reasons = {"reasons": self._explain(x, columns)} if "score" in columns else {}
                yield columns | reasons | label

    def _explain(self, x: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Return for each row its reasons as a list of records, or None where it is not strange."""
        scores = columns["score"]
        strange = columns["anomaly_score"] > _EXPLAINED_ABOVE
        strange[np.argsort(-scores, kind="stable")[:_EXPLAINED_ROWS]] = True
        reasons = np.full(len(x), None, object)
        for row, each in zip(np.flatnonzero(strange), self.model.explain(x[strange], scores[strange]), strict=True):
            reasons[row] = [reason._asdict() for reason in each]
        return reasons


def file_name(number: int) -> str:
    """Return the name of a piece's file."""
    return f"part-{number:06}.parquet"


_load_rows_once = lru_cache(1)(load_rows)
"""Each process reads a named set once for all its pieces."""


def _read_piece(data: Data, facts: Facts, piece: Piece) -> Iterator[Rows]:
    if data.name == "parquet":
        yield from parquet.read(data, facts, piece)
        return
    x, y, _ = _load_rows_once(data, facts)
    size = max(1, _CHUNK_BYTES // (4 * prod(facts.shape)))
    stop = piece.first_row + piece.rows
    for start in range(piece.first_row, stop, size):
        rows = slice(start, min(start + size, stop))
        yield Rows(x[rows], None if y is None else y[rows], None)


def _table(piece: Piece, offset: int, columns: dict[str, np.ndarray]) -> pa.Table:
    """Make a table of some rows of a piece, the first of which is row number `offset` of the piece.

    It names the piece's file relative to the set's folder, so that the name holds if the folder is moved.
    """
    size = len(next(iter(columns.values())))
    numbers = np.arange(offset, offset + size)
    arrays = {"id": pa.array(piece.first_id + numbers)}
    if piece.file:
        name = piece.source.name if piece.source else piece.file
        arrays["file"] = pa.DictionaryArray.from_arrays(np.zeros(size, np.int32), [name])
        arrays["row"] = pa.array(piece.first_row + numbers)
    return pa.table(arrays | {name: _array(values) for name, values in columns.items()})


def _array(values: np.ndarray) -> pa.Array:
    """Turn (rows, ...) into an Arrow array: vectors become fixed-size lists, images become tensors."""
    if values.dtype.kind == "U":
        return pa.array(values).dictionary_encode()
    if values.dtype.kind == "O":
        return pa.array(values.tolist(), _REASONS)
    if values.ndim == 1:
        return pa.array(values)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), prod(values.shape[1:]))
    if values.ndim == 2:
        return flat
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), values.shape[1:]), flat)
