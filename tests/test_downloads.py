"""Folders as people download or write them: competitions, caches, packed files. Each is read, or the ways out work."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from aecore.config.experiment import Data
from aecore.core.errors import InputError
from aecore.data.dataset import describe, identify, inspect, load
from jobs.cli import parse
from jobs.train import Train
from tests.test_folders import of, write

ROWS = 20


def table(number: int = 0, **columns: Any) -> pa.Table:
    given = {"a": 100.0 * number + np.arange(ROWS), "b": np.random.default_rng(number).normal(size=ROWS), **columns}
    return pa.table(given)


TEXT, NUMBERS, FLOATS = ["u", "v"] * (ROWS // 2), [0, 1] * (ROWS // 2), np.linspace(0, 1, ROWS)


def refused(data: Data, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        inspect(data)
    assert str(error.value).isprintable()


NULL: dict[str, Any] = {"labels": None}
# columns of train.parquet beside a and b, settings, what is told, and settings with which all rows are read.
# Before: test.parquet, the first by name, decided which columns there are, and no way out was named
COMPETITIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str, dict[str, Any]]] = {
    "usual name": (
        {"label": TEXT}, {},
        "has no column label, but .*train.parquet has; .* only files that have labels, or set --data.labels null$",
        NULL,
    ),
    "measured": ({"target": FLOATS}, {}, "test.parquet has no column target, .*, or set --data.labels null$", NULL),
    "named": (
        {"Survived": NUMBERS}, {"labels": "Survived"},
        "has no column Survived, but .*train.parquet has; .*, or set --data.labels null --data.exclude Survived$",
        {**NULL, "exclude": ("Survived",)},
    ),
    "not recognised": (
        {"Survived": NUMBERS}, {},
        "has no column Survived, .*; name in data.path only files that have it, or .* --data.exclude Survived$",
        {"exclude": ("survived",)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPETITIONS)
def test_a_competition_whose_test_file_has_no_labels(case: str, tmp_path: Path) -> None:
    columns, fields, message, way_out = COMPETITIONS[case]
    write(tmp_path, {"train.parquet": table(0, **columns), "test.parquet": table(1)})
    refused(of(tmp_path, **fields), message)
    data = of(tmp_path, **way_out)
    facts = inspect(data)
    assert facts.columns.features == ("a", "b")
    assert [{int(a // 100) for a in split.x[:, 0]} for split in load(data, facts)[:3]] == [{0}, {0}, {1}]
    if case in ("usual name", "named"):
        assert len(inspect(of(tmp_path / "train.parquet", **fields)).classes) == 2


def test_a_submission_beside_them_is_what_is_told(tmp_path: Path) -> None:
    """Before: test.parquet had other columns than sample_submission.parquet."""
    write(tmp_path, {"train.parquet": table(0, label=TEXT), "test.parquet": table(1)})
    write(tmp_path, {"sample_submission.parquet": pa.table({"id": range(ROWS), "label": TEXT})})
    refused(of(tmp_path), r"is named for test, but .*sample_submission\.parquet names no split; .* name in data.path")


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_a_column_that_only_some_files_have_can_be_excluded(last: bool, tmp_path: Path) -> None:
    """Before: only if the first file had it; else there was `no column c`."""
    files = [table(0), table(1, c=FLOATS)]
    write(tmp_path, {"1.parquet": files[last], "2.parquet": files[not last]})
    refused(of(tmp_path), "has no column c, .*; name in data.path only files that have it, or .* --data.exclude c$")
    assert inspect(of(tmp_path, exclude=("c",))).columns.features == ("a", "b")
    refused(of(tmp_path, exclude=("c", "d")), "data.exclude: there is no column d; the columns are a, b")


EXCLUDED: dict[str, tuple[dict[str, Any], str]] = {
    # refused before, although they were excluded
    "folds": ({"split": list(range(ROWS)), "label": TEXT}, "split"),
    "other marks": ({"Split": TEXT, "label": TEXT}, "Split"),
    # read as the labels before
    "labels": ({"label": TEXT}, "label"),
}


@pytest.mark.parametrize("case", EXCLUDED)
def test_what_is_excluded_is_neither_labels_nor_split(case: str, tmp_path: Path) -> None:
    columns, name = EXCLUDED[case]
    write(tmp_path, {"1.parquet": table(0, **columns), "2.parquet": table(1, **columns)})
    if name != "label":
        way_out = rf"or leave (it|the column) out with --data.exclude \[{name}\]$"
        refused(of(tmp_path), rf"use train, validation (and|or) test, .*{way_out}")
    data = of(tmp_path, exclude=(name,))
    facts = inspect(data)
    assert facts.columns.features == ("a", "b") and facts.classes == (() if name == "label" else ("u", "v"))
    assert describe(data, facts)[-1] == f"left out: {name} (data.exclude)"


def test_a_column_that_is_excluded_does_not_decide_over_names(tmp_path: Path) -> None:
    write(tmp_path, {"train.parquet": table(0, split=["test"] * ROWS), "test.parquet": table(1)})
    refused(of(tmp_path), "test.parquet has no column split, but .*train.parquet has")
    data = of(tmp_path, exclude=("split",))
    assert [{int(a // 100) for a in split.x[:, 0]} for split in load(data, inspect(data))[:3]] == [{0}, {0}, {1}]


def test_a_training_file_without_rows(tmp_path: Path) -> None:
    """Before: `no row of column split is marked train`, though there is no such column."""
    write(tmp_path, {"train.parquet": table(0)[:0], "test.parquet": table(1)})
    refused(
        of(tmp_path), "no row is marked train, by column split or by names; .* rename the files, so that splits are"
    )


@pytest.mark.parametrize("paths", ["*/x.parquet", "**/x.parquet", "?*", ("real/x.parquet", "link"), ("link", "real")])
def test_a_pattern_or_list_reads_no_file_twice(
    paths: str | tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: links that a pattern or a list led through gave all rows twice."""
    write(tmp_path, {"real/x.parquet": table(0)})
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    data = of(paths)
    facts = inspect(data)
    assert facts.rows == ROWS and facts == inspect(of("real/x.parquet"))
    assert (paths == "**/x.parquet") or "1 linked twice" in " ".join(describe(data, facts))


