"""Finds the sets that a study looks at side by side, each a Parquet file or a folder of them, and names them.

Functions raise an InputError that names the path, or the sets that cannot be told apart.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from urllib.parse import quote, unquote

from aecore.config.experiment import Data
from aecore.core.errors import InputError, join_names
from aecore.data.files import scheme_of
from aecore.data.folders import File, Listing, find_files, join_paths, split_pattern
from aecore.data.marks import read_marks_of_names

_ENDING = re.compile(r"\.(parquet|parq|pq)(\.\w+)?$", re.IGNORECASE)
_NOT_IN_NAMES = re.compile(r"[^\w .-]")
"""What the names of MLflow's metrics and of folders may not contain."""
_NAME_LENGTH = 100
_ONE_SET = "it is one set; name it in base.data.path, and leave data out"


def find_sets(paths: str | Sequence[str]) -> dict[str, str]:
    """Return the paths of data sets by name, sorted by path: of a folder each file and each folder in it that holds
    Parquet is a set, of a pattern each match, and a file that is named is one.

    The name of a set is that of its file or folder, with the names of the folders above where others have the same.
    """
    several = (paths,) if isinstance(paths, str) else tuple(paths)
    found = sorted({place for path in several for place in _sets_at(path)})
    return dict(zip(_names(found), found, strict=True))


def _sets_at(path: str) -> list[str]:
    try:
        listing = find_files(path)
    except InputError as error:
        raise InputError(f"data{str(error).removeprefix('data.path')}") from error
    pattern = split_pattern(path)
    if listing.named and not pattern:
        return [path]
    folder, parts = pattern or (path, [""])
    # a folder that "**" stands for may be of any depth, so that each file is a set
    depth = None if "**" in parts else len(parts)
    tops = list(dict.fromkeys("/".join(file.name.split("/")[:depth]) for file in listing.files))
    _check_that_they_are_sets(path, listing, tops)
    return [_below(folder, top) for top in tops]


def _check_that_they_are_sets(path: str, listing: Listing, tops: Sequence[str]) -> None:
    """Refuse files and folders that are parts of one set, by their names."""
    files = {file.name for file in listing.files}
    if keys := [top for top in tops if posixpath.basename(top).find("=") > 0 and top not in files]:
        raise InputError(f"data: {path} holds folders of one set by key, {join_names(keys, 2)}: {_ONE_SET}")
    parts = tuple(File(top, posixpath.basename(top)) for top in tops)
    if read_marks_of_names(Data(name="parquet", path=path), listing._replace(files=parts, named=False), ()).splits:
        raise InputError(f"data: {path} holds the splits of one set, {join_names(tops, 3)}: {_ONE_SET}")


def _below(folder: str, name: str) -> str:
    """Return the path or URI of what lies in a folder."""
    if not scheme_of(folder):
        return posixpath.join(folder, name)
    address, _, query = folder.partition("?")
    return f"{address.rstrip('/')}/{quote(name)}{'?' if query else ''}{query}"


def _names(paths: Sequence[str]) -> list[str]:
    """Return a name for each path, of as many of its last parts as tell it from the others."""
    parts = [_parts(path) for path in paths]
    counts = [1] * len(paths)
    while True:
        names = [_name(own[-count:]) for own, count in zip(parts, counts, strict=True)]
        times = Counter(names)
        longer = [n for n, name in enumerate(names) if times[name] > 1 and counts[n] < len(parts[n])]
        if not longer:
            break
        counts = [count + (n in longer) for n, count in enumerate(counts)]
    if same := next((name for name in names if times[name] > 1), None):
        places = [path for path, name in zip(paths, names, strict=True) if name == same]
        raise InputError(f"data: {join_paths(places)} would both be called {same}; rename one of them")
    return names


def _parts(path: str) -> list[str]:
    """Return the parts of a path or URI, without the ending of a Parquet file."""
    scheme = scheme_of(path)
    plain = unquote(path.partition("?")[0].partition(":")[2]) if scheme else path
    return [part for part in _ENDING.sub("", plain).split("/") if part]


def _name(parts: Sequence[str]) -> str:
    return _NOT_IN_NAMES.sub("_", "-".join(parts)).strip(" .-")[:_NAME_LENGTH].strip() or "set"
