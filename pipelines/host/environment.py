"""What the environment says of the store and of the job that this process belongs to."""

import json
import os
from pathlib import Path

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


def store_uri() -> str:
    """The MLflow store: MLFLOW_TRACKING_URI, else SQLite in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def store_is_empty() -> bool:
    """Whether nothing can be finished yet, as far as can be told without importing MLflow, which takes seconds."""
    scheme, _, path = store_uri().partition(":///")
    return scheme == "sqlite" and not Path(path).exists()
