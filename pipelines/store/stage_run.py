"""The run of one stage: its epochs, its result and the commit."""

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import time
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from aecore.core.errors import OutageError
from aecore.models.storage import Result, Weights, load_weights, save_weights
from pipelines.host.messages import one_line
from pipelines.host.scratch import scratch
from pipelines.store.client import Store
from pipelines.store.errors import LostResultError
from pipelines.store.lease import check_leases, held_leases
from pipelines.store.models import log_model

FIGURES = "figures"
_RESULT = "result"
_MOST_METRICS, _MOST_PARAMS, _MOST_CHARACTERS = 1000, 100, 6000
"""MLflow's limits: metrics and params of one request, characters of a param."""


class StageRun:
    """The open run of a stage.

    Args:
        last_epoch: The last epoch that an earlier attempt has logged, 0 if there is none.
        metrics: The last value of each metric that the run has already.
    """

    def __init__(self, tracker: Store, run_id: str, last_epoch: int = 0, metrics: Mapping[str, float] = {}) -> None:
        self.tracker, self.run_id, self.last_epoch = tracker, run_id, last_epoch
        self._metrics = dict(metrics)

    def waiting_like(self, tracker: Store) -> "StageRun":
        """Return the same run, whose calls wait for MLflow for as long as those of `tracker`."""
        return StageRun(tracker, self.run_id, self.last_epoch, self._metrics)

    def log(self, points: Sequence[tuple[int, int, Mapping[str, float]]]) -> None:
        """Log epochs (number from 1, Unix time in milliseconds, metrics), each once whatever the number of attempts."""
        fresh = [point for point in points if point[0] > self.last_epoch]
        # whole epochs up to MLflow's limit: if killed between two requests, no epoch is there in part
        size = max(1, _MOST_METRICS // max((len(metrics) for _, _, metrics in fresh), default=1))
        for start in range(0, len(fresh), size):
            batch = fresh[start : start + size]
            values = [Metric(name, value, when, n) for n, when, metrics in batch for name, value in metrics.items()]
            self.tracker.client.log_batch(self.run_id, values)
            self._metrics |= {metric.key: metric.value for metric in values}
        self.last_epoch = max([self.last_epoch, *(point[0] for point in points)])

    def commit(self, result: Result, served: Any = None) -> None:
        """Upload everything that the stage returned, then set FINISHED, which makes it count.

        Args:
            served: What the model returns for `result.example`, where there is one.

        Raises:
            TakenOverError: Another driver has taken the job over; the run is left to it.
        """
        model_id = None
        with scratch() as temporary:
            folder = temporary / _RESULT
            save_weights(folder, result.config, result.weights)
            for name, png in result.figures.items():
                (temporary / FIGURES).mkdir(exist_ok=True)
                (temporary / FIGURES / f"{name}.png").write_bytes(png)
            self.tracker.wait_for(partial(self._upload, temporary))
            if result.example is not None:
                log = partial(log_model, self.tracker, self.run_id, folder, result.example, served)
                model_id = self.tracker.wait_for(log)
        if points := summary_points(result.metrics, self._metrics, model_id):
            self.tracker.client.log_batch(self.run_id, points)
        check_leases(self.tracker, {*self.tracker.leases, *held_leases()})
        self.close("FINISHED")

    def fail(self, error: Exception) -> None:
        """End the run as FAILED and write down why, if MLflow answers."""
        client = self.tracker._replace(patience=0.0).client
        with suppress(OutageError):  # the error itself matters more than that it cannot be written down
            client.set_tag(self.run_id, "error", f"{type(error).__name__}: {one_line(error, 500)}")
            client.set_terminated(self.run_id, "FAILED")

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self.tracker.client.set_terminated(self.run_id, status)

    def _upload(self, folder: Path) -> None:
        """Upload, then read back what counts: an upload that was cut short may not become a result."""
        hasty = self.tracker._replace(patience=0.0)
        if not (folder / _RESULT).is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        hasty.direct.log_artifacts(self.run_id, str(folder))
        try:
            download_result(hasty, self.run_id)
        except (LostResultError, OutageError) as error:
            raise ConnectionError(f"upload of {_RESULT}/ is not whole: {error}") from error


def download_result(store: Store, run_id: str) -> tuple[dict[str, Any], Weights]:
    """Return configuration and weights of a stage's run.

    Raises:
        LostResultError: Its artifacts are missing or were altered.
        OutageError: MLflow does not answer.
    """

    def download(folder: Path) -> Path:
        client = store.direct
        try:
            return Path(client.download_artifacts(run_id, _RESULT, str(folder)))
        except Exception:  # what a folder that is not there raises differs from store to store
            if not client.list_artifacts(run_id, _RESULT):
                raise LostResultError(f"run {run_id} has no {_RESULT}/") from None
            raise

    with scratch() as folder:
        try:
            return load_weights(store.wait_for(partial(download, folder)))
        except (FileNotFoundError, ValueError) as error:
            raise LostResultError(one_line(error, 200)) from error


def summary_points(
    metrics: Mapping[str, float], known: Mapping[str, float], model_id: str | None = None
) -> list[Metric]:
    """Return final metrics as points at step 0.

    A value that the run has already is left out, and so is how long a further attempt took, if a first one is logged.

    Args:
        known: The last value of each metric of the run.
        model_id: The logged model that the metrics belong to as well.
    """
    now = round(1000 * time())
    return [
        Metric(name, value, now, 0, model_id=model_id)
        for name, value in metrics.items()
        if name not in known or (known[name] != value and not name.endswith("_seconds"))
    ]


def log_params_and_tags(
    client: MlflowClient, run_id: str, config: Mapping[str, Any], tags: Mapping[str, str] | None = None
) -> None:
    """Log a configuration as params under names like network.widths, and tags, in as few requests as MLflow allows."""
    params = [Param(name, value[:_MOST_CHARACTERS]) for name, value in _flatten(config)]
    run_tags = [RunTag(name, value) for name, value in (tags or {}).items()]
    for start in range(0, len(params), _MOST_PARAMS) or ([0] if run_tags else []):
        client.log_batch(run_id, params=params[start : start + _MOST_PARAMS], tags=run_tags)
        run_tags = []


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield from _flatten({str(n): item for n, item in enumerate(value, 1)}, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
