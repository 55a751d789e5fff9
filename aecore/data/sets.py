"""The files of a Parquet data set, what is read of each of them, and their division into pieces.

Functions raise an InputError that names the file, folder or column if files are missing, unreadable, or do not belong
together.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pyarrow import fs as pafs

from aecore.config.experiment import Data
from aecore.config.facts import Facts, TableColumns
from aecore.core.errors import InputError
from aecore.data.columns import LABELS_ARE_NULL, Columns, find_columns, find_name
from aecore.data.files import Batch, open_file, read_batches
from aecore.data.folders import File, Listing, find_files, join_paths
from aecore.data.marks import Marks, read_marks_of_names
from aecore.data.parts import Part, check_part

PIECE_BYTES = 2**24
"""Largest size of a piece, in bytes of its values."""


class Source(NamedTuple):
    """The facts that hold for each row of a file: its name, the columns to read, and its split or class by its name."""

    name: str
    """The file's path below the folder that holds all files of the set."""
    columns: Columns
    split: str | None
    """The split of all rows, if the names of files or folders give it."""
    label: str | None
    """The class of all rows, if a folder's name gives it."""


class Piece(NamedTuple):
    """Consecutive row groups of a file, which are read together."""

    file: str
    groups: tuple[int, ...]
    first_id: int
    """Number that the piece's first row has in the whole set."""
    first_row: int
    """Number that the piece's first row has in the file."""
    rows: int
    source: Source | None = None
    """The piece's file; None in pieces of a set that is not Parquet."""

    @property
    def known(self) -> Source:
        """The piece's file, in pieces of a Parquet set."""
        assert self.source is not None
        return self.source


class ParquetSet(NamedTuple):
    """The files of a data set, and the columns that are read of all of them."""

    listing: Listing
    first: Part
    """The first file that has rows, of those for training if names tell them, which decides the columns."""
    columns: Columns
    marks: Marks

    @property
    def filesystem(self) -> pafs.FileSystem:
        return self.listing.filesystem

    @property
    def files(self) -> list[str]:
        return [file.path for file in self.listing.files]

    def batches(self, columns: Sequence[str], size: int) -> Iterator[Batch]:
        """Read some columns of all files, at most `size` rows at a time."""
        for file in self.files:
            yield from read_batches(open_file(self.filesystem, file), file, columns, size)

    def check(self, part: Part, data: Data, like: TableColumns | None) -> None:
        """Raise an InputError if a file does not hold the columns that are read, or its values mean something else."""
        if part.schema.equals(self.first.schema):
            return
        try:
            check_part(part, self.first, self.columns, _for_columns(data, self.marks), like)
        except InputError as error:  # files whose names do not fit together often have other columns as well
            raise InputError(self.marks.problem or str(error)) from error

    def source(self, number: int) -> Source:
        """Return what is known of the rows of a file, given the file's number."""
        splits, labels = self.marks.splits, self.marks.labels
        split, label = splits[number] if splits else None, labels[number] if labels else None
        return Source(self.listing.files[number].name, self.columns, split, label)


def open_set(data: Data, like: TableColumns | None = None) -> ParquetSet:
    """Find the files of a set and the columns that are read; this opens files up to the first one that has rows. For
    `like` see `find_columns`."""
    assert data.path is not None
    listing = find_files(data.path)
    first = _first_part(listing, listing.files)
    if first is None:
        raise InputError(f"data.path: {join_paths(data.path)} has no rows; name data that have some")
    marks = read_marks_of_names(data, listing, first.schema.names)
    if marks.splits:  # what is learnt is in the training files; files for testing often lack the labels
        training = [file for file, split in zip(listing.files, marks.splits, strict=True) if split == "train"]
        first = _first_part(listing, training) or first
    wanted = _without_absent(_for_columns(data, marks), listing, first)
    columns = find_columns(wanted, first.schema, like)
    if marks.label_key:
        reason = f"its name is one of labels, and the folders' key {marks.label_key} gives them"
        left_out = [(name, reason if why == LABELS_ARE_NULL else why) for name, why in columns.left_out]
        columns = columns._replace(left_out=tuple(left_out))
    return ParquetSet(listing, first, columns, marks)


def _first_part(listing: Listing, files: Sequence[File]) -> Part | None:
    """Return the first of some files that has rows; files without rows may have no types either."""
    for file in files:
        opened = open_file(listing.filesystem, file.path)
        if opened.metadata.num_rows:
            return Part(file.path, opened.schema_arrow)
    return None


def _for_columns(data: Data, marks: Marks) -> Data:
    """Return the config by which columns are found: without labels where the names of folders give them."""
    return data.model_copy(update={"labels": None}) if marks.label_key else data


def _without_absent(data: Data, listing: Listing, first: Part) -> Data:
    """Return the config without the exclusions of columns that the set's first file lacks, if other files have them."""
    absent = [name for name in data.exclude if not find_name(name, first.schema.names)]
    unknown = absent
    for file in listing.files:
        if not unknown:
            break
        names = open_file(listing.filesystem, file.path).schema_arrow.names
        unknown = [name for name in unknown if not find_name(name, names)]
    present = tuple(name for name in data.exclude if name not in absent or name in unknown)
    return data.model_copy(update={"exclude": present})


def divide(data: Data, facts: Facts, size: int | None = None) -> tuple[Piece, ...]:
    """Divide a set into pieces of at most `size` bytes of values (16 MB by default), but at least one row group."""
    whole = open_set(data, facts.columns)
    max_rows = max(1, (size or PIECE_BYTES) // facts.row_bytes)
    result: list[Piece] = []
    first_id = 0
    for number, file in enumerate(whole.files):
        metadata, first_row, source = open_file(whole.filesystem, file).metadata, 0, whole.source(number)
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            last = result[-1] if result else None
            if last and last.file == file and last.rows + rows <= max_rows:
                result[-1] = last._replace(groups=(*last.groups, group), rows=last.rows + rows)
            elif rows:
                result.append(Piece(file, (group,), first_id, first_row, rows, source))
            first_id, first_row = first_id + rows, first_row + rows
    return tuple(result)
