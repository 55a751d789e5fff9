"""The contract for a user's own Parquet: one test for each way of writing it, and one line for each bad input."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aecore.config.experiment import Data
from aecore.config.facts import Facts
from aecore.core.errors import InputError
from aecore.data import parquet
from aecore.data.dataset import inspect, load
from aecore.data.splits import Arrays

ROWS = 40
IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, 6, 5), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (ROWS, 6, 5, 3), dtype=np.uint8)
VECTORS = np.random.default_rng(2).normal(3, 2, (ROWS, 4)).astype(np.float32)
LABELS = [n % 2 for n in range(ROWS)]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def read(path: Path, columns: dict[str, Any], **fields: Any) -> tuple[Facts, Arrays]:
    pq.write_table(pa.table(columns), path / "data.parquet", row_group_size=16)
    data = Data.model_validate({"name": "parquet", "path": str(path / "data.parquet"), "validation": 6, **fields})
    facts = inspect(data)
    return facts, load(data, facts)


def everything(arrays: Arrays) -> np.ndarray:
    return np.concatenate([split.x for split in arrays[:3]])


def same_rows(one: np.ndarray, two: np.ndarray) -> bool:
    """Say whether two arrays hold the same rows, in whatever order."""
    rows = [sorted(row.tobytes() for row in np.ascontiguousarray(array)) for array in (one, two)]
    return rows[0] == rows[1]


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
WAYS: dict[str, tuple[pa.Array, np.ndarray]] = {
    "structs": (pa.array([{"bytes": png(i), "path": None} for i in IMAGES], STRUCT), IMAGES[:, None]),
    "png": (pa.array([png(i) for i in IMAGES]), IMAGES[:, None]),
    "colour": (pa.array([png(i) for i in COLOUR]), COLOUR.transpose(0, 3, 1, 2)),
    "tensors": (pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES), IMAGES[:, None]),
    "nested": (pa.array(IMAGES.tolist(), pa.list_(pa.list_(pa.uint8(), 5), 6)), IMAGES[:, None]),
    "vectors": (pa.array(VECTORS.tolist(), pa.list_(pa.float32(), 4)), VECTORS),
    "lists": (pa.array(VECTORS.tolist(), pa.list_(pa.float32())), VECTORS),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_column_of(way: str, tmp_path: Path) -> None:
    column, expected = WAYS[way]
    facts, arrays = read(tmp_path, {"thing": column, "label": LABELS})
    assert facts.shape == expected.shape[1:]
    assert facts.levels == (256 if expected.dtype == np.uint8 else 0)
    assert same_rows(everything(arrays), expected)
    assert len(arrays.validation.x) == 6 and len(arrays.test.x) == 8


def test_columns_of_numbers_are_features_and_labels_may_be_strings(tmp_path: Path) -> None:
    columns: dict[str, Any] = {f"f{n}": VECTORS[:, n] for n in range(4)}
    facts, arrays = read(tmp_path, {**columns, "label": ["dog" if n else "cat" for n in LABELS]})
    assert facts.classes == ("cat", "dog") and facts.shape == (4,)
    assert same_rows(everything(arrays), VECTORS)
    for split in arrays[:3]:
        assert split.y is not None
        for x, y in zip(split.x, split.y, strict=True):
            assert LABELS[int(np.argmin(np.abs(VECTORS - x).sum(1)))] == y


def test_standardised_on_the_training_rows_alone(tmp_path: Path) -> None:
    _, arrays = read(tmp_path, {"x": WAYS["vectors"][0], "label": LABELS})
    train = (arrays.train.x - arrays.shift) * arrays.scale
    assert train.mean(0) == pytest.approx(0, abs=1e-5) and train.std(0) == pytest.approx(1, abs=1e-5)
    assert abs(((arrays.test.x - arrays.shift) * arrays.scale).mean(0)).max() > 0.05


def test_a_constant_column_becomes_zero(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"1 of 2 features never vary and carry no information \(the first: b\)"):
        _, arrays = read(tmp_path, {"a": np.arange(ROWS), "b": np.full(ROWS, 7.0), "label": LABELS})
    assert (((arrays.train.x - arrays.shift) * arrays.scale)[:, 1] == 0).all()


def test_labels_and_indices_are_never_features(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "a": VECTORS[:, 0],
        "b": VECTORS[:, 1],
        "label": LABELS,
        "__index_level_0__": range(ROWS),
    }
    for labels in ("auto", None):
        facts, arrays = read(tmp_path, columns, labels=labels)
        assert facts.shape == (2,) and (arrays.train.y is None) == (labels is None)


def test_all_images_take_the_mode_of_the_first(tmp_path: Path) -> None:
    grey_later = [*map(png, COLOUR[:-1]), png(IMAGES[0])]
    facts, arrays = read(tmp_path, {"image": grey_later, "label": LABELS})
    assert facts.shape == (3, 6, 5)
    grey = [x for x in everything(arrays) if (x[0] == x[1]).all() and (x[1] == x[2]).all()]
    assert len(grey) == 1 and np.array_equal(grey[0][0], IMAGES[0])


def test_the_split_column_decides(tmp_path: Path) -> None:
    marks = ["train"] * 20 + ["validation"] * 12 + ["test"] * 8
    _, arrays = read(tmp_path, {"image": WAYS["png"][0], "label": LABELS, "split": marks})
    assert np.array_equal(arrays.train.x, IMAGES[:20, None])
    assert np.array_equal(arrays.validation.x, IMAGES[20:32, None])
    assert np.array_equal(arrays.test.x, IMAGES[32:, None])


def test_a_folder_is_one_set_and_names_do_not_matter(tmp_path: Path) -> None:
    table = pa.table({"x": WAYS["vectors"][0], "label": LABELS})
    for folder, names in (("one", ("a", "b")), ("two", ("c", "d"))):
        (tmp_path / folder).mkdir()
        for name, part in zip(names, (table[:25], table[25:]), strict=True):
            pq.write_table(part, tmp_path / folder / f"{name}.parquet")
    facts = [inspect(Data(name="parquet", path=str(tmp_path / folder))) for folder in ("one", "two")]
    assert facts[0].rows == ROWS and facts[0].digest == facts[1].digest
    local = inspect(Data(name="parquet", path=(tmp_path / "one").as_uri()))
    assert local == facts[0]


def test_the_digest_is_the_one_that_finished_runs_have(tmp_path: Path) -> None:
    facts, _ = read(tmp_path, {"x": VECTOR_COLUMN, "label": LABELS})
    file_digest = hashlib.sha256((tmp_path / "data.parquet").read_bytes()).digest()
    # a change of this formula forks every finished stage of every user
    assert facts.digest == hashlib.sha256(file_digest + b"('x',) label None").hexdigest()


def test_copies_of_training_rows_in_the_test_are_counted(tmp_path: Path) -> None:
    copied = [*IMAGES[:-3], *IMAGES[:3]]
    marks = ["train"] * 20 + ["validation"] * 8 + ["test"] * 12
    with pytest.warns(UserWarning, match="3 of the 12 test rows are equal to training rows"):
        read(tmp_path, {"image": [png(i) for i in copied], "split": marks})
    with pytest.warns(UserWarning, match=r"\d+ of the 8 test rows are equal to training rows"):
        read(tmp_path, {"image": [png(i) for i in (*IMAGES[:20], *IMAGES[:20])]})


VECTOR_COLUMN = WAYS["vectors"][0]
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no features": ({"label": LABELS, "name": ["x"] * ROWS}, {}, "no column of images, vectors or numbers"),
    "two candidates": ({"a": VECTOR_COLUMN, "b": VECTOR_COLUMN}, {}, "a and b could each hold the images or vectors"),
    "unknown column": ({"a": VECTOR_COLUMN}, {"column": "z"}, "there is no column z; the columns are a"),
    "unknown labels": ({"a": VECTOR_COLUMN}, {"labels": "z"}, "there is no column z; the columns are a"),
    "text as features": (
        {"a": ["x"] * ROWS},
        {"column": "a"},
        "data.column: column a holds string, neither images nor vectors",
    ),
    "float labels": (
        {"a": VECTOR_COLUMN, "label": np.linspace(0, 1, ROWS)},
        {},
        "is not a class, as classes are integers or text; set --data.labels null",
    ),
    "missing labels": (
        {"a": VECTOR_COLUMN, "label": [None, *LABELS[1:]]},
        {},
        "column label row 0: the label is missing",
    ),
    "one class": (
        {"a": VECTOR_COLUMN, "label": [1] * ROWS},
        {},
        r"data.labels: all rows of column label have one class \(1\)",
    ),
    "missing value": ({"a": [None, *VECTORS[1:].tolist()]}, {"column": "a"}, "column a row 0: the value is missing"),
    "ragged": (
        {"a": [[1.0], *VECTORS[1:].tolist()]},
        {},
        r"column a row \d+: .*(another length than|first row \(1,\))",
    ),
    "not an image": ({"a": [png(IMAGES[0]), *[b"no"] * (ROWS - 1)]}, {}, "row 1: not a readable image"),
    "sizes differ": (
        {"a": [*map(png, IMAGES[1:]), png(IMAGES[0][:4])]},
        {},
        r"column a row \d+: the (image|row) has the shape",
    ),
    "not finite": (
        {"a": [*VECTORS[1:].tolist(), [1.0, 2.0, 3.0, float("nan")]]},
        {},
        "column a row 39: the value is not finite",
    ),
    "strange split": ({"a": VECTOR_COLUMN, "split": ["new"] * ROWS}, {}, "column split row 0: the mark is 'new'"),
    "no training rows": ({"a": VECTOR_COLUMN, "split": ["test"] * ROWS}, {}, "no row is marked train, by column"),
    "beyond [0, 1]": ({"a": VECTOR_COLUMN}, {"likelihood": "bernoulli"}, r"bernoulli needs values in \[0, 1\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_parquet_ends_in_one_line(case: str, tmp_path: Path) -> None:
    columns, fields, message = BAD[case]
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, columns, **fields)
    assert "\n" not in str(error.value)


LATE = ["not an image", "sizes differ", "not finite", "strange split", "no training rows", "beyond [0, 1]"]


@pytest.mark.parametrize("case", LATE)
def test_a_task_says_the_same_of_what_the_driver_leaves_to_it(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, fields, message = BAD[case]
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    data = Data.model_validate({"name": "parquet", "path": str(tmp_path / "data.parquet"), **fields})
    with pytest.raises(InputError, match=message) as early:
        inspect(data)
    monkeypatch.setattr(parquet, "MAX_SURVEY_BYTES", 0)
    facts = inspect(data)
    with pytest.raises(InputError) as late:
        load(data, facts)
    assert str(late.value) == str(early.value)


def test_a_file_that_changes_while_the_job_runs(tmp_path: Path) -> None:
    facts, _ = read(tmp_path, {"x": VECTOR_COLUMN, "label": LABELS})
    file = tmp_path / "data.parquet"
    pq.write_table(pa.table({"x": VECTOR_COLUMN, "label": [n % 3 for n in range(ROWS)]}), file)
    with pytest.raises(InputError, match="was changed while the job ran"):
        load(Data(name="parquet", path=str(file)), facts)
    pq.write_table(pa.table({"x": VECTOR_COLUMN, "label": LABELS})[1:], file)
    with pytest.raises(InputError, match="was changed while the job ran"):
        load(Data(name="parquet", path=str(file)), facts)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "not a readable Parquet file"), (b"PAR1 and nothing else", "not a readable")],
)
def test_bad_files_end_in_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        inspect(Data(name="parquet", path=str(file)))


def test_an_empty_table_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.parquet file"):
        inspect(Data(name="parquet", path=str(tmp_path)))
    pq.write_table(pa.table({"a": VECTOR_COLUMN})[:0], tmp_path / "data.parquet")
    with pytest.raises(InputError, match="has no rows"):
        inspect(Data(name="parquet", path=str(tmp_path)))