def test_the_cache_of_hugging_face(tmp_path: Path) -> None:
    """Before: `no .parquet file`, as the links lead to files without an ending that lie in the same folder."""
    write(tmp_path, {f"blobs/{number}": table(number, label=TEXT) for number in range(2)})
    for revision in ("one", "two"):
        folder = tmp_path / "snapshots" / revision / "data"
        folder.mkdir(parents=True)
        for number, name in enumerate(("train", "test")):
            (folder / f"{name}-00000-of-00001-0a1b2c.parquet").symlink_to(f"../../../blobs/{number}")
    arrays = load(of(tmp_path), inspect(of(tmp_path)))
    assert [{int(a // 100) for a in split.x[:, 0]} for split in arrays[:3]] == [{0}, {0}, {1}]
    assert identify(of(tmp_path)) == identify(of(tmp_path / "snapshots/one"))


@pytest.mark.parametrize("ending", ["gz", "gzip", "zst", "lz4", "snappy", "brotli", "bz2", "parquet"])
def test_a_name_that_tells_the_compression_within(ending: str, tmp_path: Path) -> None:
    """Before: Arrow tried to unpack those named .gz, .zst, .lz4 and .bz2, and the advice was to check permissions."""
    write(tmp_path, {f"x.parquet.{ending}": table(0, label=TEXT), "x.parquet": table(0, label=TEXT)})
    assert identify(of(tmp_path / f"x.parquet.{ending}")) == identify(of(tmp_path / "x.parquet"))


NO_PARQUET: dict[str, tuple[bytes, str]] = {
    # before: "not a readable Parquet file; write it again"
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "is packed with gzip; unpack it"),
    "ZIP": (b"PK\3\4" + bytes(99), "is a ZIP archive; unpack it"),
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0a",
        "is a pointer of Git LFS, .*`git lfs pul",
    ),
    "Feather": (b"ARROW1\0\0" + bytes(99), "is an Arrow or Feather file; write it as Parquet"),
    "a page": (b"<!DOCTYPE html><html>", "is a web page; download the file itself"),
    "encrypted": (b"PARE" + bytes(99) + b"PARE", "is encrypted; write it without encryption"),
    "text": (b"a,b\n1,2\n3,4\n", "is not a readable Parquet file .*; write it again"),
    "short": (b"P", "is not a readable Parquet file .*; write it again"),
}


@pytest.mark.parametrize("name", ["b.parquet", "b.parquet.gz"])
@pytest.mark.parametrize("case", NO_PARQUET)
def test_a_file_that_only_is_called_parquet(case: str, name: str, tmp_path: Path) -> None:
    content, message = NO_PARQUET[case]
    write(tmp_path, {"a.parquet": table(0, label=TEXT), name: content})
    refused(of(tmp_path), rf"data\.path: .*b\.parquet\S* {message}")


KEYS: dict[str, tuple[list[str], str | None]] = {
    # taken for classes before
    "years": (
        ["y=2023", "y=2024"],
        "folders' key y has 2 different values in 40 rows, 2023 to 2024, so it may be meas",
    ),
    "years and months": (["y=2023/m=1", "Y=2024/m=2"], "lies in folders"),
    "measured": ([f"label={100 * n}" for n in range(21)], "key label has 21 different values in 420 rows, 0 to 2000"),
    # right before
    "classes": (["y=0", "y=1"], None),
    "many classes": ([f"label={n}" for n in range(21)], None),
    "years by another name": (["label=2023", "label=2024"], None),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_doubtful_key_is_refused_with_both_ways_out(case: str, tmp_path: Path) -> None:
    folders, message = KEYS[case]
    write(tmp_path, {f"{folder}/x.parquet": table(number) for number, folder in enumerate(folders)})
    if message is None:
        assert len(identify(of(tmp_path)).classes) == len(folders)
        return
    refused(of(tmp_path), message)
    if "lies in" not in message:
        key = folders[0].partition("=")[0]
        refused(of(tmp_path), rf"; write --data\.labels {key}, or --data\.labels null$")
        assert len(identify(of(tmp_path, labels=key)).classes) == len(folders)
        assert identify(of(tmp_path, labels=None)).classes == ()


def test_why_a_column_is_left_out_where_folders_give_the_classes(tmp_path: Path) -> None:
    """Before: `data.labels is null`, which it is not."""
    write(tmp_path, {f"kind={n}/x.parquet": table(n, label=TEXT) for n in range(2)})
    data = of(tmp_path, labels="kind")
    told = describe(data, inspect(data))
    assert told[-1] == "left out: label (its name is one of labels, and the folders' key kind gives them)"


def test_images_in_a_dictionary(tmp_path: Path) -> None:
    """Before: no column of images."""
    import io

    from PIL import Image

    raws = []
    for number in range(3):
        buffer = io.BytesIO()
        Image.fromarray(np.full((4, 6, 3), 80 * number, np.uint8)).save(buffer, "PNG")
        raws.append(buffer.getvalue())
    column = pa.array(raws * 6).dictionary_encode()
    write(tmp_path, {"x.parquet": pa.table({"image": column})})
    data = of(tmp_path, test=4)
    facts = identify(data)
    assert facts.shape == (3, 4, 6) and set(load(data, facts).train.x.ravel()) == {0, 80, 160}


def test_a_picture_of_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(buffer, "PNG")
    write(tmp_path, {"x.parquet": pa.table({"image": [buffer.getvalue()] * 9})})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused(of(tmp_path), "image row 0: the image has more pixels than are read, 179 million; scale it down or cut it")


PARQUET = ["--data.name", "parquet", "--data.path"]
WORDS: dict[str, tuple[list[str], str]] = {
    # before: a codec's message, "see --help", a list that cannot be read, and Python's name of a date
    "an unquoted pattern": (
        ["x.parquet", "y.parquet"],
        "recipe y.parquet: is data, .*; put a pattern in quotes, and wr",
    ),
    "a longer one": (["x.parquet", "y.parquet", "z.parquet"], "unrecognized arguments: .*; put a pattern in quotes"),
    "braces": (["{x,y}.parquet"], r"does not exist; .* or several as \[a.parquet,b.parquet\] in place of braces"),
    "twice": (["x.parquet", "--data.path", "y.parquet"], r"or several as \[x.parquet,y.parquet\]"),
    "none": (
        ["x.parquet", "--data.labels", "none"],
        "there is no column none; the columns are a, b; null reads no labe",
    ),
}


@pytest.mark.parametrize("case", WORDS)
def test_words_of_a_command_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, message = WORDS[case]
    write(tmp_path, {f"{name}.parquet": table(0) for name in "xyz"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        inspect(parse(Train, "jobs.train", [*PARQUET, *words]).data)


def test_a_date_in_a_recipe_needs_quotes(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    for path, message in (
        ("[2026-01-01, 2026-01-02]", "numbers and dates in quotes, not"),
        ("2026", "in quotes, not 2"),
    ):
        recipe.write_text(f"data:\n  name: parquet\n  path: {path}\n")
        with pytest.raises(InputError, match=message):
            parse(Train, "jobs.train", [str(recipe)])
    recipe.write_text("data:\n  name: parquet\n  path: ['2026-01-01', '2026']\n")
    assert parse(Train, "jobs.train", [str(recipe)]).data.path == ("2026-01-01", "2026")


def test_an_empty_variable_sets_nothing_but_an_empty_option_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: an empty variable removed the recipe's value, as an empty option still does."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"data": {"name": "parquet", "path": "x"}}))
    for name in ("NAME", "PATH", "LABELS"):
        monkeypatch.setenv(f"DIABOLO__DATA__{name}", "")
    assert parse(Train, "jobs.train", [str(recipe)]).data == Data(name="parquet", path="x")
    with pytest.raises(InputError, match=r"data\.path is missing"):
        parse(Train, "jobs.train", [str(recipe), "--data.path", ""])
