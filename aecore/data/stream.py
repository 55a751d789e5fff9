"""A Parquet set that is larger than memory: read anew, piece by piece, whenever its rows are wanted.

Which rows train, validate and test is drawn from each row's number or content, so that a piece knows its own without
the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from typing import NamedTuple

import numpy as np

from aecore.config.experiment import Data
from aecore.config.facts import Facts
from aecore.data import parquet
from aecore.data.dataset import scaling
from aecore.data.parquet import Piece
from aecore.data.splits import SPLITS, Arrays, Shares, Split, content, count_marks, place, refuse_empty, row_ids, shares

SAMPLE_BYTES = {"train": 2**24, "validation": 2**25, "test": 2**23}
"""Rows of each split that are held in memory: all of a set this small, and of a larger one what validation is scored
on every epoch, and what probes, neighbours and pictures are made of."""
Read = Callable[[Piece], Iterator[Split]]
Spread = Callable[[Read, Sequence[Piece]], Iterator[Split]]
"""How the rows of many pieces are read, in order: here one after the other, on a cluster in parallel."""


def in_turn(read: Read, pieces: Sequence[Piece]) -> Iterator[Split]:
    """The rows of each piece, read in this process."""
    for piece in pieces:
        yield from read(piece)


class Stream(NamedTuple):
    """A data set on disk; in memory is a sample of it."""

    data: Data
    facts: Facts
    shares: Shares
    pieces: tuple[Piece, ...]
    counts: np.ndarray
    """(pieces, 3), rows of each split."""
    sample: Arrays

    @property
    def shift(self) -> np.ndarray:
        return self.sample.shift

    @property
    def scale(self) -> np.ndarray:
        return self.sample.scale

    def rows(self, split: str) -> int:
        """How many rows a split has."""
        return int(self.counts[:, SPLITS.index(split)].sum())

    def reader(self, split: str) -> Read:
        """What reads a split's rows of a piece; small enough to travel."""
        return partial(read, self.data, self.facts, self.shares, split)


def open_stream(data: Data, facts: Facts, spread: Spread = in_turn) -> Stream:
    """Find the pieces and splits of a set, and draw its sample; one pass more where features are standardised, and one
    where rows are split by their content.

    Raises:
        InputError: a row of the sample cannot be used, or a split is empty.
    """
    pieces = parquet.pieces(data, facts)
    marks = [parquet.marks(data, piece) for piece in pieces]
    parts = shares(data, np.sum([count_marks(m) for m in marks], 0), facts.rows)
    if data.split == "content":
        counts = np.concatenate([rows.x for rows in spread(partial(_count, data, facts, parts), pieces)])
    else:
        places = (place(parts, _uniform(p.first, p.rows), m) for p, m in zip(pieces, marks, strict=True))
        counts = np.array([np.bincount(found, minlength=4)[:3] for found in places])
    refuse_empty(counts.sum(0))
    order = np.random.default_rng(0).permutation(len(pieces))
    held = _sample(data, facts, parts, [pieces[n] for n in order])
    training = spread(partial(read, data, facts, parts, "train"), pieces)
    scale = scaling(data, facts, (rows.x for rows in training))
    return Stream(data, facts, parts, pieces, counts, Arrays(held["train"], held["validation"], held["test"], *scale))


def read(data: Data, facts: Facts, shares: Shares, split: str, piece: Piece) -> Iterator[Split]:
    """The rows of a piece that belong to a split, some megabytes at a time.

    Raises:
        InputError: a row cannot be used.
    """
    for rows, found in _placed(data, facts, shares, piece):
        own = found == SPLITS.index(split)
        if own.any():
            yield _take(rows, own)


