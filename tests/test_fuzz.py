"""Random settings and random Parquet files: a command accepts them, or ends with one line that says what is wrong.

The examples are the same in each run; `--hypothesis-profile=long` tries ten times as many, and new ones each time.
"""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel

from aecore.config.experiment import Data, Experiment
from aecore.config.facts import Facts
from aecore.core.errors import InputError
from aecore.data.dataset import identify, inspect, load, load_rows
from aecore.serving.table import read_table
from jobs.cli import parse
from jobs.compare import Compare
from jobs.train import Train
from pipelines.graph.recipe import build
from pipelines.study.plan import plan_trials

FACTS = [
    Facts(digest="0", shape=(1, 8, 8), levels=17, classes=tuple("0123456789"), rows=1797),
    Facts(digest="1", shape=(3, 32, 32), levels=256, classes=("a", "b"), rows=300),
    Facts(digest="2", shape=(1,), levels=0, classes=(), rows=20),
]
ODD = [
    "", "null", "[1", "{}", "[]", "{a: b}", "nan", "inf", "-inf", "1e400", "-1", "0", "1", "2", "0.5", "1.5", "true",
    "\n", "\x1b[31m", "\u202e", "a" * 300, "9" * 30, "1_0", "0x1f", "digits", "parquet", "conv", "dense", "sparse",
    "topk", "kl", "plain", "denoising", "contractive", "variational", "batch", "sigmoid", "relu", "bernoulli",
    "categorical", "reconstruct", "classify", "auto", "[4, 2]", "[64]", "[100000000000]", "random", "optuna", "asha",
    "probe", "bf16", "name", "../name",
]  # fmt: skip
SCALARS = st.one_of(
    st.sampled_from(ODD), st.none(), st.booleans(), st.integers(), st.integers(-3, 70), st.floats(), st.floats(0, 2),
    st.text(max_size=20), st.dates(), st.binary(max_size=5),
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def survives(attempt: Callable[[], Any]) -> Any:
    """Return what the attempt returns, or None if it ends with an InputError whose one line says where."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            return attempt()
        except InputError as error:
            text = str(error)
            assert text.isprintable() and len(text) < 2000 and (":" in text or ";" in text), text
            return None


def paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted names of all fields, for each kind of a union."""
    names = []
    for name, field in model.model_fields.items():
        names.append(f"{prefix}{field.alias or name}")
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                names += paths(inner, f"{prefix}{field.alias or name}.")
    return names


def nested(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Turn pairs of dotted name and value into nested mappings."""
    tree: dict[str, Any] = {}
    for path, value in fields:
        *parents, last = path.split(".")
        inner = tree
        for parent in parents:
            below = inner.get(parent)
            if not isinstance(below, dict):
                below = inner[parent] = {}
            inner = below
        inner[last] = value
    return tree


def trees(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    """Draw recipes that set some fields to good and bad values."""
    return st.lists(st.tuples(st.sampled_from(paths(model)), ANYTHING), max_size=5).map(nested)


def options(model: type[BaseModel]) -> st.SearchStrategy[list[str]]:
    """Draw command lines, without NUL characters, which real ones cannot hold, and without `--help`."""
    names = st.sampled_from(paths(model)) | st.text(max_size=8)
    values = st.sampled_from(ODD) | st.text(max_size=20) | st.floats().map(str) | st.integers().map(str)
    pairs = st.lists(st.tuples(names, values), max_size=4)
    lines = pairs.map(lambda pairs: [word.replace("\0", "") for n, value in pairs for word in (f"--{n}", value)])
    return lines.filter(lambda line: not any(word.startswith("-h") or "--help".startswith(word[:3]) for word in line))


OWN = [path for path in paths(Experiment) if path.split(".")[0] in ("network", "variant", "pretrain", "finetune")]
SPACES = st.dictionaries(
    st.sampled_from(OWN) | st.text(max_size=8),
    st.lists(SCALARS, min_size=1, max_size=2)
    | st.fixed_dictionaries({"low": SCALARS, "high": SCALARS, "log": st.booleans()}),
    max_size=1,
)
DIFFERENCES = st.lists(st.tuples(st.sampled_from(OWN), SCALARS), max_size=2).map(nested)
VARIANTS = st.dictionaries(
    st.sampled_from(["plain", "a b", "pca", "../x", "<b>", ""]) | st.text(max_size=4),
    DIFFERENCES | st.tuples(DIFFERENCES, SPACES).map(lambda drawn: {**drawn[0], "settings": drawn[1]}) | ANYTHING,
    min_size=1,
    max_size=2,
)
STUDIES = st.one_of(
    trees(Compare),
    st.fixed_dictionaries({"variants": VARIANTS}),
    st.fixed_dictionaries({"settings": SPACES, "search": st.sampled_from(["grid", "random", "optuna"])}),
)


def write_recipe(folder: Path, recipe: dict[str, Any]) -> str:
    file = folder / "recipe.yaml"
    file.write_bytes(yaml.safe_dump(recipe, allow_unicode=True).encode(errors="surrogatepass"))
    return str(file)


def graph(settings: Train | Compare, facts: Facts) -> list[str]:
    """Return the keys of all stages that would run."""
    if isinstance(settings, Train):
        return [stage.key for stage in build(settings.experiment, facts, settings.resources.numerics).kept()]
    assume(len(settings.seeds) < 10)
    return [plan.stage.key for plan in plan_trials(settings.study, facts, settings.resources.numerics)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@given(recipe=trees(Train), facts=st.sampled_from(FACTS))
def test_recipes_of_a_training(recipe: dict[str, Any], facts: Facts, folder: Path) -> None:
    survives(lambda: graph(parse(Train, "test", [write_recipe(folder, recipe)]), facts))


@given(recipe=STUDIES, facts=st.sampled_from(FACTS))
def test_recipes_of_a_study(recipe: dict[str, Any], facts: Facts, folder: Path) -> None:
    survives(lambda: graph(parse(Compare, "test", [write_recipe(folder, recipe)]), facts))


@given(args=st.one_of(*(st.tuples(st.just(command), options(command)) for command in (Train, Compare))))
def test_command_lines(args: tuple[type[Train] | type[Compare], list[str]]) -> None:
    survives(lambda: graph(parse(args[0], "test", args[1]), FACTS[0]))


def png(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


RNG = np.random.default_rng(0)
IMAGES = [png(RNG.integers(0, 256, (6, 5), dtype=np.uint8), form) for form in ("PNG", "JPEG", "BMP", "GIF", "TIFF")]
IMAGES += [png(RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)), png(np.full((2, 2), 9, np.uint16)), b"", b"no"]
IMAGES += [png(RNG.integers(250, 256, (6, 5, 4), dtype=np.uint8)), png(np.full((6, 5, 4), 255, np.uint8), "WEBP")]
TURNED = Image.Exif()
TURNED[274] = 6
IMAGES += [png(RNG.integers(0, 256, (5, 6), dtype=np.uint8), "JPEG", exif=TURNED)]
WORDS = ["train", "test", "validation", "val", "cat", "dog", "", "\n", "$\\frac$", "<b>"]

NUMBERS = [pa.int8(), pa.uint8(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_()]
FLAT = [
    *NUMBERS, pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.binary(3), pa.null(), pa.date32(),
    pa.timestamp("us"), pa.time64("us"), pa.decimal128(5, 2), pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.int64()), pa.duration("s"), pa.string_view(), pa.binary_view(), pa.decimal256(50, 2),
]  # fmt: skip
FIELDS = ["bytes", "path", "a", ""]
TYPES = st.recursive(
    st.sampled_from(FLAT),
    lambda inner: st.one_of(
        inner.map(pa.list_), inner.map(pa.large_list), inner.map(pa.list_view), inner.map(pa.large_list_view),
        st.builds(pa.list_, inner, st.integers(1, 3)),  # of size 0 Arrow aborts in writing
        st.dictionaries(st.sampled_from(FIELDS), inner, min_size=1, max_size=2).map(lambda f: pa.struct([*f.items()])),
        st.builds(pa.map_, st.just(pa.string()), inner),
    ),
    max_leaves=3,
)  # fmt: skip
TENSORS = st.builds(
    lambda kind, shape, turned: pa.fixed_shape_tensor(
        kind, shape, permutation=list(range(len(shape)))[::-1] if turned else None
    ),
    st.sampled_from(NUMBERS), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.booleans(),
)  # fmt: skip


def values(kind: pa.DataType, missing: bool) -> st.SearchStrategy[Any]:
    """Draw Python values for an array of this type, with nulls at any depth if `missing`."""
    strategy: st.SearchStrategy[Any]
    if pa.types.is_dictionary(kind):
        strategy = values(kind.value_type, False)
    elif pa.types.is_boolean(kind):
        strategy = st.booleans()
    elif pa.types.is_integer(kind):
        most = 2 ** (kind.bit_width - 1) - 1
        strategy = st.integers(0 if "u" in str(kind) else -most, most) | st.integers(0, 3)
    elif pa.types.is_floating(kind):
        strategy = st.floats(0, 1, width=16) | st.floats(width=kind.bit_width)
        strategy = strategy.map(np.float16) if pa.types.is_float16(kind) else strategy
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        strategy = st.sampled_from(WORDS)
    elif pa.types.is_fixed_size_binary(kind):
        strategy = st.just(b"abc")
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        strategy = st.sampled_from(IMAGES)
    elif pa.types.is_decimal(kind):
        strategy = st.decimals(-9, 9, places=2)
    elif pa.types.is_date(kind):
        strategy = st.dates()
    elif pa.types.is_timestamp(kind):
        strategy = st.datetimes()
    elif pa.types.is_time(kind):
        strategy = st.times()
    elif pa.types.is_duration(kind):
        strategy = st.integers(0, 9)
    elif pa.types.is_map(kind):
        strategy = st.lists(st.tuples(st.sampled_from(WORDS), values(kind.item_type, missing)), max_size=2)
    elif pa.types.is_struct(kind):
        strategy = st.fixed_dictionaries({field.name: values(field.type, missing) for field in kind})
    elif pa.types.is_fixed_size_list(kind):
        strategy = st.lists(values(kind.value_type, missing), min_size=kind.list_size, max_size=kind.list_size)
    elif hasattr(kind, "value_type"):  # a list or a view of one
        strategy = st.lists(values(kind.value_type, missing), min_size=2, max_size=2 + missing)
    else:
        strategy = st.none()
    return st.one_of(strategy, strategy, strategy, st.none()) if missing else strategy


@st.composite
def columns(draw: st.DrawFn, rows: int) -> pa.Array:
    kind = draw(TYPES | TENSORS | st.sampled_from(FLAT))
    stored = kind.storage_type if isinstance(kind, pa.FixedShapeTensorType) else kind
    few = draw(st.lists(values(stored, draw(st.booleans())), min_size=1, max_size=4))
    array = pa.array([few[n * n % len(few)] for n in range(rows)], stored)
    return pa.ExtensionArray.from_storage(kind, array) if kind is not stored else array


NAMES = st.sampled_from(
    [
        "image",
        "x",
        "label",
        "y",
        "split",
        "a.b",
        "a",
        "",
        "\n",
        "\x1b[31m",
        "__index_level_0__",
        "Class",
        "Y",
        "X",
        "Split",
        "Unnamed: 0",
    ]
)


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    rows = draw(st.integers(0, 30) | st.just(24))
    names = draw(st.lists(NAMES | st.text(max_size=4), max_size=4, unique=draw(st.booleans())))
    arrays = [draw(columns(rows)) for _ in names]
    if draw(st.booleans()):  # some that can be learnt from
        names.append("f")
        arrays.append(pa.array(np.arange(rows) + 0.5))
    return pa.table(arrays, names=names)


CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "column": NAMES,
        "labels": st.none() | NAMES,
        "exclude": st.lists(NAMES, max_size=2),
        "validation": st.sampled_from([1, 3, 40, 0.9]),
        "test": st.sampled_from([1, 30]),
        "limit": st.integers(1, 40),
        "likelihood": st.sampled_from(["bernoulli", "continuous_bernoulli", "categorical"]),
        "standardize": st.booleans(),
    },
)


def read(path: Path, choices: dict[str, Any]) -> None:
    data = Data.model_validate({"name": "parquet", "path": str(path), **choices})
    facts = survives(lambda: inspect(data))
    if facts is None:
        return
    stages = survives(lambda: build(Experiment(data=data), facts, Train().resources.numerics))
    if stages is None:
        return
    arrays = load(stages.experiment.data, facts)  # what the driver accepts can be read
    for split in arrays[:3]:
        x = (split.x - arrays.shift) * arrays.scale
        assert len(x) and x.shape[1:] == facts.shape and x.dtype == np.float32 and np.isfinite(x).all()
        assert (split.y is not None) == bool(facts.classes)
        assert split.y is None or (split.y.min() >= 0 and split.y.max() < len(facts.classes))


@given(table=tables(), choices=CHOICES)
def test_parquet(table: pa.Table, choices: dict[str, Any], folder: Path) -> None:
    file = folder / "table.parquet"
    try:
        pq.write_table(table, file, row_group_size=16)
    except (pa.ArrowException, ValueError):
        assume(False)
    read(file, choices)


TABLE_TYPES = [
    pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.float32(), pa.float64(), pa.bool_(),
    pa.decimal128(30, 6), pa.dictionary(pa.int32(), pa.int64()),
]  # fmt: skip


def as_type(numbers: np.ndarray, kind: pa.DataType) -> pa.Array:
    array = pa.array(numbers)
    return array.dictionary_encode() if pa.types.is_dictionary(kind) else array.cast(kind)


@st.composite
def named_numbers(draw: st.DrawFn) -> tuple[pa.Table, pa.Table]:
    """Draw a table of numbers, and the same numbers in other columns: moved, of other types, beside text."""
    names = draw(st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=6, unique_by=str.casefold))
    large = draw(st.sampled_from([0, 10**6, 10**12]))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    numbers = {name: random.integers(0, 100, 20) for name in names}
    wide = draw(st.sampled_from(names))
    numbers[wide] = numbers[wide] + large
    tables = []
    for _ in range(2):
        small = {name: draw(st.sampled_from(TABLE_TYPES[:-3] + TABLE_TYPES[-2:])) for name in names}
        kinds = small | {wide: draw(st.sampled_from([pa.int64(), pa.float64(), pa.decimal128(30, 6)]))}
        arrays = {name: as_type(numbers[name], kinds[name]) for name in draw(st.permutations(names))}
        tables.append(pa.table(arrays).append_column(" a note", pa.array(["text"] * 20)))
    return tables[0], tables[1]


@given(tables=named_numbers())
def test_names_are_what_counts(tables: tuple[pa.Table, pa.Table], folder: Path) -> None:
    files = [folder / f"{number}.parquet" for number in range(2)]
    for table, file in zip(tables, files, strict=True):
        pq.write_table(table, file, row_group_size=16)
    first, second = (Data(name="parquet", path=str(file), labels=None) for file in files)
    facts = survives(lambda: identify(first))
    if facts is None:
        return
    rows = load_rows(first, facts).x
    np.testing.assert_array_equal(load_rows(second, identify(second, facts.columns)).x, rows)
    table = tables[1].select(list(facts.columns.features)).to_pandas()
    np.testing.assert_array_equal(read_table(table[table.columns[::-1]], facts.columns), rows)


PLACES = st.lists(
    st.sampled_from(
        ["a", "train", "test", "val", "_b", ".c", "split=train", "split=test", "split=", "label=cat", "label=1",
         "label=2", "Class=dog", "day=1", "day=2", "a=%20", "label=__HIVE_DEFAULT_PARTITION__", "x.parquet", "=", "é b"]
    ),
    max_size=3,
)  # fmt: skip
FILES = st.tuples(PLACES, st.sampled_from(["0.parquet", "train-0.parquet", "x_test.PARQUET", "dev.pq", "_m", "n.md"]))
PATTERNS = ["", "*", "**", "**/*.parquet", "*/*", "[!t]*", "?"]


@st.composite
def parts(draw: st.DrawFn) -> list[tuple[str, pa.Table]]:
    """Draw the files of a folder: tables of one schema, in some of which columns are moved, cast, added or left out."""
    whole = draw(tables())
    files: dict[str, pa.Table] = {}
    for folders, name in draw(st.lists(FILES, min_size=1, max_size=4)):
        part = whole
        if draw(st.booleans()):
            part = part.select(draw(st.permutations(range(part.num_columns))))
        if part.num_columns and draw(st.booleans()):
            place = draw(st.integers(0, part.num_columns - 1))
            try:
                part = part.set_column(
                    place, part.field(place).name, part.column(place).cast(draw(st.sampled_from(FLAT)))
                )
            except (pa.ArrowException, ValueError):
                part = part.remove_column(place)
        if draw(st.booleans()):
            part = part.append_column(draw(NAMES), draw(columns(part.num_rows)))
        files["/".join([*folders, name])] = part
    return list(files.items())


@given(files=parts(), pattern=st.sampled_from(PATTERNS), choices=CHOICES)
def test_folders_of_parquet(
    files: list[tuple[str, pa.Table]], pattern: str, choices: dict[str, Any], folder: Path
) -> None:
    with TemporaryDirectory(dir=folder) as place:
        for name, table in files:
            try:
                (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(table, Path(place) / name, row_group_size=16)
            except (pa.ArrowException, ValueError, OSError):  # a file lies where a folder should
                assume(False)
        read(Path(place) / pattern, choices)


WHOLE = pa.table({"image": (IMAGES[:1] + IMAGES[1:2]) * 12, "label": ["cat", "dog", "cow"] * 8, "f": np.arange(24.0)})


@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6), end=st.floats(0, 1) | st.just(1.0)
)
@example(changes=[(0.7950528819435065, 1)], end=1.0)  # a column of fewer rows than the footer says
def test_damaged_parquet(changes: list[tuple[float, int]], end: float, folder: Path) -> None:
    file = folder / "damaged.parquet"
    pq.write_table(WHOLE, file, compression="none", use_dictionary=False, column_encoding="PLAIN")
    raw = bytearray(file.read_bytes())
    for place, value in changes:
        raw[int(place * (len(raw) - 1))] = value
    file.write_bytes(raw[: int(end * len(raw))])
    read(file, {})
