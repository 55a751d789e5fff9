"""`jobs.encode`: every row of the input has one row in the output, also after a crash, computed by the named model."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from aecore.config.experiment import Data, Experiment, Finetune
from aecore.config.specs import Numerics
from aecore.core.errors import InputError
from aecore.data.dataset import identify, inspect, load_rows
from aecore.models.storage import Result
from aecore.serving import encoding
from aecore.serving.model import Model
from aecore.serving.strangest import STRANGEST
from aecore.variants import Variational
from jobs import cli
from jobs.encode import Encode, encode
from pipelines.cluster.reading import Done
from pipelines.encoding.encode import MANIFEST
from pipelines.graph.recipe import build
from pipelines.store.runs import Tracker
from tests.benchmarks import encoding as bench
from tests.here import encode_here, run_here
from tests.nodes import BIN, free_port, running, wait_for
from tests.test_tracking import parent, small
from tests.test_train import clean

ROOT = Path(__file__).parents[1]
DIGITS = load_rows(Data(), identify(Data())).x
IMAGES = 15 * DIGITS[:250]
AUTOENCODER, CLASSIFIER = ("--model", "models:/autoencoder/1"), ("--model", "models:/classifier/1")


def write(path: Path, x: Any, **more: Any) -> list[str]:
    pq.write_table(pa.table({"x": list(x), **more}), path, row_group_size=100)
    return ["--data.name", "parquet", "--data.path", str(path)]


def lists(x: np.ndarray) -> list[Any]:
    return [row[0].tolist() for row in x]


KIND = pa.list_(pa.list_(pa.uint8(), 8), 8)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write two files of grey images with labels; return the options that name them."""
    folder = tmp_path_factory.mktemp("set")
    for name in "ab":
        data = write(folder / f"{name}.parquet", pa.array(lists(IMAGES), KIND), y=["even", "odd"] * 125)
    return [*data[:3], str(folder)]


@pytest.fixture(scope="module")
def models(tracker: Tracker, images: list[str]) -> dict[str, Result]:
    """Train and register three models: a classifier and a variational model of digits, an autoencoder of `images`."""
    own = Data(name="parquet", path=images[-1], labels=None)
    tuning = Finetune(epochs=3, task="reconstruct")
    autoencoder = Experiment(data=own, pretrain=None, finetune=tuning)
    variational = Experiment(variant=Variational(), pretrain=None, finetune=tuning)
    graphs = {
        "classifier": small()[0],
        "autoencoder": build(autoencoder, identify(own), Numerics()),
        "vae": build(variational, inspect(variational.data), Numerics()),
    }
    top, found = parent(tracker, "models"), {}
    for name, graph in graphs.items():
        assert graph.finetune is not None
        found[name] = run_here(graph.finetune, tracker, top)
        run_id = tracker.find(graph.finetune.key)
        assert run_id is not None
        tracker.models.register(name, tracker.models.logged_by(run_id))
    tracker.client.set_registered_model_alias("classifier", "champion", "1")
    return found


