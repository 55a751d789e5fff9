"""A registered model with a score of anomalies: what `jobs.encode` writes and ranks, and what a server answers."""

import json
import warnings
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aecore.anomaly.reasons import REASONS
from aecore.config.experiment import Data, Dense, Experiment, Finetune
from aecore.config.specs import Numerics
from aecore.core.errors import InputError
from aecore.data.dataset import inspect
from aecore.models.storage import Result
from aecore.serving import encoding, strangest
from aecore.serving.model import Model
from aecore.serving.strangest import STRANGEST
from jobs import cli
from jobs.encode import Encode, encode
from pipelines.encoding.encode import MANIFEST
from pipelines.graph.recipe import build
from pipelines.store.runs import Tracker
from tests.here import encode_here, run_here
from tests.test_encode import Here
from tests.test_tracking import parent

NAMES = [f"[b]x{number}" for number in range(6)]
"""Names of features that look like markup."""
MODEL = ("--model", "models:/machines/1")


def machines(rows: int, seed: int, strange: int = 0) -> pd.DataFrame:
    """Return a table of correlated features; in the first `strange` rows the second feature is wrong."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 2)) @ np.random.default_rng(0).normal(size=(2, 6)) + 0.1 * rng.normal(size=(rows, 6))
    x[:strange, 1] += np.linspace(20, 10, strange)
    state = np.where(np.arange(rows) < strange, "broken", "fine")
    return pd.DataFrame(x, columns=NAMES).assign(state=state)


@pytest.fixture(scope="module")
def result(tracker: Tracker, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Train and register an autoencoder of the table."""
    path = tmp_path_factory.mktemp("machines") / "machines.parquet"
    machines(600, 0, 60).to_parquet(path, index=False)
    data = Data(name="parquet", path=str(path), labels="state", anomaly=("broken",))
    tuning = Finetune(epochs=3, task="reconstruct")
    recipe = Experiment(data=data, network=Dense(widths=(4,)), pretrain=None, finetune=tuning)
    graph = build(recipe, inspect(data), Numerics())
    assert graph.finetune is not None
    found = run_here(graph.finetune, tracker, parent(tracker, "machines"))
    tracker.models.register("machines", tracker.models.logged_by(tracker.find(graph.finetune.key) or ""))
    return found


