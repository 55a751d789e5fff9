"""Notes on measures: why one is left out, or on which sample of the rows it was taken."""

from collections.abc import Mapping

from aecore.core.errors import join_names

Notes = dict[str, str]
"""What must be known about a measure, by the measure's name."""


def sampled(count: int, rows: int, split: str, *measures: str) -> Notes:
    """Return the note that measures were taken on `count` of a split's `rows`; none if they were taken on all."""
    text = f"taken on {count:,} of {rows:,} {split} rows, since all would take too long"
    return dict.fromkeys(measures, text) if count < rows else {}


def left_out(reason: str, *measures: str) -> Notes:
    """Return the note that measures are left out."""
    return dict.fromkeys(measures, f"left out, since {reason}")


def describe(notes: Mapping[str, str]) -> list[str]:
    """Return notes as lines, one for all measures with the same note."""
    names: dict[str, list[str]] = {}
    for name, text in notes.items():
        names.setdefault(text, []).append(name)
    return [f"{join_names(sorted(same))}: {text}" for text, same in names.items()]