class Here:
    """The command in this process, with workers that run one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, list[int]()

    def __call__(self, *args: str) -> dict[str, Any]:
        self.made.clear()
        return encode(cli.parse(Encode, "python -m jobs.encode", [*args, "--output", str(self.folder)]))

    def each(
        self, make: Callable[[Any, torch.device], Callable[[int], int]], given: Any, numbers: Sequence[int], *_: Any
    ) -> Iterator[Done]:
        worker = make(given, torch.device("cpu"))
        for number in numbers:
            self.made.append(number)
            began = time.time()
            yield Done(number, worker(number), began, time.time())

    def table(self) -> pa.Table:
        return pq.read_table(self.folder)


@pytest.fixture
def here(
    models: dict[str, Result], tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Here:  # fmt: skip
    made = Here(tmp_path / "out")
    encode_here(monkeypatch, tracker, made.each)
    monkeypatch.setattr(encoding, "PIECE_BYTES", 300 * 64)  # six pieces
    monkeypatch.chdir(tmp_path)
    return made


def vectors(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    array = array.storage if isinstance(array.type, pa.FixedShapeTensorType) else array
    return array.flatten().to_numpy().reshape(len(array), -1)


def test_each_row_is_encoded_once_by_the_model(here: Here, models: dict[str, Result], tracker: Tracker) -> None:
    report = here("--model", "models:/classifier@champion")
    assert "strangest" not in report and not (here.folder / STRANGEST).exists()  # the model has no score of anomalies
    assert report["rows"] == {"all": 1797, "made": 1797} and report["model"] == "models:/classifier/1"
    table, direct = here.table(), Model(models["classifier"]).measure(DIGITS)
    assert table["id"].to_pylist() == table["row"].to_pylist() == list(range(1797))
    assert set(table["file"].to_pylist()) == {"digits"}
    assert table.schema.field("code").type == pa.list_(pa.field("element", pa.float32()), 16)
    assert table["prediction"].to_pylist() == direct["prediction"].tolist()
    assert np.abs(vectors(table["code"]) - direct["code"]).max() < 1e-6
    for name in ("probability", "reconstruction_mse", "anomaly_score"):
        assert np.allclose(table[name].to_numpy(), direct[name], atol=1e-4 if name == "anomaly_score" else 1e-6)
    kept = json.loads((here.folder / MANIFEST).read_text())
    assert kept["rows"] == 1797 and kept["files"] == 6 and kept["diabolo.model"] == "models:/classifier/1"
    for file in here.folder.glob("*.parquet"):
        metadata = pq.read_metadata(file).metadata
        assert all(metadata[key.encode()].decode() == kept[key] for key in kept if key.startswith("diabolo."))
    run = tracker.client.get_run(report["run_id"])
    assert run.data.tags["model"] == "models:/classifier/1" and run.data.metrics["rows"] == 1797
    assert run.info.run_name == "classifier/1: 1,797 rows of digits"
    result, about, status = run.data.tags["mlflow.note.content"].split("  \n")
    assert result == "1,797 rows in 6 files." and status == "Status: finished"
    assert about == f"What: encode with models:/classifier/1, into {here.folder}."
    assert run.info.status == "FINISHED" and run.inputs is not None
    (data,), (model,) = run.inputs.dataset_inputs, run.inputs.model_inputs
    assert data.dataset.digest == kept["diabolo.data.digest"][:36] and model.model_id.startswith("m-")


def test_whole_files_stay_and_missing_ones_are_written(here: Here) -> None:
    asked = ("--model", "models:/classifier/1")
    first = here(*asked)
    before = here.table()
    files = sorted(here.folder.glob("*.parquet"))
    times = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    files[4].write_bytes(
        files[4].read_bytes()[:-100]
    )  # as a broken disk leaves it: the command itself writes whole files or none
    (here.folder / ".part-000001.parquet.0123").write_bytes(b"left by a killed worker")
    again = here(*asked)
    assert here.made == [1, 4] and again["rows"]["made"] == 600 and again["run_id"] == first["run_id"]
    assert here.table().equals(before) and not list(here.folder.glob(".part*"))
    assert [n for n, file in enumerate(files) if file.stat().st_mtime_ns != times[n]] == [1, 4]
    assert here(*asked)["rows"]["made"] == 0 and here.made == []


def test_labels_are_copied_where_they_are_named(here: Here, models: dict[str, Result], images: list[str]) -> None:
    here(*AUTOENCODER, *images, "--data.labels", "y")
    table = here.table()
    assert table["id"].to_pylist() == list(range(500)) and table["row"].to_pylist() == [*range(250)] * 2
    assert table["file"].to_pylist() == ["a.parquet"] * 250 + ["b.parquet"] * 250
    assert table["label"].to_pylist() == ["even", "odd"] * 250 and "prediction" not in table.column_names
    direct = Model(models["autoencoder"]).measure(np.concatenate([IMAGES, IMAGES]))
    assert np.abs(vectors(table["code"]) - direct["code"]).max() < 1e-6


def test_codes_are_decoded(here: Here, models: dict[str, Result], images: list[str], tmp_path: Path) -> None:
    here(*AUTOENCODER, *images)
    codes, here.folder = here.folder, tmp_path / "back"
    here(*AUTOENCODER, "--decode", str(codes))
    table, model = here.table(), Model(models["autoencoder"])
    assert table["id"].to_pylist() == list(range(500)) and table.schema.field("reconstruction").type.shape == [1, 8, 8]
    back, direct = vectors(table["reconstruction"])[:250], model.measure(IMAGES)
    assert np.allclose(back, model.decode(direct["code"]).reshape(250, -1), atol=1e-3)
    errors = np.square((back - IMAGES.reshape(250, -1)) / 255).mean(1)
    assert np.allclose(errors, direct["reconstruction_mse"], atol=1e-5)


ODD_NAMES = ["a b", "a?b", "a#b", "100%", "a%20b", "été/ß", "run:1", "C:x", "a&b=c'd", "-x"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_the_output_folder_may_have_any_name(here: Here, name: str, tmp_path: Path) -> None:
    here.folder = tmp_path / name
    report = here("--model", "models:/vae/1", "--sample", "20")
    files = {file.name for file in here.folder.iterdir()}
    assert report["output"] == str(here.folder) and files == {"part-000000.parquet", MANIFEST}
    assert here.table().num_rows == 20 and sorted(path.name for path in tmp_path.iterdir()) == [Path(name).parts[0]]
    assert here("--model", "models:/vae/1", "--sample", "20")["rows"]["made"] == 0


def test_an_output_may_be_a_uri_or_lie_in_the_home_folder(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    sample = ["--model", "models:/vae/1", "--sample", "20"]
    for output, folder in ((f"file://{tmp_path}/a b%20c", "a b c"), ("~/codes", "home/codes")):
        encode(cli.parse(Encode, "test", [*sample, "--output", output]))
        assert pq.read_table(tmp_path / folder).num_rows == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b c", "home"]


UNWRITABLE = {
    "": "output: missing; name a folder", " ": "output: empty; name a folder",
    "C:\\codes": "output: .* is a path of Windows", "nowhere://x": "output: nowhere://x has an unknown scheme; write",
    "az://c/x": "output: az://c/x .* write abfs://", "file://x": "output: file://x needs three slashes",
    "s3://b/x?y=1": r"output: cannot open s3://b/x\?\*\*\* \(Unexpected", "file:///a?b": "output: .* write %23 for",
}  # fmt: skip


@pytest.mark.parametrize("output", UNWRITABLE)
def test_where_nothing_can_be_written_is_told_in_one_line(here: Here, output: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=UNWRITABLE[output]) as error:
        encode(cli.parse(Encode, "test", ["--model", "models:/vae/1", "--sample", "20", "--output", output]))
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_samples_of_a_variational_model(here: Here) -> None:
    report = here("--model", "models:/vae/1", "--sample", "3000", "--batch_size", "500")
    x = vectors(here.table()["sample"])
    assert report["rows"]["all"] == 3000 and x.shape == (3000, 64) and x.min() >= 0 and x.max() <= 16
    assert len(np.unique(x, axis=0)) == 3000


PARQUET = ("--data.name", "parquet", "--data.path")
REFUSED: list[tuple[tuple[str, ...], str]] = [
    ((), "model: missing; name one"),
    (("--model", "models:/gone@champion"), "has no models:/gone@champion"),
    (("--model", "models:/classifier@gone"), "has no models:/classifier@gone"),
    (("--model", "models:/classifier/7"), "has no models:/classifier/7"),
    (("--model", "classifier"), "model: classifier names no registered model"),
    ((*CLASSIFIER, "--data.path", "x.parquet"), "add --data.name parquet"),
    ((*CLASSIFIER, *PARQUET, "gone"), "data.path: .*gone does not exist"),
    ((*CLASSIFIER, *PARQUET, "wide.parquet"), "vectors of 9 features, .* reads images of 8 x 8 pixels with 1 channel"),
    ((*CLASSIFIER, *PARQUET, "grey.parquet"), "integers below 256, .* below 17"),
    ((*CLASSIFIER, *PARQUET, "real.parquet"), "values are floating-point numbers"),
    ((*CLASSIFIER, "--decode", "codes"), "classifier, whose codes have no decoder"),
    ((*AUTOENCODER, "--decode", "wide.parquet"), "no column code"),
    ((*AUTOENCODER, "--decode", "codes.parquet"), "holds codes of an unknown model"),
    ((*CLASSIFIER, "--sample", "5"), "is not variational"),
    ((*CLASSIFIER, "--sample", "5", "--decode", "codes"), "leave one of them out"),
    ((*CLASSIFIER, "--output", "wide.parquet"), "output: cannot write to"),
    ((*CLASSIFIER, "--output", "full"), r"is of another job \(not made by this command\); name another --output"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_requests_are_refused(args: tuple[str, ...], message: str, here: Here, tmp_path: Path) -> None:
    grey = pa.array(lists(DIGITS[:20]), KIND)
    write(tmp_path / "wide.parquet", np.zeros((20, 9)))
    write(tmp_path / "grey.parquet", grey)
    write(tmp_path / "real.parquet", np.ones((20, 8, 8)).tolist())
    pq.write_table(pa.table({"code": [[0.0] * 16] * 5}), "codes.parquet")
    (tmp_path / "full").mkdir()
    write(tmp_path / "full" / "part-000000.parquet", grey)
    with pytest.raises(InputError, match=message) as error:
        settings = cli.parse(Encode, "python -m jobs.encode", ["--output", str(here.folder), *args])
        encode(settings)
    assert "\n" not in str(error.value) and here.made == []


def test_output_of_another_model_or_other_data_is_refused(here: Here, tmp_path: Path) -> None:
    here(*CLASSIFIER)
    for other in (["--model", "models:/vae/1"], [*CLASSIFIER, "--data.labels", "auto"]):
        with pytest.raises(InputError, match=r"out/part-00000\d.parquet is of another job .*name another --output"):
            here(*other)
        assert here.made == []
    assert len(here.table()) == 1797


def test_a_bad_row_is_named_and_whole_files_before_it_stay(here: Here, tmp_path: Path) -> None:
    here.folder.mkdir()
    x = np.concatenate([IMAGES, IMAGES, IMAGES]).astype(object)
    x[650, 0, 3, 3] = None
    data = write(tmp_path / "hole.parquet", pa.array(lists(x), KIND))
    with pytest.raises(InputError, match=r"hole\.parquet column x row 650"):
        here(*AUTOENCODER, *data)
    assert here.made == [0, 1, 2] and len(list(here.folder.glob("part-*"))) == 2


PICKLED = """
import sys, warnings
warnings.simplefilter("ignore")
import pipelines.store.client, mlflow

