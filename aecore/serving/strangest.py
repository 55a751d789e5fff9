"""The ranking of all rows by how strange they are, made from the files that a job has written."""

import uuid
from collections.abc import Iterator
from contextlib import suppress

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aecore.data.files import filesystem_of
from aecore.serving.encoding import UNFINISHED, Work, file_name

STRANGEST = "_strangest.parquet"
"""File of the strangest rows; readers of Parquet folders skip names that begin with an underscore."""
_ROWS = 1000
_COLUMNS = ("id", "file", "row", "score", "anomaly_score", "reasons", "label")
"""The columns of a file that are ranked; some files have no `label`."""
_ORDER = [("score", "descending"), ("id", "ascending")]


def rank_strangest(work: Work) -> pa.Table | None:
    """Return the strangest rows of a finished job, the strangest first, and write them to `STRANGEST` if they are not
    there yet; None if the model gives no scores.

    Memory holds one batch of rows beside the strangest ones.
    """
    filesystem, folder = filesystem_of(work.output, "output")
    with suppress(pa.ArrowException, OSError):  # it is missing or damaged
        return pq.read_table(f"{folder}/{STRANGEST}", filesystem=filesystem)
    strangest: pa.Table | None = None
    for rows in _scored_rows(work):
        if strangest is not None and len(strangest) == _ROWS:  # sorting all rows would take longer
            rows = rows.filter(pc.greater_equal(rows["score"], strangest["score"][-1]))
        tables = [rows] if strangest is None else [strangest, rows]
        strangest = pa.concat_tables(tables).sort_by(_ORDER).slice(0, _ROWS)
    if strangest is None:
        return None
    ranks = pa.array(range(1, len(strangest) + 1), pa.int64())
    strangest = strangest.add_column(0, "rank", ranks).replace_schema_metadata(work.identity)
    unfinished = f"{folder}/{UNFINISHED}strangest.{uuid.uuid4().hex[:12]}"
    with filesystem.open_output_stream(unfinished) as stream:
        pq.write_table(strangest, stream)
    filesystem.move(unfinished, f"{folder}/{STRANGEST}")
    return strangest


def _scored_rows(work: Work) -> Iterator[pa.Table]:
    """Yield the rows of all files in batches, without the codes; nothing if they have no scores."""
    filesystem, folder = filesystem_of(work.output, "output")
    for number in range(len(work.pieces())):
        with filesystem.open_input_file(f"{folder}/{file_name(number)}") as source:
            file = pq.ParquetFile(source)
            names = file.schema_arrow.names
            if "score" not in names:
                return
            for batch in file.iter_batches(columns=[name for name in _COLUMNS if name in names]):
                rows = pa.Table.from_batches([batch])
                for place, field in enumerate(rows.schema):
                    if pa.types.is_dictionary(field.type):  # each file has a dictionary of its own
                        rows = rows.set_column(place, field.name, rows[field.name].cast(field.type.value_type))
                yield rows
