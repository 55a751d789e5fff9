"""Finds the files of a Parquet data set, and what the names of its files and folders say about their rows.

A folder is read as the programs that write such folders mean it. Names that begin with "." or "_" are left out, as
Arrow, Spark and pandas do. Folders called `key=value`, as Hive writes them, and names such as `train-0.parquet` tell
something about all rows of a file. Functions raise an InputError that names the path, the file or the folder.
"""

import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import NamedTuple
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as pafs

from aecore.config.experiment import Data
from aecore.core.errors import InputError, join_names
from aecore.data.files import filesystem_of, short_reason

_ENDING = re.compile(r".*\.(parquet|parq|pq)(\.(gz|gzip|snappy|zstd|zst|brotli|lz4))?", re.IGNORECASE | re.DOTALL)
"""Name of a Parquet file; some writers add the compression that is used inside."""
_TABLES = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}
"""Folders that mark a table of another format, whose old files stay in the folder after their rows were deleted."""
_ICEBERG = re.compile(r"(.*/)?metadata/[^/]*\.metadata\.json")
_MISSING = ("", "__HIVE_DEFAULT_PARTITION__")
"""Values of a folder `key=value` that stand for a missing value."""


class File(NamedTuple):
    """A file of a data set."""

    path: str
    """Path on the file's filesystem."""
    name: str
    """Path below the folder that holds all files of the set."""

    @property
    def keys(self) -> dict[str, str | None]:
        """Keys and values of the folders `key=value` in which the file lies; None is a missing value."""
        pairs = [folder.partition("=") for folder in self.name.split("/")[:-1] if folder.find("=") > 0]
        return {unquote(key): None if value in _MISSING else unquote(value) for key, _, value in pairs}


class Listing(NamedTuple):
    """The files of a data set, in the order in which their rows are read, and the names that were left out."""

    filesystem: pafs.FileSystem
    files: tuple[File, ...]
    hidden: tuple[str, ...] = ()
    """Files and folders whose names begin with "." or "_"."""
    others: tuple[str, ...] = ()
    """Files without the ending of a Parquet file."""
    copies: tuple[str, ...] = ()
    """Links to files and folders that the set has already."""
    named: bool = False
    """Whether the user named a single file, so that its name says nothing about its rows."""


def find_files(paths: str | Sequence[str]) -> Listing:
    """Return the files at a path or URI, or at several: files, folders with all Parquet files below them, and patterns
    with the wildcards of a shell (`*`, `?`, `[ab]`, and `**` for folders at any depth).

    A file that is named is read whatever its name. A file that is found twice is read once. The order does not depend
    on where the folder lies or on the order of the paths.
    """
    several = (paths,) if isinstance(paths, str) else tuple(paths)
    roots, listings = [], []
    for path in several:
        try:
            root, listing = _find(path)
            _ = [file.path.encode() for file in listing.files]  # Arrow cannot open what is not UTF-8
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"data.path: cannot open {path} ({short_reason(error)}); check the address") from error
        except UnicodeError as error:
            raise InputError(f"data.path: {path} is or holds a name that is not UTF-8; rename it") from error
        roots.append(root)
        listings.append(listing)
    first = listings[0]
    if any(listing.filesystem != first.filesystem for listing in listings):
        raise InputError(
            f"data.path: {join_paths(several)} lie on different filesystems; copy all files to one of them"
        )
    return _join(first.filesystem, roots, listings)


def filesystem_at(data: Data) -> pafs.FileSystem:
    """Return the filesystem on which a data set lies, without a look at its files."""
    assert data.path is not None
    path = data.path if isinstance(data.path, str) else data.path[0]
    pattern = split_pattern(path)
    return filesystem_of(pattern[0] if pattern else path)[0]


def join_paths(paths: str | Sequence[str] | None) -> str:
    """Return the paths of a data set as a message names them."""
    return paths if isinstance(paths, str) else join_names(paths or (), 4)


