"""A Parquet set that is larger than memory: read again, piece by piece, whenever its rows are needed.

The split of a row is drawn from the row's number or content alone, so a piece can be split without the other pieces.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np

from aecore.config.experiment import Data
from aecore.config.facts import Facts
from aecore.data import parquet, splits
from aecore.data.dataset import fill_values, scaling
from aecore.data.sets import Piece, divide
from aecore.data.splits import SPLITS, Arrays, Shares, Split

SAMPLE_BYTES = {"train": 2**24, "validation": 2**25, "test": 2**23}
"""Bytes of each split that are held in memory: the whole of a smaller split, and a sample of a larger one. Validation
uses its sample every epoch; probes, nearest neighbours and pictures are computed from the samples too."""
ReadPiece = Callable[[Piece], Iterator[Split]]
"""Reads the rows of one piece, some megabytes at a time."""
ReadPieces = Callable[[ReadPiece, Sequence[Piece]], Iterator[Split]]
"""Reads the rows of many pieces, in their order: in this process one after the other, or in parallel on a cluster."""


def read_in_turn(read: ReadPiece, pieces: Sequence[Piece]) -> Iterator[Split]:
    """Read the pieces one after the other in this process."""
    for piece in pieces:
        yield from read(piece)


class Stream(NamedTuple):
    """A data set on disk: its pieces, how its rows are split, and a sample of them in memory."""

    data: Data
    facts: Facts
    shares: Shares
    pieces: tuple[Piece, ...]
    counts: np.ndarray
    """(pieces, 3), number of rows of each split."""
    sample: Arrays

    @property
    def shift(self) -> np.ndarray:
        return self.sample.shift

    @property
    def scale(self) -> np.ndarray:
        return self.sample.scale

    def row_count(self, split: str) -> int:
        return int(self.counts[:, SPLITS.index(split)].sum())

    def reader(self, split: str) -> ReadPiece:
        """Return a function that reads the rows of one split and is small enough to be sent to other processes."""
        return partial(read, self.data, self.facts, self.shares, split)


def open_stream(data: Data, facts: Facts, read_pieces: ReadPieces = read_in_turn) -> Stream:
    """Divide a set into pieces, split it, and draw its sample.

    This reads the set once where features are standardised, and once more where rows are split by content. It raises
    an InputError if a row cannot be used or a split is empty.
    """
    pieces = divide(data, facts)
    labels, marks = zip(*(parquet.read_apart(data, facts, piece) for piece in pieces), strict=True)
    marked = np.sum([splits.count_marks(m) for m in marks], 0)
    shares = splits.split_shares(data, marked, facts.rows, splits.share_of_anomalies(data, labels, marks))
    if data.split == "content":
        counts = np.concatenate([rows.x for rows in read_pieces(partial(_count, data, facts, shares), pieces)])
    else:
        positions = (splits.positions_by_number(piece.first_id, piece.rows) for piece in pieces)
        assigned = (_assign(data, shares, *each) for each in zip(positions, labels, marks, strict=True))
        counts = np.array([_split_counts(*each) for each in zip(assigned, labels, strict=True)])
    *rows, anomalies = counts.sum(0).tolist()
    counts = counts[:, : len(SPLITS)]
    splits.check_not_empty(rows)
    if facts.has_anomalies:
        splits.check_training_rows(rows[SPLITS.index("train")], facts.rows, facts)
        splits.check_test_rows(rows[SPLITS.index("test")], anomalies)
    order = np.random.default_rng(0).permutation(len(pieces))
    train, validation, test = _draw_sample(data, facts, shares, [pieces[n] for n in order])
    training_rows = read_pieces(partial(read, data, facts, shares, "train"), pieces)
    shift, scale = scaling(data, facts, (rows.x for rows in training_rows))
    fill = fill_values(facts, train.x)  # a median of all rows would need them all at once
    return Stream(data, facts, shares, pieces, counts, Arrays(train, validation, test, shift, scale, fill))


def read(data: Data, facts: Facts, shares: Shares, split: str, piece: Piece) -> Iterator[Split]:
    """Read the rows of a piece that belong to a split, some megabytes at a time; an InputError names a bad row."""
    for rows, assigned in _read_with_splits(data, facts, shares, piece):
        selected = assigned == SPLITS.index(split)
        if selected.any():
            yield splits.hide_labels(facts, split, rows.take(selected))


@dataclass(frozen=True)
class Shuffled:
    """The training rows of a stream, or one worker's part of them, in another order each epoch.

    Pieces come in random order, and rows are shuffled within windows of 32 MB. If a file is sorted, its row groups
    should therefore be far smaller than that.
    """

    stream: Stream
    labelled: bool = False
    """Batches hold labels too."""
    read_pieces: ReadPieces = read_in_turn
    window: int = 2**25
    """Bytes of rows that are shuffled together."""

    def __len__(self) -> int:
        return self.stream.row_count("train")

    def batches(
        self, size: int, seed: int, rank: int = 0, workers: int = 1, least: int = 0, fewest: int = 2
    ) -> Iterator[tuple[tuple[np.ndarray, ...], float]]:
        """Yield this worker's part of each batch and its share of the batch's rows; the part is empty once the worker
        has no rows left.

        Each worker reads pieces of its own, and all take the same number of steps.

        Args:
            size: number of rows of a batch, over all workers.
            least: a batch is left out if any worker's part of it has fewer rows than this without being empty.
            fewest: a batch of fewer rows, over all workers, is left out.
        """
        order = np.random.default_rng(seed).permutation(len(self.stream.pieces))
        rows = [int(self.stream.counts[order[r::workers], 0].sum()) for r in range(workers)]
        sizes = [size // workers + (r < size % workers) for r in range(workers)]
        pieces = [self.stream.pieces[n] for n in order[rank::workers]]
        own_batches = self._own_batches(pieces, sizes[rank], np.random.default_rng([seed, rank]))
        for step in range(max(-(-r // s) for r, s in zip(rows, sizes, strict=True) if s)):
            parts = [min(s, max(0, r - step * s)) for r, s in zip(rows, sizes, strict=True)]
            batch = next(own_batches) if parts[rank] else ()
            if sum(parts) >= fewest and all(not part or part >= least for part in parts):
                arrays = tuple(values for values in batch[: 1 + self.labelled] if values is not None)
                yield arrays, parts[rank] / sum(parts)

    def _own_batches(self, pieces: Sequence[Piece], size: int, rng: np.random.Generator) -> Iterator[Split]:
        """Yield the rows of the pieces in batches of `size` rows, of which the last may be smaller."""
        window: list[Split] = []
        for chunk in chain(self.read_pieces(self.stream.reader("train"), pieces), [None]):
            if chunk is not None:
                window.append(chunk)
                if sum(rows.x.nbytes for rows in window) < self.window:
                    continue
            if not window:
                return
            rows = _concatenate(window)
            order = rng.permutation(len(rows.x))
            stop = len(order) if chunk is None else len(order) - len(order) % size
            for start in range(0, stop, size):
                yield rows.take(order[start : min(start + size, stop)])
            window = [rows.take(order[stop:])]  # too few for a batch: they join the next window
            parquet.release_memory()


def _read_with_splits(data: Data, facts: Facts, shares: Shares, piece: Piece) -> Iterator[tuple[Split, np.ndarray]]:
    """Read the rows of a piece, some megabytes at a time; yield the rows and the split of each, (rows,): an index into
    `SPLITS`, or 3 for a row that is not used."""
    first_id = piece.first_id
    for x, y, marks in parquet.read(data, facts, piece):
        if data.split == "content":
            positions = splits.positions_by_content(splits.content_hashes(x))
        else:
            positions = splits.positions_by_number(first_id, len(x))
        yield Split(x, y), _assign(data, shares, positions, y, marks)
        first_id += len(x)


def _assign(
    data: Data, shares: Shares, positions: np.ndarray, labels: np.ndarray | None, marks: np.ndarray | None
) -> np.ndarray:
    """Return the split of each row, (rows,), which depends on nothing but the row."""
    return splits.thin_anomalies(data, splits.assign_splits(shares, positions, marks), labels, marks)


def _count(data: Data, facts: Facts, shares: Shares, piece: Piece) -> Iterator[Split]:
    """Yield the `_split_counts` of a piece, (1, 4), as `x` of the `Split` that a `ReadPiece` yields."""
    counts = [_split_counts(part, rows.y) for rows, part in _read_with_splits(data, facts, shares, piece)]
    yield Split(np.sum(counts, 0)[None], None)


def _split_counts(assigned: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """Count the rows of each split, and the test rows that are anomalies where the labels tell these, (4,)."""
    counts = np.bincount(assigned, minlength=len(SPLITS) + 1)
    counts[-1] = 0 if labels is None else (labels[assigned == SPLITS.index("test")] == 1).sum()
    return counts


def _draw_sample(data: Data, facts: Facts, shares: Shares, pieces: Sequence[Piece]) -> list[Split]:
    """Read rows of each split until they fill its `SAMPLE_BYTES`, or the pieces end."""
    missing = [max(1, SAMPLE_BYTES[split] // facts.row_bytes) for split in SPLITS]
    sample: list[list[Split]] = [[], [], []]
    for rows, assigned in (chunk for piece in pieces for chunk in _read_with_splits(data, facts, shares, piece)):
        for number, chunks in enumerate(sample):
            selected = np.flatnonzero(assigned == number)[: missing[number]]
            missing[number] -= len(selected)
            if len(selected):
                chunks.append(splits.hide_labels(facts, SPLITS[number], rows.take(selected)))
        if not any(missing):
            break
    return [_concatenate(chunks) for chunks in sample]


def _concatenate(parts: Sequence[Split]) -> Split:
    labels = [part.y for part in parts if part.y is not None]
    return Split(np.concatenate([part.x for part in parts]), np.concatenate(labels) if labels else None)
