"""A table's columns have names, and names are what counts: in serving, encoding, retraining and drift."""

import json
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from aecore.config.experiment import Data, Dense, Experiment, Finetune
from aecore.config.facts import TableColumns
from aecore.config.specs import FinetuneSpec, Numerics
from aecore.core.errors import InputError
from aecore.data.dataset import identify, inspect, load, load_rows
from aecore.evaluation.drift import drift_table, summary
from aecore.models.storage import Result, save_weights
from aecore.serving.model import Model, _load_pyfunc
from aecore.serving.table import read_array, read_table, write_table
from aecore.stages import finetune as finetuning
from aecore.stages.context import Context
from jobs import cli
from jobs.retrain import Retrain, run
from pipelines.graph.recipe import build
from pipelines.retraining import models
from pipelines.store.models import Models, Registered
from pipelines.store.runs import Tracker
from tests.here import encode_here, run_here
from tests.test_encode import Here as Encoding
from tests.test_retrain import Here as Retraining
from tests.test_retrain import aliases, in_process, store
from tests.test_tracking import parent

FEATURES = ("age", "income", "height", "visits", "smoker")
COLUMNS = TableColumns(features=FEATURES, types=("double",) * 5, label="label")


@cache
def people(rows: int = 600, seed: int = 26) -> pd.DataFrame:
    """A table of which each column is of another size, so that rows whose columns are mixed up look like nobody."""
    rng = np.random.default_rng(seed)
    sick = rng.integers(0, 2, rows)
    return pd.DataFrame(
        {
            "age": rng.normal(40, 8, rows) + 20 * sick,
            "income": rng.normal(5e4, 5e3, rows).astype(np.float32),
            "height": rng.normal(170, 8, rows),
            "visits": rng.poisson(3, rows) + 8 * sick,
            "smoker": rng.random(rows) < 0.3,
            "label": np.where(sick, "sick", "well"),
        }
    )  # fmt: skip


def asked(rows: int = 8) -> pd.DataFrame:
    return people().drop(columns="label").head(rows)


