"""Parquet files and URIs: opening files and reading them in batches.

Functions raise an InputError that names the file if it is missing, unreadable or damaged.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from aecore.core.errors import InputError, shorten

_SCHEMES = "s3://, gs://, abfs://, hdfs:// or file:///"
"""What a URI may begin with."""
_BETTER_SCHEMES = {
    "s3a": "s3://BUCKET/...", "s3n": "s3://BUCKET/...", "dbfs": "/dbfs/..., where Databricks mounts it",
    **dict.fromkeys(("az", "adl", "wasb", "wasbs"), "abfs://ACCOUNT.blob.core.windows.net/CONTAINER/..."),
    **dict.fromkeys(("http", "https", "ftp"), f"the folder into which you have downloaded it, or {_SCHEMES}"),
}  # fmt: skip
"""What to write instead of a scheme that others use."""
_GCS_SECONDS = 30
"""Seconds for which a request to Google's store is tried again; its own limit is a quarter of an hour."""

_OTHER_FILES = {
    b"PK\3\4": "is a ZIP archive; unpack it", b"\x1f\x8b": "is packed with gzip; unpack it",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself; fetch it, `git lfs pull`",
    b"ARROW1": "is an Arrow or Feather file; write it as Parquet", b"<": "is a web page; download the file itself",
    b"PARE": "is encrypted; write it without encryption",
}  # fmt: skip
"""What files are that are taken for Parquet, by their first bytes, and what to do."""
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


def filesystem_of(path: str, setting: str = "data.path") -> tuple[pafs.FileSystem, str]:
    """Return the filesystem on which a path or URI lies, and its path there.

    Args:
        setting: What names the path, for the message.

    Raises:
        InputError: The path or URI cannot be one, or its filesystem cannot be reached from here.
    """
    scheme = scheme_of(path)
    if not path.strip():
        raise InputError(f"{setting}: empty; name a folder, a file or a URI")
    if not scheme and os.name != "nt" and re.match(r"[A-Za-z]:[\\/]", path):
        raise InputError(f"{setting}: {path} is a path of Windows; write it as this machine has it")
    if not scheme:
        return pafs.LocalFileSystem(), os.path.abspath(path) if ":" in path else path  # Arrow takes `a:b` for a URI
    uri = _checked_uri(path, scheme, setting)
    try:
        return pafs.FileSystem.from_uri(uri)
    except ImportError as error:
        package = (re.findall(r"(?:Install |No module named ')([\w-]+)", str(error)) or [scheme])[0]
        raise InputError(f"{setting}: {path} needs the package {package}; add it, `uv run --with {package}`") from error
    except (pa.ArrowException, OSError) as error:
        if "Unrecognized filesystem" in str(error):
            raise InputError(f"{setting}: {path} has an unknown scheme; write {_SCHEMES}, or a folder") from error
        if "libjvm" in str(error) or "libhdfs" in str(error):
            remedy = "install Java and Hadoop's client, and set JAVA_HOME, HADOOP_HOME and CLASSPATH"
            raise InputError(f"{setting}: {path} needs Hadoop's library, which is not here; {remedy}") from error
        raise InputError(f"{setting}: cannot open {path} ({short_reason(error)}); check the address") from error


def scheme_of(path: str) -> str:
    """Return the scheme of a URI in lower case; nothing for a path, even if it has a colon."""
    scheme, colon, rest = path.partition(":")
    is_uri = colon and (rest.startswith("//") or (scheme.lower() in ("file", "dbfs") and rest.startswith("/")))
    return scheme.lower() if is_uri and re.fullmatch(r"[A-Za-z][\w+.-]+", scheme) else ""


def _checked_uri(path: str, scheme: str, setting: str) -> str:
    """Return a URI as Arrow reads it, or raise an InputError that says what to write instead."""
    if better := _BETTER_SCHEMES.get(scheme):
        raise InputError(f"{setting}: {path} has a scheme that cannot be read; write {better}")
    if "#" in path or (scheme == "file" and "?" in path):
        raise InputError(f"{setting}: {path} ends for a URI at its `#` or `?`; write %23 for `#` and %3F for `?`")
    parts = re.fullmatch(r"([^/]*(?://[^/]*)?)(.*)", path, re.DOTALL)
    assert parts is not None, "both parts may be empty, so that every text matches"
    place, inner = parts.groups()
    if scheme == "file" and not re.fullmatch(r"\w+:(//)?", place):
        raise InputError(f"{setting}: {path} needs three slashes; write file:///FOLDER, or the path alone")
    if scheme in ("s3", "gs", "gcs") and place.endswith("/"):
        raise InputError(f"{setting}: {path} names no bucket; write {scheme}://BUCKET/FOLDER")
    # a URI has no blanks, and no letters but those of ASCII; where they stand, they can be meant in one way only
    inner = re.sub(r"%(?![\da-fA-F]{2})", "%25", inner)
    uri = scheme + place[len(scheme) :] + quote(inner, safe="/:@?=&%+,;!$'()*~")
    if scheme in ("gs", "gcs") and "retry_limit_seconds=" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={_GCS_SECONDS}"
    return uri


def open_file(filesystem: pafs.FileSystem, file: str) -> pq.ParquetFile:
    """Open a Parquet file and read its schema."""
    try:
        # Arrow keeps what it reads ahead in memory until the file is closed, which pays only for remote files
        remote = not isinstance(filesystem, pafs.LocalFileSystem)
        parquet_file = pq.ParquetFile(file, filesystem=filesystem, pre_buffer=remote)
        _ = parquet_file.schema_arrow.names  # Arrow decodes names when they are first used, and may fail then
        return parquet_file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, PermissionError):
            raise InputError(f"data.path: cannot read {file}; check its permissions") from error
        problem = _other_file(filesystem, file) or (
            f"is not a readable Parquet file ({short_reason(error)}); write it again"
        )
        raise InputError(f"data.path: {file} {problem}") from error


def _other_file(filesystem: pafs.FileSystem, file: str) -> str | None:
    """Say what a file is that is no Parquet file, and what to do; None if that is not known."""
    try:
        with filesystem.open_input_stream(file, compression=None) as stream:
            first = stream.read(max(map(len, _OTHER_FILES)))
    except (pa.ArrowException, OSError):
        return None
    return next((problem for magic, problem in _OTHER_FILES.items() if first.startswith(magic)), None)


def file_digest(filesystem: pafs.FileSystem, file: str) -> bytes:
    """Return the SHA-256 digest of a file's bytes."""
    digest = hashlib.sha256()
    try:
        # without `compression`, Arrow would unpack a file whose name ends in .gz
        with filesystem.open_input_stream(file, compression=None) as stream:
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
        way_out = "write the file without encryption" if "decrypt" in str(error) else "write the file again"
        raise InputError(f"{file} row {first_row}: cannot be read ({short_reason(error)}); {way_out}") from error


def short_reason(error: Exception) -> str:
    """Return an error's message on one line, without secrets, shortened to 120 characters."""
    return shorten(str(error), 120)