@pytest.fixture
def here(result: Result, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    made = Here(tmp_path / "out")
    encode_here(monkeypatch, tracker, made.each)
    monkeypatch.setattr(encoding, "PIECE_BYTES", 300 * 24)  # pieces of 300 rows
    return made


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    """Write two files of 700 rows, five strange ones in each, and return the options that name them."""
    folder = tmp_path / "set"
    folder.mkdir()
    for name in "ab":  # the same rows twice, so that each score ties with another
        machines(700, 1, 5).to_parquet(folder / f"{name}.parquet", index=False, row_group_size=100)
    return [*MODEL, "--data.name", "parquet", "--data.path", str(folder), "--data.labels", "state"]


def test_files_have_scores_and_the_reasons_of_strange_rows(here: Here, asked: list[str], result: Result) -> None:
    here(*asked)
    table, x = here.table(), machines(700, 1, 5)[NAMES].to_numpy(np.float32)
    direct = Model(result).measure(np.concatenate([x, x]))
    for name in ("score", "anomaly_score"):
        assert table.schema.field(name).type == pa.float32()
        assert np.allclose(table[name].to_numpy(), direct[name], rtol=1e-4)
    kinds = {"feature": pa.string(), "value": pa.string(), "expected": pa.string(), "contribution": pa.float32()}
    assert table.schema.field("reasons").type == pa.list_(pa.struct(kinds))
    for number, (score, reasons) in enumerate(
        zip(table["anomaly_score"].to_pylist(), table["reasons"].to_pylist(), strict=True)
    ):
        assert reasons is not None or score <= 95, number
        assert reasons is None or 1 <= len(reasons) <= REASONS
        if number % 700 < 5:
            assert reasons[0]["feature"] == NAMES[1] and float(reasons[0]["value"]) == pytest.approx(
                float(x[number % 700, 1]), rel=1e-5
            )
    assert 20 < table["reasons"].null_count < 1400


def test_the_strangest_rows_of_all_files_are_ranked(
    here: Here, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(strangest, "_ROWS", 41)  # of a pair that ties, the last
    report = here(*asked)
    expected = here.table().to_pandas().sort_values(["score", "id"], ascending=[False, True]).head(41)
    ranked = pq.read_table(here.folder / STRANGEST)
    assert ranked["rank"].to_pylist() == [*range(1, 42)] and len(here.table()) == 1400
    assert ranked.column_names == ["rank", "id", "file", "row", "score", "anomaly_score", "reasons", "label"]
    for name in ("id", "file", "row", "score", "label"):
        assert ranked[name].to_pylist() == expected[name].tolist()
    first = ranked.slice(0, 10).to_pylist()
    assert [row["row"] for row in first] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert {row["label"] for row in first} == {"broken"}
    short = [(row["id"], row["score"], [reason["feature"] for reason in row["reasons"]]) for row in first]
    assert [tuple(row.values()) for row in report["strangest"]] == short and list(report["strangest"][0]) == [
        "id", "score", "features"
    ]  # fmt: skip
    json.loads(json.dumps(report), parse_constant=pytest.fail)
    printed = capsys.readouterr().out
    assert "The strangest rows" in printed and f"{NAMES[1]} {first[0]['reasons'][0]['value']} (expected" in printed


def test_the_ranking_is_written_again_when_it_is_lost_or_damaged(here: Here, asked: list[str]) -> None:
    first = here(*asked)
    file = here.folder / STRANGEST
    whole, time = file.read_bytes(), file.stat().st_mtime_ns
    assert here(*asked)["strangest"] == first["strangest"] and file.stat().st_mtime_ns == time
    for damage in (lambda: file.unlink(), lambda: file.write_bytes(whole[:-50]), lambda: file.write_bytes(b"")):
        damage()
        assert here(*asked)["strangest"] == first["strangest"] and file.read_bytes() == whole and here.made == []
    names = {path.name for path in here.folder.iterdir()}
    assert names == {*(f"part-{number:06}.parquet" for number in range(6)), STRANGEST, MANIFEST}
    here.folder = here.folder.parent / "without labels"
    here(*asked[:-2])
    file.write_bytes((here.folder / STRANGEST).read_bytes())
    here.folder = file.parent
    with pytest.raises(InputError, match=f"{STRANGEST} is of another job"):
        here(*asked)


def test_few_rows_are_all_explained_and_a_uri_will_do(here: Here, tmp_path: Path) -> None:
    path = ["--data.name", "parquet", "--data.path", str(tmp_path / "few.parquet"), "--data.labels", "state"]
    settings = [*MODEL, *path, "--output", f"file://{tmp_path}/a b"]
    machines(8, 2, 1).to_parquet(tmp_path / "few.parquet", index=False)
    report = encode(cli.parse(Encode, "test", settings))
    ranked = pq.read_table(tmp_path / "a b" / STRANGEST)
    assert len(report["strangest"]) == len(ranked) == 8 and ranked["reasons"].null_count == 0
    assert ranked["label"].to_pylist() == ["broken", *["fine"] * 7]


def test_codes_beside_reasons_are_decoded(here: Here, asked: list[str], tmp_path: Path) -> None:
    here(*asked)
    codes, here.folder = here.folder, tmp_path / "back"
    report = here(*MODEL, "--decode", str(codes))
    assert here.table().num_rows == report["rows"]["all"] == 1400 and "strangest" not in report
    assert not (here.folder / STRANGEST).exists()


@pytest.fixture(scope="module")
def served(result: Result, tracker: Tracker) -> Any:
    mlflow.set_tracking_uri(tracker.uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own
        return mlflow.pyfunc.load_model("models:/machines/1")


def test_mlflow_serves_reasons(served: Any, result: Result, tracker: Tracker) -> None:
    rows = machines(30, 3, 2)[NAMES]
    table, direct = served.predict(rows), Model(result).predict(rows)
    assert table.reasons.tolist() == direct.reasons.tolist() and len(table) == 30
    assert np.array_equal(table.score, direct.score) and np.array_equal(table.anomaly_score, direct.anomaly_score)
    outputs = served.metadata.get_output_schema().input_names()
    assert outputs == ["code", "reconstruction_mse", "score", "anomaly_score", "reasons"]
    uri = tracker.client.get_model_version_download_uri("machines", "1")
    assert (Path(mlflow.artifacts.download_artifacts(uri)) / "code" / "aecore" / "anomaly" / "score.py").exists()


def test_a_server_answers_with_reasons_in_json(served: Any, result: Result) -> None:
    from mlflow.pyfunc.scoring_server import invocations  # MLflow warns of its own type hints, if it is imported first

    rows = machines(4, 3, 2)[NAMES]
    body = json.dumps({"dataframe_records": rows.to_dict("records")})
    answer = invocations(body, "application/json", served, served.metadata.get_input_schema())
    assert answer.status == 200
    predictions = json.loads(answer.response, parse_constant=pytest.fail)["predictions"]
    direct = Model(result).predict(rows)
    assert [row["reasons"] for row in predictions] == direct.reasons.tolist()
    assert predictions[0]["anomaly_score"] == 100 and predictions[0]["reasons"][0]["feature"] == NAMES[1]
    assert predictions[0]["score"] == pytest.approx(float(direct.score[0]))
