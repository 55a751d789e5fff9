"""Facts from the environment and this machine: the address of the store, the submitted job, the commit, the user."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from pipelines.host.addresses import head_address, store_address

SUBMISSION_ID = "DIABOLO_SUBMISSION_ID"
"""Environment variable in which `jobs.submit` gives a job its own submission id."""


def submission_id() -> str | None:
    """Return the submission id if this process is the driver of a submitted Ray job, else None.

    `jobs.submit` sets `DIABOLO_SUBMISSION_ID`. For a job of a plain `ray job submit` the id is read from Ray's own
    variable RAY_JOB_CONFIG_JSON_ENV_VAR, which is not documented (seen in Ray 2.60). Ray has no public way to
    ask before the process is connected to the cluster, and a job without a usable store must be refused before that;
    afterwards `ray.util.state.list_jobs` would know the id.
    """
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return os.environ.get(SUBMISSION_ID) or config.get("metadata", {}).get("job_submission_id")


def ray_address() -> str | None:
    """Return what RAY_ADDRESS names; see `head_address`.

    Raises:
        InputError: It is no address of a Ray head.
    """
    return head_address(os.environ.get("RAY_ADDRESS", ""))


def has_embedded_ray() -> bool:
    """Return whether this process starts a Ray of its own, because RAY_ADDRESS names no cluster."""
    return ray_address() is None


def store_uri() -> str:
    """Return the address of the MLflow store: MLFLOW_TRACKING_URI, else SQLite in the working directory.

    The path of a file is absolute, since tasks run in other folders.

    Raises:
        InputError: MLFLOW_TRACKING_URI is no address of a store.
    """
    return store_address(os.environ.get("MLFLOW_TRACKING_URI", ""))


def store_is_empty() -> bool:
    """Return whether no stage can be finished yet because the SQLite file of the store does not exist.

    This is answered without MLflow, whose import takes seconds. Of other stores nothing is known: they count as filled.
    """
    scheme, _, path = store_uri().partition(":///")
    return scheme == "sqlite" and not Path(path).exists()


def git_commit() -> str:
    """Return the commit of the code that runs, or "unknown".

    GIT_COMMIT names the commit where the folder is shipped without its history, as `ray job submit` does.
    """
    if commit := os.environ.get("GIT_COMMIT"):
        return commit
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=True, cwd=Path(__file__).parent
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def user_name() -> str:
    """Return the name by which this process logs in to MLflow, else that of the user whom it belongs to, or
    "unknown"."""
    if name := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return name
    try:
        return psutil.Process().username()
    except (KeyError, psutil.Error):
        return "unknown"


def program_name() -> str:
    """Return what this process runs: the module that was started with `python -m`, such as `jobs.train`, else the name
    of the file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name or "python"