def array(frame: pd.DataFrame) -> np.ndarray:
    return frame[list(FEATURES)].to_numpy(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("people")
    people().to_parquet(made / "people.parquet", index=False)
    return made


@pytest.fixture(scope="module")
def result(tracker: Tracker, folder: Path) -> Result:
    """Train and register a classifier of the table."""
    data = Data(name="parquet", path=str(folder / "people.parquet"))
    recipe = Experiment(data=data, network=Dense(widths=(8,)), pretrain=None, finetune=Finetune(epochs=20, lr=1e-2))
    graph = build(recipe, inspect(data), Numerics())
    assert graph.finetune is not None
    found = run_here(graph.finetune, tracker, parent(tracker, "people"))
    tracker.models.register("people", tracker.models.logged_by(tracker.find(graph.finetune.key) or ""))
    return found


@pytest.fixture(scope="module")
def served(result: Result, tracker: Tracker) -> Any:
    """The registered model as MLflow loads it."""
    mlflow.set_tracking_uri(tracker.uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own
        return mlflow.pyfunc.load_model("models:/people/1")


@pytest.mark.parametrize("form", [" {} ", '"{}"', "SQL{}"], ids=["blanks", "quotes", "capitals"])
def test_a_model_is_found_however_the_address_of_its_store_is_written(
    form: str, result: Result, tracker: Tracker
) -> None:
    """Before: `models:/people/1 is lost or was altered`, as MLflow itself took the address as it was written."""
    mlflow.set_tracking_uri(form.format(tracker.uri).replace("SQLsql", "SQL"))
    assert tracker.models.load("models:/people/1").uri == "models:/people/1"
    assert mlflow.get_tracking_uri() == tracker.uri


def nullable(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.convert_dtypes()


class Polars:
    """A table of another library, which pandas would take for a list of its columns."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame

    def to_pandas(self) -> pd.DataFrame:
        return self.frame

    def __iter__(self) -> Iterator[Any]:
        return iter([column for _, column in self.frame.items()])


DICTIONARY = pd.ArrowDtype(pa.dictionary(pa.int32(), pa.int64()))
Ask = Callable[[pd.DataFrame], Any]
ASKED: dict[str, Ask] = {  # before: refused for their types, but for those with a remark
    "as in the file": lambda x: x,
    "float32": lambda x: x.astype(np.float32),  # before: right
    "float32, sorted": lambda x: x.astype(np.float32)[sorted(x)],  # before: wrong
    "float64, reversed": lambda x: x.astype(np.float64)[[*reversed(FEATURES)]],
    "float16 and int8": lambda x: x.round().astype({"age": np.float16, "visits": np.int8, "height": np.uint8}),
    "unsigned": lambda x: x.astype({"visits": np.uint64}),
    "nullable": nullable,
    "nullable, sorted": lambda x: nullable(x)[sorted(x)],
    "Arrow": lambda x: x.convert_dtypes(dtype_backend="pyarrow"),
    "Arrow decimals": lambda x: x.assign(
        age=pd.Series(
            [Decimal(f"{v:.3f}") for v in x.age], dtype=pd.ArrowDtype(pa.decimal128(12, 3))
        )
    ),
    "objects": lambda x: x.astype(object),
    "Decimal": lambda x: x.assign(age=[Decimal(f"{v:.3f}") for v in x.age]),
    "categories of numbers": lambda x: x.assign(visits=x.visits.astype("category")),
    "Arrow dictionary": lambda x: x.assign(
        visits=pd.Series(pa.array(x.visits).dictionary_encode(), dtype=DICTIONARY)
    ),
    "one row of a frame": lambda x: x.iloc[0][sorted(x)],
    "sparse": lambda x: x.assign(visits=pd.arrays.SparseArray(x.visits)),
    "another index": lambda x: x.set_index(pd.Index(range(100, 100 + len(x)))),
    "text as index": lambda x: x.set_index(pd.Index([f"row {n}" for n in range(len(x))])),
    "one row": lambda x: x.head(1),
    "mapping of lists": lambda x: x[sorted(x)].to_dict("list"),
    "mapping of arrays": lambda x: {name: x[name].to_numpy() for name in sorted(x)},
    "list of mappings": lambda x: x[sorted(x)].to_dict("records"),
    "one mapping": lambda x: x.head(1).to_dict("records")[0],
    "array of float32": lambda x: array(x),  # before: right
    "array of float64": lambda x: array(x).astype(np.float64),
    "array of integers": lambda x: array(x).astype(np.int64),
    "array of columns": lambda x: np.asfortranarray(array(x)),  # before: right
    "list of rows": lambda x: array(x).tolist(),
    "frame without names": lambda x: pd.DataFrame(array(x)),  # before: right
}  # fmt: skip


def wanted(case: str, result: Result) -> pd.DataFrame:
    """The answer for the rows of a case, as the data set holds them."""
    x = array(ASKED[case](asked()) if case == "float16 and int8" else asked())
    x = x.astype(np.int64).astype(np.float32) if case == "array of integers" else x
    return Model(result).predict(x[:1] if case.startswith("one ") else x)


def equal(one: pd.DataFrame, two: pd.DataFrame) -> bool:
    same = [
        np.allclose(one[name], two[name], atol=1e-3) for name in ("probability", "reconstruction_mse") if name in two
    ]
    return list(one.prediction) == list(two.prediction) and all(same)


@pytest.mark.parametrize("case", ASKED)
def test_a_table_is_read_by_name_and_rows_without_names_by_position(case: str, result: Result, served: Any) -> None:
    expected = wanted(case, result)
    assert {*Model(result).predict(array(asked())).prediction} == {"sick", "well"}
    assert equal(Model(result).predict(ASKED[case](asked())), expected)
    assert equal(served.predict(ASKED[case](asked())), expected)


def body(x: pd.DataFrame) -> dict[str, Any]:
    return json.loads(x.to_json(orient="split"))


BODIES: dict[str, Ask] = {
    "records": lambda x: {"dataframe_records": x[sorted(x)].to_dict("records")},  # before: wrong
    "split": lambda x: {"dataframe_split": body(x[sorted(x)])},  # before: wrong
    "split without names": lambda x: {"dataframe_split": {"data": body(x)["data"]}},
    "inputs, columns": lambda x: {"inputs": x[sorted(x)].to_dict("list")},
    "inputs, records": lambda x: {"inputs": x[sorted(x)].to_dict("records")},
    "inputs, rows": lambda x: {"inputs": array(x).tolist()},
    "instances, records": lambda x: {"instances": x[sorted(x)].to_dict("records")},
    "instances, rows": lambda x: {"instances": array(x).tolist()},
    "with the label": lambda x: {"dataframe_records": x.assign(label="sick").to_dict("records")},
}


@pytest.mark.parametrize("case", BODIES)
def test_json_is_read_by_name_as_well(case: str, result: Result, served: Any) -> None:
    from mlflow.pyfunc.scoring_server import invocations  # MLflow warns of its own type hints, if it is imported first

    answer = invocations(
        json.dumps(BODIES[case](asked())), "application/json", served, served.metadata.get_input_schema()
    )
    assert answer.status == 200
    found = pd.DataFrame(json.loads(answer.response)["predictions"])
    assert equal(found, Model(result).predict(array(asked())))


REFUSED: dict[str, tuple[Ask, str]] = {  # before: refused without a name, or answered
    "missing": (lambda x: x.drop(columns="age"), "there is no column age, which the model was trained with; the col"),
    "two missing": (lambda x: x[["income", "visits", "smoker"]], "there is no column age, height, which the model"),
    "another case": (lambda x: x.rename(columns={"age": "Age"}), "there is no column age"),
    "text": (lambda x: x.assign(age="old"), "column age"),
    "numbers as text": (lambda x: x.assign(age=x.age.astype(str)), "column age"),
    "text in one row": (lambda x: x.assign(age=[*x.age[:-1].tolist(), "old"]), "row 7 column age: 'old' is no number"),
    "dates": (lambda x: x.assign(age=pd.Timestamp("2026-11-27")), "column age"),
    "lists": (lambda x: x.assign(age=[[1.0]] * len(x)), r"row 0 column age: \[1.0\] is no number"),
    "complex": (lambda x: x.assign(age=x.age + 1j), "column age"),
    "NaN": (lambda x: x.assign(height=x.height.where(x.index != 3)), "row 3 column height: the value is missing"),
    "None": (lambda x: x.assign(age=[None, *x.age[1:]]), "row 0 column age: the value is missing"),
    "pd.NA": (
        lambda x: nullable(x).assign(visits=pd.array([1, pd.NA] * 4, "Int64")),
        "row 1 column visits: the value is missing",
    ),
    "null of Arrow": (
        lambda x: x.assign(age=pd.Series([1.5, None] * 4, dtype=pd.ArrowDtype(pa.float64()))),
        "row 1 column age: the value is missing",
    ),
    "missing category": (lambda x: x.assign(visits=pd.Categorical([1, None] * 4)), "row 1 column visits: the value"),
    "signalling NaN": (lambda x: x.assign(age=[Decimal("sNaN")] * 8), "row 0 column age: the value is missing"),
    "beyond any float": (lambda x: x.assign(age=[10**400] * 8), "row 0 column age: inf is not finite"),
    "missing truth": (
        lambda x: x.assign(smoker=pd.array([True, None] * 4, "boolean")), "row 1 column smoker: the value is missing"
    ),
    "infinite": (lambda x: x.assign(income=-np.inf), "row 0 column income: -inf is not finite"),
    "too large": (lambda x: x.assign(income=1e300), r"row 0 column income: 1e\+300 is not finite in float32"),
    "NaN in an array": (lambda x: np.where(array(x) == array(x)[2, 0], np.nan, array(x)), "row 2 column age: the v"),
    "too few": (lambda x: array(x)[:, :4], "rows have 4 values, but the model reads 5: age, income"),
    "too many": (lambda x: np.hstack([array(x), array(x)]), r"rows have (6|10) values, but the model reads 5: age"),
    "one number": (lambda x: np.array([1, 2, 3], np.float32), "rows have 1 values, but the model reads 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str, result: Result, served: Any) -> None:
    make, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as error:
        Model(result).predict(make(asked()))
    assert "\n" not in str(error.value) and str(error.value).startswith("input: ")
    with pytest.raises(InputError, match=message):
        served.predict(make(asked()))


def test_unknown_columns_are_refused_and_the_label_is_left_out(result: Result, served: Any) -> None:
    model, expected = Model(result), Model(result).predict(array(asked()))
    with pytest.raises(InputError, match="the model was not trained with weight, shoes; leave such columns out"):
        model.predict(asked().assign(weight=70, shoes=1))
    with pytest.raises(InputError, match="several columns are called age"):
        model.predict(asked()[[*FEATURES, "age"]])
    with pytest.raises(InputError, match="a ndarray that is no table"):
        model.predict(np.ones((3, 2, 5)))
    with pytest.warns(UserWarning, match="^input: column label holds labels, and is left out$"):
        assert equal(model.predict(people().head(8)), expected)
    with pytest.warns(UserWarning, match="^input: column Label holds labels, and is left out$"):
        assert equal(model.predict(people().head(8).rename(columns={"label": "Label"})), expected)
    # MLflow leaves unknown columns out before the model sees them, and says so itself
    assert equal(served.predict(people().head(8).assign(weight=70)), expected)


def test_the_signature_has_the_columns_and_the_example_is_one(result: Result, served: Any) -> None:
    inputs = served.metadata.get_input_schema()
    assert not inputs.is_tensor_spec()
    assert inputs.input_names() == [0, 1, 2, 3, 4, 5, *FEATURES]
    assert list(served.input_example.columns) == list(FEATURES)
    assert len(served.predict(served.input_example)) == 4
    outputs = served.metadata.get_output_schema().input_names()
    assert outputs == ["code", "prediction", "probability"]


def test_tables_of_other_libraries_are_read_by_name() -> None:  # before: by position, or refused; MLflow refuses them
    frame = asked()[sorted(FEATURES)]
    for table in (Polars(frame), Polars(frame.head(5)), pa.Table.from_pandas(frame), pa.RecordBatch.from_pandas(frame)):
        rows = read_table(table, COLUMNS)
        assert np.array_equal(rows, array(asked())[: len(rows)])
    with pytest.raises(InputError, match=r"the columns are .*visits \('age ' is not 'age'\)$"):
        read_table(frame.rename(columns={"age": "age "}), COLUMNS)


def test_an_offset_is_subtracted_before_anything_is_rounded() -> None:
    first = 1_795_000_000_000_000_001
    columns = TableColumns(features=("time", "size"), types=("int64", "double"), offsets=(first, 0), label=None)
    times = [first, first + 1, first + 5]
    for column in (
        times, pd.array(times, "Int64"), pd.array(times, pd.ArrowDtype(pa.int64())), np.array(times, object),
        np.array(times, np.uint64), [Decimal(one) for one in times],
        pd.array([Decimal(one) for one in times], pd.ArrowDtype(pa.decimal128(38, 0))),
    ):  # fmt: skip
        rows = read_table(pd.DataFrame({"size": [1.5, 2, 3], "time": column}), columns)
        assert rows.dtype == np.float32 and rows.tolist() == [[0, 1.5], [1, 2], [5, 3]], column
    moved = columns.model_copy(update={"offsets": (1_795_000_000.5, 0)})
    x = np.array([[0, 1.5], [0.25, 2]], np.float32)
    assert np.array_equal(read_table(write_table(x, moved), moved), x)
    assert write_table(x, moved).time.tolist() == [1_795_000_000.5, 1_795_000_000.75]


def test_names_that_are_numbers_are_names_as_text_and_positions_as_numbers() -> None:
    columns, x = TableColumns(features=("2", "0", "1")), np.array([[2, 0, 1]], np.float32)
    by_name = pd.DataFrame({"0": [0], "1": [1], "2": [2]})
    for table in (x, x.tolist(), pd.DataFrame(x), by_name, by_name.to_dict("list")):
        assert np.array_equal(read_table(table, columns), x)


def test_numbers_are_read_as_they_were_read_for_the_model(tmp_path: Path) -> None:
    first = 1_795_000_000_000
    pd.DataFrame({"time": first + np.arange(90), "size": np.arange(90.0)}).to_parquet(tmp_path / "own.parquet")
    data = Data(name="parquet", path=str(tmp_path / "own.parquet"))
    own = identify(data)
    assert own.columns.offsets == (first + 45, 0)
    assert identify(data, own.columns) == own
    assert identify(data, TableColumns()).columns.offsets == ()  # a model from before: nothing was subtracted
    later = own.columns.model_copy(update={"offsets": (first + 9, 0)})
    assert identify(data, later).columns.offsets == (first + 9, 0)


def test_a_model_gives_back_what_was_subtracted(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    seconds, size = 1_700_000_000 + random.permutation(90), random.normal(size=90)
    pd.DataFrame({"time": seconds, "size": size}).to_parquet(tmp_path / "own.parquet")
    data = Data(name="parquet", path=str(tmp_path / "own.parquet"))
    facts = inspect(data)
    recipe = Experiment(data=data, network=Dense(widths=(4,)), pretrain=None, finetune=Finetune(epochs=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an overcomplete layer
        stage = build(recipe, facts, Numerics()).finetune
    assert stage is not None and isinstance(stage.spec, FinetuneSpec)
    model = Model(finetuning.finetune(stage.spec, Context(), data=load(data, facts)))
    x = load_rows(data, facts).x
    restored = model.decode(model.measure(x)["code"])
    assert restored.dtype == np.float64 and abs(np.median(restored[:, 0]) - 1.7e9) < 200
    served = model.predict(pd.DataFrame({"size": size, "time": seconds}))
    np.testing.assert_array_equal(np.stack(list(served["code"])), model.measure(x)["code"])


def test_rows_of_images_and_vectors_need_numbers_too() -> None:
    pixels = np.zeros((3, 1, 2, 2), np.uint8)
    assert read_array(pixels) is pixels and len(read_array(np.zeros((0, 4), np.float32))) == 0
    x = np.ones((3, 2, 2), np.float32)
    x[1, 1, 0] = np.nan
    with pytest.raises(InputError, match=r"^input: row 1 feature 2: the value is missing"):
        read_array(x)
    with pytest.raises(InputError, match=r"^input: the values are object, not numbers"):
        read_array([[None, 1.0]])


def as_before(result: Result) -> Result:
    """The result as earlier versions made it."""
    config = {name: value for name, value in result.config.items() if name != "columns"}
    return replace(result, config=config)


OLD = "was trained by an earlier version, which kept no names of columns: columns are taken by position"


def test_a_model_from_before_is_served_by_position(result: Result, tmp_path: Path) -> None:
    old = as_before(result)
    save_weights(tmp_path, old.config, old.weights)
    with pytest.warns(UserWarning, match=OLD) as told:
        model = _load_pyfunc(str(tmp_path))
        assert equal(model.predict(array(asked())), Model(result).predict(array(asked())))
    assert len(told) == 1
    with pytest.raises(InputError, match="row 0 feature 0: the value is missing"):
        model.predict(np.full((1, 5), np.nan, np.float32))


@pytest.fixture
def encoding(result: Result, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Encoding:
    made = Encoding(tmp_path / "out")
    encode_here(monkeypatch, tracker, made.each)
    monkeypatch.chdir(tmp_path)
    return made


Change = Callable[[pd.DataFrame], pd.DataFrame]
FILES: dict[str, Change] = {
    "as it was": lambda x: x,
    "without label": lambda x: x.drop(columns="label"),
    "sorted": lambda x: x[sorted(x)],  # before: wrong codes and classes
    "reversed": lambda x: x[[*x][::-1]],  # before: wrong codes and classes
    "reversed, without label": lambda x: x[[*reversed(FEATURES)]],  # before: wrong codes and classes
    "wider and narrower types": lambda x: x.astype({"income": np.float64, "visits": np.int8, "smoker": np.int64}),
    "floats": lambda x: x.astype(dict.fromkeys(FEATURES, np.float32))[sorted(x)],
    "label in front, as numbers": lambda x: x.assign(label=(x.label == "sick").astype(int))[["label", *FEATURES]],
}
PARQUET = ("--model", "models:/people/1", "--data.name", "parquet", "--data.path", "own.parquet")


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_encoded_by_name(case: str, encoding: Encoding, result: Result) -> None:
    FILES[case](people()).to_parquet("own.parquet", index=False)
    encoding(*PARQUET)
    table, expected = encoding.table(), Model(result).predict(array(people()))
    assert table["prediction"].to_pylist() == list(expected.prediction)
    codes = np.array(table["code"].to_pylist())
    assert np.allclose(codes, np.stack(expected.code.tolist()), atol=1e-2)


UNFIT: dict[str, tuple[Change, str]] = {
    "missing": (lambda x: x.drop(columns="age"), "there is no column age, which the model was trained on"),
    "extra": (lambda x: x.assign(weight=70.0), "the model was not trained on weight"),
    "swapped": (lambda x: x.drop(columns="age").assign(weight=70.0), "there is no column age"),
    "text": (
        lambda x: x.assign(age=x.age.astype(str)),
        "column age holds .*string, but the model was trained on double",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_file_with_other_columns_is_refused_by_name(case: str, encoding: Encoding) -> None:
    change, message = UNFIT[case]
    change(people()).to_parquet("own.parquet", index=False)
    with pytest.raises(InputError, match=message):
        encoding(*PARQUET)
    assert encoding.made == []


def test_a_label_of_an_unusual_name_is_no_feature_of_a_file(tmp_path: Path) -> None:
    frame = people().assign(diagnosis=np.arange(600) % 2).drop(columns="label")
    frame.to_parquet(tmp_path / "own.parquet", index=False)
    data = Data(name="parquet", path=str(tmp_path / "own.parquet"), labels=None)
    facts = identify(data, COLUMNS.model_copy(update={"label": "diagnosis"}))
    assert facts.columns.features == FEATURES and load_rows(data, facts).x.shape == (600, 5)


def test_a_file_is_encoded_by_position_if_the_model_has_no_names(
    encoding: Encoding, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    people().to_parquet("own.parquet", index=False)
    load = Models.load

    def load_old(self: Models, uri: str) -> Registered:
        found = load(self, uri)
        return found._replace(result=as_before(found.result))

    monkeypatch.setattr(Models, "load", load_old)
    with pytest.warns(UserWarning, match=f"models:/people/1 {OLD}"):
        encoding(*PARQUET)
    assert encoding.table()["prediction"].to_pylist() == list(Model(result).predict(array(people())).prediction)


def test_drift_is_of_a_column_by_its_name() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 2))
    old = {"reference.code": x, "reference.mean": x.mean(0), "reference.std": x.std(0)}
    new = {"code": x, "x": x + np.array([0, 2])}
    for names, expected in (((), "feature 1"), (("age", "price\nin $"), r"feature price\nin $")):
        table = drift_table(new, old, [], 0.2, names)
        assert summary([row for row in table if row["drifted"]], 500).startswith(
            f"drift in 500 new test rows: {expected} "
        )


NIGHT = (
    "--model", "night", "--pretrain.epochs", "2", "--pretrain.weight_decay", "1e-5",
    "--finetune.epochs", "20",
)  # fmt: skip


def day(number: int, folder: Path, *frames: pd.DataFrame) -> tuple[str, ...]:
    """Write the data of a day; return the options of the command."""
    (folder / "digits").mkdir(exist_ok=True)
    pd.concat(frames).to_parquet(folder / "digits" / "all.parquet", index=False)
    return (*NIGHT, "--logical-date", f"2026-11-{number:02}")


def more(change: Change) -> tuple[pd.DataFrame, ...]:
    """The rows of the first day and new ones, as another day writes them."""
    return change(people()), change(people(80, 27))


@pytest.fixture(scope="module")
def _first_night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it
        folder = tmp_path_factory.mktemp("nights")
        report = in_process(patch, folder)(*day(1, folder, people()))
        assert report["status"] == "promoted" and report["metrics"]["challenger/accuracy"] > 0.95
        yield folder


@pytest.fixture
def nights(_first_night: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Retraining:
    """The command in a folder of its own, in which the first champion has been made."""
    shutil.copytree(_first_night / "digits", tmp_path / "digits")
    shutil.copy(_first_night / "mlflow.db", tmp_path)
    return in_process(monkeypatch, tmp_path)


UNLABELLED: dict[str, tuple[Change, str]] = {  # before: only "was trained to classify, this model to reconstruct"
    "missing": (
        lambda x: x.drop(columns="label"),
        "in column label; add it, or name the column of labels with --data.l",
    ),
    "renamed": (
        lambda x: x.rename(columns={"label": "outcome"}),
        "^data.labels: the data have no labels, but models:/n",
    ),
}


@pytest.mark.parametrize("case", UNLABELLED)
def test_a_day_without_the_labels_of_the_champion_is_refused(case: str, nights: Retraining, tmp_path: Path) -> None:
    change, message = UNLABELLED[case]
    with pytest.raises(InputError, match=message):
        nights(*day(2, tmp_path, *more(change)))
    if case == "renamed":
        report = nights(*day(2, tmp_path, *more(change)), "--data.labels", "outcome")
        assert report["status"] == "kept" and report["metrics"]["champion/accuracy"] > 0.95


@pytest.mark.parametrize("case", [case for case in FILES if "label" not in case])
def test_the_champion_reads_new_data_by_name(
    case: str, nights: Retraining, tmp_path: Path
) -> None:  # before: the sorted and the reversed ones were scrambled for the champion, and drifted
    report = nights(*day(2, tmp_path, *more(FILES[case])))
    scores = report["metrics"]
    assert report["status"] == "kept" and "no drift in" in report["reason"], report
    assert scores["champion/accuracy"] > 0.95 and scores["drift/drifted"] == 0
    assert scores["frozen/rows"] > 90 and 0 < scores["newest/rows"] < 40
    again = nights(*NIGHT, "--logical-date", "2026-11-03")
    assert again["status"] == "unchanged" and "those that 2026-11-02 was decided on" in again["reason"]


@pytest.mark.parametrize("case", UNFIT)
def test_data_with_other_columns_than_the_champions_are_refused(
    case: str, nights: Retraining, tmp_path: Path
) -> None:  # before: refused by the number of columns, if by anything
    change, message = UNFIT[case]
    with pytest.raises(InputError, match=message):
        nights(*day(2, tmp_path, *more(change)))
    line = [*day(2, tmp_path, *more(change)), "--data.name", "parquet", "--data.path", "digits"]
    line += ["--data.split", "content", "--plan"]
    with pytest.raises(InputError, match=message):
        run(cli.parse(Retrain, "python -m jobs.retrain", line))
    version = store(tmp_path).models.version("night", "champion")
    assert version is not None and version.number == "1"


def test_a_new_champion_reads_in_the_order_of_the_old_one(nights: Retraining, tmp_path: Path) -> None:
    changed = people(300, 28).assign(visits=0, age=lambda x: 90 - x.age)  # who is ill is now told by other values
    promoted = nights(*day(2, tmp_path, *more(lambda x: x[sorted(x)]), changed[sorted(changed)]))
    assert promoted["status"] == "promoted" and aliases(promoted) == ("2", "1", "2"), promoted
    tracker = store(tmp_path)
    drift = tracker.client.get_run(promoted["run_id"]).data.tags["run.drift"]
    table = tracker.restore(drift).config["table"]
    assert {f"feature {name}" for name in FEATURES} == set(re.findall("feature [a-z0-9]+", table))
    champion = tracker.models.load("models:/night@champion")
    assert champion.result.config["columns"]["features"] == list(FEATURES)
    back = nights(*day(3, tmp_path, *more(lambda x: x), changed))
    assert back["status"] == "kept" and back["metrics"]["newest/rows"] == 0  # the same rows, in the order of day 1


def test_a_champion_from_before_reads_by_position_and_its_successor_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights = in_process(monkeypatch, tmp_path)
    finetune = finetuning.finetune
    with monkeypatch.context() as before:
        before.setattr(finetuning, "finetune", lambda *given, **inputs: as_before(finetune(*given, **inputs)))
        before.setattr(models, "column_tag", lambda _: {})
        assert nights(*day(1, tmp_path, people()))["status"] == "promoted"
    with pytest.warns(UserWarning, match=f"models:/night@champion {OLD}") as told:
        report = nights(*day(2, tmp_path, *more(lambda x: x)))
    assert sum("earlier version" in str(one.message) for one in told) == 1
    assert report["status"] == "kept" and report["metrics"]["champion/accuracy"] > 0.95
    assert report["metrics"]["frozen/rows"] > 90 and "no drift" in report["reason"]
    challenger = store(tmp_path).models.load("models:/night@challenger")
    assert challenger.result.config["columns"]["features"] == list(FEATURES)
    assert nights(*NIGHT, "--logical-date", "2026-11-03")["status"] == "unchanged"


def test_a_wide_table_is_read_in_time_in_proportion_to_its_columns() -> None:
    names = [f"gene {number}" for number in range(20_000)]
    columns = TableColumns(features=tuple(names), types=("float",) * len(names))
    frame = pd.DataFrame(np.ones((2, len(names)), np.float32), columns=names[::-1])
    began = time.perf_counter()
    assert read_table(frame, columns).shape == (2, len(names))
    assert time.perf_counter() - began < 5, "a square of so many columns takes minutes"
