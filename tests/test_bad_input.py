"""Bad input of every kind: a command says what is wrong, where, and what to do, in one line and before Ray starts."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from aecore.core.errors import InputError
from jobs.cli import parse
from jobs.compare import Compare, compare
from jobs.train import Train, train

ROOT = Path(__file__).parents[1]
ROWS = 40
RNG = np.random.default_rng(0)
VECTORS: list[list[float]] = RNG.random((ROWS, 4)).astype(np.float32).tolist()
LABELS = [n % 2 for n in range(ROWS)]
PARQUET = "--data.name parquet --data.path data.parquet"


def image(shape: tuple[int, ...] = (6, 5), kind: type = np.uint8, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, shape).astype(kind)).save(buffer, form)
    return buffer.getvalue()


IMAGES = [image() for _ in range(ROWS)]


def replaced(values: list[Any], row: int, value: Any) -> list[Any]:
    return [*values[:row], value, *values[row + 1 :]]


def table(**columns: Any) -> pa.Table:
    return pa.table(columns)


def stored(made: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(made, sink, compression="none", use_dictionary=False)
    return sink.getvalue()


GOOD = table(x=VECTORS, label=LABELS)
IDS = list(range(ROWS))
STRUCTS = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Row(NamedTuple):
    """One bad input, and the message that it must produce."""

    message: str
    """Parts that the message must contain in this order, divided by ` ... `."""
    args: str = PARQUET
    files: Any = None
    """Content of each input file by its name: a table, bytes, or values for YAML. A table alone is data.parquet."""
    command: str = "train"
    environment: Mapping[str, str] = MappingProxyType({})


def settings(message: str, args: str, **environment: str) -> Row:
    return Row(message, args, environment=environment)


def recipe(message: str, content: Any) -> Row:
    return Row(message, "recipe.yaml", {"recipe.yaml": content})


def study(message: str, content: Any, args: str = "") -> Row:
    return Row(message, f"study.yaml {args}".strip(), {"study.yaml": content}, "compare")


def rows(message: str, args: str = "", **columns: Any) -> Row:
    return Row(message, f"{PARQUET} {args}".strip(), table(**columns))


def variants(**rows: Any) -> dict[str, Any]:
    return {"variants": rows}


TABLE: dict[str, Row] = {
    # the file
    "missing": Row("data.path: data.parquet does not exist; name a Parquet file, folder or URI"),
    "empty file": Row("data.path: data.parquet is not a readable Parquet file ... write it again", files=b""),
    "truncated": Row("data.parquet is not a readable Parquet file ... write it again", files=stored(GOOD)[:-50]),
    "not Parquet": Row("data.parquet is not a readable Parquet file", files=b"a,b\n1,2\n"),
    "nothing but magic": Row("data.parquet is not a readable Parquet file", files=b"PAR1 and PAR1"),
    "damaged within": Row(
        "data.parquet row 0: cannot be read ... write the file again",
        files=b"PAR1" + b"\xff" * 600 + stored(GOOD)[604:],
    ),
    "folder without files": Row("no .parquet file in .; name the folder", "--data.name parquet --data.path ."),
    "no rows": Row("data.path: data.parquet has no rows; name data that have some", files=GOOD[:0]),
    "other columns": Row(
        "b.parquet has no column label, but ... a.parquet has; its columns are x; name in data.path only files "
        "that have labels, or set --data.labels null",
        "--data.name parquet --data.path .",
        {"a.parquet": GOOD, "b.parquet": table(x=VECTORS)},
    ),
    "address": settings(
        "data.path: nowhere://x has an unknown scheme; write s3://, gs://",
        "--data.name parquet --data.path nowhere://x",
    ),
    "secrets in an address": settings(
        "data.path: nowhere://***@x?*** has an unknown scheme; write s3://",
        "--data.name parquet --data.path nowhere://me:secret@x?token=abc",
    ),
    "a dashboard for Ray": Row(
        "RAY_ADDRESS: http://head:8265 is a dashboard, which takes ... or unset it for a Ray of this job's own",
        "",
        environment={"RAY_ADDRESS": "http://head:8265"},
    ),
    "no scheme for MLflow": Row(
        "MLFLOW_TRACKING_URI: localhost:5000 has no scheme; write http://localhost:5000",
        "",
        environment={"MLFLOW_TRACKING_URI": "localhost:5000"},
    ),
    "line end in a path": Row(r"data.path: a\nb does not exist", "--data.name parquet --data.path a\nb"),
    # the columns
    "no images": rows(
        "no column of images, vectors or numbers among label, name; jobs/DATA.md says", label=LABELS, name=["x"] * ROWS
    ),
    "two candidates": rows(
        "data.column: a and b could each hold the images or vectors; name one with --data.column", a=VECTORS, b=VECTORS
    ),
    "many columns": Row(
        "among c0, c1, ... and 28 more; jobs/DATA.md says", files=pa.table({f"c{n}": ["x"] * ROWS for n in range(40)})
    ),
    "no such column": rows("data.column: there is no column z; the columns are x", "--data.column z", x=VECTORS),
    "no such labels": rows("data.labels: there is no column z; the columns are x", "--data.labels z", x=VECTORS),
    "labels as images": rows(
        "data.column: label holds the labels; name the column of images or vectors",
        "--data.column label",
        x=VECTORS,
        label=LABELS,
    ),
    "one name twice": Row(
        "several columns are called x; give each", files=pa.table([VECTORS, LABELS], names=["x", "x"])
    ),
    "text as images": rows(
        "data.column: column x holds string, neither images nor vectors; name another",
        "--data.column x",
        x=["a"] * ROWS,
    ),
    "paths alone": rows(
        "data.column: column x holds struct<path: string>, neither images nor vectors",
        "--data.column x",
        x=pa.array([{"path": "a.png"}] * ROWS),
    ),
    "too deep": rows(
        "data.column: a row of column x has the shape (1, 1, 1, 1); write vectors", x=[[[[[float(n)]]]] for n in IDS]
    ),
    "empty vectors": rows(
        "data.column: a row of column x has the shape (0,); write vectors",
        x=pa.array([[]] * ROWS, pa.list_(pa.float32())),
    ),
    "labels of real numbers": rows(
        "data.parquet column label row 0: 0.5 is not a class, as classes are integers or text; set --data.labels null",
        x=VECTORS,
        label=[0.5] * ROWS,
    ),
    "labels of truth": rows(
        "data.labels: all rows of column label have one class (True); use --data.labels null",
        x=VECTORS,
        label=[True] * ROWS,
    ),
    "marks of numbers": rows(
        "data.path: column split holds int64; use train, validation and test", x=VECTORS, split=LABELS
    ),
    "escapes in a name": Row(
        r"among \x1b[31mred\n, \u202e; jobs/DATA.md says",
        files=pa.table({"\x1b[31mred\n": ["a"] * ROWS, "\u202e": ["a"] * ROWS}),
    ),
    # the values
    "missing value": rows(
        "data.parquet column x row 7: the value is missing; fill it or drop the row", x=replaced(VECTORS, 7, None)
    ),
    "missing inside": rows(
        "data.parquet column x row 7: a value inside the list is missing; fill it or drop the row",
        x=replaced(VECTORS, 7, [0.0, None, 0.0, 0.0]),
    ),
    "missing number": rows(
        "data.parquet column b row 3: the value is missing; fill it", a=IDS, b=replaced(IDS, 3, None)
    ),
    "ragged vectors": rows(
        "data.parquet column x row 9: the list has another length than those before it; make all equally long",
        x=replaced(VECTORS, 9, [1.0]),
    ),
    "ragged grids": rows(
        "data.parquet column x row 5: the list has another length",
        x=replaced([[[1.0, float(n)]] * 2 for n in IDS], 5, [[1.0, 2.0], [1.0]]),
    ),
    "sizes of images": rows(
        "data.parquet column x row 11: the image has the shape (1, 4, 5), those before it (1, 6, 5); resize it",
        x=replaced(IMAGES, 11, image((4, 5))),
    ),
    "undecodable": Row(
        "b.parquet column x row 2: not a readable image ... replace it",
        "--data.name parquet --data.path .",
        {"a.parquet": table(x=IMAGES), "b.parquet": table(x=replaced(IMAGES, 2, b"\x89PNG and no more"))},
    ),
    "half an image": rows("data.parquet column x row 4: not a readable image", x=replaced(IMAGES, 4, IMAGES[4][:60])),
    "no bytes": rows(
        "data.parquet column x row 1: the image has no bytes; store images in the file, not as paths",
        x=pa.array([{"bytes": None if n == 1 else raw, "path": "p"} for n, raw in enumerate(IMAGES)], STRUCTS),
    ),
    "16 bits": rows(
        "column x row 0: the image has the mode I;16; store 8 bits per channel", x=[image(kind=np.uint16)] * ROWS
    ),
    "not a number": rows(
        "data.parquet column x row 39: the value is not finite, or too large for 32 bits; correct it or drop the row",
        x=replaced(VECTORS, 39, [0.0, 0.0, 0.0, float("nan")]),
    ),
    "infinite": rows(
        "data.parquet column b row 6: the value is not finite", a=IDS, b=replaced([0.5] * ROWS, 6, float("inf"))
    ),
    "beyond 32 bits": rows(
        "data.parquet column a row 0: the value is not finite, or too large for 32 bits",
        a=[1e300, -1e300] * (ROWS // 2),
        b=IDS,
    ),
    "beyond [0, 1]": rows(
        "data.parquet column b row 8: bernoulli needs values in [0, 1]; rescale the values or set --data.likelihood "
        "gaussian",
        "--data.likelihood bernoulli",
        a=[n / 40 for n in IDS],
        b=replaced([0.5] * ROWS, 8, 1.5),
    ),
    "below [0, 1]": rows(
        "column x row 3: continuous_bernoulli needs values in [0, 1]",
        "--data.likelihood continuous_bernoulli",
        x=replaced(VECTORS, 3, [0.1, -0.1, 0.1, 0.1]),
    ),
    "categorical": rows(
        "data.likelihood: categorical needs integer pixels, but these are floats; use gaussian",
        "--data.likelihood categorical",
        x=VECTORS,
    ),
    "standardised": rows(
        "data.standardize: the bernoulli likelihood needs unstandardised values; set",
        "--data.likelihood bernoulli --data.standardize true",
        x=VECTORS,
    ),
    "all rows equal": rows(
        "data.path: all 40 rows are equal, so there is nothing to learn; name data that vary", x=[VECTORS[0]] * ROWS
    ),
    # the labels
    "label missing": rows(
        "data.parquet column label row 1: the label is missing; drop such rows or set --data.labels null",
        x=VECTORS,
        label=replaced(LABELS, 1, None),
    ),
    "label negative": rows(
        "data.parquet column label row 2: -1 is not a class ... drop such rows or set --data.labels null",
        x=VECTORS,
        label=replaced(LABELS, 2, -1),
    ),
    "one class": rows(
        "data.labels: all rows of column label have one class (1); use --data.labels null", x=VECTORS, label=[1] * ROWS
    ),
    "ids as labels": rows(
        "data.labels: column label has 40 different values in 40 rows, so it may be measured rather than a label; "
        "write --data.labels label, or --data.labels null",
        x=VECTORS,
        label=IDS,
    ),
    "no labels to classify": rows(
        "finetune.task: classify needs labels, but the data have none; use reconstruct",
        "--finetune.task classify",
        x=VECTORS,
    ),
    # the splits
    "strange mark": rows(
        "data.parquet column split row 3: the mark is 'new'; use train, validation or test",
        x=VECTORS,
        split=replaced(["train"] * ROWS, 3, "new"),
    ),
    "mark missing": rows(
        "data.parquet column split row 3: the mark is None; use train",
        x=VECTORS,
        split=replaced(["train"] * ROWS, 3, None),
    ),
    "nothing to train on": rows(
        "data.path: no row is marked train, by column split or by names; mark some", x=VECTORS, split=["test"] * ROWS
    ),
    "everything for validation": rows(
        "data.validation: 32 of 32 rows leaves a split empty; choose another size", "--data.validation 32", x=VECTORS
    ),
    "everything for the test": rows(
        "data.test: 40 rows requested, but there are only 40; request fewer", "--data.test 40", x=VECTORS
    ),
    "a row or two": rows(
        "data.validation: 0.15 of 2 rows leaves a split empty; choose another size", x=VECTORS[:3], args="--data.test 1"
    ),
    "one row left": rows(
        "data: training gets only 1 of 40 rows, fewer than two; provide more", "--data.limit 1", x=VECTORS
    ),
    "fewer rows than classes": settings(
        "data: training gets only 5 of 1797 rows, fewer than the 10 classes", "--data.limit 5"
    ),
    "splits of a named set": settings(
        "data.validation: 1700 of 1438 rows leaves a split empty; choose another size", "--data.validation 1700"
    ),
    # the settings
    "typo": settings("--finetune.epohs: unknown option; the nearest is finetune.epochs", "--finetune.epohs 3"),
    "half an option": settings("--data: has several fields; set them one by one", "--data "),
    "half a variable": settings("finetune: input should be a valid dictionary", "", DIABOLO__FINETUNE="{"),
    "typo in a variable": settings(
        "finetune.lrr: unknown key; the nearest is finetune.lr", "", DIABOLO__FINETUNE__LRR="3"
    ),
    "wrong type": settings("pretrain.epochs: input should be a valid integer ... got 'many'", "--pretrain.epochs many"),
    "long value": settings("seed: input should be a valid integer ... got 'aaaa ... aaa...", f"--seed {'a' * 5000}"),
    "infinite rate": settings("finetune.lr: input should be a finite number, got 'inf'", "--finetune.lr inf"),
    "no width": settings("network.widths.0: input should be a whole number above 0, or", "--network.widths [0]"),
    "no widths": settings("network.widths: ... at least 1 item", "--network.widths []"),
    "impossible width": settings(
        "network.widths: 1000000000000 units give layer 1 6.4e+13 weights, more than any device holds",
        "--network.widths [1000000000000]",
    ),
    "kernel": settings(
        "network.kernel: 9 is larger than the 8 x 8 input of layer 1; use a smaller kernel",
        "--network.kind conv --network.kernel 9",
    ),
    "stride": settings(
        "network.stride: 20 leaps over the 8 x 8 input of layer 1; use a smaller stride",
        "--network.kind conv --network.stride 20",
    ),
    "convolution of vectors": rows(
        "network.kind: conv needs images, but data.name parquet has vectors; use dense",
        "--network.kind conv",
        x=VECTORS,
    ),
    "kl of ReLU": settings(
        "variant.penalty: kl needs codes in (0, 1), layer 1 has relu; set --network.activation sigmoid",
        "--variant.kind sparse --variant.penalty kl --network.activation relu",
    ),
    "too many codes": settings(
        "variant.k: 100 codes are more than the 48 that layer 1 has; keep fewer",
        "--variant.kind sparse --variant.penalty topk --variant.k 100",
    ),
    "noise": settings(
        "variant.level: 1.5 is not a share of the features; use 0 to 1", "--variant.kind denoising --variant.level 1.5"
    ),
    "tied levels": settings(
        "network.tied: a categorical decoder ... set --network.tied false",
        "--data.likelihood categorical --network.tied true",
    ),
    "binarised": settings(
        "variant.binarize: needs the bernoulli likelihood ... set --data.likelihood bernoulli",
        "--variant.kind variational --variant.binarize true --data.likelihood gaussian",
    ),
    "batch statistics": settings(
        "finetune.batch_size: one row has no batch statistics; use 2",
        "--network.normalization batch --finetune.batch_size 1",
    ),
    "nothing to train": settings(
        "pretrain and finetune are both null: nothing to train; set one of them", "--pretrain null --finetune null"
    ),
    "no path": settings("data.path is missing: name a Parquet file, folder or URI", "--data.name parquet"),
    "path too many": settings(
        "data.path is for data.name parquet, not digits: add --data.name parquet", "--data.path x"
    ),
    "nothing to register": settings("register: finetune is null ... set finetune", "--register digits --finetune null"),
    "name to register": settings("register: string should match pattern ... got '../digits'", "--register ../digits"),
    "figures into a file": Row("figures: data.parquet is a file; name a folder", "--figures data.parquet/out", GOOD),
    # the machine
    "GPUs": settings(
        "resources.gpus: 1 asked for a stage, the largest node has 0; ask for less",
        "--resources.gpus 1",
        CUDA_VISIBLE_DEVICES="",
    ),
    "CPUs": settings(
        "resources.cpus: 5000 asked for a stage, the largest node has ... ask for less", "--resources.cpus 5000"
    ),
    "workers": settings(
        "resources.workers: 5000 with 1 CPUs each asked for, the cluster has ... ask for fewer",
        "--resources.workers 5000",
    ),
    # the recipe
    "no recipe": settings("recipe gone.yaml: No such file or directory; name a YAML file", "gone.yaml"),
    "folder as recipe": settings("recipe .: Is a directory; name a YAML file", "."),
    "not YAML": recipe("recipe recipe.yaml: not valid YAML ... correct it", b"a: [1"),
    "not text": recipe("recipe recipe.yaml: not valid YAML", b"\xff\xfe\x00"),
    "no such day": recipe("recipe recipe.yaml: not valid YAML ... correct it", b"seed: 2001-99-99"),
    "bottomless": recipe("recipe recipe.yaml: not valid YAML", b"[" * 5000),
    "list": recipe("recipe recipe.yaml: holds a list; write lines such as `field: value`", b"- a"),
    "number as a key": recipe("1: keys should be strings, got 1", {1: 2}),
    "typo in a recipe": recipe("resources.gpu: unknown key; the nearest is resources.gpus", {"resources": {"gpu": 1}}),
    "other kind's field": recipe(
        "variant.level: not a field of this variant.kind; leave it out", {"variant": {"level": 1}}
    ),
    "no such kind": recipe(
        "variant: input tag 'sparce' found using 'kind' does not match", {"variant": {"kind": "sparce"}}
    ),
    # the study
    "no rows to compare": study("variants: input should be a valid dictionary", {"variants": None}),
    "row without a name": study(
        "variants.<b>: the names of metrics contain a row's name; use letters, digits", {"variants": {"<b>": {}}}
    ),
    "row that climbs": study("variants.../x: the names of metrics contain a row's name", {"variants": {"../x": {}}}),
    "reference as a row": study(
        "variants.pca: every study has a reference of this name; choose another name", variants(pca={})
    ),
    "unequal rows": study(
        "variants.a.seed: a row may differ in ... the rest must be equal for all", variants(a={"seed": 3})
    ),
    "typo in a row": study("variants.a.finetune.lrr: ... not permitted", variants(a={"finetune": {"lrr": 1}})),
    "row that cannot be": study(
        "variants.a: variant.penalty: kl needs codes in (0, 1)",
        variants(a={"variant": {"kind": "sparse", "penalty": "kl"}, "network": {"code_activation": "relu"}}),
    ),
    "seed twice": study("seeds: [0, 0] lists a seed twice; name each once", {"seeds": [0, 0]}),
    "grid of a range": study(
        "search: a grid needs lists of values, not ranges", {"settings": {"finetune.lr": {"low": 0.1, "high": 0.2}}}
    ),
    "width as a row's network": study(
        "variants.a.network.dense.widths: Input should be a valid tuple, got 3", variants(a={"network": {"widths": 3}})
    ),
    "row untrained": study("variants.a: pretrain and finetune are both null", variants(a={"finetune": None})),
    "row pretrained alone": study(
        "variants.a.finetune: null, but each row is trained as a whole; leave it out",
        variants(a={"finetune": None, "pretrain": {}}),
    ),
    "setting of no field": study(
        "settings.data.name: only fields of variant, network, pretrain, finetune and labels.fit can be searched",
        {"settings": {"data.name": ["mnist"]}},
    ),
    "setting of the budget": study(
        "settings.finetune.epochs: equal for all trials; budget.epochs and", {"settings": {"finetune.epochs": [1, 9]}}
    ),
    "setting that cannot be": study(
        "variants.plain.finetune.lr: Input should be greater than 0, got -1", {"settings": {"finetune.lr": [-1]}}
    ),
    "settings of a row": study(
        "variants.a.settings: settings: a range from 2 to 1 is empty",
        variants(a={"settings": {"finetune.lr": {"low": 2, "high": 1}}}),
    ),
    "empty range": study(
        "settings: a range from 0.2 to 0.1 is empty; set low below high",
        {"search": "random", "settings": {"finetune.lr": {"low": 0.2, "high": 0.1}}},
    ),
    "nothing to try": study("settings.finetune.lr: no values to try; list some", {"settings": {"finetune.lr": []}}),
    "classes in a study": study(
        "base.finetune.task: a study trains without labels", {"base": {"finetune": {"task": "classify"}}}
    ),
    "asha by probe": study(
        "scheduler: asha stops by reconstruction; set choose reconstruction", {"scheduler": "asha", "choose": "probe"}
    ),
    "classifier without labels": study(
        "choose: finetuned needs labels, but the data have none; use reconstruction",
        {"choose": "finetuned", "base": {"data": {"labels": None}}},
    ),
    "layers alone": study(
        "variants.a.finetune: null, but each row is trained as a whole; leave it out or set choose finetuned",
        variants(a={"pretrain": {}, "finetune": None}),
    ),
    "more epochs than the budget": study(
        "variants.a: pretrain.epochs 20 with 3 layers is more than budget.epochs 40 allows, 13 per layer; raise the",
        {
            **variants(a={"pretrain": {}, "finetune": None}),
            "choose": "finetuned",
            "settings": {"pretrain.epochs": [20]},
        },
    ),
    "too few epochs": study(
        "budget.epochs: 2 leave row a with its 3 layers no epoch for the whole; allow at least 4",
        {**variants(a={"pretrain": {}}), "budget": {"epochs": 2}},
    ),
    "workers of trials": study(
        "resources.workers: trials run side by side, each on one worker", {}, "--resources.workers 2"
    ),
    "GPUs of trials": study(
        "resources.gpus: 1 asked for a stage, the largest node has 0", {"variants": {"plain": {}}}, "--resources.gpus 1"
    )._replace(environment={"CUDA_VISIBLE_DEVICES": ""}),
    "data of a study": Row(
        "data.parquet column x row 0: the value is not finite",
        "study.yaml",
        {
            "study.yaml": {"base": {"data": {"name": "parquet", "path": "data.parquet"}}},
            "data.parquet": table(x=[[float("nan")]] * ROWS),
        },
        "compare",
    ),
}


def prepare(row: Row, folder: Path) -> list[str]:
    """Write the files of a row and return its command line."""
    files = {} if row.files is None else row.files
    for name, content in files.items() if isinstance(files, dict) else [("data.parquet", files)]:
        if isinstance(content, pa.Table):
            pq.write_table(content, folder / name)
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
    return row.args.split(" ") if row.args else []


def fits(line: str, row: Row) -> bool:
    """Return whether a line contains all parts of the expected message."""
    return re.search(".*".join(map(re.escape, row.message.split(" ... "))), line) is not None


COMMANDS: dict[str, tuple[Any, Callable[[Any], Any]]] = {"train": (Train, train), "compare": (Compare, compare)}


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 100


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_is_reported_in_one_line_before_ray_starts(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started")

    row = TABLE[case]
    args = prepare(row, tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ray.init", started)
    for name, value in row.environment.items():
        monkeypatch.setenv(name, value)
    model, run = COMMANDS[row.command]
    with pytest.raises(InputError) as error:
        run(parse(model, "test", args))
    line = str(error.value)
    assert fits(line, row), line
    assert line.isprintable() and len(line) < 500 and "secret" not in line and "token" not in line
    assert sorted(tmp_path.iterdir()) == before


AS_COMMANDS = [
    "infinite", "undecodable", "escapes in a name", "typo", "not YAML", "GPUs of trials", "data of a study",
    "a dashboard for Ray", "no scheme for MLflow",
]  # fmt: skip


@pytest.mark.parametrize("case", AS_COMMANDS)
def test_a_command_ends_with_that_line_and_code_2(case: str, tmp_path: Path) -> None:
    row = TABLE[case]
    args = prepare(row, tmp_path)
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "ray.py").write_text("raise RuntimeError('ray was imported')")
    environment = {**os.environ, **row.environment, "PYTHONPATH": f"{stub}:{ROOT}"}
    line = [sys.executable, "-m", f"jobs.{row.command}", *args]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and done.stderr.strip().isprintable()
    assert fits(done.stderr, row)
