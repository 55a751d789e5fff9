"""Connecting to the MLflow store, which is created if it does not exist."""

import hashlib
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy.exc import SQLAlchemyError

from aecore.core.errors import InputError
from pipelines.host.addresses import STORE_REMEDY, store_address
from pipelines.host.environment import store_uri
from pipelines.host.messages import one_line
from pipelines.host.scratch import scratch
from pipelines.store.labels import SAVED_VIEW
from pipelines.store.patience import ignoring
from pipelines.store.runs import MARKED, Tracker

_LONGEST_FOLDER = 100
"""Most bytes of an experiment's name that its folder has; file systems allow 255."""
_DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Packages of database drivers by the module that is missing, where the two have different names."""


def connect(uri: str | None = None, experiment: str | None = None, create: bool = True) -> Tracker | None:
    """Connect to an MLflow store; create the store and the experiment if they do not exist.

    Args:
        uri: By default MLFLOW_TRACKING_URI, else SQLite in the working directory.
        experiment: Name of the experiment; by default that of MLFLOW_EXPERIMENT_ID or MLFLOW_EXPERIMENT_NAME, else
            diabolo.
        create: Whether to make what is missing.

    Returns:
        The tracker, or None if something is missing and `create` is false.

    Raises:
        InputError: The store cannot be reached, or there is no such experiment.
    """
    uri = store_address(uri) if uri else store_uri()
    path = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    if path is not None and not create and not path.exists():
        return None
    try:
        if path is not None and path.exists():
            _check_file(path)
        elif path is not None:
            _make_store(path)
        return _open_experiment(uri, experiment, path, create)
    except InputError:
        raise
    except (MlflowException, SQLAlchemyError, ImportError, OSError, ValueError) as error:
        reason = _reason(error)
        raise InputError(f"MLFLOW_TRACKING_URI: cannot use {uri} ({reason}); {_remedy(uri, error)}") from error


def _open_experiment(uri: str, name: str | None, path: Path | None, create: bool) -> Tracker | None:
    client = MlflowClient(tracking_uri=uri)
    experiment = None if name else _experiment_by_id(client, uri)
    if experiment is None:
        name = name or _environment("MLFLOW_EXPERIMENT_NAME") or "diabolo"
        experiment = client.get_experiment_by_name(name)
    if experiment is None and not create:
        return None
    if experiment is None:
        assert name is not None
        artifacts = (path.parent / "mlruns" / _folder_name(name)).as_uri() if path is not None else None
        with ignoring("RESOURCE_ALREADY_EXISTS"):  # another driver has made it just now
            return Tracker(uri, client.create_experiment(name, artifacts, {MARKED: "yes", **SAVED_VIEW}), marked=True)
        return _open_experiment(uri, name, path, create)
    if experiment.lifecycle_stage != "active":
        raise InputError(
            f"MLFLOW_EXPERIMENT_NAME: experiment {experiment.name} is deleted in {uri}; restore it (`mlflow "
            f"experiments restore --experiment-id {experiment.experiment_id}`) or choose another"
        )
    return Tracker(uri, experiment.experiment_id, marked=MARKED in experiment.tags)


def _experiment_by_id(client: MlflowClient, uri: str) -> Experiment | None:
    """Return the experiment that MLFLOW_EXPERIMENT_ID names; None if it is not set."""
    number, name = _environment("MLFLOW_EXPERIMENT_ID"), _environment("MLFLOW_EXPERIMENT_NAME")
    if not number:
        return None
    experiment = None
    if re.fullmatch(r"\d{1,18}", number):  # of anything else MLflow's stores say different things
        with ignoring("RESOURCE_DOES_NOT_EXIST"):
            experiment = client.get_experiment(number)
    if experiment is None:
        raise InputError(
            f"MLFLOW_EXPERIMENT_ID: {uri} has no experiment {number}; correct it, or unset it and set "
            "MLFLOW_EXPERIMENT_NAME, whose experiment is made where there is none"
        )
    if name and name != experiment.name:
        raise InputError(
            f"MLFLOW_EXPERIMENT_ID: {number} is experiment {experiment.name}, but MLFLOW_EXPERIMENT_NAME is {name}; "
            "unset one of them"
        )
    return experiment


def _environment(name: str) -> str:
    return os.environ.get(name, "").strip()


def _folder_name(experiment: str) -> str:
    """Return the name of the folder of an experiment's artifacts: the experiment's own name, if that is a plain one.

    Others, such as `/Users/me@example.com/digits` of hosted MLflow, could lead to another folder.
    """
    if re.fullmatch(r"\w[\w .+@-]*", experiment) and len(experiment.encode()) <= _LONGEST_FOLDER:
        return experiment
    words = re.sub(r"[^a-zA-Z0-9_.+@-]+", "-", experiment).strip("-.")[:_LONGEST_FOLDER]
    return f"{words or 'experiment'}-{hashlib.sha256(experiment.encode()).hexdigest()[:8]}"


def _check_file(path: Path) -> None:
    """Raise an InputError if a file that exists is no store that can be written to: MLflow would try for minutes."""
    if path.is_dir():
        raise InputError(
            f"MLFLOW_TRACKING_URI: sqlite:///{path} is a folder; name a file in it, sqlite:///{path}/mlflow.db"
        )
    with path.open("rb") as file:
        first = file.read(15)
    if first and first != b"SQLite format 3":
        raise InputError(f"MLFLOW_TRACKING_URI: {path} is not an SQLite file; name another, sqlite:///mlflow.db")
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise InputError(
            f"MLFLOW_TRACKING_URI: {path} and its folder cannot be written to; change their permissions, or name "
            "another file, sqlite:///mlflow.db"
        )


def _reason(error: Exception) -> str:
    """Return in a few words why MLflow cannot use a store: the innermost cause, which it puts last, or else the first
    sentence."""
    text = " ".join(str(error).split())
    if "unsupported URI" in text:
        return "MLflow knows no such scheme"
    if inner := re.search(r"\(Caused by \w+\((.*)\)\)$", text):
        return one_line(inner[1].rpartition("): ")[2].strip("\"'"))
    return one_line(re.split(r"(?<=[\w'])\. |\[SQL: ", text)[0])


def _remedy(uri: str, error: Exception) -> str:
    """Return what to do about an error, as the end of a message."""
    text, scheme = str(error), uri.partition(":")[0]
    if isinstance(error, ImportError):
        package = _DRIVERS.get(error.name or "", error.name)
        return f"add the driver, `uv run --with '{package}'`, or name a server, http://HOST:5000"
    if scheme in ("databricks-uc", "uc"):
        return "write databricks, and MLFLOW_REGISTRY_URI=databricks-uc for the models"
    if scheme == "databricks":
        return "set DATABRICKS_HOST and DATABRICKS_TOKEN, or log in with `databricks auth login`"
    if "out-of-date database schema" in text:
        return f"make a copy of it, then run `mlflow db upgrade {uri}`"
    if "Invalid Host header" in text:
        return "let the server accept the name, `mlflow server --allowed-hosts HOST:PORT`"
    if "error code 401" in text or "error code 403" in text:
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    return "start the server or correct the address" if scheme in ("http", "https") else STORE_REMEDY


def _make_store(path: Path) -> None:
    """Make MLflow's SQLite file in another place, then put the finished file in its place in one step.

    This takes seconds. MLflow's own way leaves a file that can never be used again if it is killed in the middle, or if
    two drivers make it together. Where a file cannot be put in place so, MLflow makes it.
    """
    with scratch() as folder:
        # MLflow's default experiment, 0, keeps its artifacts beside the others', not in the working directory
        SqlAlchemyStore(f"sqlite:///{folder}/mlflow.db", (path.parent / "mlruns").as_uri())
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with scratch(path.parent) as beside:
                shutil.copyfile(folder / "mlflow.db", beside / "mlflow.db")
                os.link(beside / "mlflow.db", path)  # fails where another driver's file is, and never replaces it
