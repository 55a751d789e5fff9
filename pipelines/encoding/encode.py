"""Runs a data set through a model into Parquet files, by several workers at once; finished files stay."""

import json
import os
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from aecore.data.files import filesystem_of, scheme_of
from aecore.models.storage import Result
from aecore.serving.encoding import Work, Worker, find_finished
from aecore.serving.strangest import rank_strangest
from pipelines.cluster.connection import start_ray
from pipelines.cluster.nodes import check_reach
from pipelines.cluster.reading import each

MANIFEST = "_manifest.json"
"""File that describes the whole output; readers of Parquet folders skip names that begin with an underscore."""
_SAY_SECONDS, _LISTED = 2.0, 10


class Encoded(NamedTuple):
    """The rows and files of an encoding job that has ended, and how long it took."""

    rows: int
    """Rows in all files."""
    computed: int
    """Rows that were computed now; the others were there already."""
    files: int
    seconds: float
    """From the first worker's first row to the last worker's last, without the start of Ray and of the workers."""
    strangest: list[dict[str, Any]]
    """The ten strangest rows of all, with the columns of the file that ranks them; empty without scores."""


def write_files(
    work: Work, model: Result, store: str, workers: int | None, gpus: float | None, say: Callable[[str], None]
) -> Encoded:
    """Write the output files that are missing, then the ranking of the strangest rows and the manifest; Ray starts only
    if a file is missing.

    Args:
        store: address of the MLflow store; where workers run on other machines, it must not be local.
        workers: number of processes side by side; None takes as many as the cluster holds.
        gpus: GPUs per worker; None takes 1 where the cluster has GPUs, else 0.
        say: prints a line of progress.

    Raises:
        InputError: the folder holds the output of another job, or a row cannot be used.
    """
    pieces, present = work.pieces(), find_finished(work)
    missing = [number for number in range(len(pieces)) if number not in present]
    computed, started_at, ended_at = 0, float("inf"), 0.0
    if present:
        say(f"{len(present)} of {len(pieces)} files are there already")
    if missing:
        start_ray()
        check_reach(store, work.output, "output")
        total, said_at = sum(pieces[number].rows for number in missing), time.monotonic()
        for done in each(partial(Worker, work), model, missing, workers, gpus):
            computed += done.rows
            started_at, ended_at = min(started_at, done.began), max(ended_at, done.ended)
            if time.monotonic() - said_at > _SAY_SECONDS:
                said_at = time.monotonic()
                say(f"{computed:,} rows of {total:,}")
    rows, lost = sum(piece.rows for piece in pieces), len(pieces) - len(find_finished(work))
    assert not lost and rows == work.rows, f"{lost} files are missing"
    strangest = rank_strangest(work)
    filesystem, folder = filesystem_of(work.output, "output")
    manifest = json.dumps({**work.identity, "rows": rows, "files": len(pieces)}, indent=2) + "\n"
    with filesystem.open_output_stream(f"{folder}/{MANIFEST}") as stream:
        stream.write(manifest.encode())
    listed = [] if strangest is None else strangest.slice(0, _LISTED).to_pylist()
    return Encoded(rows, computed, len(pieces), max(0.0, ended_at - started_at), listed)


def absolute_path(path: str) -> str:
    """Return a path that means the same place to workers, which run in other folders; a URI stays as it is."""
    is_own = scheme_of(path) or not path.strip() or re.match(r"[A-Za-z]:[\\/]", path)  # `filesystem_of` judges these
    return path if is_own else os.path.abspath(os.path.expanduser(path))