class Pickled(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return model_input

mlflow.set_tracking_uri(sys.argv[1])
mlflow.set_experiment(experiment_id=sys.argv[2])
mlflow.pyfunc.log_model(name="p", python_model=Pickled(), registered_model_name="pickled", pip_requirements=["mlflow"])
try:
    mlflow.pyfunc.load_model("models:/pickled/1")
except mlflow.exceptions.MlflowException as error:
    print(error)
"""


def test_a_model_with_another_loader_is_not_loaded(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.store.models._LOADERS", ("something.else",))
    with pytest.raises(InputError, match=r"was not made by jobs\.train, and is not unpickled"):
        here(*CLASSIFIER)


@pytest.mark.long
def test_a_pickled_model_is_not_loaded(here: Here, tracker: Tracker) -> None:
    line = [sys.executable, "-c", PICKLED, tracker.uri, tracker.experiment_id]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**clean(), "PYTHONPATH": str(ROOT)})
    assert "Deserializing model using pickle is disallowed" in done.stdout, done.stderr
    with pytest.raises(InputError, match=r"was not made by jobs\.train, and is not unpickled"):
        here("--model", "models:/pickled/1")


def test_an_altered_model_is_refused(here: Here, tracker: Tracker) -> None:
    uri = tracker.client.get_model_version_download_uri("vae", "1")
    folder = Path(mlflow.artifacts.download_artifacts(uri)) / "data" / "result"
    whole = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(InputError, match=r"models:/vae/1 is lost or was altered .*checksum"):
            here("--model", "models:/vae/1")
    finally:
        (folder / "weights.safetensors").write_bytes(whole)


@pytest.mark.long
def test_a_killed_job_is_finished_by_the_next_one(mnist_root: Path, tmp_path: Path) -> None:
    """With two workers on Ray; tests/benchmarks/encoding.py measures the same."""
    data = Data(name="mnist", root=mnist_root)
    x = load_rows(data, identify(data)).x[:60_000]
    bench.write(tmp_path / "set.parquet", x, 1)
    weights = bench.train(mnist_root, tmp_path)
    output = tmp_path / "codes"
    files = bench.killed(tmp_path / "set.parquet", output, tmp_path)
    assert 0 < files < 6
    report, _ = bench.watched(bench.encoding(tmp_path / "set.parquet", output), tmp_path)
    assert report["rows"]["all"] == 60_000 and 0 < report["rows"]["made"] < 60_000
    ids, difference = bench.compared(output, weights, x)
    assert ids == 60_000 and difference < 1e-6


@pytest.mark.long
def test_the_readme_serves_the_same_columns(
    models: dict[str, Result], tracker: Tracker, tmp_path: Path
) -> None:  # fmt: skip
    """The two lines of jobs/ENCODE.md work as they stand there, but for the port and the model's name."""
    block = (ROOT / "jobs" / "ENCODE.md").read_text().split("## Serving")[1].split("\n\n")[2]
    serve, curl = re.sub(r"^    ", "", block, flags=re.MULTILINE).split("\n", 1)
    port = free_port()
    command = (
        serve.removeprefix("uv run ").replace("models:/digits/1", "models:/classifier/1").replace("5001", str(port))
    )
    env = {**clean(), "MLFLOW_TRACKING_URI": tracker.uri, "PATH": f"{BIN}:{os.environ['PATH']}"}
    with running(shlex.split(command), tmp_path / "log", env, tmp_path):
        wait_for(f"http://127.0.0.1:{port}/ping", tmp_path / "log", 120)
        done = subprocess.run(curl.replace("5001", str(port)), shell=True, capture_output=True, text=True, check=True)
    (row,) = json.loads(done.stdout)["predictions"]
    direct = Model(models["classifier"]).predict(DIGITS[:1]).iloc[0]
    assert list(row) == list(direct.index) and row["prediction"] == direct["prediction"]
    assert np.allclose(row["code"], direct["code"], atol=1e-6)
    assert row["reconstruction_mse"] == pytest.approx(direct["reconstruction_mse"], abs=1e-6)
