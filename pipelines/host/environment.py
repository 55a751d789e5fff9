"""What the environment says of the store and of the job that this process belongs to."""

import json
import os
from pathlib import Path


def submission_id() -> str | None:
    """Of the `ray job submit` that this process is the driver of; None where it is none."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return config.get("metadata", {}).get("job_submission_id")


def store_uri() -> str:
    """The MLflow store: MLFLOW_TRACKING_URI, else SQLite in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def store_is_empty() -> bool:
    """Whether nothing can be finished yet, as far as can be told without importing MLflow, which takes seconds."""
    scheme, _, path = store_uri().partition(":///")
    return scheme == "sqlite" and not Path(path).exists()
