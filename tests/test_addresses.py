"""Addresses of Ray, MLflow and data as users write them: each works, or one line says what to write instead."""

import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from aecore.core.errors import InputError
from aecore.data.files import filesystem_of
from aecore.data.folders import find_files
from pipelines.cluster import connection
from pipelines.cluster.connection import start_ray
from pipelines.cluster.nodes import check_reach
from pipelines.cluster.resources import Resources
from pipelines.encoding.encode import absolute_path
from pipelines.execution.store import open_store
from pipelines.host.addresses import head_address, store_address
from pipelines.host.environment import has_embedded_ray, store_is_empty
from pipelines.store.connection import connect
from pipelines.store.runs import Tracker

OWN_RAY = "HOST:PORT of a Ray head, or unset it for a Ray of this job's own"


class Refused(str):
    """Parts of a message, divided by ` ... `."""


def judge(act: Callable[[], Any], expected: Any) -> None:
    """Assert that a call returns what is expected, or raises an InputError of one line with the expected parts."""
    if not isinstance(expected, Refused):
        assert act() == expected
        return
    with pytest.raises(InputError) as error:
        act()
    line = str(error.value)
    assert re.search(".*".join(map(re.escape, expected.split(" ... "))), line), line
    assert line.isprintable() and len(line) < 500 and "secret" not in line and "; " in line, line


HEADS: dict[str, Any] = {
    "": None, "  ": None, "local": None, "LOCAL": None, "auto": "auto", " Auto ": "auto", "head:6379": "head:6379",
    " 10.0.0.1:6379 ": "10.0.0.1:6379", "HEAD.Internal:6379/": "HEAD.Internal:6379", "[::1]:6379": "[::1]:6379",
    "http://head:8265": Refused("is a dashboard, which takes jobs from `python -m jobs.submit --address http://head"),
    "HTTPS://head": Refused("is a dashboard ... " + OWN_RAY),
    "ray://head:10001": Refused("an address of Ray Client, through which no command runs here; ... --address http://"),
    "RAY://head:10001": Refused("an address of Ray Client"),
    "head": Refused("head has no port; write head:6379, or unset it for a Ray of this job's own"),
    '"head:6379"': "head:6379", "'auto' ": "auto", '""': None,
    "::1:6379": Refused("is an IPv6 address without brackets; write [ADDRESS]:PORT"),
    "head:x": Refused("head:x is not HOST:PORT; name"), "head:": Refused("head: is not HOST:PORT"),
    ":6379": Refused(":6379 is not HOST:PORT"), "head:0": Refused("is not HOST:PORT"),
    "head:99999": Refused("is not HOST:PORT"), "redis://head:6379": Refused("is not HOST:PORT"),
    "a b:6379": Refused("is not HOST:PORT"),
}  # fmt: skip


