"""Which columns of a table are features, labels and split marks, and how their numbers are read."""

import json
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aecore.config.experiment import Data
from aecore.config.facts import TableColumns
from aecore.core.errors import InputError
from aecore.data.columns import described, find_columns
from aecore.data.dataset import describe, inspect, load, load_rows
from aecore.data.parts import Part, check_part
from aecore.data.values import shifted

ROWS = 60
rng = np.random.default_rng(0)
A, B, C = rng.normal(size=(3, ROWS))
CLASSES = [0, 1, 2] * (ROWS // 3)
TEXT = ["u", "v", "w"] * (ROWS // 3)
WHOLE = rng.integers(90, 110, ROWS)
SPLIT = ["train", "train", "test"] * (ROWS // 3)
SPARK = pa.struct(
    [("type", pa.int8()), ("size", pa.int32()), ("indices", pa.list_(pa.int32())), ("values", pa.list_(pa.float64()))]
)  # fmt: skip


def table(**columns: Any) -> pa.Table:
    return pa.table(columns)


def set_of(tmp_path: Path, values: pa.Table, **fields: Any) -> Data:
    pq.write_table(values, tmp_path / "data.parquet")
    return Data(name="parquet", path=str(tmp_path / "data.parquet"), **fields)


def pandas_index(values: pa.Table, *names: Any) -> pa.Table:
    return values.replace_schema_metadata({"pandas": json.dumps({"index_columns": names})})


FOUND: dict[str, tuple[pa.Table, dict[str, Any], tuple[str, ...], str | None, dict[str, str]]] = {
    # name: table, config, features, labels, columns that are left out
    "Class": (table(a=A, b=B, Class=CLASSES), {}, ("a", "b"), "Class", {}),
    "LABEL of text": (table(a=A, LABEL=TEXT), {}, ("a",), "LABEL", {}),
    "named in another case": (table(a=A, Fraud=CLASSES), {"labels": "fraud"}, ("a",), "Fraud", {}),
    "Split": (table(a=A, Split=SPLIT), {}, ("a",), None, {}),
    # from here to "numbered columns", before: read as a feature, or refused
    "label with a blank": (pa.table({"a": A, " Label": CLASSES}), {}, ("a",), " Label", {}),
    "named with an accent": (
        pa.table({"a": A, "gru\u0308n": CLASSES}), {"labels": "GR\u00dcN"}, ("a",), "gru\u0308n", {},
    ),
    "split excluded": (
        table(a=A, split=SPLIT), {"exclude": ["split"]}, ("a",), None, {"split": "data.exclude"},
    ),  # before: left out of the features, but still the split
    "fold excluded": (table(a=A, split=CLASSES), {"exclude": ["split"]}, ("a",), None, {"split": "data.exclude"}),
    "label excluded": (table(a=A, label=CLASSES), {"exclude": ["label"]}, ("a",), None, {"label": "data.exclude"}),
    "one of two labels excluded": (
        table(a=A, label=CLASSES, target=CLASSES), {"exclude": ["target"]}, ("a",), "label",
        {"target": "data.exclude"},
    ),
    "label excluded and named": (
        table(a=A, label=CLASSES), {"exclude": ["label"], "labels": "label"}, ("a",), "label", {},
    ),
    "numbered columns": (pa.table({"1": A, "0": B, "": C}), {}, ("1", "0", ""), None, {}),
    "columns of pandas with several levels": (
        pa.table({"('a', 'x')": A, "('a', 'y')": B}), {}, ("('a', 'x')", "('a', 'y')"), None, {},
    ),
    "labels ignored": (
        table(a=A, Target=CLASSES), {"labels": None}, ("a",), None,
        {"Target": "its name is one of labels, and data.labels is null"},
    ),
    "another label": (
        table(a=A, target=CLASSES, kind=TEXT), {"labels": "kind"}, ("a",), "kind",
        {"target": "its name is one of labels, beside kind"},
    ),
    "x, y, z kept": (table(x=WHOLE, y=WHOLE, z=WHOLE), {"labels": None}, ("x", "y", "z"), None, {}),
    "X, Y kept": (table(X=WHOLE, Y=WHOLE), {"labels": None}, ("X", "Y"), None, {}),
    "x and y as said": (table(x=WHOLE, y=CLASSES), {"labels": "y"}, ("x",), "y", {}),
    "lengths called x, y, z": (table(x=A, y=B, z=C), {}, ("x", "y", "z"), None, {}),
    "x, y and a label": (table(x=WHOLE, y=WHOLE, label=CLASSES), {}, ("x", "y"), "label", {}),
    "y beside a vector x": (table(x=[[1.0, 2.0]] * ROWS, y=CLASSES), {}, ("x",), "y", {}),
    "whole floats": (table(a=A, label=np.array(CLASSES, float)), {}, ("a",), "label", {}),
    "decimal labels": (table(a=A, label=[Decimal(one) for one in CLASSES]), {}, ("a",), "label", {}),
    "truth values": (table(a=A, label=[one > 0 for one in CLASSES]), {}, ("a",), "label", {}),
    "dictionary of text": (table(a=A, label=pa.array(TEXT).dictionary_encode()), {}, ("a",), "label", {}),
    "string view": (table(a=A, label=pa.array(TEXT, pa.string_view())), {}, ("a",), "label", {}),
    "pandas' index": (
        pandas_index(table(customer=np.arange(ROWS), a=A), "customer"), {}, ("a",), None, {"customer": "pandas' index"},
    ),
    "pandas' range index": (
        pandas_index(table(a=A, b=B), {"kind": "range", "name": None, "start": 0, "stop": ROWS, "step": 1}), {},
        ("a", "b"), None, {},
    ),
    "unnamed index": (table(a=A, __index_level_0__=CLASSES), {}, ("a",), None, {"__index_level_0__": "pandas' index"}),
    "index of a CSV": (
        pa.table({"Unnamed: 0": CLASSES, "a": A}), {}, ("a",), None, {"Unnamed: 0": "pandas' index"},
    ),
    "damaged metadata": (
        table(a=A).replace_schema_metadata({"pandas": "[not JSON"}), {}, ("a",), None, {},
    ),
    "excluded": (
        table(Id=CLASSES, a=A), {"exclude": ["id"]}, ("a",), None, {"Id": "data.exclude"},
    ),
    "text, dates and nothing": (
        table(a=A, name=TEXT, day=pa.array([0] * ROWS, pa.date32()), none=pa.nulls(ROWS)), {"categories": 0}, ("a",),
        None, {"name": "string", "day": "date32[day]", "none": "it has no values"},
    ),
    "numbers beside a vector": (
        table(id=CLASSES, v=[[1.0, 2.0]] * ROWS), {}, ("v",), None, {"id": "the features are in v"},
    ),
    "numbers of all kinds": (
        table(
            decimal=[Decimal("1.50"), Decimal("2.25")] * (ROWS // 2), truth=[True, False] * (ROWS // 2),
            half=A.astype(np.float16), words=pa.array(CLASSES).dictionary_encode(),
            wide=pa.array(CLASSES, pa.uint64()),
        ), {}, ("decimal", "truth", "half", "words", "wide"), None, {},
    ),
    "two vectors, one excluded": (
        table(v=[[1.0]] * ROWS, w=[[2.0]] * ROWS), {"exclude": ["v"]}, ("w",), None, {"v": "data.exclude"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_columns_are_found_by_name_and_type(case: str) -> None:
    values, fields, features, labels, left_out = FOUND[case]
    found = find_columns(Data(name="parquet", path="x", **fields), values.schema)
    assert (found.features, found.labels, dict(found.left_out)) == (features, labels, left_out)
    assert found.split == next((name for name in values.schema.names if name == "Split"), None)


REFUSED: dict[str, tuple[pa.Table, dict[str, Any], str]] = {
    "y beside x": (
        table(x=WHOLE, y=WHOLE, z=WHOLE), {},
        "data.labels: column y may hold labels, or beside column x a measured value; write --data.labels y, or "
        "--data.labels null, which keeps it as a feature",
    ),
    "two labels": (
        table(a=A, label=CLASSES, Class=CLASSES), {},
        "data.labels: label and Class could each hold the labels; name one with --data.labels, or use --data.labels "
        "null",
    ),
    "a measured integer": (
        table(a=A, target=np.arange(ROWS) * 3), {},
        "data.labels: column target has 60 different values in 60 rows, so it may be measured rather than a label; "
        "write --data.labels target, or --data.labels null",
    ),
    "names as labels": (
        table(a=A, label=[f"row {number}" for number in range(ROWS)]), {},
        "data.labels: column label has 60 different values in 60 rows",
    ),
    "a real target": (table(a=A, target=B), {}, "is not a class, as classes are integers or text; set --data.labels "),
    "lists of labels": (
        table(a=A, labels=[[0, 1]] * ROWS), {},
        "data.labels: column labels holds list<element: int64>; use integers or strings, name another column, or "
        "ignore it with --data.labels null",
    ),
    "no such label": (table(a=A), {"labels": "fraud"}, "data.labels: there is no column fraud; the columns are a"),
    "no such exclusion": (table(a=A), {"exclude": ["id"]}, "data.exclude: there is no column id; the columns are a"),
    "nothing but text": (
        table(name=TEXT), {"categories": 2}, "data.path: no column of images, vectors or numbers among name",
    ),
    "split of numbers": (
        table(a=A, SPLIT=CLASSES), {},
        "data.path: column SPLIT holds int64; use train, validation and test, rename the column, or leave it out with "
        "--data.exclude [SPLIT]",
    ),
    "split of other marks": (
        table(a=A, split=["2026"] * ROWS), {},
        "the mark is '2026'; use train, validation or test, or leave the column out with --data.exclude [split]",
    ),
    "a column of missing values": (
        pa.table({"a": A, "my b": pa.array([None] * ROWS, pa.float64())}), {},
        "row 0: the value is missing; fill it or drop the row, or train with --data.missing impute, or train without "
        "the column: --data.exclude '[\"my b\"]'",
    ),
    "1 and -1": (
        table(a=A, label=[1, -1] * (ROWS // 2)), {},
        "row 1: -1 is not a class (it often marks rows without a label; classes of such names may be written as text); "
        "drop such rows or set --data.labels null",
    ),
    "decimal labels that are not whole": (
        table(a=A, label=[Decimal("1.50"), Decimal("2.00")] * (ROWS // 2)), {}, "row 0: 1.5 is not a class",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_doubtful_columns_are_refused_with_the_ways_out(case: str, tmp_path: Path) -> None:
    values, fields, message = REFUSED[case]
    with pytest.raises(InputError) as refused:
        inspect(set_of(tmp_path, values, **fields))
    assert message in str(refused.value)


LIKE = TableColumns(features=("b", "a"), types=("double", "int64"), label="fraud")
MATCHED: dict[str, tuple[pa.Table, str | None]] = {
    # name: table, and what the error says
    "another order": (table(a=A, b=B), None),
    "other numbers": (table(b=CLASSES, a=[Decimal(1)] * ROWS), None),
    "with the label": (table(a=A, b=B, Fraud=CLASSES), None),
    "with text": (table(a=A, name=TEXT, b=B), None),
    "an index that was a feature": (pandas_index(table(a=A, b=B), "a"), None),
    "a missing one": (table(a=A, c=C), "there is no column b, which the model was trained on; the columns are a, c"),
    "another one": (
        table(a=A, b=B, c=C),
        "the model was not trained on c; leave out what it does not know with --data.exclude [c]",
    ),
    "others with blanks": (
        pa.table({"a": A, "b": B, "c d": C, "e": C}),
        "the model was not trained on c d, e; leave out what it does not know with --data.exclude '[\"c d\", \"e\"]'",
    ),
    "a blank in the name": (
        pa.table({"a": A, "b ": B}),
        "there is no column b, which the model was trained on; the columns are a, b  ('b ' is not 'b')",
    ),
    "retyped": (
        table(a=TEXT, b=B), "column a holds string, but the model was trained on int64; write it as numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MATCHED)
def test_columns_are_matched_by_name_to_those_of_a_model(case: str) -> None:
    values, message = MATCHED[case]
    data = Data(name="parquet", path="x", labels=None)
    if message is None:
        assert find_columns(data, values.schema, LIKE).features == ("b", "a")
        return
    with pytest.raises(InputError) as refused:
        find_columns(data, values.schema, LIKE)
    assert message in str(refused.value)


def test_a_column_of_a_model_cannot_be_left_out() -> None:  # before: "column a holds double, but ... on double"
    with pytest.raises(InputError, match=r"^data\.exclude: the model was trained on a; take it off this list"):
        find_columns(Data(name="parquet", path="x", labels=None, exclude=["A"]), table(a=A, b=B).schema, LIKE)


@pytest.mark.parametrize("name", ["c", "label", "split"])
def test_a_column_that_only_a_later_file_has_can_be_left_out(name: str, tmp_path: Path) -> None:
    # before: "data.exclude: there is no column c", though a message said to leave it out
    pq.write_table(table(a=A, b=B), tmp_path / "0.parquet")
    pq.write_table(table(a=C, b=B).append_column(name, [CLASSES]), tmp_path / "1.parquet")
    facts = inspect(Data(name="parquet", path=str(tmp_path), exclude=[name]))
    assert (facts.rows, facts.columns.features, facts.classes) == (2 * ROWS, ("a", "b"), ())
    with pytest.raises(InputError, match=r"^data.exclude: there is no column d; the columns are a, b$"):
        inspect(Data(name="parquet", path=str(tmp_path), exclude=["d"]))


def test_rows_are_read_in_the_order_of_a_model(tmp_path: Path) -> None:
    data = set_of(tmp_path, table(a=A, b=B))
    own, matched = inspect(data), inspect(data, TableColumns(features=("b", "a"), types=("double", "double")))
    assert own.digest != matched.digest and own.columns.features == ("a", "b")
    np.testing.assert_array_equal(load_rows(data, own).x, load_rows(data, matched).x[:, ::-1])


@pytest.mark.filterwarnings("ignore:.*test rows are equal to training rows")
def test_values_of_all_types_become_numbers(tmp_path: Path) -> None:
    # values in two rows only, so that test rows equal training rows
    sparse = {"type": 0, "size": 3, "indices": [1], "values": [2.0]}
    dense = {"type": 1, "size": None, "indices": None, "values": [1.0, 3.0, 3.0]}
    data = set_of(tmp_path, table(v=pa.array([sparse, dense] * (ROWS // 2), SPARK)))
    np.testing.assert_array_equal(load_rows(data, inspect(data)).x[:2], [[0, 2, 0], [1, 3, 3]])
    values, fields, features, _, _ = FOUND["numbers of all kinds"]
    data = set_of(tmp_path, values, **fields)
    rows = load_rows(data, inspect(data)).x
    assert rows.shape == (ROWS, len(features)) and rows[0].tolist() == [1.5, 1, np.float16(A[0]), 0, 0]


@pytest.mark.parametrize("kind", [pa.list_view, pa.large_list_view, pa.large_list, pa.list_])
def test_lists_of_all_kinds_are_vectors(kind: Any, tmp_path: Path) -> None:
    values = rng.normal(size=(ROWS, 3))
    data = set_of(tmp_path, table(v=pa.array(values.tolist(), kind(pa.float64()))))
    np.testing.assert_array_equal(load_rows(data, inspect(data)).x, values.astype(np.float32))


@pytest.mark.parametrize("label", ["float", "half", "truth", "decimal"])
def test_labels_of_all_kinds_are_classes(label: str, tmp_path: Path) -> None:
    kinds = {
        "float": np.array(CLASSES, float),
        "half": np.array(CLASSES, np.float16),
        "truth": [one > 0 for one in CLASSES],
        "decimal": list(map(Decimal, CLASSES)),
    }
    facts = inspect(set_of(tmp_path, table(a=A, label=kinds[label])))
    assert facts.classes == (("False", "True") if label == "truth" else ("0", "1", "2"))


def test_large_decimal_labels_are_told_apart(tmp_path: Path) -> None:  # before: all of one class
    for kind in (pa.decimal128(30, 2), pa.decimal256(60, 0)):
        labels = pa.array([Decimal(10**20 + one) for one in CLASSES], kind)
        assert inspect(set_of(tmp_path, table(a=A, label=labels))).classes == tuple(
            str(10**20 + one) for one in range(3)
        )


def test_labels_that_differ_in_blanks_are_told(tmp_path: Path) -> None:  # before: no word
    data = set_of(tmp_path, table(a=A, label=["u", "u ", "w"] * (ROWS // 3)))
    with pytest.warns(UserWarning, match="the classes 'u ' and 'u' of column label differ in blanks alone, and count"):
        assert inspect(data).classes == ("u", "u ", "w")


SECONDS = 1_700_000_000 + rng.permutation(ROWS)
LOWEST, HIGHEST = -(2**63), 2**63 - 1
NUMBERS: dict[str, Any] = {
    "times in seconds": SECONDS,
    "times in nanoseconds": SECONDS * 10**9,
    "times as double": SECONDS + rng.uniform(size=ROWS),
    "large integers": 2**62 + rng.permutation(ROWS),
    "unsigned integers": np.uint64(2**63) + rng.permutation(ROWS).astype(np.uint64),
    "negative ones": -(2**60) - rng.permutation(ROWS),
    "tiny differences": 1 + 1e-9 * A,
    "the largest integers": HIGHEST - rng.permutation(ROWS),
    "decimal numbers": pa.array([Decimal(10**17 + int(one)) for one in SECONDS], pa.decimal128(38, 0)),  # before: wrong
    "lowest and highest": np.where(np.array(CLASSES) > 0, HIGHEST, LOWEST),  # before: 0 and 1
    "plain numbers": 100 + A,
    "huge numbers": A * 1e30,
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_keep_their_differences(case: str, tmp_path: Path) -> None:
    data = set_of(tmp_path, table(a=A, t=NUMBERS[case]))
    column = np.array([int(one) for one in NUMBERS[case].to_pylist()]) if "decimal" in case else NUMBERS[case]
    facts = inspect(data)
    assert bool(facts.columns.offsets) == (case not in ("plain numbers", "huge numbers", "lowest and highest"))
    arrays = load(data, facts)
    read = load_rows(data, facts).x[:, 1].astype(np.float64)
    exact = np.array(
        [int(one) - int(column[0]) if column.dtype.kind in "iu" else one - column[0] for one in column], float
    )
    np.testing.assert_allclose(read - read[0], exact, atol=1e-5 * exact.std())
    standardised = (arrays.train.x[:, 1] - arrays.shift[1]) * arrays.scale[1]
    np.testing.assert_allclose([standardised.mean(), standardised.std()], [0, 1], atol=1e-3)
    if facts.columns.offsets:
        assert "read minus a number near their values, which 32 bits would not tell apart: t" in describe(data, facts)


@pytest.mark.parametrize("sentinel", [0, -1, LOWEST])
def test_a_sentinel_among_times_does_not_hide_their_differences(sentinel: int, tmp_path: Path) -> None:
    times = SECONDS * 10**9
    times[7] = sentinel
    data = set_of(tmp_path, table(a=A, t=times))
    facts = inspect(data)
    assert facts.columns.offsets[1] in times.tolist()  # before: nothing was subtracted, and all times became equal
    read = load_rows(data, facts).x[:, 1].astype(np.float64)
    exact = [float(int(one) - facts.columns.offsets[1]) for one in times]
    np.testing.assert_allclose(read, exact, rtol=1e-6)


def test_numbers_that_32_bits_cannot_hold_are_refused(tmp_path: Path) -> None:
    outlier = SECONDS.copy()
    outlier[: ROWS // 2] = 0  # the spread is large, so that nothing is subtracted ...
    assert inspect(set_of(tmp_path, table(a=A, t=outlier))).columns.offsets == ()
    data = set_of(tmp_path, table(v=np.stack([A, SECONDS], 1).tolist()))  # ... and from vectors nothing is, ever
    with pytest.raises(
        InputError, match=r"values of v, number 1 differ by about 17 around 1.7e\+09, which 32 bits do not"
    ):
        inspect(data)
    with pytest.raises(InputError, match=r"values of t differ by about .*e-47"):
        inspect(set_of(tmp_path, table(a=A, t=A * 1e-46)))
    for tiny in (A * 1e-40, (A * 1e-40).astype(np.float32), A * 1e-300):  # before: standardised to zeros, or "about 0"
        with pytest.raises(InputError, match=r"values of t differ by about [1-9.]+e-"):
            inspect(set_of(tmp_path, table(a=A, t=tiny)))
    data = set_of(tmp_path, table(v=[[HIGHEST - number, number] for number in range(ROWS)]))
    with pytest.raises(InputError, match=r"values of v, number 0 differ by about 30 "):  # before: "never vary"
        inspect(data)
    decimals = {whole: [Decimal(f"{whole}.{number:03}") for number in range(ROWS)] for whole in (10**10, 10**30)}
    written = {whole: table(a=A, t=pa.array(one, pa.decimal256(60, 3))) for whole, one in decimals.items()}
    assert inspect(set_of(tmp_path, written[10**10])).columns.offsets
    with pytest.raises(InputError, match="values of t differ by less than 64 bits tell apart"):  # before: "never vary"
        inspect(set_of(tmp_path, written[10**30]))


def test_a_number_is_subtracted_rightly_from_all_integers() -> None:
    cases: list[tuple[int, float, np.dtype[Any]]] = [
        (1_700_000_002, 1_700_000_000.75, np.dtype(np.int64)),  # before: 2.0
        (LOWEST, 1_700_000_000_000_000_000, np.dtype(np.int64)),  # before: positive
        (5, 2**64 - 3, np.dtype(np.uint64)),  # before: 8
        (2**64 - 1, 2**64 - 3, np.dtype(np.uint64)),
        (-128, 2**62, np.dtype(np.int8)),
    ]
    for value, offset, kind in cases:
        assert shifted(np.array([value], kind), offset).tolist() == [float(Fraction(value) - Fraction(offset))]


def test_never_varies_is_said_of_the_values_in_the_file(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"1 of 3 features never vary .*the first: c"):
        inspect(set_of(tmp_path, table(a=A, t=1 + 1e-12 * B, c=np.full(ROWS, 2.0**60))))


def test_names_that_cannot_be_printed_are_escaped(tmp_path: Path) -> None:  # before: they broke the lines of a plan
    data = set_of(tmp_path, pa.table({"a\nb": A, "\x1b[31mc": B}))
    assert describe(data, inspect(data))[2] == r"columns: a\nb, \x1b[31mc; labels: none; split: drawn"


def test_what_is_read_and_left_out_is_said(tmp_path: Path) -> None:
    data = set_of(tmp_path, table(customer=np.arange(ROWS), a=A, b=B, name=TEXT, Class=CLASSES), exclude=["customer"])
    assert describe(data, inspect(data)) == [
        "data: 60 rows, vectors of 5 features",
        "1 file, data.parquet",
        "columns: a, b, name; labels: Class (3 classes); split: drawn",
        "left out: customer (data.exclude)",
        "one-hot: name (3 texts)",
    ]
    few = data.model_copy(update={"categories": 2})
    assert describe(few, inspect(few))[2:] == [
        "columns: a, b; labels: Class (3 classes); split: drawn",
        "left out: customer (data.exclude), name (3 different texts, more than data.categories)",
    ]
    by_content = data.model_copy(update={"split": "content"})  # before: "drawn"
    assert (
        describe(by_content, inspect(by_content))[2]
        == "columns: a, b, name; labels: Class (3 classes); split: by content"
    )


def test_the_rules_take_time_in_proportion_to_the_columns() -> None:
    schema = pa.schema([(f"gene {number}", pa.float32()) for number in range(30_000)])
    data = Data(name="parquet", path="x")
    began = time.perf_counter()
    columns = find_columns(data, schema)
    like = described(data, columns, schema, {}, None)
    check_part(Part("b", schema), Part("a", schema), find_columns(data, schema, like), data, like)
    assert time.perf_counter() - began < 10, "a square of so many columns takes minutes"
