"""Missing values and categories in what a model is asked about: served by MLflow, encoded, and retrained on."""

import json
import re
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aecore.config.experiment import Data, Dense, Experiment, Finetune
from aecore.config.facts import TableColumns
from aecore.config.specs import ContestSpec, DriftSpec, Numerics
from aecore.core.errors import InputError
from aecore.data.dataset import identify, inspect, load
from aecore.models.storage import Result
from aecore.serving.encoding import Work, Worker, adapt_data
from aecore.serving.model import Model
from aecore.serving.table import read_array, read_table, write_table
from aecore.stages.contest import contest
from aecore.stages.context import Context
from aecore.stages.drift import drift
from aecore.stages.finetune import finetune
from pipelines.cluster.resources import Resources
from pipelines.graph.recipe import build
from pipelines.retraining import models
from pipelines.retraining.rule import Rule
from pipelines.store.runs import Tracker
from tests.here import run_here
from tests.test_missing import people, set_of
from tests.test_tracking import parent

MIXED = TableColumns(
    features=("age", "colour"), types=("double", "string"), offsets=(100.5, 0), categories=((), ("blue", "red"))
)
IMPUTED = MIXED.model_copy(update={"missing": "impute"})
GAPS = np.array([[1.5, 0, 1], [np.nan, 1, 0], [2.5, np.nan, np.nan]], np.float32)


