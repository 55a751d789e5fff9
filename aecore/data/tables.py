"""Reads a table once to find the different texts of its text columns, which become categories, and the numbers that are
subtracted from its numeric columns.

Functions raise an InputError that names a column whose values cannot be used.
"""

import warnings
from collections.abc import Collection, Sequence

import pyarrow.compute as pc

from aecore.config.experiment import Data
from aecore.config.facts import TableColumns
from aecore.core.errors import InputError, join_names, short_repr
from aecore.data.cells import exact_decimals, is_number, is_text
from aecore.data.columns import described, no_features
from aecore.data.files import open_file, read_batches
from aecore.data.numbers import find_offsets, is_too_fine
from aecore.data.sets import ParquetSet
from aecore.data.values import checked, numbers

_TEXT_ROWS = 1 << 16
"""Rows of a batch where only texts are read."""
_MOST_TEXTS = 10_000
"""The texts of a column are counted up to this number."""
_SAMPLE_BYTES, _SAMPLE_ROWS = 2**23, 4096
"""Largest sample from which offsets are found, in bytes of double values and in rows."""


def learn_columns(data: Data, source: ParquetSet, like: TableColumns | None) -> tuple[ParquetSet, TableColumns]:
    """Return the set, without columns of text that have too many values, and what a model keeps of its columns.

    Args:
        like: the columns that a model was trained on, whose texts and offsets then hold; a warning names texts that it
            does not know.
    """
    columns, schema = source.columns, source.first.schema
    if like is not None:
        known = {name: texts for name, texts in zip(like.features, like.categories, strict=False) if texts}
        for name, found in _find_texts(source, [*known]).items():
            if unknown := sorted(found - {*known[name]}):
                warnings.warn(f"data.path: {unknown_texts(name, unknown)}", stacklevel=3)
        table = described(data, columns, schema, known, like)
        return source, table.model_copy(update={"offsets": like.offsets})
    candidates = [] if data.column else [name for name in columns.features if is_text(schema.field(name).type)]
    texts = _find_texts(source, candidates)
    reasons = ((name, _why_not_read(texts.get(name), data)) for name in candidates)
    unread = {name: reason for name, reason in reasons if reason}
    features = tuple(name for name in columns.features if name not in unread)
    if not features:
        raise no_features(schema.names)
    columns = columns._replace(features=features)
    table = described(data, columns, schema, texts, None)
    source = source._replace(columns=columns)
    offsets = _find_offsets(data, source, table)
    return source, table.model_copy(update={"offsets": offsets, "unread": tuple(unread.items())})


def unknown_texts(column: str, texts: Sequence[str]) -> str:
    """Say which texts of a column a model does not know, and what becomes of them."""
    shown = join_names([short_repr(text, 40) for text in texts], 4)
    return f"the model was trained without {shown} in column {column}; such values count as missing"


def _why_not_read(texts: Collection[str] | None, data: Data) -> str:
    """Say why a column of these texts is not read; nothing if it is."""
    if texts is None:
        return "not in all files"
    if len(texts) < 2:
        return "all rows have one text" if texts else "it has no values"
    count = f"{_MOST_TEXTS:,} or more" if len(texts) >= _MOST_TEXTS else f"{len(texts):,}"
    return f"{count} different texts, more than data.categories" if len(texts) > data.categories else ""


def _find_texts(source: ParquetSet, names: Sequence[str]) -> dict[str, set[str]]:
    """Return the different texts of those columns that hold text in all files; of very many texts, the first ones."""
    found: dict[str, set[str]] = {name: set() for name in names}
    for file in source.files if names else ():
        opened = open_file(source.filesystem, file)
        schema = opened.schema_arrow
        if opened.metadata.num_rows:  # a file without rows may have no types either
            kept = (name for name in found if schema.names.count(name) == 1 and is_text(schema.field(name).type))
            found = {name: found[name] for name in kept}
        for name, texts in found.items():
            for batch in read_batches(opened, file, [name], _TEXT_ROWS):
                if len(texts) >= _MOST_TEXTS:
                    break
                texts.update(text for text in checked(batch, name).unique().to_pylist() if text is not None)
    return found


def _find_offsets(data: Data, source: ParquetSet, table: TableColumns) -> tuple[int | float, ...]:
    """Look at some rows of a table and return `TableColumns.offsets`; nothing where values must keep their range."""
    names = [name for name in table.features if is_number(source.first.schema.field(name).type)]
    if not names or data.likelihood not in ("auto", "gaussian"):
        return ()
    rows = max(1, min(_SAMPLE_ROWS, _SAMPLE_BYTES // (8 * len(names))))
    sample = next(source.batches(names, rows), None)
    if sample is None or not {*names} <= {*sample.table.column_names}:
        return ()  # files that lack a column are refused when all are looked at
    if data.missing == "refuse" and any(sample.table[name].null_count for name in names):
        return ()  # reading refuses missing values
    present = {name: sample._replace(table=sample.table.select([name]).drop_null()) for name in names}
    values = {name: numbers(batch, name) for name, batch in present.items()}
    for name in names:
        decimals = exact_decimals(present[name].table[name].combine_chunks())
        varies = decimals is not None and pc.count_distinct(decimals).as_py() > 1
        if varies and values[name].dtype.kind == "f" and is_too_fine(values[name]):
            raise InputError(
                f"data.path: the values of {name} differ by less than 64 bits tell apart; subtract a number near them "
                "before you write the file, or write fewer digits"
            )
    by_name = dict(zip(names, find_offsets([*values.values()]), strict=False))
    return tuple(by_name.get(name, 0) for name in table.features) if by_name else ()
