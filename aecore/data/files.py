"""Parquet files and URIs: opening files and reading them in batches.

Functions raise an InputError that names the file if it is missing, unreadable or damaged.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from aecore.core.errors import InputError, hide_secrets

_MANY_VALUES = 2**20
"""A file of more values than this is decoded by several threads."""


class Batch(NamedTuple):
    """Consecutive rows of a file."""

    file: str
    first_row: int
    """Number that the batch's first row has in the file."""
    table: pa.Table

    def place(self, column: str, offset: int = 0) -> str:
        """Say where a value lies, for an error message; `offset` counts the rows from the first of the batch."""
        return f"{self.file} column {column} row {self.first_row + offset}"


def filesystem_of(path: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem on which a path or URI lies, and its path there."""
    return pafs.FileSystem.from_uri(path) if "://" in path else (pafs.LocalFileSystem(), path)


def open_file(filesystem: pafs.FileSystem, file: str) -> pq.ParquetFile:
    """Open a Parquet file and read its schema."""
    try:
        # Arrow keeps what it reads ahead in memory until the file is closed, which pays only for remote files
        remote = not isinstance(filesystem, pafs.LocalFileSystem)
        parquet_file = pq.ParquetFile(file, filesystem=filesystem, pre_buffer=remote)
        _ = parquet_file.schema_arrow.names  # Arrow decodes names when they are first used, and may fail then
        return parquet_file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.path: {file} is not a readable Parquet file ({short_reason(error)}); write it again"
        ) from error


def file_digest(filesystem: pafs.FileSystem, file: str) -> bytes:
    """Return the SHA-256 digest of a file's bytes."""
    digest = hashlib.sha256()
    try:
        with filesystem.open_input_stream(file) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data.path: cannot read {file} ({short_reason(error)}); check its permissions") from error
    return digest.digest()


def read_batches(
    opened: pq.ParquetFile, file: str, columns: Sequence[str], size: int, groups: Sequence[int] | None = None,
    first_row: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """Read some columns of a file, at most `size` rows at a time.

    Args:
        opened: the file, from `open_file`.
        file: its name, for messages.
        groups: row groups to read; None reads all.
        first_row: number in the file of the first row that is read.
    """
    chosen: dict[str, Any] = {} if groups is None else {"row_groups": list(groups)}
    # Arrow decodes columns in parallel; of small files, that takes longer than the decoding
    chosen["use_threads"] = len(columns) > 1 and opened.metadata.num_rows * len(columns) > _MANY_VALUES
    try:
        for batch in opened.iter_batches(batch_size=size, columns=list(columns), **chosen):
            if len(batch):
                yield Batch(file, first_row, pa.Table.from_batches([batch]))
            first_row += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file} row {first_row}: cannot be read ({short_reason(error)}); write the file again"
        ) from error


def short_reason(error: Exception) -> str:
    """Return an error's message on one line, without secrets, cut to 120 characters."""
    return hide_secrets(" ".join(str(error).split()))[:120]
