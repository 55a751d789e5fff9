"""Labels that tell nothing but anomalies: which rows train, which are tested, and that training sees no label."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aecore.config.experiment import Data, Dense, Experiment, Finetune, Fit
from aecore.config.facts import Facts, RowCounts
from aecore.config.resolve import resolve
from aecore.config.specs import MeasureSpec, Numerics
from aecore.core.errors import InputError
from aecore.core.fingerprint import fingerprint
from aecore.data.dataset import describe, identify, inspect, load
from aecore.data.labels import label_numbers, only_anomalies
from aecore.data.splits import (
    SPLITS,
    UNUSED,
    Arrays,
    Split,
    content_hashes,
    share_of_anomalies,
    split_rows,
    split_shares,
    thin_anomalies,
)
from aecore.data.stream import Stream, open_stream, read_in_turn
from aecore.stages.context import Context
from aecore.stages.measure import measure
from jobs.cli import parse
from jobs.encode import Encode, encode
from jobs.train import Train
from pipelines.graph.recipe import build
from pipelines.study.plan import plan_trials
from pipelines.study.schema import Study
from tests.test_stream import run

ROWS = 400
FACTS = Facts(digest="", shape=(1,), levels=0, classes=(), labels=("0", "1"), rows=ROWS)
LOTS = {"contamination": ("clean", "mixed", 0.1), "split": ("drawn", "content")}


def rare(rows: int = ROWS, every: int = 7) -> np.ndarray:
    """Label one row in `every` 1 and the others 0."""
    return (np.arange(rows) % every == 0).astype(int)


def table(
    folder: Path, labels: Sequence[Any] | np.ndarray, marks: Sequence[str] | None = None, **fields: Any
) -> Data:  # fmt: skip
    """Write a table whose feature `n` is the row's number, and name its anomalies 1."""
    x = np.random.default_rng(0).normal(size=(len(labels), 3))
    frame = pd.DataFrame(x, columns=list("abc")).assign(n=np.arange(len(labels)), label=labels)
    frame = frame if marks is None else frame.assign(split=marks)
    frame.to_parquet(folder / "rows.parquet", index=False, row_group_size=90)
    return Data.model_validate(
        {"name": "parquet", "path": str(folder / "rows.parquet"), "anomaly": 1, "standardize": False} | fields
    )


def marks_of(rows: int = ROWS) -> list[str]:
    return [("train", "train", "validation", "test")[n % 4] for n in range(rows)]


def numbers(split: Split) -> list[int]:
    return split.x[:, 3].astype(int).tolist()


def bits(arrays: Arrays) -> list[bytes]:
    """Return all that a training reads."""
    read = (arrays.train.x, arrays.validation.x, arrays.shift, arrays.scale)
    return [f"{one.shape}".encode() + one.tobytes() for one in read]


def test_training_is_normal_and_the_test_has_both_kinds() -> None:
    data = Data(anomaly=("0",))
    facts = inspect(data)
    assert (facts.classes, facts.trained_classes, facts.labels) == ((), None, tuple("0123456789"))
    everything, arrays = load(Data(), identify(Data())), load(data, facts)
    assert arrays.train.y is None and arrays.validation.y is None and arrays.test.y is not None
    assert arrays.test.y.dtype == np.int64 and arrays.test.y.sum() == 178
    zeros = {s.x[y == 0].tobytes() for s in everything[:3] if (y := s.y) is not None}
    known = {row.tobytes() for s in everything[:3] if s.y is not None for row in s.x[s.y == 0]}
    assert zeros and {row.tobytes() for row in arrays.test.x[arrays.test.y == 1]} == known
    assert not known & {row.tobytes() for s in (arrays.train, arrays.validation) for row in s.x}
    assert facts.row_counts == tuple(
        RowCounts(normal=n, anomalies=a) for n, a in ((1101, 0), (195, 0), (323, 178), (0, 0))
    )
    assert describe(data, facts) == [
        "data: digits, 1,797 rows, images of 8 x 8 pixels with 1 channel, "
        "label 0 marks anomalies: 178 of 1,797 rows, 9.9 %",
        "splits: train 1,101 normal rows; validation 195 normal rows; test 323 normal rows and 178 anomalies",
    ]