def _join(filesystem: pafs.FileSystem, roots: Sequence[str], listings: Sequence[Listing]) -> Listing:
    """Return the files of all listings as one, with names below the deepest folder that holds all `roots`."""
    absolute = [os.path.abspath(root) if _is_local(filesystem) else f"/{root.strip('/')}" for root in roots]
    common = posixpath.commonpath(absolute)
    files: dict[str, File] = {}
    for root, place, listing in zip(roots, absolute, listings, strict=True):
        for file in listing.files:
            whole = posixpath.join(place, file.path[len(root) :].lstrip("/"))
            files.setdefault(whole, file._replace(name=whole[len(common) :].lstrip("/")))
    ordered, copies = [files[place] for place in sorted(files)], list[str]()
    if _is_local(filesystem) and len(files) > 1:  # several paths, or a pattern, may lead to one file through links
        unique: dict[str, File] = {}
        for file in ordered:
            if unique.setdefault(os.path.realpath(file.path), file) is not file:
                copies.append(file.name)
        ordered = list(unique.values())
    hidden = _together(listing.hidden for listing in listings)
    others = _together(listing.others for listing in listings)
    copies = list(_together([*(listing.copies for listing in listings), tuple(copies)]))
    named = len(listings) == 1 and listings[0].named
    return Listing(filesystem, tuple(ordered), hidden, others, tuple(copies), named)


def _together(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(chain.from_iterable(names)))


def _find(path: str) -> tuple[str, Listing]:
    """Return the folder below which the names at a path count, and the files there."""
    if pattern := split_pattern(path):
        return _find_matches(path, *pattern)
    filesystem, inner = filesystem_of(path)
    kind = filesystem.get_file_info(inner).type
    if kind == pafs.FileType.File:
        return posixpath.dirname(inner), Listing(filesystem, (File(inner, ""),), named=True)
    if kind == pafs.FileType.NotFound:
        several = f", or several as [{path}]" if "," in path else ""
        several = ", or several as [a.parquet,b.parquet] in place of braces" if "{" in path else several
        raise InputError(f"data.path: {path} does not exist; name a Parquet file, folder or URI{several}")
    if kind != pafs.FileType.Directory:
        raise InputError(f"data.path: {path} is neither a file nor a folder; name a Parquet file, folder or URI")
    listing = _list_folder(filesystem, inner.rstrip("/") or "/")
    if not listing.files:
        hidden = f" ({join_names(listing.hidden, 3)}: hidden)" if listing.hidden else ""
        others = f" ({join_names(listing.others, 3)}: name them by a pattern)" if listing.others else ""
        raise InputError(f"data.path: no .parquet file in {path}{hidden}{others}; name the folder that has them")
    return inner.rstrip("/") or "/", listing


def split_pattern(path: str) -> tuple[str, list[str]] | None:
    """Return the path or URI before the first wildcard, and the parts from there on; None if there is no wildcard."""
    scheme, _, rest = path.rpartition("://")
    body, _, query = rest.partition("?") if scheme else (rest, "", "")
    wild = re.compile(r"[*[]" if scheme else r"[*?[]")  # in a URI, "?" begins the query
    parts = body.split("/")
    first = next((n for n, part in enumerate(parts) if wild.search(part)), None)
    if first is None or (not scheme and os.path.exists(path)):
        return None
    before = "/".join(parts[:first]) or ("/" if body.startswith("/") else ".")
    if not scheme:
        return before, [part for part in parts[first:] if part]
    before = "" if first == 0 else before  # "file:///" has an empty host
    address = f"{scheme}://{before}{'/' if before in ('', '.') else ''}{f'?{query}' if query else ''}"
    return address, [unquote(part) for part in parts[first:] if part]


def _find_matches(path: str, before: str, parts: Sequence[str]) -> tuple[str, Listing]:
    """Return the folder before the first wildcard, and the files that match or lie in folders that match."""
    filesystem, root = filesystem_of(before)
    root = root.rstrip("/") or ("/" if root.startswith("/") else "")
    listings, named = [], []
    if filesystem.get_file_info(root or "/").type == pafs.FileType.Directory:
        for match, is_folder in _matches(filesystem, root, parts):
            if is_folder:
                listings.append(_list_folder(filesystem, match))
            else:
                named.append(match)
    # a pattern such as data/* also matches notes beside the Parquet files
    chosen = [file for file in named if _is_parquet(file)] or named
    others = [file for file in named if file not in set(chosen)]
    listings.append(Listing(filesystem, tuple(File(file, "") for file in chosen), others=_below(root, others)))
    whole = _join(filesystem, [root] * len(listings), listings)
    if not whole.files:
        raise InputError(f"data.path: nothing matches {path}; check the pattern")
    return root, whole._replace(named=len(chosen) == len(whole.files) == 1)


