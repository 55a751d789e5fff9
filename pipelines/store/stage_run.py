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
_MOST_VALUES, _MOST_PARAMS, _MOST_CHARACTERS = 1000, 100, 6000
"""MLflow's limits: metrics, params and tags of one request, params among them, characters of a param."""


class StageRun:
    """The open run of a stage, to which epochs, the result and the status are written.

    Args:
        last_epoch: The last epoch that an earlier attempt has logged, 0 if there is none.
        metrics: The last value of each metric that the run has already.
        params: The params that the run does not have yet; they are logged with the first epochs.
    """

    def __init__(
        self, tracker: Store, run_id: str, last_epoch: int = 0, metrics: Mapping[str, float] = {},
        params: Sequence[Param] = (),
    ) -> None:  # fmt: skip
        self.tracker, self.run_id, self.last_epoch = tracker, run_id, last_epoch
        self._metrics, self._params = dict(metrics), list(params)

    def waiting_like(self, tracker: Store) -> "StageRun":
        """Return an object for the same run whose calls wait for MLflow as long as those of `tracker`."""
        return StageRun(tracker, self.run_id, self.last_epoch, self._metrics, self._params)

    def log(self, points: Sequence[tuple[int, int, Mapping[str, float]]]) -> None:
        """Log epochs (number from 1, Unix time in milliseconds, metrics), each once whatever the number of attempts."""
        fresh = list({point[0]: point for point in points if point[0] > self.last_epoch}.values())
        # whole epochs up to MLflow's limit: if killed between two requests, no epoch is there in part
        size = max(1, _MOST_VALUES // max((len(metrics) for _, _, metrics in fresh), default=1))
        for start in range(0, len(fresh), size):
            batch = fresh[start : start + size]
            values = [Metric(name, value, when, n) for n, when, metrics in batch for name, value in metrics.items()]
            self._log_values(values)
        self.last_epoch = max([self.last_epoch, *(point[0] for point in points)])

    def commit(self, result: Result, served: Any = None) -> None:
        """Upload the result of the stage, then set the run FINISHED, which makes the result count.

        Args:
            served: The output of the model for `result.example`, if there is an example.

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
                self._log_values([])  # the model takes the run's params over
                log = partial(log_model, self.tracker, self.run_id, folder, result.example, served)
                model_id = self.tracker.wait_for(log)
        self._log_values(summary_points(result.metrics, self._metrics, model_id))
        check_leases(self.tracker, {*self.tracker.leases, *held_leases()})
        self.close("FINISHED")

    def fail(self, error: Exception) -> None:
        """End the run as FAILED and write down why, if MLflow answers."""
        client = self.tracker._replace(patience=0.0).client
        with suppress(OutageError):  # the error itself matters more than that MLflow cannot record it
            tags = {"error": f"{type(error).__name__}: {one_line(error, 500)}"}
            log_batch(client, self.run_id, params=self._params, tags=tags)
            client.set_terminated(self.run_id, "FAILED")

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self.tracker.client.set_terminated(self.run_id, status)

    def _log_values(self, values: Sequence[Metric]) -> None:
        log_batch(self.tracker.client, self.run_id, values, self._params)
        self._params = []
        self._metrics |= {metric.key: metric.value for metric in values}

    def _upload(self, folder: Path) -> None:
        """Upload a folder, then read the result back: an upload that was cut short may not become a result."""
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
        LostResultError: The artifacts are missing or were altered.
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

    Values that are logged already are left out, and so are the seconds of a further attempt.

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


def params_of(config: Mapping[str, Any], known: Mapping[str, str] | None = None) -> list[Param]:
    """Return a configuration as params under names like network.widths, without those in `known`."""
    return [Param(name, value[:_MOST_CHARACTERS]) for name, value in _flatten(config) if name not in (known or {})]


def log_batch(
    client: MlflowClient, run_id: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = (),
    tags: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Log at most 1000 metrics, any number of params, and tags, in as few requests as MLflow allows."""
    run_tags = [RunTag(name, value) for name, value in (tags or {}).items()]
    while len(params) > _MOST_PARAMS or len(metrics) + len(params) + len(run_tags) > _MOST_VALUES:
        client.log_batch(run_id, params=params[:_MOST_PARAMS])
        params = params[_MOST_PARAMS:]
    if metrics or params or run_tags:
        client.log_batch(run_id, metrics, params, run_tags)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield from _flatten({str(n): item for n, item in enumerate(value, 1)}, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