def trained(data: Data) -> Result:
    facts = inspect(data)
    tuning = Finetune(epochs=4, lr=1e-2)
    recipe = Experiment(data=data, network=Dense(widths=(2,)), pretrain=None, finetune=tuning)
    graph: Any = build(recipe, facts, Numerics())
    return finetune(graph.finetune.spec, Context(), data=load(data, facts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("people")


@pytest.fixture(scope="module")
def data(folder: Path) -> Data:
    return set_of(folder, people(), missing="impute", labels=None, exclude=["label"])


@pytest.fixture(scope="module")
def result(data: Data) -> Result:
    return trained(data)


def asked(rows: int = 12) -> pd.DataFrame:
    return people().drop(columns="label").head(rows)


def scores(model: Model, frame: Any) -> np.ndarray:
    found = model.predict(frame)["reconstruction_mse"].to_numpy()
    assert np.isfinite(found).all()
    return found


def test_tables_with_text_are_read_back() -> None:
    frame = write_table(GAPS, IMPUTED)
    assert (
        frame.colour.tolist()[:2] == ["red", "blue"]
        and frame.colour.isna()[2]
        and frame.age.tolist()[::2] == [102.0, 103.0]
    )
    np.testing.assert_array_equal(read_table(frame, IMPUTED), GAPS)
    forms = {
        "records": frame.to_dict("records"), "object": frame.astype(object), "nullable": frame.convert_dtypes(),
        "category": frame.astype({"colour": "category"}), "arrow": pa.Table.from_pandas(frame),
        "turned": frame[["colour", "age"]], "rows": frame.to_numpy(object).tolist(),
    }  # fmt: skip
    for table in forms.values():
        np.testing.assert_array_equal(read_table(table, IMPUTED), GAPS)


@pytest.mark.parametrize("missing", ["refuse", "impute"])
def test_an_unknown_text_is_told_and_counts_as_missing(missing: Any) -> None:
    columns = MIXED.model_copy(update={"missing": missing})
    frame = pd.DataFrame({"age": [1.0, 2.0, 3.0], "colour": ["red", "mauve", "mauve"]})
    with pytest.warns(UserWarning, match="the model was trained without 'mauve' in column colour; such values count"):
        rows = read_table(frame, columns)
    assert np.isnan(rows).tolist() == [[False] * 3, [False, True, True], [False, True, True]]


REFUSED: dict[str, tuple[dict[str, Any], TableColumns, str]] = {
    "a gap in a text": ({"age": [1.0], "colour": [None]}, MIXED, "input: row 0 column colour: the value is missing"),
    "a gap in a number": (
        {"age": [1.0, None], "colour": ["red"] * 2}, MIXED, "input: row 1 column age: the value is missing; correct it",
    ),
    "a number for a text": (
        {"age": [1.0], "colour": [5]}, IMPUTED, "input: row 0 column colour: 5 is no text; write text",
    ),
    "a text for a number": (
        {"age": ["x"], "colour": ["red"]}, IMPUTED, "input: column age holds str, not numbers; write num",
    ),
    "infinite": (
        {"age": [np.inf], "colour": ["red"]}, IMPUTED, "input: row 0 column age: inf is not finite in float32; correct",
    ),
    "an empty row": (
        {"age": [1.0, None], "colour": ["red", None]}, IMPUTED, "input: row 1: no value of the row is known; leave the",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_row_and_column(case: str) -> None:
    values, columns, message = REFUSED[case]
    with pytest.raises(InputError, match=re.escape(message)):
        read_table(pd.DataFrame(values), columns)


def test_vectors_with_gaps_are_read_where_the_model_knows_gaps() -> None:
    for rows in ([[1.0, None], [2.0, 3.0]], np.array([[1.0, np.nan], [2.0, 3.0]])):
        assert np.isnan(read_array(rows, imputes=True)).tolist() == [[False, True], [False, False]]
        with pytest.raises(InputError):
            read_array(rows)
    with pytest.raises(InputError, match="row 1: no value of the row is known"):
        read_array([[1.0, None], [None, None]], imputes=True)


def test_rows_with_gaps_are_scored(result: Result, data: Data) -> None:
    model = Model(result)
    found = scores(model, asked())
    facts = identify(data, model.columns)
    raw = load(data, facts).train.x[:12]
    np.testing.assert_allclose(scores(model, model.as_served(raw)), model.measure(raw)["reconstruction_mse"], rtol=1e-6)
    assert len(found) == 12 and asked().isna().any().any()
    assert result.example is not None and np.isfinite(scores(model, model.as_served(result.example))).all()


def test_a_model_that_was_trained_without_gaps_refuses_them(tmp_path: Path) -> None:
    model = Model(trained(set_of(tmp_path, people(gaps=False), labels=None, exclude=["label"])))
    whole = people(gaps=False).drop(columns="label").head(5)
    known = scores(model, whole)
    with pytest.raises(InputError, match="input: row 2 column age: the value is missing"):
        model.predict(whole.assign(age=[1.0, 2.0, None, 3.0, 4.0]))
    with pytest.warns(UserWarning, match="without 'mauve' in column colour"):
        found = scores(model, whole.assign(colour=["mauve", *whole.colour[1:]]))
    np.testing.assert_array_equal(found[1:], known[1:])


def test_mlflow_serves_null_and_text(data: Data, tracker: Tracker) -> None:
    recipe = Experiment(data=data, network=Dense(widths=(2,)), pretrain=None, finetune=Finetune(epochs=2))
    graph = build(recipe, inspect(data), Numerics())
    assert graph.finetune is not None
    model = Model(run_here(graph.finetune, tracker, parent(tracker, "gaps")))
    tracker.models.register("gaps", tracker.models.logged_by(tracker.find(graph.finetune.key) or ""))
    mlflow.set_tracking_uri(tracker.uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own
        served = mlflow.pyfunc.load_model("models:/gaps/1")
    from mlflow.pyfunc.scoring_server import invocations

    names = ["age", "colour", "income", "visits", "size"]
    assert [*served.metadata.get_input_schema().input_names()][-5:] == names
    expected = scores(model, asked())
    records = json.loads(asked().to_json(orient="records"))
    cells = [[row[name] for name in names] for row in records]
    split = {"columns": names, "data": cells}
    assert any(None in row for row in cells)
    for body in ({"dataframe_records": records}, {"dataframe_split": split}, {"instances": records}):
        answer = invocations(json.dumps(body), "application/json", served, served.metadata.get_input_schema())
        assert answer.status == 200, answer.response
        found = pd.DataFrame(json.loads(answer.response)["predictions"])["reconstruction_mse"]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(served.predict(asked())["reconstruction_mse"], expected, rtol=1e-6)


def test_a_data_set_with_gaps_is_encoded(result: Result, tmp_path: Path) -> None:
    model = Model(result)
    new = people(seed=3).assign(colour=lambda frame: frame.colour.replace("red", "mauve"))
    data = set_of(tmp_path, new[["size", "visits", "income", "colour", "age"]], missing="impute", labels=None)
    with pytest.warns(UserWarning, match="data.path: the model was trained without 'mauve' in column colour"):
        facts = identify(data, model.columns)
    data = adapt_data(result, data, facts, "models:/people/1")
    output = tmp_path / "codes"
    output.mkdir()
    work = Work(
        operation="encode", model="models:/people/1", model_digest="", data=data, facts=facts, rows=facts.rows,
        output=str(output),
    )  # fmt: skip
    Worker(work, result)(0)
    found = pq.read_table(output)["reconstruction_mse"].to_numpy()
    with pytest.warns(UserWarning, match="mauve"):
        np.testing.assert_allclose(found, scores(model, new.drop(columns="label")), rtol=1e-5)


def test_champion_and_challenger_meet_on_rows_with_gaps(result: Result, data: Data, tmp_path: Path) -> None:
    later = set_of(tmp_path, people(seed=5), missing="impute", labels=None, exclude=["label"])
    facts = inspect(later, TableColumns.model_validate(result.config["columns"]))
    rows = load(later, facts)
    spec = ContestSpec(metric="reconstruction", facts=facts, split="drawn", test=0.2)
    before = contest(spec, Context(), data=load(data, inspect(data)), challenger=result)
    after = contest(spec, Context(), data=rows, challenger=result, champion=result, earlier=before)
    assert after.metrics["difference"] == 0 and np.isfinite(after.metrics["champion/reconstruction"])
    drifted = drift(DriftSpec(classes=(), threshold=0.2), Context(), data=rows, champion=result, earlier=before)
    assert np.isfinite([*drifted.metrics.values()]).all() and "feature colour = red" in drifted.config["table"]


def test_a_champion_that_reads_no_gaps_is_not_compared_on_them(tmp_path: Path) -> None:
    numbers = people(gaps=False).drop(columns=["colour", "size", "label"])
    before = set_of(tmp_path, numbers)
    known, result = inspect(before), trained(before)
    contested = Result({"facts": known.model_dump(mode="json"), "split": "drawn", "test": 0.2}, {}, {})
    stage: Any = None
    champion = models.Champion("people", "1", stage, stage, result, contested)
    candidates = []
    for missing in ("refuse", "impute"):
        data = before.model_copy(update={"missing": missing})
        recipe = Experiment(data=data, network=Dense(widths=(2,)), pretrain=None)
        candidates.append(models.candidate_of(recipe, date.today(), Rule(), Resources(), known.columns))
    models.check_schema(candidates[0], champion)
    with pytest.raises(InputError, match=r"data.missing: people was trained with refuse, and cannot read a row with"):
        models.check_schema(candidates[1], champion)