def _matches(filesystem: pafs.FileSystem, folder: str, parts: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Yield the paths below a folder that match a pattern's parts, and whether each is a folder. A wildcard matches no
    hidden name unless it follows the "." or "_" of that name."""
    first, rest = parts[0], parts[1:]
    if first == "**":
        if not rest:
            yield folder, True
            return
        yield from _matches(filesystem, folder, rest)
    for name, is_folder, is_link in _entries(filesystem, folder):
        path = f"{folder.rstrip('/')}/{name}" if folder else name
        if first == "**":
            if is_folder and not is_link and not _is_hidden(name):
                yield from _matches(filesystem, path, parts)
        elif fnmatchcase(name, first) and (not _is_hidden(name) or first[0] == name[0]):
            if not rest:
                yield path, is_folder
            elif is_folder:
                yield from _matches(filesystem, path, rest)


def _entries(filesystem: pafs.FileSystem, folder: str) -> list[tuple[str, bool, bool]]:
    """Return name, whether it is a folder and whether it is a link for each entry of a folder, sorted by name."""
    if _is_local(filesystem):
        with os.scandir(folder or ".") as entries:
            return sorted((entry.name, entry.is_dir(), entry.is_symlink()) for entry in entries)
    infos = filesystem.get_file_info(pafs.FileSelector(folder))
    return sorted((info.base_name, info.type == pafs.FileType.Directory, False) for info in infos)


def _list_folder(filesystem: pafs.FileSystem, folder: str) -> Listing:
    """Return the Parquet files at any depth below a folder."""
    if _is_local(filesystem):
        paths, copies = _walk(folder)
    else:
        entries = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True))
        paths, copies = [entry.path for entry in entries if entry.type == pafs.FileType.File], []
    files, hidden, others = [], set(), []
    for path, name in zip(paths, _below(folder, paths), strict=True):
        parts = name.split("/")
        first = next((n for n, part in enumerate(parts, 1) if _is_hidden(part)), None)
        if first:
            hidden.add("/".join(parts[:first]))
        elif _is_parquet(name):
            files.append(File(path, name))
        else:
            others.append(name)
    kind = next((_TABLES[name] for name in map(posixpath.basename, hidden) if name in _TABLES), None)
    if kind or any(map(_ICEBERG.fullmatch, others)):
        raise InputError(
            f"data.path: {folder} is a table of {kind or 'Iceberg'}, whose files may hold rows that were deleted since;"
            f" write its present rows as Parquet, or name its files by a pattern such as {folder}/*.parquet"
        )
    return Listing(filesystem, tuple(files), tuple(sorted(hidden)), tuple(sorted(others)), _below(folder, copies))


def _walk(folder: str) -> tuple[list[str], list[str]]:
    """Return the files at any depth below a local folder, and the links to files and folders that are there already.

    Links are followed after all else is known. Hidden folders are listed among the files, and not entered.
    """
    paths: list[str] = []
    copies: list[str] = []
    links: list[str] = []
    folders, seen = [folder], set()
    while folders or links:
        path = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(path)
        if real in seen:
            copies.append(path)
        elif os.path.isdir(path):
            seen.add(real)
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if _is_hidden(entry.name):
                        paths.append(entry.path)
                    elif entry.is_symlink():
                        links.append(entry.path)
                    elif entry.is_dir():
                        folders.append(entry.path)
                    elif entry.is_file():
                        paths.append(entry.path)
                        if _is_parquet(entry.name):  # Hugging Face's cache links to files without an ending
                            seen.add(f"{real.rstrip('/')}/{entry.name}")
        elif os.path.isfile(path):
            seen.add(real)
            paths.append(path)
        elif _is_parquet(path):
            raise InputError(f"data.path: {path} is a link to {os.readlink(path)}, which does not exist; delete it")
    return paths, copies


def _is_local(filesystem: pafs.FileSystem) -> bool:
    return isinstance(filesystem, pafs.LocalFileSystem)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _is_parquet(path: str) -> bool:
    return _ENDING.fullmatch(path) is not None


def _below(folder: str, paths: Iterable[str]) -> tuple[str, ...]:
    """Return the paths relative to the folder in which they lie."""
    return tuple(path[len(folder) :].lstrip("/") for path in paths)
