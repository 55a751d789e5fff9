"""Decides which columns of a table are features, labels and split marks, and says which are left out and why.

Names are matched whatever their case and the blanks around them. Functions raise an InputError that names the column
and the ways out.
"""

import json
import shlex
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from aecore.config.experiment import Data
from aecore.config.facts import TableColumns
from aecore.core.errors import InputError, join_names
from aecore.data.cells import find_decoder, is_number, is_text, plain_type, short_type

LABEL_NAMES = ("label", "labels", "target", "class", "y")
"""Usual names of a column of labels, in lower case; the first one that a table has is taken."""
_ANOMALY_NAMES = ("anomaly", "outlier", "is_anomaly", "is_outlier")
"""Names that are usual as well where labels mark anomalies."""
LABELS_ARE_NULL = "its name is one of labels, and data.labels is null"
"""Why a column with such a name is left out where no labels are read."""
SPLIT_NAME = "split"
_ROW_NUMBERS = ("__index_level_", "Unnamed: 0")
"""How names of columns begin in which pandas keeps the numbers of rows."""
_MAX_CANDIDATES = 4
"""Most columns that a message names as candidates for the features."""


class Columns(NamedTuple):
    """The columns of a table that are read."""

    features: tuple[str, ...]
    """One column of images or vectors, or several columns of single numbers and texts."""
    labels: str | None
    split: str | None
    left_out: tuple[tuple[str, str], ...] = ()
    """Columns that are not read, each with the reason."""

    @property
    def names(self) -> list[str]:
        return [*self.features, *filter(None, (self.labels, self.split))]


def find_columns(data: Data, schema: pa.Schema, like: TableColumns | None = None) -> Columns:
    """Find the columns of features, labels and split marks, by what the config names and by their types.

    Args:
        like: the columns that a model was trained on, empty if it knows no names. Features are then returned in its
            order, whatever the order in the file; an InputError names a column that is missing or was not there.
    """
    names = schema.names
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise InputError(f"data.path: several columns are called {double}; give each a name of its own")
    known, excluded = like or TableColumns(), _excluded(data, schema)
    offered = pa.schema([field for field in schema if field.name not in excluded])
    split = _find_split(offered)
    labels, others = _find_labels(data, offered, known)
    left_out = {name: reason for name, reason in others.items() if name not in known.features}
    left_out |= excluded
    left_out |= {name: "pandas' index" for name in _index_of(schema) if name not in (*known.features, labels)}
    if data.column is not None:
        column = _named(data.column, schema, "data.column")
        if column in (labels, split):
            content = "labels" if column == labels else "split marks"
            raise InputError(f"data.column: {column} holds the {content}; name the column of images or vectors")
        features: tuple[str, ...] = (column,)
    else:
        unread = {labels, split, *left_out}
        fields = [field for field in schema if field.name not in unread]
        if known.features:
            features = _matched(data, fields, schema, known)
        else:  # a model of an earlier version knows no columns of text
            features = _find_features(fields, schema.names, texts=like is None and data.categories > 0)
    read = {*features, labels, split}
    left_out = {**dict(known.unread), **left_out}
    reasons = [
        (field.name, left_out.get(field.name) or _why_not_read(field.type, features, schema))
        for field in schema
        if field.name not in read
    ]
    return Columns(features, labels, split, tuple(reasons))


def described(
    data: Data, columns: Columns, schema: pa.Schema, texts: Mapping[str, Collection[str]], like: TableColumns | None
) -> TableColumns:
    """Return what a model keeps of the columns: names, if each feature has a column of its own, but no offsets yet.

    Args:
        texts: the texts that each column of text can be.
    """
    kinds = {name: schema.field(name).type for name in columns.features}
    if not all(is_number(kind) or name in texts for name, kind in kinds.items()):
        return TableColumns(missing=data.missing)
    known = like or TableColumns()
    categories = tuple(tuple(sorted(texts.get(name, ()))) for name in columns.features)
    return TableColumns(
        features=columns.features, types=tuple(map(str, kinds.values())), missing=data.missing,
        # a column that held the labels for a model is none of the features for others either
        label=columns.labels or known.label,
        categories=categories if any(categories) else (),
    )  # fmt: skip