@dataclass(frozen=True)
class Shuffled:
    """The training rows of a stream, a worker's part of them, in another order each epoch.

    Pieces come in random order; rows are shuffled within windows of 32 MB. Sorted data therefore want row groups far
    smaller than that.
    """

    stream: Stream
    labelled: bool = False
    """Labels come with the rows."""
    spread: Spread = in_turn
    window: int = 2**25
    """Bytes."""

    def __len__(self) -> int:
        return self.stream.rows("train")

    def batches(
        self, size: int, seed: int, rank: int = 0, workers: int = 1, least: int = 0
    ) -> Iterator[tuple[tuple[np.ndarray, ...], float]]:
        """This worker's part of each batch, nothing where it has no rows left, and its share of the rows.

        Every worker reads other pieces and takes the same number of steps.

        Args:
            size: rows of a batch, all workers together.
            least: rows a worker below which a batch is left out.
        """
        order = np.random.default_rng(seed).permutation(len(self.stream.pieces))
        rows = [int(self.stream.counts[order[r::workers], 0].sum()) for r in range(workers)]
        parts = [size // workers + (r < size % workers) for r in range(workers)]
        pieces = [self.stream.pieces[n] for n in order[rank::workers]]
        own = self._cut(pieces, parts[rank], np.random.default_rng([seed, rank]))
        for step in range(max(-(-r // p) for r, p in zip(rows, parts, strict=True) if p)):
            taken = [min(p, max(0, r - step * p)) for r, p in zip(rows, parts, strict=True)]
            batch = next(own) if taken[rank] else ()
            if sum(taken) > 1 and min(taken) >= least:
                yield (
                    tuple(values for values in batch[: 1 + self.labelled] if values is not None),
                    taken[rank] / sum(taken),
                )

    def _cut(self, pieces: Sequence[Piece], size: int, rng: np.random.Generator) -> Iterator[Split]:
        """Batches of `size` rows, the last one smaller."""
        held: list[Split] = []
        for chunk in chain(self.spread(self.stream.reader("train"), pieces), [None]):
            if chunk is not None:
                held.append(chunk)
                if sum(part.x.nbytes for part in held) < self.window:
                    continue
            if not held:
                return
            rows = _together(held)
            shuffled = rng.permutation(len(rows.x))
            whole = len(shuffled) if chunk is None else len(shuffled) - len(shuffled) % size
            for start in range(0, whole, size):
                yield _take(rows, shuffled[start : min(start + size, whole)])
            held = [_take(rows, shuffled[whole:])]
            parquet.give_back()


def _placed(data: Data, facts: Facts, shares: Shares, piece: Piece) -> Iterator[tuple[Split, np.ndarray]]:
    """The rows of a piece, some megabytes at a time, and the number of each one's split."""
    first = piece.first
    for x, y, marks in parquet.read(data, facts, piece):
        numbers = content(row_ids(x)) if data.split == "content" else _uniform(first, len(x))
        yield Split(x, y), place(shares, numbers, marks)
        first += len(x)


def _count(data: Data, facts: Facts, shares: Shares, piece: Piece) -> Iterator[Split]:
    """Rows of a piece in each split, (1, 3)."""
    places = np.concatenate([found for _, found in _placed(data, facts, shares, piece)])
    yield Split(np.bincount(places, minlength=4)[None, :3], None)


def _uniform(first: int, rows: int) -> np.ndarray:
    """A number in [0, 1) for each row number, always the same (SplitMix64, Steele et al. 2014)."""
    z = (np.arange(first + 1, first + rows + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) / 2.0**64


def _sample(data: Data, facts: Facts, shares: Shares, pieces: Sequence[Piece]) -> dict[str, Split]:
    """As many rows of each split as are held in memory, from the first of the pieces."""
    row_bytes = prod(facts.shape) * (1 if facts.levels else 4)
    most = [max(1, SAMPLE_BYTES[split] // row_bytes) for split in SPLITS]
    found: list[list[Split]] = [[], [], []]
    for rows, splits in (chunk for piece in pieces for chunk in _placed(data, facts, shares, piece)):
        for number, parts in enumerate(found):
            own = np.flatnonzero(splits == number)[: most[number]]
            most[number] -= len(own)
            if len(own):
                parts.append(_take(rows, own))
        if not any(most):
            break
    return {split: _together(parts) for split, parts in zip(SPLITS, found, strict=True)}


def _together(parts: Sequence[Split]) -> Split:
    labelled = [part.y for part in parts if part.y is not None]
    return Split(np.concatenate([part.x for part in parts]), np.concatenate(labelled) if labelled else None)


def _take(rows: Split, which: np.ndarray | slice) -> Split:
    return Split(rows.x[which], None if rows.y is None else rows.y[which])