def test_keys_depend_on_what_anomalies_are_and_not_on_their_number() -> None:
    facts = inspect(Data(anomaly=("0",)))
    assert fingerprint(facts) == fingerprint(identify(Data(anomaly=("0",)))) != fingerprint(identify(Data()))
    assert fingerprint(Data()) == fingerprint(Data(anomaly=(), contamination="clean")) != fingerprint(Data(anomaly="0"))


def test_a_named_set_with_marks(mnist_root: Path) -> None:
    facts = inspect(Data(name="mnist", root=mnist_root, anomaly=("0",)))
    assert facts.row_counts[2:] == (RowCounts(normal=9020, anomalies=980), RowCounts(normal=0, anomalies=5923))
    clothes = Facts(digest="", shape=(1,), levels=0, classes=("bag", "boot"), rows=9)
    assert label_numbers(Data(anomaly=("Bag",)), only_anomalies(Data(anomaly=("Bag",)), clothes)) == {
        "bag": 1,
        "boot": 0,
    }


LABELS: dict[str, tuple[Sequence[Any], Any]] = {
    "text": (["ok", "fraud"], "fraud"),
    "several texts": (["ok", "fraud", "fault"], ["fraud", "fault"]),
    "integers": ([3, 7], 7),
    "truth values": ([False, True], True),
    "truth values as a shell writes them": ([False, True], "true"),
    "whole floats": ([0.0, 1.0], 1),
    "whole floats as they are written": ([0.0, 1.0], 1.0),
}


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("folders", [False, True])
def test_anomalies_of_every_kind_of_label(case: str, folders: bool, tmp_path: Path) -> None:
    values, anomaly = LABELS[case]
    labels = [values[n % 5 % len(values) if n % 5 < len(values) else 0] for n in range(100)]
    data = table(tmp_path, labels, anomaly=anomaly)
    if folders:
        whole = pd.read_parquet(tmp_path / "rows.parquet")
        for value, rows in whole.groupby("label"):
            folder = tmp_path / "set" / f"label={int(value) if isinstance(value, float) else value}"
            folder.mkdir(parents=True)
            rows.drop(columns="label").to_parquet(folder / "a.parquet", index=False)
        data = data.model_copy(update={"path": str(tmp_path / "set")})
    facts = inspect(data)
    arrays = load(data, facts)
    expected = [n for n in range(100) if 0 < n % 5 < len(values)]
    assert arrays.test.y is not None
    assert [n for n, y in zip(numbers(arrays.test), arrays.test.y, strict=True) if y] == sorted(
        expected, key=numbers(arrays.test).index
    )
    stream = open_stream(data.model_copy(update={"in_memory": "never"}), facts)
    assert sum(
        int(part.y.sum()) for part in read_in_turn(stream.reader("test"), stream.pieces) if part.y is not None
    ) == (len(expected))
    assert facts.labels == tuple(str(int(v) if isinstance(v, float) else v) for v in sorted(values))
    assert (
        f"mark{'' if isinstance(anomaly, list) else 's'} anomalies: {len(expected)} of 100 rows"
        in describe(data, facts)[2 + folders]
    )


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown": (rare(), {"anomaly": "fraud"}, "data.anomaly: no row has the label fraud; the labels are 0, 1"),
    "one of several": (rare(), {"anomaly": [1, 7]}, "data.anomaly: no row has the label 7; the labels are 0, 1"),
    "no anomaly": ([0] * 50, {}, "data.anomaly: all rows are normal, labelled 0, and no row has the label 1"),
    "all anomalies": ([1] * 50, {}, "data.anomaly: all rows are anomalies, labelled 1, and training needs normal rows"),
    "all of both": (rare(), {"anomaly": [0, 1]}, "data.anomaly: all rows are anomalies, labelled 0, 1"),
    "measured": (np.arange(ROWS), {}, "so it may be measured rather than a label"),
    "one anomaly, in training": ([1] + [0] * 49, {"contamination": "mixed"}, "test rows is an anomaly"),
    "too few normal rows": ([1] * 50 + [0] * 2, {}, "data: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_labels_that_tell_no_anomalies_are_refused(case: str, tmp_path: Path) -> None:
    labels, fields, message = REFUSED[case]
    with pytest.raises(InputError) as caught:
        inspect(table(tmp_path, labels, **fields))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_one_value_in_all_folders_is_refused(tmp_path: Path) -> None:
    data = table(tmp_path, rare())
    (tmp_path / "set" / "label=0").mkdir(parents=True)
    pd.read_parquet(tmp_path / "rows.parquet").drop(columns="label").to_parquet(tmp_path / "set/label=0/a.parquet")
    data = data.model_copy(update={"path": str(tmp_path / "set")})
    with pytest.raises(InputError, match=r"data.anomaly: all rows are normal, labelled 0, and no row has the label 1"):
        inspect(data)
    with pytest.raises(InputError, match=r"data.labels: all rows have one class \(label=0\); use --data.labels null"):
        inspect(data.model_copy(update={"anomaly": ()}))


@pytest.mark.parametrize(
    "test, message", [([0] * 9, "test rows is an anomaly"), ([1] * 9, "test rows is a normal row")]
)
@pytest.mark.parametrize("mode", ["always", "never"])
def test_test_rows_of_one_kind_are_refused(test: list[int], message: str, mode: str, tmp_path: Path) -> None:
    labels = [0] * 40 + [1] * 5 + [0] * 9 + test
    data = table(tmp_path, labels, ["train"] * 45 + ["validation"] * 9 + ["test"] * 9, in_memory=mode)
    with pytest.raises(InputError, match=f"data.anomaly: none of the 9 {message}"):
        inspect(data)
    with pytest.raises(InputError, match=f"data.anomaly: none of the 9 {message}"):
        open_stream(data, identify(data)) if mode == "never" else load(data, identify(data))


@pytest.mark.parametrize("mode", ["always", "never"])
def test_one_normal_training_row_is_too_few(mode: str, tmp_path: Path) -> None:
    marks = ["train"] * 9 + ["validation"] * 9 + ["test"] * 9
    data = table(tmp_path, [1] * 8 + [0] * 18 + [1], marks, in_memory=mode)
    with pytest.raises(InputError, match="data: training gets only 1 of 27 rows, fewer than two"):
        open_stream(data, identify(data)) if mode == "never" else inspect(data)


@pytest.mark.parametrize(
    "value, names",
    [
        (1, ("1",)), ("[fraud, fault]", ("fraud", "fault")), ('["idle, hot", "off"]', ("idle, hot", "off")),
        ("['a','b']", ("a", "b")), ("idle, hot", ("idle, hot",)), ("[1, 1]", ("1",)), ("[]", ()), (None, ()),
    ],
)  # fmt: skip
def test_values_of_anomalies_are_read_as_a_command_line_writes_them(value: Any, names: tuple[str, ...]) -> None:
    assert Data(anomaly=value).anomaly == names


def test_an_empty_value_of_anomalies_is_refused() -> None:
    """A variable that the shell does not know would else make an experiment without anomalies."""
    with pytest.raises(InputError, match=r"data.anomaly: the value is empty; write the label of anomalies"):
        parse(Train, "test", ["--data.anomaly", ""])


def test_settings_that_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.anomaly: labels mark the anomalies, but data.labels is null"):
        Data(anomaly=("1",), labels=None)
    for value in (0, 0.5, "dirty", True, None):
        with pytest.raises(
            ValueError, match=r"data.contamination: write clean, mixed or a share above 0 and below 0.5"
        ):
            Data.model_validate({"anomaly": 1, "contamination": value})
    assert Data.model_validate({"anomaly": 1, "contamination": "0.1"}).contamination == 0.1
    for contamination in ("mixed", 0.1):
        with pytest.raises(ValueError, match=r"data.contamination: only data.anomaly says which rows are anomalies"):
            Data.model_validate({"contamination": contamination})
    data = table(tmp_path, rare())
    facts = inspect(data)
    classify = Experiment(data=data, finetune=Finetune(task="classify"))
    with pytest.raises(InputError, match=r"finetune.task: classify needs classes, but with data.anomaly"):
        resolve(classify, facts)
    found = resolve(Experiment(data=data), facts).finetune
    assert found is not None and found.task == "reconstruct"
    study = Study(base=Experiment(data=data), choose="probe")
    with pytest.raises(InputError, match=r"choose: probe needs labels, but with data.anomaly they tell only anomalies"):
        plan_trials(study, facts, Numerics())
    with pytest.raises(InputError, match=r"data.anomaly: all rows are encoded, whatever their labels tell"):
        encode(Encode(model="models:/m@champion", output=str(tmp_path / "codes"), data=data))
    (tmp_path / "bare").mkdir()
    pd.DataFrame({"a": [1.0, 2.0, 3.0] * 9, "b": range(27)}).to_parquet(tmp_path / "bare/rows.parquet", index=False)
    with pytest.raises(InputError, match=r"data.anomaly: the data have no labels that could mark anomalies"):
        inspect(data.model_copy(update={"path": str(tmp_path / "bare")}))
    for one in (inspect, identify):
        streamed = data.model_copy(update={"contamination": 0.1, "in_memory": "never"})
        with pytest.raises(InputError, match=r"data.contamination: a share is counted in memory"):
            resolve(Experiment(data=streamed), one(streamed))


@given(
    labels=st.lists(st.sampled_from([0, 0, 0, 1]), min_size=30, max_size=120),
    marks=st.none() | st.lists(st.sampled_from(SPLITS), min_size=120, max_size=120),
    contamination=st.sampled_from(["clean", "mixed"]) | st.floats(0.01, 0.49),
    split=st.sampled_from(["drawn", "content"]),
    limit=st.none() | st.integers(2, 60),
)
def test_splits_of_any_labels_and_marks(
    labels: list[int], marks: list[str] | None, contamination: Any, split: Any, limit: int | None
) -> None:
    y = np.array(labels)
    marked = None if marks is None else np.array(marks)[: len(y)]
    data = Data(anomaly=("1",), contamination=contamination, split=split, limit=limit)
    hashes = content_hashes(np.arange(len(y), dtype=np.uint8)[:, None])
    try:
        parts = split_rows(data, FACTS, len(y), y, marked, hashes)
    except InputError as error:
        assert "\n" not in str(error)
        return
    train, validation, test = parts
    used = np.concatenate(parts)
    assert len(set(used)) == len(used) and len(train) >= 2 and len(validation) and 0 < y[test].sum() < len(test)
    assert all((np.diff(rows) > 0).all() for rows in parts)
    if split == "drawn":
        assert limit is None or len(train) <= limit
    for number, rows in enumerate((train, validation)):
        normal, anomalies = (int((y[rows] == kind).sum()) for kind in (0, 1))
        if contamination == "clean":
            assert anomalies == 0
        elif contamination != "mixed":
            most = contamination / (1 - contamination) * normal
            assert anomalies <= round(most) + (number == 0 and limit is not None and split == "drawn")
    if marked is not None:
        for name, rows in zip(SPLITS, parts, strict=True):
            assert all(mark == name or (mark == "train" and name not in marked) for mark in marked[rows])
        assert {*np.flatnonzero(marked == "test")} <= {*test}
    elif limit is None and not (split == "content" and isinstance(contamination, float)):
        assert len(used) == len(y)


@given(st.lists(st.integers(0, 1), min_size=5, max_size=60), st.floats(0.01, 0.49))
def test_a_share_takes_as_many_anomalies_as_it_asks_for(labels: list[int], share: float) -> None:
    y = np.array(labels)
    assigned = np.arange(len(y)) % 2
    thinned = thin_anomalies(Data(anomaly=("1",), contamination=share), assigned, y, None)
    for split in (0, 1):
        normal, anomalies = (int(((assigned == split) & (y == kind)).sum()) for kind in (0, 1))
        left = int(((thinned == split) & (y == 1)).sum())
        assert left == min(anomalies, round(share / (1 - share) * normal))
        assert int(((thinned == split) & (y == 0)).sum()) == normal
    assert ((thinned == assigned) | (thinned == 2)).all()
    marked = thin_anomalies(Data(anomaly=("1",), contamination=share), assigned, y, np.full(len(y), "train"))
    assert ((marked == UNUSED) == (thinned == 2)).all()


@pytest.mark.parametrize("marks", ["all", "no validation"])
@pytest.mark.parametrize("split", LOTS["split"])
def test_labels_of_training_rows_change_nothing_where_training_is_mixed(marks: str, split: str, tmp_path: Path) -> None:
    named = [one if marks == "all" or one == "test" else "train" for one in marks_of()]
    trained, labels = np.array(named) != "test", rare()
    mixed = table(tmp_path, labels, named, contamination="mixed", split=split, standardize=True, limit=150)
    before = bits(load(mixed, inspect(mixed)))
    clean = mixed.model_copy(update={"contamination": "clean"})
    normal = load(clean, inspect(clean))
    for seed in range(3):
        permuted = labels.copy()
        permuted[trained] = np.random.default_rng(seed).permutation(labels[trained])
        table(tmp_path, permuted, named)
        assert bits(load(mixed, inspect(mixed))) == before
        other = load(clean, inspect(clean))
        for one in (*normal[:2], *other[:2]):  # only which rows are there changes, not the rows
            assert isinstance(one, Split) and one.y is None
        assert not {*numbers(other.train), *numbers(other.validation)} & {*np.flatnonzero(permuted).tolist()}


@pytest.mark.parametrize("contamination", LOTS["contamination"])
@pytest.mark.parametrize("split", LOTS["split"])
def test_labels_of_test_rows_do_not_reach_training(contamination: Any, split: str, tmp_path: Path) -> None:
    tested, labels = np.array(marks_of()) == "test", rare()
    data = table(tmp_path, labels, marks_of(), contamination=contamination, split=split, standardize=True, limit=150)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = bits(load(data, inspect(data)))
        for seed in range(3):
            other = labels.copy()
            other[tested] = np.random.default_rng(seed).integers(0, 2, tested.sum())
            table(tmp_path, other, marks_of())
            assert bits(load(data, inspect(data))) == before


@pytest.mark.parametrize("contamination", ["clean", "mixed"])
@pytest.mark.parametrize("split", LOTS["split"])
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("limit", [None, 120])
def test_streamed_as_in_memory(
    contamination: str, split: str, marked: bool, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aecore.data.sets.PIECE_BYTES", 90 * 16)
    labels = rare()
    data = table(
        tmp_path, labels, marks_of() if marked else None, contamination=contamination, split=split, limit=limit,
        in_memory="never",
    )  # fmt: skip
    facts = inspect(data)
    stream = open_stream(data, facts)
    rows = {split: list(read_in_turn(stream.reader(split), stream.pieces)) for split in SPLITS}
    ids = {split: [n for part in parts for n in numbers(part)] for split, parts in rows.items()}
    assert all((part.y is None) == (name != "test") for name, parts in rows.items() for part in parts)
    assert [stream.row_count(name) for name in SPLITS] == [len(ids[name]) for name in SPLITS]
    assert [part.y is None for part in stream.sample[:3] if isinstance(part, Split)] == [True, True, False]
    for part in rows["test"]:
        assert part.y is not None and part.y.tolist() == labels[numbers(part)].tolist()
    trained = [*ids["train"], *ids["validation"]]
    assert (labels[trained].sum() > 0) == (contamination == "mixed")
    if limit and not marked:
        assert len(ids["train"]) == pytest.approx(limit, abs=45)
    if split == "content" or (marked and limit is None):
        in_memory = load(data, facts)
        assert [sorted(ids[name]) for name in SPLITS] == [numbers(part) for part in in_memory[:3]]
    assert facts.row_counts == () or [counts.rows for counts in facts.row_counts[:3]] == [
        len(ids[name]) for name in SPLITS
    ]


@pytest.mark.parametrize("contamination", LOTS["contamination"])
def test_by_content_no_test_row_trains_when_the_data_grow(contamination: Any) -> None:
    rng, seen = np.random.default_rng(0), set[int]()
    x = rng.integers(0, 2**31, (4000, 1)).astype(np.float32)
    x[1::3] = x[::3][: len(x[1::3])]  # many rows have a copy, with the same label
    y = (content_hashes(x) % 9 == 0).astype(np.int64)
    data = Data(anomaly=("1",), contamination=contamination, split="content")
    tested, trained = set[int](), set[int]()
    for rows in (1000, 1500, 4000):
        hashes = content_hashes(x[:rows])
        train, validation, test = split_rows(data, FACTS, rows, y[:rows], None, hashes)
        now = {name: {*hashes[part].tolist()} for name, part in (("train", train), ("val", validation), ("test", test))}
        assert not now["test"] & (now["train"] | now["val"] | trained)
        assert not tested & (now["train"] | now["val"])
        tested |= now["test"]
        trained |= now["train"] | now["val"]
        seen |= now["test"]
    assert len(seen) > 100


@pytest.mark.parametrize("contamination", LOTS["contamination"])
def test_by_content_the_order_of_the_rows_does_not_matter(contamination: Any) -> None:
    x = np.arange(600, dtype=np.float32)[:, None]
    y, hashes = rare(600, 3), content_hashes(x)
    data = Data(anomaly=("1",), contamination=contamination, split="content")
    order = np.random.default_rng(0).permutation(600)
    parts = split_rows(data, FACTS, 600, y, None, hashes)
    others = split_rows(data, FACTS, 600, y[order], None, hashes[order])
    assert [{*part} for part in parts] == [{*order[part]} for part in others]


def test_the_limit_counts_rows_that_are_left() -> None:
    none = np.zeros(3, int)
    for contamination, share in (("clean", 0.2), ("mixed", 0.1), (0.25, 0.15)):
        data = Data.model_validate({"anomaly": 1, "contamination": contamination, "limit": 100, "split": "content"})
        y = rare(1000, 2)
        assert share_of_anomalies(data, [y[:300], y[300:]], [None, None]) == (0 if contamination == "mixed" else 0.5)
        anomalies = share_of_anomalies(data, [y], [None])
        assert split_shares(data, none, 1000, anomalies).train == pytest.approx(share)
        hashes = content_hashes(np.arange(1000, dtype=np.float32)[:, None])
        assert len(split_rows(data, FACTS, 1000, y, None, hashes)[0]) == pytest.approx(100, abs=30)
    marks = np.array(["train", "test"] * 500)
    assert share_of_anomalies(Data(anomaly=("1",)), [rare(1000, 2)], [marks]) == 1


def test_fewer_anomalies_than_asked_for_are_told(tmp_path: Path) -> None:
    data = table(tmp_path, rare(), contamination=0.3)
    with pytest.warns(UserWarning, match=r"14.*% of the \d+ (train|validation) rows are anomalies, not 30.00%"):
        facts = inspect(data)
    assert facts.row_counts[0].anomalies == 39
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for limit in (None, 50, 77):
            limited = table(tmp_path, rare(), contamination=0.05, limit=limit)
            found = inspect(limited).row_counts[0]
            assert found.anomalies == pytest.approx(0.05 * found.rows, abs=1)
    assert (
        "splits: train 233 normal rows and 12 anomalies; "
        in describe(data, inspect(table(tmp_path, rare(), contamination=0.05)))[-1]
    )


@pytest.mark.parametrize("mode", ["always", "never"])
def test_an_anomaly_study_trains_and_is_evaluated_without_labels(mode: str, tmp_path: Path) -> None:
    data = table(tmp_path, rare(), in_memory=mode)
    facts = inspect(data)
    experiment = Experiment(
        data=data, network=Dense(widths=(3, 2)), pretrain=Fit(epochs=1), finetune=Finetune(epochs=1)
    )  # fmt: skip
    graph = build(experiment, facts, Numerics())
    rows: Arrays | Stream = (open_stream if mode == "never" else load)(graph.experiment.data, facts)
    layers, _, scored = run(graph, rows)
    assert scored.metrics.keys() >= {"test/reconstruction_mse"} and not any(
        "accuracy" in name for name in scored.metrics
    )
    spec = MeasureSpec(variant=None, classes=facts.classes, labels=(), seed=0, pictures=True)
    found = measure(spec, Context(), data=rows, layers=layers)
    assert "map" in found.weights and "map_labels" not in found.weights


@pytest.mark.parametrize("name", ["anomaly", "Outlier", "is_anomaly"])
def test_columns_that_are_called_so_mark_anomalies(tmp_path: Path, name: str) -> None:
    data = table(tmp_path, rare())
    frame = pd.read_parquet(str(data.path)).rename(columns={"label": name})
    frame.to_parquet(str(data.path), index=False)
    assert inspect(data).columns.features == ("a", "b", "c", "n")
    # without the task it is a feature like any other
    assert inspect(data.model_copy(update={"anomaly": ()})).columns.features == ("a", "b", "c", "n", name)
