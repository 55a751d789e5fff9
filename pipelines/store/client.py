"""The address of an MLflow store and its client, with MLflow's own settings as Diabolo needs them."""

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from pipelines.store.patience import PatientClient, wait_for
from pipelines.store.record import marker

SETTINGS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow's own 7 tries of 120 s each hold a call up for a quarter of an hour; `patience` waits longer where it may
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # results are small; in parts, MLflow would first ask the server, once per download, whether it can send parts
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",  # unpickling runs whatever code a file names
}
"""Values of MLflow's own environment variables, where the user has set no others."""
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)
logging.getLogger("mlflow").setLevel(logging.WARNING)  # its lines would mix with Diabolo's progress on stderr
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # its errors are raised as well
logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # environments that uv makes have no pip
logging.getLogger("mlflow.utils.databricks_utils").setLevel(logging.ERROR)  # what is wrong is raised as well
logging.getLogger("alembic").setLevel(logging.WARNING)

PAGE_SIZE = 1000
"""Most runs that one search request returns."""
T = TypeVar("T")


class Store(NamedTuple):
    """An experiment in an MLflow store; small enough to travel to every task."""

    uri: str
    experiment_id: str
    patience: float = 0.0
    """Seconds for which each call waits for an MLflow that does not answer; then the call raises an OutageError."""
    marked: bool = False
    """Whether every run of the experiment that has a key also has the key in the name of a tag (`marker`)."""
    leases: tuple[str, ...] = ()
    """Names of leases that must still be held when a result is committed."""

    @property
    def client(self) -> MlflowClient:
        """The client whose calls are repeated during an outage; for calls that do no harm if executed twice."""
        return cast(MlflowClient, PatientClient(self.direct, self.uri, self.patience))

    @property
    def direct(self) -> MlflowClient:
        """The client whose calls raise at once."""
        return MlflowClient(tracking_uri=self.uri)

    def files_at(self, uri: str) -> ArtifactRepository:
        """Return the files of a run, whose artifact URI is given: `MlflowClient` would ask the server for it first."""
        return get_artifact_repository(uri, tracking_uri=self.uri)

    def wait_for(self, call: Callable[[], T]) -> T:
        """Return what `call` returns, tried again while MLflow does not answer; see `patience.wait_for`."""
        return wait_for(call, self.uri, self.patience)

    def log_folder(self, run_id: str, folder: Path, place: str) -> None:
        """Upload everything in `folder` to `place` among the run's artifacts."""
        self.client.log_artifacts(run_id, str(folder), place)

    def link(self, run_id: str, place: str) -> str:
        """Return a link in Markdown, for a description in MLflow, to a folder or file among a run's artifacts."""
        return f"[{place}](#/experiments/{self.experiment_id}/runs/{run_id}/artifacts/{place})"

    def search(self, condition: str = "", limit: int | None = None, client: MlflowClient | None = None) -> list[Run]:
        """Return the runs of the experiment that fulfil a condition in MLflow's syntax, the newest first."""
        size = PAGE_SIZE if limit is None else min(limit, PAGE_SIZE)
        search = partial((client or self.client).search_runs, [self.experiment_id], condition, max_results=size)
        return list(islice(all_pages(search), limit))

    def search_holders(
        self, key: str, condition: str = "", limit: int | None = None, client: MlflowClient | None = None,
        place: str = "LIKE '%'",
    ) -> list[Run]:  # fmt: skip
        """Return the runs that hold the result of a stage, runs of trials too, and fulfil a further condition."""
        runs = self.search(f"tags.`{marker(key)}` {place}{condition}", limit, client)
        if not runs and not self.marked:
            runs = self.search(f"tags.`stage.key` = '{key}'{condition}", limit, client)
        return runs


def all_pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Yield the results of a search of MlflowClient from all of its pages; `search` takes a `page_token`."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return
