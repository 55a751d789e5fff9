"""A data set through a registered model into Parquet, by workers side by side; what is whole already stays."""

import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from aecore.data.parquet import filesystem_of
from aecore.serving.encoding import Work, Worker, whole
from pipelines.cluster.connection import start_ray
from pipelines.cluster.nodes import check_reach
from pipelines.cluster.reading import each

if TYPE_CHECKING:
    from aecore.models.storage import Result


_SAY_SECONDS = 2.0
MANIFEST = "_manifest.json"
"""Readers of Parquet folders skip names with such a beginning."""


class Encoded(NamedTuple):
    """What a job has done."""

    rows: int
    """In all files."""
    fresh: int
    """Rows that were computed now, the others were there."""
    files: int
    seconds: float
    """From the first worker's first row to the last one's last, without the start of Ray and of the workers."""


def write(
    work: Work, result: "Result", store: str, workers: int | None, gpus: float | None, say: Callable[[str], None]
) -> Encoded:
    """Write the files that are not there; Ray starts only if one is missing.

    Args:
        result: the model.
        workers, gpus: see `pipelines.streaming.each`.

    Raises:
        InputError: the output is another job's, or a row cannot be used.
    """
    pieces, there = work.pieces(), whole(work)
    missing = [number for number in range(len(pieces)) if number not in there]
    fresh, began, ended = 0, float("inf"), 0.0
    if there:
        say(f"{len(there)} of {len(pieces)} files are there already")
    if missing:
        start_ray()
        check_reach(store, work.output, "output")
        said = time.monotonic()
        for done in each(partial(Worker, work), result, missing, workers, gpus):
            fresh, began, ended = fresh + done.rows, min(began, done.began), max(ended, done.ended)
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                say(f"{fresh:,} rows of {sum(pieces[n].rows for n in missing):,}")
    rows = sum(piece.rows for piece in pieces)
    left = set(range(len(pieces))) - whole(work)
    assert not left and rows == work.rows, f"{len(left)} files are missing"
    _write_manifest(work, rows, len(pieces))
    return Encoded(rows, fresh, len(pieces), max(0.0, ended - began))


def _write_manifest(work: Work, rows: int, files: int) -> None:
    filesystem, folder = filesystem_of(work.output)
    text = json.dumps({**work.identity, "rows": rows, "files": files}, indent=2) + "\n"
    with filesystem.open_output_stream(f"{folder}/{MANIFEST}") as stream:
        stream.write(text.encode())


def absolute(output: str) -> str:
    """The same place for workers, which run in other folders."""
    return output if "://" in output else os.path.abspath(output)
