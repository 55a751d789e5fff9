"""Connecting to the MLflow store, which is created if it does not exist."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from aecore.core.errors import InputError
from pipelines.host.environment import store_uri
from pipelines.host.messages import one_line
from pipelines.host.scratch import scratch
from pipelines.store.labels import SAVED_VIEW
from pipelines.store.patience import ignoring
from pipelines.store.runs import MARKED, Tracker


def connect(uri: str | None = None, experiment: str | None = None, create: bool = True) -> Tracker | None:
    """Connect to an MLflow store; create the store and the experiment if they do not exist.

    Args:
        uri: By default MLFLOW_TRACKING_URI, else SQLite in the working directory.
        experiment: Name of the experiment; by default MLFLOW_EXPERIMENT_NAME, else diabolo.
        create: Whether to make what is missing.

    Returns:
        The tracker, or None if something is missing and `create` is false.

    Raises:
        InputError: The store cannot be reached.
    """
    uri = uri or store_uri()
    experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "diabolo"
    path = Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None
    if path is not None:
        if not create and not path.exists():
            return None
        uri = f"sqlite:///{path}"  # absolute, since tasks run in other folders
    try:
        if path is not None and not path.exists():
            _make_store(path)
        return _open_experiment(uri, experiment, path, create)
    except (MlflowException, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"MLFLOW_TRACKING_URI: cannot use {uri} ({one_line(error)}); start the server or correct the address"
        ) from error


def _open_experiment(uri: str, name: str, path: Path | None, create: bool) -> Tracker | None:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None and not create:
        return None
    if experiment is None:
        artifacts = (path.parent / "mlruns" / name).as_uri() if path is not None else None
        with ignoring("RESOURCE_ALREADY_EXISTS"):  # another driver has made it just now
            return Tracker(uri, client.create_experiment(name, artifacts, {MARKED: "yes", **SAVED_VIEW}), marked=True)
        return _open_experiment(uri, name, path, create)
    if experiment.lifecycle_stage != "active":
        raise InputError(
            f"MLFLOW_EXPERIMENT_NAME: experiment {name} is deleted in {uri}; restore it or choose another name"
        )
    return Tracker(uri, experiment.experiment_id, marked=MARKED in experiment.tags)


def _make_store(path: Path) -> None:
    """Make MLflow's SQLite file in another place, then put the finished file in its place in one step.

    This takes seconds. MLflow's own way leaves a file that can never be used again if it is killed in the middle, or if
    two drivers make it together. Where a file cannot be put in place so, MLflow makes it.
    """
    with scratch() as folder:
        MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with scratch(path.parent) as beside:
                shutil.copyfile(folder / "mlflow.db", beside / "mlflow.db")
                os.link(beside / "mlflow.db", path)  # fails where another driver's file is, and never replaces it
