"""Folders of Parquet files are read as their writers meant them: one row of a table for each way of writing one."""

import os
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from aecore.config.experiment import Data
from aecore.core.errors import InputError
from aecore.data.dataset import identify, inspect, load
from aecore.data.marks import describe_listing
from aecore.data.sets import open_set

ROWS = 20


def table(number: int, **columns: Any) -> pa.Table:
    """Return the table of file number `number`: the values of column `a` tell the file."""
    noise = np.random.default_rng(number).normal(size=ROWS)
    given = {"a": 100.0 * number + np.arange(ROWS), "b": noise, "label": ["u", "v"] * (ROWS // 2), **columns}
    return pa.table({name: values for name, values in given.items() if values is not None})


def describe_files(data: Data) -> list[str]:
    source = open_set(data)
    return describe_listing(source.listing, source.marks)


def write(folder: Path, files: dict[str, pa.Table | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            pq.write_table(content, folder / name)


def of(path: str | tuple[str, ...] | Path, **fields: Any) -> Data:
    place = path if isinstance(path, tuple) else str(path)
    return Data.model_validate({"name": "parquet", "path": place, "validation": 4, **fields})


def files_of(data: Data) -> list[list[int]]:
    """Return the numbers of the files whose rows are in training, validation and test."""
    facts = inspect(data)
    arrays = load(data, facts)
    assert sum(len(split.x) for split in arrays[:3]) == facts.rows  # each row once
    assert len(np.unique(np.concatenate([split.x for split in arrays[:3]])[:, 0])) == facts.rows
    return [sorted({int(a // 100) for a in split.x[:, 0]}) for split in arrays[:3]]


def all_files_of(data: Data) -> list[int]:
    return sorted({number for split in files_of(data) for number in split})


def refused(data: Data, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        inspect(data)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


# names of files, the numbers of those that are read, and data.path below the folder
NAMES: dict[str, tuple[list[str], list[int], str]] = {
    "jupyter": (["x.parquet", ".ipynb_checkpoints/x-checkpoint.parquet"], [0], ""),
    "spark": (["part-0.snappy.parquet", "_temporary/0/_temporary/attempt_1/part-0.parquet"], [0], ""),
    "staging folder of hive": ([".hive-staging_1/x.parquet", "000.parquet"], [1], ""),
    "AppleDouble": (["x.parquet", "._x.parquet"], [0], ""),
    "hidden below a subfolder": (["a/b/x.parquet", "a/_b/y.parquet", "a/b/.z.parquet"], [0], ""),
    "underscore inside": (["a_b/x_.parquet", "a.b/y.parquet"], [0, 1], ""),
    "endings": (["a.parquet", "b.PARQUET", "c.parq", "d.pq", "e.parquet.gzip", "f.snappy.parquet"], [*range(6)], ""),
    "other endings": (["a.parquet", "b.parquet.tmp", "c.parquet.crc", "d.parquet.bak", "e.parquetx", "pq"], [0], ""),
    "folders called .parquet": (["x.parquet/part-0.parquet", "x.parquet/part-1.parquet"], [0, 1], ""),
    "a folder called .parquet that is named": (["x.parquet/part-0.parquet", "y.parquet"], [0], "x.parquet"),
    "a hidden file that is named": (["_x.parquet", "y.parquet"], [0], "_x.parquet"),
    "a file without ending that is named": (["x", "y.parquet"], [0], "x"),
    "below a hidden folder that is named": (["_cache/.a/x.parquet", "_cache/y.parquet"], [0], "_cache/.a"),
    "star": (["a.parquet", "b.parquet", "c/d.parquet", "n.md"], [0, 1], "*.parquet"),
    "star takes no hidden names": (["a.parquet", "_b.parquet", ".c.parquet"], [0], "*.parquet"),
    "star after an underscore": (["a.parquet", "_b.parquet", "_c.parquet"], [1, 2], "_*.parquet"),
    "all names of a folder": (["a.parquet", "c/d.parquet", "n.md"], [0, 1], "*"),
    "no endings at all": (["000000_0", "000001_0"], [0, 1], "*_0"),
    "question mark and set": (["a1.parquet", "a2.parquet", "a3.parquet", "b.parquet"], [0, 1], "a[12].parquet"),
    "folders by pattern": (["2023-1/a.parquet", "2024-1/b.parquet", "2024-2/c/d.parquet"], [1, 2], "2024-*"),
    "a pattern in the middle": (["24-1/x.parquet", "24-2/x.parquet", "24-2/y.parquet"], [0, 1], "24-?/x.parquet"),
    "two stars": (["x.parquet", "a/x.parquet", "a/b/x.parquet", "a/y.parquet"], [0, 1, 2], "**/x.parquet"),
    "two stars at the end": (["x.parquet", "a/b/y.parquet", "_c/z.parquet"], [0, 1], "**"),
    "a name with wildcards that exists": (["[a]*.parquet", "a.parquet"], [0], "[a]*.parquet"),
    "comma and bracket in a name": (["a,[b].parquet"], [0], "a,[b].parquet"),
    "a folder with blanks and signs": (["a b#%é/x.parquet", "y.parquet"], [0], "a b#%é"),
    "the log of a table that is named by a pattern": (["x.parquet", "_delta_log/y.parquet"], [0], "*.parquet"),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_which_files_are_read(case: str, tmp_path: Path) -> None:
    names, expected, path = NAMES[case]
    write(tmp_path, {name: table(number) for number, name in enumerate(names)})
    assert all_files_of(of(tmp_path / path if path else tmp_path)) == expected


NOT_READ: dict[str, tuple[list[str], str, str]] = {
    "nothing there": ([], "", r"no \.parquet file in .*; name the folder that has them"),
    "only hidden files": (["_a.parquet"], "", r"no \.parquet file in .* \(_a.parquet: hidden\)"),
    "only other endings": (["a.csv"], "", r"no \.parquet file in .* \(a.csv: name them by a pattern\)"),
    "no match": (["a.parquet"], "b*.parquet", r"nothing matches .*b\*\.parquet; check the pattern"),
    "no folder before the pattern": ([], "nowhere/*.parquet", r"nothing matches .*nowhere/\*\.parquet"),
    "two paths without brackets": (["a", "b"], "a,b", r"a,b does not exist; .* or several as \[.*a,b\]"),
    "Delta Lake": (["a.parquet", "_delta_log/0.parquet"], "", r"is a table of Delta Lake, .* pattern such as .*/\*\.p"),
    "Hudi": (["a.parquet", ".hoodie/x"], "", "is a table of Hudi, whose files may hold rows that were deleted"),
    "Iceberg": (["data/a.parquet", "metadata/v1.metadata.json"], "", "is a table of Iceberg"),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_where_no_files_are_read_one_line_says_why(case: str, tmp_path: Path) -> None:
    names, path, message = NOT_READ[case]
    write(tmp_path, {name: table(number) for number, name in enumerate(names)})
    refused(of(tmp_path / path), message)


def test_links_are_followed_and_no_file_is_read_twice(tmp_path: Path) -> None:
    write(tmp_path, {"all/2024/a.parquet": table(0), "all/b.parquet": table(1), "blobs/123": table(2)})
    here = tmp_path / "all"
    (here / "c.parquet").symlink_to("../blobs/123")
    assert all_files_of(of(here)) == [0, 1, 2]
    (here / "latest.parquet").symlink_to("b.parquet")
    (here / "0").symlink_to("2024")
    (here / "loop").symlink_to(".")
    assert all_files_of(of(here)) == [0, 1, 2]
    (tmp_path / "link").symlink_to("all")
    assert identify(of(tmp_path / "link")) == identify(of(here))
    (here / "broken.parquet").symlink_to("gone")
    refused(of(here), r"broken\.parquet is a link to gone, which does not exist; delete it")


def test_several_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {f"{name}.parquet": table(n) for n, name in enumerate(["f/a", "f/b", "c", "g/d"])})
    monkeypatch.chdir(tmp_path)
    expected = identify(of(("c.parquet", "f", "g/*.parquet")))
    assert expected.rows == 4 * ROWS and all_files_of(of(("f", "c.parquet", "g"))) == [0, 1, 2, 3]
    same: list[tuple[str, ...]] = [
        ("g", "f", "c.parquet"),  # the order of the paths does not count
        ("f", "f/a.parquet", "c.parquet", "g", "g/d.parquet"),  # nor does a file that is found twice
        tuple(str(tmp_path / name) for name in ("f", "c.parquet", "g")),
        ("../" + tmp_path.name + "/f", "./c.parquet", (tmp_path / "g").as_uri()),
        ("**/*.parquet",),
    ]
    for paths in same:
        assert identify(of(paths)) == expected, paths
    refused(of(("f", "gone.parquet")), r"gone\.parquet does not exist")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a.parquet,b.parquet]", ("a.parquet", "b.parquet")),
        ("[ a b.parquet , 'c.parquet' ]", ("a b.parquet", "c.parquet")),
        ('["a,1.parquet", "b.parquet"]', ("a,1.parquet", "b.parquet")),
        ("[a.parquet]", "a.parquet"),
        (["a.parquet", "b.parquet"], ("a.parquet", "b.parquet")),
        (["a.parquet", ""], "a.parquet"),
        ("a,b.parquet", "a,b.parquet"),
        ("[ab]*.parquet", "[ab]*.parquet"),
        ("~/x.parquet", "/home/me/x.parquet"),
        ("[~/x.parquet, ~nobody_has_this_name/y]", ("/home/me/x.parquet", "~nobody_has_this_name/y")),
        ("./~/x.parquet", "./~/x.parquet"),
    ],
)
def test_lists_and_the_home_folder(text: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert of(text).path == expected if isinstance(text, str) else Data(name="parquet", path=text).path == expected
    assert of("x", root="~/sets").root == Path("/home/me/sets")


@pytest.mark.parametrize("value", [5, ["a", 5], [["a"]], {"a": "b"}, "[1, 2]"])
def test_what_is_no_path(value: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.path: name a file or folder, or several as \[a.parquet, b.parquet\]"):
        Data.model_validate({"name": "parquet", "path": value})


@pytest.mark.parametrize("value", [[], "[]", "", [""]])
def test_an_empty_path_is_missing(value: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.path is missing"):
        Data.model_validate({"name": "parquet", "path": value})


# names of files, and the numbers of those whose rows are trained on, validated on and tested on
SPLITS: dict[str, tuple[list[str], tuple[list[int], list[int], list[int]]]] = {
    "hugging face": (
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-0.parquet", "test-0.parquet"],
        ([0, 1], [2], [3]),
    ),
    "in data/": (["data/train.parquet", "data/valid.parquet", "data/test.parquet"], ([0], [1], [2])),
    "folders": (["train/0.parquet", "val/0.parquet", "test/part-0.parquet"], ([0], [1], [2])),
    "other words": (["training_1.parquet", "dev.parquet", "testing.parquet"], ([0], [1], [2])),
    "any case": (["Train/a.parquet", "DEV/a.parquet", "TEST/b.parquet"], ([0], [1], [2])),
    "joined words": (["trainset.parquet", "valset.parquet", "TestData.parquet"], ([0], [1], [2])),
    "joined numbers": (["train2024.parquet", "val2024.parquet", "test2024.parquet"], ([0], [1], [2])),
    "at the end": (["digits_train.parquet", "digits_val.parquet", "digits_test.parquet"], ([0], [1], [2])),
    "in the middle": (["en-train-0.parquet", "en-val-0.parquet", "en-test-0.parquet"], ([0], [1], [2])),
    "hive": (["split=train/a.parquet", "split=val/a.parquet", "split=test/a.parquet"], ([0], [1], [2])),
    "hive, any case": (["Split=Train/a.parquet", "Split=VALID/a.parquet", "Split=Test/a.parquet"], ([0], [1], [2])),
    "hive above names": (
        ["split=train/test-1.parquet", "split=val/test-2.parquet", "split=test/train.parquet"], ([0], [1], [2])
    ),
    "Spark": (["train.parquet/0.parquet", "val.parquet/0.parquet", "test.parquet/0.parquet"], ([0], [1], [2])),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLITS)
def test_names_give_the_splits(case: str, tmp_path: Path) -> None:
    names, expected = SPLITS[case]
    write(tmp_path, {name: table(number) for number, name in enumerate(names)})
    assert files_of(of(tmp_path)) == list(expected)
    by_names = identify(of(tmp_path))
    for number, name in enumerate(names):
        (tmp_path / name).rename(tmp_path / f"{number}.parquet")
    drawn = identify(of(tuple(str(tmp_path / f"{number}.parquet") for number in range(len(names)))))
    assert drawn.rows == by_names.rows and drawn.digest != by_names.digest


def test_splits_that_are_missing_are_drawn_from_the_training_files(tmp_path: Path) -> None:
    write(tmp_path, {"train.parquet": table(0), "test.parquet": table(1)})
    assert files_of(of(tmp_path)) == [[0], [0], [1]]
    write(tmp_path, {"val/x.parquet": table(2)})
    assert files_of(of(tmp_path)) == [[0], [2], [1]]
    assert files_of(of((str(tmp_path / "train.parquet"), str(tmp_path / "val")))) == [[0], [2], [0]]


UNDIVIDED = {
    "words that begin alike": ["trainer.parquet", "valuation.parquet", "device-1.parquet", "testament.parquet"],
    "capitals that begin alike": ["TRAINER.parquet", "VALUES.parquet", "DEVICES.parquet"],
    "only training files": ["train-0.parquet", "train/1.parquet", "training.parquet"],
    "one other word inside": ["load_test_1.parquet", "load_test_2.parquet", "run.parquet"],
    "other keys": ["day=test/a.parquet", "day=train/b.parquet"],
}


@pytest.mark.parametrize("case", UNDIVIDED)
def test_other_names_do_not_count(case: str, tmp_path: Path) -> None:
    names = UNDIVIDED[case]
    tables = {name: table(number) for number, name in enumerate(sorted(names))}
    write(tmp_path / "one", tables)
    write(tmp_path / "two", dict(zip([f"{n}.parquet" for n in range(len(names))], tables.values(), strict=True)))
    assert identify(of(tmp_path / "one")) == identify(of(tmp_path / "two"))
    assert all_files_of(of(tmp_path / "one")) == [*range(len(names))]


def test_a_file_or_folder_that_is_named_is_not_marked_by_its_own_name(tmp_path: Path) -> None:
    write(tmp_path, {"test/test.parquet": table(0), "test/more/x.parquet": table(1)})
    for path in ("test/test.parquet", "test/t*.parquet"):
        assert files_of(of(tmp_path / path)) == [[0], [0], [0]]
    assert all_files_of(of(tmp_path / "test/more")) == [1]


MIXED: dict[str, tuple[list[str], str]] = {
    "some names": (
        ["train.parquet", "test.parquet", "extra.parquet"],
        r"\.parquet is named for (train|test), but .*extra\.parquet names no split; rename one of them, or name in",
    ),
    "a held-out file": (["train.parquet", "holdout.parquet"], r"but .*holdout\.parquet names no split"),
    "words at the end": (["x_train.parquet", "x_test.parquet", "x.parquet"], r"but .*x\.parquet names no split"),
    "two splits": (["train/test.parquet", "train/x.parquet"], r"test\.parquet is named for test and for train; rename"),
    "only test files": (["test-0.parquet", "test-1.parquet"], "no file is named for train, but .*test-0.parquet for t"),
    "an unknown split": (["split=train/a.parquet", "split=other/b.parquet"], "has no split=train, validation or test"),
    "a missing split": (["split=train/a.parquet", "split=__HIVE_DEFAULT_PARTITION__/b.parquet"], "has no split=train"),
    "different keys": (["day=1/a.parquet", "hour=1/b.parquet"], "lies in folders hour=, but .* in folders day=; give"),
    "some without keys": (["a.parquet", "day=1/b.parquet"], "lies in folders day=, but .* in folders none; give all"),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_splits_are_never_mixed(case: str, tmp_path: Path) -> None:
    names, message = MIXED[case]
    write(tmp_path, {name: table(number) for number, name in enumerate(names)})
    refused(of(tmp_path), message)
    if "keys" not in case:  # all rows are encoded, whatever their split
        assert identify(of(tmp_path, labels=None)).rows == len(names) * ROWS


def test_a_column_decides_over_names(tmp_path: Path) -> None:
    marks = ["train"] * 12 + ["validation"] * 4 + ["test"] * 4
    write(tmp_path, {"train.parquet": table(0, split=marks), "test.parquet": table(1, split=marks)})
    assert files_of(of(tmp_path)) == [[0, 1], [0, 1], [0, 1]]
    assert "column split gives the splits, not the names" in " ".join(describe_files(of(tmp_path)))
    write(tmp_path, {"test.parquet": table(1)})
    refused(of(tmp_path), "train.parquet has no column split|test.parquet has no column split")


# folders, data.labels, the classes that are expected, and what is told
LABELS: dict[str, tuple[list[str], str | None, tuple[str, ...], str]] = {
    "text": (["label=dog", "label=cat"], "auto", ("cat", "dog"), "the folders' key label gives the classes"),
    "another name": (["Class=dog", "Class=cat"], "auto", ("cat", "dog"), "key Class gives the classes"),
    "numbers": (["label=10", "label=9", "label=0"], "auto", ("0", "9", "10"), ""),
    "numbers with zeros": (["label=01", "label=1"], "auto", ("01", "1"), ""),
    "encoded": (["label=New%20York", "label=a%3Db"], "auto", ("New York", "a=b"), ""),
    "below another key": (["day=1/label=b", "day=2/label=a"], "auto", ("a", "b"), "key day is not read"),
    "named": (["animal=dog", "animal=cat"], "animal", ("cat", "dog"), "key animal gives the classes"),
    "named in another case": (["Animal=dog", "Animal=cat"], "animal", ("cat", "dog"), ""),
    "ignored": (["label=dog", "label=cat"], None, (), "key label is not read (data.labels null)"),
    "not read": (["animal=dog", "animal=cat"], "auto", (), "key animal is not read"),
}


@pytest.mark.parametrize("case", LABELS)
def test_folders_give_the_classes(case: str, tmp_path: Path) -> None:
    folders, labels, classes, note = LABELS[case]
    write(tmp_path, {f"{folder}/x.parquet": table(number, label=None) for number, folder in enumerate(folders)})
    data = of(tmp_path, labels=labels)
    facts = inspect(data)
    assert facts.classes == classes and facts.shape == (2,)
    assert note in " ".join(describe_files(data))
    if not classes:
        return
    for split in load(data, facts)[:3]:
        assert split.y is not None
        for x, y in zip(split.x, split.y, strict=True):
            value = folders[int(x[0] // 100)].split("=")[-1].replace("%20", " ").replace("%3D", "=")
            assert classes[int(y)] == value
    for folder in folders:
        (tmp_path / folder).rename(tmp_path / folder.replace("=", "-").replace("/", "-"))
    assert identify(of(tmp_path, labels=None)).digest != facts.digest


NO_CLASSES = {
    "one class": (["label=a/x.parquet", "label=a/y.parquet"], r"all rows have one class \(label=a\); use --data.lab"),
    "missing": (["label=a/x.parquet", "label=__HIVE_DEFAULT_PARTITION__/y.parquet"], "label= is missing for some fi"),
    "unlabelled": (["label=-1/x.parquet", "label=1/y.parquet"], "label=-1 is not a class"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_CLASSES)
def test_folders_that_give_no_classes(case: str, tmp_path: Path) -> None:
    names, message = NO_CLASSES[case]
    write(tmp_path, {name: table(number, label=None) for number, name in enumerate(names)})
    refused(of(tmp_path), message)


def test_a_column_decides_over_a_key(tmp_path: Path) -> None:
    write(tmp_path, {"label=p/b=1/x.parquet": table(0), "label=q/b=2/x.parquet": table(1)})
    assert identify(of(tmp_path)).classes == ("u", "v") and identify(of(tmp_path)).shape == (2,)
    told = " ".join(describe_files(of(tmp_path)))
    assert "key label is not read, as the files have" in told and "key b is not read, as the files have" in told


def test_the_rows_of_a_partitioned_set_can_be_streamed(tmp_path: Path) -> None:
    from aecore.data.stream import Shuffled, open_stream

    names = [f"split={split}/label={label}/x.parquet" for split in ("train", "val", "test") for label in ("p", "q")]
    write(tmp_path, {name: table(number, label=None) for number, name in enumerate(names)})
    data = of(tmp_path, in_memory="never")
    facts = inspect(data)
    stream = open_stream(data, facts)
    assert [stream.row_count(split) for split in ("train", "validation", "test")] == [2 * ROWS] * 3
    for (x, y), _ in Shuffled(stream, labelled=True).batches(8, seed=0):
        assert set(x[:, 0] // 100) <= {0, 1} and np.array_equal(x[:, 0] // 100, y)


COLUMNS: dict[str, Any] = {"a": np.arange(ROWS) * 1.5, "b": np.arange(ROWS) % 7, "label": ["u", "v"] * (ROWS // 2)}
PLAIN = pa.table(COLUMNS)
IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, 4, 4), dtype=np.uint8)
FLOAT_IMAGES = pa.FixedShapeTensorArray.from_numpy_ndarray((IMAGES / 255).astype(np.float32))
VECTORS = np.random.default_rng(0).normal(size=(ROWS, 3))


def changed(**columns: Any) -> pa.Table:
    return pa.table({name: values for name, values in (COLUMNS | columns).items() if values is not None})


def image_table(column: Any) -> pa.Table:
    return pa.table({"image": column, "label": COLUMNS["label"]})


HARMLESS: dict[str, tuple[pa.Table, pa.Table]] = {
    "order": (PLAIN, PLAIN.select(["label", "b", "a"])),
    "int32": (PLAIN, changed(b=COLUMNS["b"].astype("i4"))),
    "float32": (PLAIN, changed(a=COLUMNS["a"].astype("f4"))),
    "integers and floats": (PLAIN, changed(b=COLUMNS["b"].astype("f8"))),
    "unsigned": (PLAIN, changed(b=COLUMNS["b"].astype("u1"))),
    "large text": (PLAIN, changed(label=pa.array(COLUMNS["label"], pa.large_string()))),
    "dictionary": (PLAIN, changed(label=pa.array(COLUMNS["label"]).dictionary_encode())),
    "not null": (PLAIN, PLAIN.cast(pa.schema([pa.field(f.name, f.type, nullable=False) for f in PLAIN.schema]))),
    "metadata": (PLAIN, PLAIN.replace_schema_metadata({"pandas": "{}", "x": "y"})),
    "unused text": (PLAIN, changed(note=["x"] * ROWS)),
    "unused time": (changed(at=pa.array([0] * ROWS, pa.timestamp("s"))), PLAIN),
    "unused column changes": (changed(note=["x"] * ROWS), changed(note=pa.array([None] * ROWS))),
    "pandas' index": (PLAIN, changed(__index_level_0__=range(ROWS))),
    "no rows and no types": (PLAIN, pa.table({name: pa.array([], pa.null()) for name in COLUMNS})),
    "no rows and no columns": (PLAIN, PLAIN.select([])[:0]),
    "lists of other width": (
        image_table(pa.array(VECTORS.tolist(), pa.list_(pa.float32()))),
        image_table(pa.array(VECTORS.tolist(), pa.large_list(pa.float64()))),
    ),
    "fixed lists": (
        image_table(pa.array(VECTORS.tolist(), pa.list_(pa.float64()))),
        image_table(pa.array(VECTORS.tolist(), pa.list_(pa.float32(), 3))),
    ),
    "tensors and nested lists": (
        image_table(pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES)),
        image_table(pa.array(IMAGES.tolist(), pa.list_(pa.list_(pa.uint8())))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("case", HARMLESS)
def test_parts_that_differ_harmlessly(case: str, turned: bool, tmp_path: Path) -> None:
    warnings.simplefilter("ignore")  # the files hold the same rows
    first, second = reversed(HARMLESS[case]) if turned else HARMLESS[case]
    write(tmp_path, {"1.parquet": first, "2.parquet": second, "3.parquet": first})
    facts = inspect(of(tmp_path))
    arrays = load(of(tmp_path), facts)
    x, y = (np.concatenate(parts) for parts in zip(*((s.x, s.y) for s in arrays[:3]), strict=True))
    assert len(x) == facts.rows == 2 * len(first) + len(second) and facts.classes == ("u", "v")
    names = {field.name for field in PLAIN.schema}
    if names <= {*first.schema.names, *second.schema.names}:
        b = x[:, facts.columns.features.index("b")]
        a = x[:, facts.columns.features.index("a")]
        assert np.array_equal(a / 1.5 % 7, b) and np.array_equal(a / 1.5 % 2, y)


PARTS = r"\d\.parquet"
HARMFUL: dict[str, tuple[pa.Table, pa.Table, str]] = {
    "a missing feature": (PLAIN, changed(b=None), rf"{PARTS} has no column b, but .*{PARTS} has; its columns are a, "),
    "another feature": (PLAIN, changed(c=VECTORS[:, 0]), rf"{PARTS} has no column c, but .*{PARTS} has"),
    "a number and text": (PLAIN, changed(b=["1"] * ROWS), rf"column b holds \w+ in .*{PARTS}, but \w+ in .*{PARTS}; "),
    "a list, which may be the features": (PLAIN, changed(c=[[1.0]] * ROWS), rf"{PARTS} has no column \w, but"),
    "a column twice": (PLAIN, PLAIN.append_column("b", PLAIN["b"]), "columns (are )?called b; give each a name"),
    "a number and a list": (PLAIN, changed(b=[[1.0]] * ROWS), r"column b holds .*(int64 in|but int64)"),
    "a number and nothing": (PLAIN, changed(b=pa.array([None] * ROWS)), "column b holds (null in|.* but null)"),
    "labels of another kind": (PLAIN, changed(label=[0, 1] * (ROWS // 2)), "column label holds"),
    "no labels": (PLAIN, changed(label=None), rf"{PARTS} has no column label, but .*{PARTS} has"),
    "truth values and numbers": (
        changed(label=[0, 1] * (ROWS // 2)), changed(label=[False, True] * (ROWS // 2)), "column label holds"
    ),
    "splits in some": (PLAIN, changed(split=["train"] * ROWS), rf"{PARTS} has no column split, but .*{PARTS} has"),
    "bytes and floats": (
        image_table(pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES)), image_table(FLOAT_IMAGES),
        r"column image holds .* in .*\.parquet, but .* in .*\.parquet; write all files with one type",
    ),
    "another shape": (
        image_table(pa.array(VECTORS.tolist())), image_table(pa.array(VECTORS[:, :2].tolist())),
        rf"{PARTS} column image row 0: the row has the shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("case", HARMFUL)
def test_parts_that_do_not_belong_together(case: str, turned: bool, tmp_path: Path) -> None:
    first, second, message = HARMFUL[case]
    write(tmp_path, {"1.parquet": second if turned else first, "2.parquet": first if turned else second})
    refused(of(tmp_path), message)


def test_what_is_told_about_files(tmp_path: Path) -> None:
    tables: dict[str, pa.Table | bytes] = {f"year=2024/day={n}/train-{n}.parquet": table(n) for n in range(3)}
    write(tmp_path, {**tables, "year=2024/day=3/test.parquet": table(3), "_SUCCESS": b"", "a/.b/c": b"", "n.md": b""})
    assert describe_files(of(tmp_path)) == [
        "4 files, year=2024/day=0/train-0.parquet to year=2024/day=3/test.parquet; left out: 2 hidden (_SUCCESS, a/.b),"
        " 1 not .parquet (n.md)",
        "splits come from the names of files and folders (files: train 3, test 1); the folders' key year is not read; "
        "the folders' key day is not read",
    ]
    assert describe_files(of(tmp_path / "year=2024/day=3/test.parquet")) == ["1 file, test.parquet"]


def test_an_empty_file_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, {"a.parquet": table(0), "b.parquet": b""})
    refused(of(tmp_path), r"b\.parquet is not a readable Parquet file .*; write it again")


def test_a_name_that_is_not_text(tmp_path: Path) -> None:
    write(tmp_path, {"a.parquet": table(0)})
    os.rename(tmp_path / "a.parquet", os.fsencode(tmp_path) + b"/\xff.parquet")
    refused(of(tmp_path), "is or holds a name that is not UTF-8; rename it")


def test_remote_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aecore.data import folders

    names = ["d/train-0.parquet", "d/test-0.parquet", "d/_x/y.parquet", "d/.z.parquet", "e f/x.parquet"]
    write(tmp_path, {name: table(number) for number, name in enumerate(names)})
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())  # stands for an object store
    monkeypatch.setattr(
        folders, "filesystem_of", lambda path: (store, unquote(path.split("?")[0].partition("://")[2].strip("/")))
    )
    expected = ["d/test-0.parquet", "d/train-0.parquet"]
    for path in ("mem://d", "mem://d/?key=secret", "mem://d/*", "mem://d/t*.parquet?key=secret"):
        listing = folders.find_files(path)
        assert [file.path for file in listing.files] == expected, path
        assert [file.name for file in listing.files] == ["test-0.parquet", "train-0.parquet"], path
    assert folders.find_files("mem://d").hidden == (".z.parquet", "_x")
    assert [file.path for file in folders.find_files("mem://*%20f/*").files] == ["e f/x.parquet"]
    whole = folders.find_files(("mem://d", "mem://e%20f/*"))
    assert [file.name for file in whole.files] == ["d/test-0.parquet", "d/train-0.parquet", "e f/x.parquet"]
    with pytest.raises(InputError, match="lie on different filesystems"):
        monkeypatch.undo()
        monkeypatch.setattr(
            folders, "filesystem_of", lambda path: (store, "d") if "://" in path else (pafs.LocalFileSystem(), path)
        )
        folders.find_files(("mem://d", str(tmp_path)))