def label_names(data: Data) -> tuple[str, ...]:
    """Return the usual names of a column of labels, in lower case."""
    return LABEL_NAMES + _ANOMALY_NAMES if data.anomaly else LABEL_NAMES


def find_name(name: str, names: Sequence[str]) -> str | None:
    """Return the one of `names` that is `name` or, if there is only one, that is equal to it as `folded`."""
    alike = [one for one in names if folded(one) == folded(name)]
    return name if name in names else alike[0] if len(alike) == 1 else None


def folded(name: str) -> str:
    """Return a name as names are compared: without its case, the blanks around it, and the two ways in which Unicode
    writes an accent."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def resembling(missing: Sequence[str], names: Sequence[str]) -> str:
    """Return a remark on the first missing column whose name another one resembles; nothing if there is none."""
    pairs = [(name, found) for name in missing if (found := find_name(name, names))]
    return f" ({pairs[0][1]!a} is not {pairs[0][0]!a})" if pairs else ""


def exclusion(names: Sequence[str]) -> str:
    """Return the option that leaves columns out, as a shell takes it; of many columns, with the first ones."""
    shown = [*names[:_MAX_CANDIDATES], *(["..."] if len(names) > _MAX_CANDIDATES else [])]
    plain = all(shlex.quote(name) == name and "," not in name for name in names)
    return "--data.exclude " + (f"[{','.join(shown)}]" if plain else shlex.quote(json.dumps(shown, ensure_ascii=False)))


def _named(name: str, schema: pa.Schema, field: str) -> str:
    """Return the column that a config field names."""
    found = find_name(name, schema.names)
    if found is None:
        null = "; null reads no labels" if field == "data.labels" else ""
        raise InputError(f"{field}: there is no column {name}; the columns are {join_names(schema.names)}{null}")
    return found


def _find_split(schema: pa.Schema) -> str | None:
    """Return the column of split marks, if there is one."""
    split = find_name(SPLIT_NAME, schema.names)
    if split and not is_text(kind := schema.field(split).type):
        raise InputError(
            f"data.path: column {split} holds {short_type(kind)}; use train, validation and test, rename the column, "
            f"or leave it out with {exclusion([split])}"
        )
    return split


def _find_labels(data: Data, schema: pa.Schema, like: TableColumns) -> tuple[str | None, dict[str, str]]:
    """Return the column of labels, if there is one, and columns that may hold labels too and are therefore not read,
    with the reason."""
    names = label_names(data)
    usual = sorted((n for n in schema.names if folded(n) in names), key=lambda name: names.index(folded(name)))
    if like.label and (trained_on := find_name(like.label, schema.names)):
        usual = [trained_on, *(name for name in usual if name != trained_on)]
    measured = _beside_x(usual, schema)
    likely: list[str] = [name for name in usual if name != measured or name == like.label]
    if data.labels is None:
        return None, {name: "the labels of the model" if name == like.label else LABELS_ARE_NULL for name in likely}
    if data.labels != "auto":
        labels: str | None = _named(data.labels, schema, "data.labels")
    elif like.features and like.label is None:
        labels = next(iter(likely), None)
    elif measured and not likely and _may_be_classes(schema.field(measured).type):
        raise InputError(
            f"data.labels: column {measured} may hold labels, or beside column x a measured value; write --data.labels "
            f"{shlex.quote(measured)}, or --data.labels null, which keeps it as a feature"
        )
    elif len(likely) > 1 and like.label is None:
        raise InputError(
            f"data.labels: {' and '.join(likely)} could each hold the labels; name one with --data.labels, or use "
            "--data.labels null"
        )
    else:
        labels = next(iter(likely), None)
    if labels is not None and not (_may_be_classes(kind := schema.field(labels).type) or is_number(kind)):
        raise InputError(
            f"data.labels: column {labels} holds {short_type(kind)}; use integers or strings, name another column, or "
            "ignore it with --data.labels null"
        )
    return labels, {name: f"its name is one of labels, beside {labels}" for name in likely if name != labels}


def _beside_x(usual: Sequence[str], schema: pa.Schema) -> str | None:
    """Return the column y of numbers if there is a column x of numbers: both are then more likely measured."""
    y, x = next((name for name in usual if folded(name) == "y"), None), find_name("x", schema.names)
    return y if y and x and all(is_number(schema.field(name).type) for name in (x, y)) else None


def _may_be_classes(kind: pa.DataType) -> bool:
    """Say whether values of this type are likely classes; floating-point numbers only are if all of them are whole."""
    kind = plain_type(kind)
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind) or is_text(kind)


def _excluded(data: Data, schema: pa.Schema) -> dict[str, str]:
    """Return the columns that `data.exclude` names, but for those to which another field gives a part."""
    wanted = [data.column, None if data.labels == "auto" else data.labels]
    used = {find_name(name, schema.names) for name in wanted if name is not None}
    names = [_named(name, schema, "data.exclude") for name in data.exclude]
    return {name: "data.exclude" for name in names if name not in used}


def _index_of(schema: pa.Schema) -> Iterable[str]:
    """Return the columns in which pandas keeps the index of its table."""
    names: set[str] = set()
    try:
        stored = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
        names = {name for name in stored.get("index_columns", ()) if isinstance(name, str)}
    except (ValueError, AttributeError, TypeError):  # metadata may hold anything
        pass
    return [name for name in schema.names if name in names or name.startswith(_ROW_NUMBERS)]


def _why_not_read(kind: pa.DataType, features: Sequence[str], schema: pa.Schema) -> str:
    if len(features) == 1 and not is_number(schema.field(features[0]).type) and is_number(kind):
        return f"the features are in {features[0]}"
    return "it has no values" if pa.types.is_null(kind) else short_type(plain_type(kind))


def _find_features(fields: Sequence[pa.Field], names: Sequence[str], texts: bool) -> tuple[str, ...]:
    """Return the one column of images or vectors among the fields, or if there is none all columns of numbers and, if
    `texts`, of text."""
    candidates = [field.name for field in fields if find_decoder(field.type)]
    if len(candidates) > 1:
        raise InputError(
            f"data.column: {' and '.join(candidates[:_MAX_CANDIDATES])} could each hold the images or vectors; name "
            "one with --data.column"
        )
    singles = [field.name for field in fields if is_number(field.type) or (texts and is_text(field.type))]
    features = tuple(candidates) or tuple(singles)
    if not features:
        raise no_features(names)
    return features


def no_features(names: Sequence[str]) -> InputError:
    """Return the error about a table with no column that can be read."""
    return InputError(
        f"data.path: no column of images, vectors or numbers among {join_names(names)}; jobs/DATA.md says what is read"
    )


def _matched(data: Data, fields: Sequence[pa.Field], schema: pa.Schema, like: TableColumns) -> tuple[str, ...]:
    """Return the features in the order of `like`, the columns that a model was trained on."""
    numbers = {field.name for field in fields if is_number(field.type)}
    texts = {field.name for field in fields if is_text(field.type)}
    names = {*schema.names}
    categories = like.categories or [()] * len(like.features)
    for name, kind, known in zip(like.features, like.types, categories, strict=True):
        if name not in names:
            raise InputError(
                f"data.path: there is no column {name}, which the model was trained on; the columns are "
                f"{join_names(schema.names)}{resembling([name], schema.names)}"
            )
        if find_name(name, data.exclude):
            raise InputError(f"data.exclude: the model was trained on {name}; take it off this list")
        if name not in (texts if known else numbers):
            raise InputError(
                f"data.path: column {name} holds {short_type(schema.field(name).type)}, but the model was trained on "
                f"{kind}; write it as {'text' if known else 'numbers'}"
            )
    unknown = numbers - {*like.features}
    if extra := [field.name for field in fields if field.name in unknown]:
        raise InputError(
            f"data.path: the model was not trained on {join_names(extra)}; leave out what it does not know with "
            f"{exclusion(extra)}"
        )
    return like.features
