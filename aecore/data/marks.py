"""Reads from the names of files and folders what they say about all rows of a file: its split and its class.

Functions raise an InputError that names the files or folders.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from aecore.config.experiment import Data
from aecore.core.errors import InputError, join_names
from aecore.data.columns import LABEL_NAMES, SPLIT_NAME, folded, label_names
from aecore.data.folders import File, Listing
from aecore.data.splits import SPLITS
from aecore.data.values import SPLIT_OF_MARK

_SPLIT_WORD = re.compile(
    rf"(?<![A-Za-z])(?i:({'|'.join(sorted(SPLIT_OF_MARK, reverse=True))})(?:set|data)?)(?![a-z])(?!(?<=[A-Z])[A-Z])"
)
"""A word that names a split: "train" in train-0, trainset and TrainImages, but not in trainer or TRAINER."""


class Marks(NamedTuple):
    """What the names of files and folders say about the rows of a data set."""

    splits: tuple[str, ...] = ()
    """Split of each file; empty if the names divide the set into no splits."""
    labels: tuple[str | None, ...] = ()
    """Class of each file, None where it is missing; empty if the folders name no classes."""
    label_key: str | None = None
    """Key of the folders `key=value` that name the classes."""
    problem: str = ""
    """Why the names do not tell which rows to train on; empty if they do, or say nothing about it."""
    notes: tuple[str, ...] = ()
    """Sentences for the user: what the names of files and folders were used for, and which keys of folders are not."""


def read_marks_of_names(data: Data, listing: Listing, columns: Sequence[str]) -> Marks:
    """Return what the names of a set's files and folders say about their rows, given the names of the columns.

    A column decides where it and the names say the same kind of thing.
    """
    files = listing.files
    keys = _common_keys(files)
    excluded = {folded(name) for name in data.exclude}
    known = {folded(column) for column in columns} - excluded
    label_key = _label_key(data, keys, known)
    labels = tuple(file.keys[label_key] for file in files) if label_key else ()
    split_key = next((key for key in keys if folded(key) == SPLIT_NAME), None)
    splits: tuple[str, ...] = ()
    problem, notes = "", []
    try:
        splits = () if listing.named else _splits(files, split_key)
    except InputError as error:
        problem = str(error)
    if SPLIT_NAME in known and (splits or problem):
        splits, problem, notes = (), "", ["column split gives the splits, not the names of files and folders"]
    elif splits:
        counts = [f"{split} {splits.count(split):,}" for split in SPLITS if split in splits]
        origin = f"the folders' key {split_key}" if split_key else "the names of files and folders"
        notes.append(f"splits come from {origin} (files: {join_names(counts)})")
    if label_key:
        notes.append(f"the folders' key {label_key} gives the classes")
    for key in keys:
        if folded(key) in known and key != label_key:
            notes.append(f"the folders' key {key} is not read, as the files have a column of that name")
        elif data.labels is None and folded(key) in LABEL_NAMES:
            notes.append(f"the folders' key {key} is not read (data.labels null)")
        elif key not in (label_key, split_key):
            notes.append(f"the folders' key {key} is not read")
    return Marks(splits, labels, label_key, problem, tuple(notes))


def may_be_years(key: str, classes: Sequence[str]) -> bool:
    """Say whether the folders of a key `y` rather hold years than classes, as in y=2024/m=1/d=31."""
    return key.casefold() == "y" and all(re.fullmatch(r"(19|20)\d\d", name) for name in classes)


def classes_of_folders(labels: set[str | None], key: str) -> tuple[str, ...]:
    """Return the names of the classes, in the order of their labels: of numbers if all are whole numbers, else of
    text."""
    if None in labels:
        raise InputError(f"data.labels: {key}= is missing for some files; move them away or set --data.labels null")
    names = sorted(label for label in labels if label is not None)
    if all(re.fullmatch(r"0|-?[1-9]\d*", name) for name in names):
        names.sort(key=int)
    if names[0].startswith("-") and names[0][1:].isdigit():
        raise InputError(
            f"data.labels: {key}={names[0]} is not a class (it often marks rows without a label); move such files away "
            "or set --data.labels null"
        )
    return tuple(names)


def describe_listing(listing: Listing, marks: Marks) -> list[str]:
    """Say in a line or two which files a set is read from, what was left out, and what their names say."""
    files = listing.files
    line = (
        f"{len(files):,} files, {files[0].name} to {files[-1].name}" if len(files) > 1 else f"1 file, {files[0].name}"
    )
    reasons = {"hidden": listing.hidden, "not .parquet": listing.others, "linked twice": listing.copies}
    left_out = [f"{len(names):,} {reason} ({join_names(names, 2)})" for reason, names in reasons.items() if names]
    notes = "; ".join(marks.notes)
    return [line + (f"; left out: {', '.join(left_out)}" if left_out else ""), *([notes] if notes else [])]


def _common_keys(files: Sequence[File]) -> tuple[str, ...]:
    """Return the keys of the folders `key=value`, which must be the same for all files."""
    first = files[0].keys
    for file in files:
        if (keys := file.keys).keys() != first.keys():
            own, others = (join_names([f"{key}=" for key in each]) for each in (keys, first))
            raise InputError(
                f"data.path: {file.path} lies in folders {own}, but {files[0].path} in folders {others}; give all "
                "files the same keys, or name the files that belong together by a pattern"
            )
    return tuple(first)


def _label_key(data: Data, keys: Sequence[str], columns: set[str]) -> str | None:
    """Return the key of the folders that name the classes; None where a column holds the labels, or nothing does."""
    if data.labels is None:
        return None
    for name in label_names(data) if data.labels == "auto" else (folded(data.labels),):
        if name in columns:
            return None
        if key := next((key for key in keys if folded(key) == name), None):
            return key
    return None


def _splits(files: Sequence[File], key: str | None) -> tuple[str, ...]:
    """Return the split of each file by the folders `key=value` or else by words in the names; nothing if these do not
    divide the set. An InputError says why names of splits do not tell which rows to train on."""
    if key:
        found = [_words(file.keys[key] or "", leading=True) for file in files]
    else:
        found = [_words(file.name, leading=True) for file in files]
        if not any(found):  # as in digits_train.parquet; such a word may mean something else if it stands alone
            inner = [_words(file.name, leading=False) for file in files]
            found = [splits if len(splits) == 1 else set() for splits in inner]
            if "train" not in set().union(*found) or len(set().union(*found)) == 1:
                return ()
        if not any(found):
            return ()
    marked = next((n for n, splits in enumerate(found) if splits), 0)
    for file, splits in zip(files, found, strict=True):
        if len(splits) > 1:
            raise InputError(f"data.path: {file.path} is named for {' and for '.join(sorted(splits))}; rename it")
        if not splits and key:
            raise InputError(f"data.path: {file.path} has no {key}=train, validation or test; rename its folder")
        if not splits:
            raise InputError(
                f"data.path: {files[marked].path} is named for {min(found[marked])}, but {file.path} names no split; "
                "rename one of them, or name in data.path only the files that belong together"
            )
    divided = tuple(min(each) for each in found)
    if "train" not in divided:
        raise InputError(
            f"data.path: no file is named for train, but {files[0].path} for {divided[0]}; name the folder that has "
            "all splits, or rename the files so that splits are drawn"
        )
    return divided if set(divided) != {"train"} else ()  # then splits are drawn as if there were no names


def _words(name: str, leading: bool) -> set[str]:
    """Return the splits that the parts of a path name, at their beginning or anywhere in them."""
    parts = [part for part in name.split("/") if part.find("=") <= 0]
    matches = [match for part in parts for match in _SPLIT_WORD.finditer(part) if not (leading and match.start())]
    return {SPLIT_OF_MARK[match[1].lower()] for match in matches}