@pytest.mark.parametrize("text", HEADS)
def test_what_ray_address_names(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge(lambda: head_address(text), HEADS[text])
    monkeypatch.setenv("RAY_ADDRESS", text)
    if isinstance(HEADS[text], Refused):
        judge(start_ray, HEADS[text])
    else:
        assert has_embedded_ray() == (HEADS[text] is None)


SERVER, FILE = "name a server, http://HOST:5000", "or a file, sqlite:///mlflow.db"
STORES: dict[str, Any] = {
    "": "sqlite:///{cwd}/mlflow.db", " ": "sqlite:///{cwd}/mlflow.db", "sqlite:///mlflow.db": "sqlite:///{cwd}/mlflow.db",
    " sqlite:///a/b.db ": "sqlite:///{cwd}/a/b.db", "sqlite:////a/b.db": "sqlite:////a/b.db",
    "SQLite:///b.db": "sqlite:///{cwd}/b.db", "sqlite:///~/b.db": "sqlite:///{home}/b.db",
    "sqlite:///a b#é%.db": "sqlite:///{cwd}/a b#é%.db",
    '"sqlite:///b.db"': "sqlite:///{cwd}/b.db", "''": "sqlite:///{cwd}/mlflow.db",
    "b.db": Refused("b.db has no scheme; write sqlite:///b.db"), "./b.db": Refused("write sqlite:///./b.db"),
    "/a/b.db": Refused("/a/b.db has no scheme; write sqlite:////a/b.db"), "~/b.sqlite": Refused("sqlite:///~/b.sqlite"),
    "sqlite://b.db": Refused("sqlite://b.db names no file; write sqlite:///mlflow.db, or with four slashes"),
    "sqlite:b.db": Refused("names no file"), "sqlite://": Refused("names no file"),
    "sqlite:///": Refused("names no file"), "sqlite:///:memory:": Refused("names no file"),
    "sqlite+pysqlite:///b.db": Refused("names no file"),
    "sqlite:///a?b.db": Refused("reads the `?` or `%` in {cwd}/a?b.db as more than a part of a name; set it to"),
    "sqlite:///a%20b.db": Refused("as more than a part of a name; set it to a file elsewhere, sqlite:////FOLDER/"),
    "http://m:5000": "http://m:5000", " http://m:5000/ ": "http://m:5000", "HTTPS://m": "https://m",
    "https://me:secret@m:5000": "https://me:secret@m:5000", "http://m:5000/#/experiments/3": "http://m:5000",
    "http://m:5000/mlflow/": "http://m:5000/mlflow", "http://[::1]:5000": "http://[::1]:5000",
    "http://": Refused("http:// is not an address of a server; write it as in http://HOST:5000"),
    "http:/m:5000": Refused("is not an address of a server"), "http:m:5000": Refused("is not an address of a server"),
    "http://m:99999": Refused("is not an address of a server"), "http://m:x": Refused("is not an address of a server"),
    "http://::1:5000": Refused("is not an address of a server"), "http://a b": Refused("is not an address of a server"),
    "http://m:5000?a=b": Refused("is not an address of a server"),
    "localhost:5000": Refused("localhost:5000 has no scheme; write http://localhost:5000"),
    "10.0.0.1:5000": Refused("has no scheme; write http://10.0.0.1:5000"), "[::1]:5000": Refused("write http://[::1]"),
    "mlflow.internal:5000/x": Refused("has no scheme; write http://mlflow.internal:5000/x"),
    "me:secret@m:5000": Refused("MLFLOW_TRACKING_URI: m:5000 has no scheme; write http://m:5000"),
    "./mlruns": Refused(f"./mlruns is a folder, and MLflow keeps runs in folders no longer; {SERVER}, {FILE}"),
    "mlruns": Refused("mlruns is a folder"), "/a/mlruns": Refused("/a/mlruns is a folder"),
    "~/mlruns": Refused("~/mlruns is a folder"), "C:\\mlruns": Refused("is a folder"), "file:": Refused("is a folder"),
    "file:mlruns": Refused("is a folder"), "file:///a/mlruns": Refused("is a folder"), "mlflow": Refused("is a folder"),
    "postgres://me:secret@h/db": Refused("that MLflow does not know; write postgresql://***@h/db"),
    "postgresql://u@h/db": "postgresql://u@h/db", "databricks": "databricks", "databricks://Me": "databricks://Me",
}  # fmt: skip


@pytest.mark.parametrize("text", STORES)
def test_what_the_tracking_uri_names(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    expected = type(STORES[text])(STORES[text].format(cwd=tmp_path, home=tmp_path / "home"))
    judge(lambda: store_address(text), expected)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", text)
    if not isinstance(expected, Refused):
        assert store_is_empty() == (expected.startswith("sqlite:"))


@pytest.mark.parametrize("text", ["", " ", '""', "sqlite:///m.db", " sqlite:///m.db", '"sqlite:///m.db"'])
def test_a_submitted_job_keeps_its_results_in_no_folder_that_is_thrown_away(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIABOLO_SUBMISSION_ID", "train-1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", text)
    judge(lambda: open_store(Resources(), create=False), Refused("would be thrown away ... http://HOST:5000"))


def test_a_folder_is_taken_where_mlflow_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    for text in ("runs", "./runs", "file:runs", f"file://{tmp_path}/runs", f"{tmp_path}/runs"):
        assert store_address(text) == f"file://{tmp_path}/runs"
    tracker = connect("runs")
    assert tracker is not None and (tmp_path / "runs" / tracker.experiment_id).is_dir()


UNUSABLE: dict[str, Refused] = {
    "postgresql://me:secret@h/db": Refused("postgresql://***@h/db (No module named ... uv run --with 'psycopg"),
    "mssql://h/db": Refused("(No module named 'pyodbc'); add the driver, `uv run --with 'pyodbc'`, or name a server"),
    "foo://bar": Refused(f"cannot use foo://bar (MLflow knows no such scheme); {SERVER}, {FILE}"),
    "s3://bucket/x": Refused("MLflow knows no such scheme"),
    "me:pw@m": Refused("MLflow knows no such scheme"),
    "databricks": Refused("cannot use databricks ( ... ); set DATABRICKS_HOST and DATABRICKS_TOKEN, or log in with"),
    "databricks-uc": Refused("write databricks, and MLFLOW_REGISTRY_URI=databricks-uc"),
    "http://127.0.0.1:9": Refused("(Failed to establish ... Connection refused); start the server or correct the"),
    "http://no.invalid:5000": Refused("(Failed to resolve 'no.invalid' ... ); start the server or correct the address"),
    "sqlite:///{folder}": Refused("is a folder; name a file in it, sqlite:///{folder}/mlflow.db"),
    "sqlite:///{folder}/text": Refused("{folder}/text is not an SQLite file; name another"),
    "sqlite:///{folder}/text/x.db": Refused("cannot use sqlite:///{folder}/text/x.db ( ... ); name a server"),
    "sqlite:///{folder}/old.db": Refused("{folder}/old.db ( ... ); make a copy of it, then run `mlflow db upgrade"),
}


@pytest.mark.parametrize("uri", UNUSABLE)
def test_a_store_that_cannot_be_used(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "DATABRICKS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "text").write_text("no database")
    if uri.endswith("old.db"):
        assert connect(f"sqlite:///{tmp_path}/new.db") is not None
        shutil.copyfile(tmp_path / "new.db", tmp_path / "old.db")
        with sqlite3.connect(tmp_path / "old.db") as database:
            database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    judge(lambda: connect(uri.format(folder=tmp_path)), Refused(UNUSABLE[uri].format(folder=tmp_path)))


CREDENTIALS = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
ANSWERS: list[tuple[int, str, str]] = [
    (200, "<html>Ray Dashboard</html>", "not in a valid JSON format); start the server or correct the address"),
    (404, "Not found", "error code 404 ... ; start the server or correct the address"),
    (401, "who are you", f"error code 401 ... ; {CREDENTIALS}"),
    (403, "no", f"error code 403 ... ; {CREDENTIALS}"),
    (403, "Invalid Host header - possible DNS rebinding attack", "`mlflow server --allowed-hosts HOST:PORT`"),
    (502, "Bad gateway", "too many 502 error responses); start the server or correct the address"),
]


@pytest.mark.parametrize(("status", "body", "message"), ANSWERS, ids=[f"{row[0]} {row[1][:7]}" for row in ANSWERS])
def test_a_server_that_is_no_mlflow_or_refuses(
    status: int, body: str, message: str, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.answer = status, body
    uri = f"http://127.0.0.1:{server.server_port}"
    judge(lambda: connect(uri), Refused(f"MLFLOW_TRACKING_URI: cannot use {uri} ( ... {message}"))


PLAIN = ("diabolo", "a b", "v1.2+x@y", "été")
PATHS = (
    "/Users/me@example.com/digits", "../x", "..", ".", "a/b", "a/../../../x", "C:\\x", "x?y#z", "100%", "a%2Fb", "~",
    "-x", "a\nb", "x" * 300, "é" * 200, "'q\"", ".hidden",
)  # fmt: skip


def test_artifacts_stay_in_their_folder_whatever_the_experiment_is_called(tmp_path: Path) -> None:
    home = tmp_path / "a b#é"
    seen = set[Path]()
    for name in (*PLAIN, *PATHS):
        tracker = connect(f"sqlite:///{home}/mlflow.db", name)
        assert tracker is not None and connect(tracker.uri, name) == tracker
        run_id = tracker.client.create_run(tracker.experiment_id).info.run_id
        tracker.client.log_dict(run_id, {"a": 1}, "result.json")
        assert [file.path for file in tracker.client.list_artifacts(run_id)] == ["result.json"]
        (file,) = {*home.parent.rglob("result.json")} - seen
        seen.add(file)
        assert file.relative_to(home).parts[0] == "mlruns" and len(file.relative_to(home).parts) == 5
        assert (file.relative_to(home).parts[1] == name) == (name in PLAIN)
    assert len({file.parents[2] for file in seen}) == len(seen) and [path.name for path in tmp_path.iterdir()] == [
        home.name
    ]


@pytest.fixture(scope="module")
def experiments(tracker: Tracker) -> Tracker:
    """A store with the experiments Default (0), test (1), other (2) and the deleted gone (3)."""
    made = [connect(tracker.uri, name) for name in ("other", "gone")]
    assert [one.experiment_id for one in made if one is not None] == ["2", "3"]
    tracker.client.delete_experiment("3")
    return tracker


CHOICES: dict[tuple[str, str], Any] = {
    ("", ""): "diabolo", (" ", " "): "diabolo", ("other", ""): "other", (" other ", ""): "other", ("", "2"): "other",
    ("", " 2 "): "other", ("other", "2"): "other", ("", "0"): "Default",
    ("test", "2"): Refused("MLFLOW_EXPERIMENT_ID: 2 is experiment other, but MLFLOW_EXPERIMENT_NAME is test; unset"),
    ("", "99"): Refused("MLFLOW_EXPERIMENT_ID: sqlite:/// ... has no experiment 99; correct it, or unset it and set"),
    ("test", "99"): Refused("has no experiment 99"), ("", "abc"): Refused("has no experiment abc"),
    ("", "-1"): Refused("has no experiment -1"), ("", "9" * 30): Refused("has no experiment 999"),
    ("", "3"): Refused("experiment gone is deleted ... `mlflow experiments restore --experiment-id 3`) or choose"),
    ("gone", ""): Refused("experiment gone is deleted"), ("gone", "3"): Refused("experiment gone is deleted"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "number"), CHOICES)
def test_which_experiment_is_taken(
    name: str, number: str, experiments: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)

    def chosen() -> str:
        tracker = connect(experiments.uri)
        assert tracker is not None
        return tracker.client.get_experiment(tracker.experiment_id).name

    judge(chosen, CHOICES[name, number])


def test_the_default_experiment_keeps_its_artifacts_beside_the_store(experiments: Tracker) -> None:
    location = experiments.client.get_experiment("0").artifact_location
    assert location == f"file://{Path(experiments.uri.removeprefix('sqlite:///')).parent}/mlruns/0"


HEAD = "/ray.rpc.NodeInfoGcsService/CheckAlive"


@pytest.fixture
def head() -> Iterator[tuple[str, dict[str, Any]]]:
    """HOST:PORT of a server that answers the request for a sign of life as a Ray head does, and its settings: the
    `token` that it asks for."""
    settings: dict[str, Any] = {"token": None}

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        metadata = dict(context.invocation_metadata())
        if settings["token"] and metadata.get("authorization") != f"Bearer {settings['token']}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer) if details.method == HEAD else None

    made = grpc.server(ThreadPoolExecutor(2))
    made.add_generic_rpc_handlers((Handler(),))
    port = made.add_insecure_port("127.0.0.1:0")
    made.start()
    yield f"127.0.0.1:{port}", settings
    made.stop(None).wait()


class JoinedError(Exception):
    """Ray would connect now."""


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Any]:
    """Return a function that starts Ray with an address, up to the moment in which Ray itself would connect."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    asked: list[str] = []

    def init(**options: Any) -> None:
        asked.append(options["address"])
        raise JoinedError

    def start(address: str) -> str:
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        monkeypatch.setattr("ray.init", init)
        with pytest.raises(JoinedError):
            start_ray()
        assert os.environ["RAY_ADDRESS"] == asked[-1]
        return asked[-1]

    return start


TOKEN = "export RAY_AUTH_MODE=token and put the cluster's token into ~/.ray/auth_token"


def test_a_head_lets_in_who_knows_its_token(
    head: tuple[str, dict[str, Any]], join: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address, settings = head
    assert join(f" {address}/ ") == address
    settings["token"] = "t" * 64
    judge(lambda: join(address), Refused(f"RAY_ADDRESS: {address} asks for a token; {TOKEN}"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)
    judge(lambda: join(address), Refused("asks for a token"))  # Ray does not show it without the mode
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert join(address) == address
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    judge(lambda: join(address), Refused(f"RAY_ADDRESS: {address} does not know this token; {TOKEN}"))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    judge(lambda: join(address), Refused("asks for a token"))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t" * 64 + "\n")
    assert join(address) == address
    # to a Ray of this machine, Ray shows a token that is there also without the mode
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setattr(connection, "_find_head", lambda: address)
    assert join("AUTO") == "auto"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    judge(lambda: join("auto"), Refused(f"{address} asks for a token; {TOKEN}"))


def test_what_is_no_head(server: Any, join: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    other = f"127.0.0.1:{server.server_port}"
    judge(lambda: join(other), Refused(f"what answers at {other} is not a Ray head, whose port is 6379 ... {OWN_RAY}"))
    judge(lambda: join("127.0.0.1:9"), Refused(f"no answer from 127.0.0.1:9 ( ... refused); name {OWN_RAY}"))
    judge(lambda: join("no.invalid:6379"), Refused(f"no answer from no.invalid:6379 ( ... ); name {OWN_RAY}"))

    def find(address: str) -> str:
        raise ConnectionError("Could not find any running Ray instance. Please specify the one with `--address`.")

    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", find)
    judge(lambda: join("auto"), Refused(f"RAY_ADDRESS: auto, but no Ray runs on this machine; name {OWN_RAY}"))


def test_a_cluster_that_refuses_in_the_end(
    head: tuple[str, dict[str, Any]], join: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import AuthenticationError

    address, _ = head
    for error, remedy in ((ConnectionError("no"), OWN_RAY), (AuthenticationError("no token"), TOKEN)):

        def init(error: Exception = error, **options: Any) -> None:
            raise error

        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr("ray.init", init)
        judge(start_ray, Refused(f"RAY_ADDRESS: cannot join {address} (no ... {remedy}"))


PATHS_OF_DATA: dict[str, Any] = {
    "/a/b": "/a/b", "a/b": "a/b", "a:b": "{cwd}/a:b", "run:1/x": "{cwd}/run:1/x", "50% a#b?c é": "50% a#b?c é",
    "file:///a/b": "/a/b", "FILE:///a": "/a", "file:/a/b": "/a/b", "file:///a%20b": "/a b", "file:///a b é": "/a b é",
    "file:///100%": "/100%", "file:///a%23b": "/a#b", "file:///a[0-9]*": "/a[0-9]*",
    "s3://b/x y?region=eu-west-1": "b/x y", "S3://b/é?region=eu-west-1": "b/é", "s3://b/[x]?region=eu-west-1": "b/[x]",
    "gs://anonymous@b/x y": "b/x y", "gcs://anonymous@b/x?retry_limit_seconds=5": "b/x",
    "abfs://a.blob.core.windows.net/c/x y": "c/x y", "abfss://c@a.dfs.core.windows.net/x": "c/x",
    "": Refused("empty; name a folder"), " ": Refused("empty; name a folder"),
    "C:\\a": Refused("C:\\a is a path of Windows; write it as this machine has it"), "c:/a": Refused("path of Windows"),
    "file://a/b": Refused("needs three slashes; write file:///FOLDER"), "file://a": Refused("needs three slashes"),
    "file:///a#b": Refused("ends for a URI at its `#` or `?`; write %23 for `#` and %3F for `?`"),
    "file:///a?b": Refused("write %23 for `#` and %3F for `?`"), "s3://b/a#b": Refused("write %23 for `#`"),
    "s3://": Refused("s3:// names no bucket; write s3://BUCKET/FOLDER"), "gs:///x": Refused("write gs://BUCKET/FOLDER"),
    "s3a://b/x": Refused("has a scheme that cannot be read; write s3://BUCKET/..."), "s3n://b": Refused("write s3://"),
    "az://c/x": Refused("write abfs://ACCOUNT.blob.core.windows.net/CONTAINER"), "wasbs://c@a/x": Refused("write abfs://"),
    "dbfs:/x": Refused("write /dbfs/..., where Databricks mounts it"), "https://h/x": Refused("have downloaded it"),
    "hdfs://h:8020/x": Refused("needs Hadoop's library, which is not here; install Java and Hadoop's client, and set"),
    "hf://datasets/a/b": Refused("needs the package huggingface_hub; add it, `uv run --with huggingface_hub`"),
    "foo://b": Refused("foo://b has an unknown scheme; write s3://, gs://, abfs://, hdfs:// or file:///, or a folder"),
    "s3://b/x?foo=secret": Refused("cannot open s3://b/x?*** (Unexpected query parameter ... ); check the address"),
}  # fmt: skip


@pytest.mark.parametrize("text", PATHS_OF_DATA)
def test_what_a_path_or_uri_names(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = PATHS_OF_DATA[text]
    if isinstance(expected, Refused):
        judge(lambda: filesystem_of(text), Refused(f"data.path: ... {expected}"))
        judge(lambda: filesystem_of(text, "output"), Refused(f"output: ... {expected}"))
        judge(lambda: check_reach("http://m", text), Refused(f"resources.storage_path: ... {expected}"))
    else:
        filesystem, path = filesystem_of(text)
        assert path == expected.format(cwd=tmp_path)
        is_local = text.lower().startswith("file:") or "://" not in text
        assert isinstance(filesystem, pafs.LocalFileSystem) == is_local


@pytest.mark.parametrize("name", ["a b", "a#b", "a?b", "100%", "a%20b", "été", "run:1", "a&b=c", "[x]", "a'b"])
def test_a_folder_of_data_may_have_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / name / "d.parquet")
    monkeypatch.chdir(tmp_path)
    for text in (name, str(tmp_path / name), absolute_path(name), (tmp_path / name).as_uri()):
        files = [file.path for file in find_files(text).files]
        assert [Path(file).absolute() for file in files] == [tmp_path / name / "d.parquet"]


def test_a_name_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.parquet")).touch()
    judge(lambda: find_files(str(tmp_path)), Refused("data.path: ... is not UTF-8; rename it"))


def test_an_absolute_path_is_one_of_this_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    paths = {"a": f"{tmp_path}/a", "~/a": "/home/me/a", "s3://b/a": "s3://b/a", "file:/a": "file:/a", "": ""}
    assert {path: absolute_path(path) for path in paths} == paths
