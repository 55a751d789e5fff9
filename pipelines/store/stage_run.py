"""The run of one stage or trial: its epochs, its results and the commit."""

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from time import time
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from aecore.core.errors import OutageError
from aecore.models.storage import (
    RESULT_FILES,
    Result,
    Weights,
    load_results,
    load_weights,
    save_results,
    save_weights,
)
from pipelines.graph.stage import Stage
from pipelines.host.messages import one_line
from pipelines.host.scratch import scratch
from pipelines.store.client import Store
from pipelines.store.errors import LostResultError
from pipelines.store.lease import check_leases, held_leases
from pipelines.store.models import log_model
from pipelines.store.record import MEASURED, TRAINED

FIGURES = "figures"
_RESULT = "result"
_MOST_VALUES, _MOST_PARAMS, _MOST_CHARACTERS = 1000, 100, 6000
"""MLflow's limits: metrics, params and tags of one request, params among them, characters of a param."""
Points = Sequence[tuple[int, int, Mapping[str, float]]]
"""Epochs: number from 1, Unix time in milliseconds, metrics."""


class StageRun:
    """The open run of a stage or trial, to which epochs, results and the status are written.

    Args:
        files: The URI of the run's artifacts.
        last_epoch: The last epoch that an earlier attempt has logged, 0 if there is none.
        metrics: The last value of each metric that the run has already.
        params: The params that the run does not have yet; they are logged with the first epochs.
        attempt: The number of this attempt, from 1.
    """

    def __init__(
        self, tracker: Store, run_id: str, files: str, *, last_epoch: int = 0, metrics: Mapping[str, float] = {},
        params: Sequence[Param] = (), attempt: int = 1,
    ) -> None:  # fmt: skip
        self.tracker, self.run_id, self.files, self.last_epoch = tracker, run_id, files, last_epoch
        self.attempt = attempt
        self.metrics, self._params = dict(metrics), list(params)

    def waiting_like(self, tracker: Store) -> "StageRun":
        """Return an object for the same run whose calls wait for MLflow as long as those of `tracker`."""
        return StageRun(
            tracker, self.run_id, self.files, last_epoch=self.last_epoch, metrics=self.metrics, params=self._params,
            attempt=self.attempt,
        )  # fmt: skip

    def log(self, points: Points, last: Sequence[Metric] = ()) -> None:
        """Log epochs, each once whatever the number of attempts, and final metrics in the same request if possible."""
        fresh = list({point[0]: point for point in points if point[0] > self.last_epoch}.values())
        # whole epochs up to MLflow's limit: if killed between two requests, no epoch is there in part
        size = max(1, _MOST_VALUES // max((len(metrics) for _, _, metrics in fresh), default=1))
        batches = [
            [
                Metric(name, value, when, n)
                for n, when, metrics in fresh[i : i + size]
                for name, value in metrics.items()
            ]
            for i in range(0, len(fresh), size)
        ]
        if batches and len(batches[-1]) + len(last) + len(self._params) <= _MOST_VALUES:
            batches[-1] += last
        elif last:
            batches.append(list(last))
        for batch in batches:
            self._log_values(batch)
        self.last_epoch = max([self.last_epoch, *(point[0] for point in points)])

    def commit(self, result: Result, served: tuple[Any, Any] | None = None) -> None:
        """Upload the result of the stage, then set the run FINISHED, which makes the result count.

        Args:
            served: A few rows as the model is asked for them and its output, if the result is a model to be served.

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
            if served is not None:
                self._log_values([])  # the model takes the run's params over
                log = partial(log_model, self.tracker, self.run_id, folder, *served)
                model_id = self.tracker.wait_for(log)
        self._log_values(summary_points(result.metrics, self.metrics, model_id))
        self._finish()

    def keep(self, results: Mapping[str, Result]) -> None:
        """Upload the results of the trained stages of a trial, by key, as one file.

        The file is not read back: its checksum tells whoever reads it whether it is whole.
        """
        self._keep(TRAINED, results)

    def commit_trial(
        self, key: str, result: Result, points: Points, totals: Mapping[str, float], spent: Mapping[str, float]
    ) -> None:
        """Log the epochs of a trial and its measures, upload its measures, then set the run FINISHED.

        Args:
            key: The key of the trial's last stage, which has made `result`.
            totals: Further final metrics.
            spent: What all attempts have cost, by metric.

        Raises:
            TakenOverError: Another driver has taken the job over; the run is left to it.
        """
        final = {**result.metrics, **totals}
        self.log(points, [*summary_points(final, self.metrics), *self._costs(spent)])
        self._keep(MEASURED, {key: result})
        self._finish()

    def fail(self, error: Exception, points: Points = (), spent: Mapping[str, float] = {}) -> None:
        """End the run as FAILED and write down why, if MLflow answers."""
        hasty = self.waiting_like(self.tracker._replace(patience=0.0))
        with suppress(OutageError):  # the error itself matters more than that MLflow cannot record it
            hasty.log(points, self._costs(spent))
            tags = {"error": f"{type(error).__name__}: {one_line(error, 500)}"}
            log_batch(hasty.tracker.client, self.run_id, params=hasty._params, tags=tags)
            hasty.close("FAILED")

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self.tracker.client.set_terminated(self.run_id, status)

    def _costs(self, spent: Mapping[str, float]) -> list[Metric]:
        # a step per attempt, since each attempt raises the costs
        return [Metric(name, value, round(1000 * time()), self.attempt) for name, value in spent.items()]

    def _finish(self) -> None:
        check_leases(self.tracker, {*self.tracker.leases, *held_leases()})
        self.close("FINISHED")

    def _log_values(self, values: Sequence[Metric]) -> None:
        log_batch(self.tracker.client, self.run_id, values, self._params)
        self._params = []
        self.metrics |= {metric.key: metric.value for metric in values}

    def _keep(self, name: str, results: Mapping[str, Result]) -> None:
        with scratch() as folder:
            save_results(folder / name, results)
            self.tracker.wait_for(lambda: self.tracker.files_at(self.files).log_artifact(str(folder / name)))

    def _upload(self, folder: Path) -> None:
        """Upload a folder, then read the result back: an upload that was cut short may not become a result."""
        hasty = self.tracker._replace(patience=0.0)
        if not (folder / _RESULT).is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        hasty.files_at(self.files).log_artifacts(str(folder))
        try:
            download_result(hasty, self.files)
        except (LostResultError, OutageError) as error:
            raise ConnectionError(f"upload of {_RESULT}/ is not whole: {error}") from error


def download_result(store: Store, files: str) -> tuple[dict[str, Any], Weights]:
    """Return configuration and weights of a stage from the artifacts of its run, in two requests.

    Raises:
        LostResultError: The artifacts are missing or were altered.
        OutageError: MLflow does not answer.
    """
    with scratch() as folder, _is_lost(ValueError, FileNotFoundError):
        for name in RESULT_FILES:
            _download(store, files, f"{_RESULT}/{name}", folder)
        return load_weights(folder / _RESULT)


def download_results(store: Store, files: str, place: str) -> dict[str, Result]:
    """Return the results in one file, by key, from the artifacts of a trial's run, in one request.

    Raises:
        LostResultError: The file is missing or was altered.
        OutageError: MLflow does not answer.
    """
    with scratch() as folder, _is_lost(ValueError, FileNotFoundError):
        return load_results(_download(store, files, place, folder))


@contextmanager
def _is_lost(*kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        raise LostResultError(one_line(error, 200)) from error


def _download(store: Store, files: str, path: str, folder: Path) -> Path:
    """Download one file into `folder`."""

    def download() -> Path:
        artifacts = store.files_at(files)
        # it is a file; MLflow would ask for a list first, to see whether it is a folder
        vars(artifacts)["list_artifacts"] = lambda path=None: []
        try:
            return Path(artifacts.download_artifacts(path, str(folder)))
        except Exception:  # what a file that is not there raises differs from store to store
            listed = store.files_at(files).list_artifacts(path.rpartition("/")[0] or None)
            if not any(file.path == path for file in listed):
                raise LostResultError(f"{files} has no {path}") from None
            raise

    return store.wait_for(download)


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


def params_of(config: Mapping[str, Any]) -> list[Param]:
    """Return a configuration as params under names like network.widths."""
    return [Param(name, value[:_MOST_CHARACTERS]) for name, value in _flatten(config)]


def trial_params(stage: Stage) -> list[Param]:
    """Return the params of a trial: those of its last stage, and with them those of the stack that it measures; the
    layers are one param, so that all params fit into one request."""
    config = stage.spec.model_dump(mode="json")
    if isinstance(stack := stage.inputs.get("stack"), Stage):
        config = {**stack.spec.model_dump(mode="json"), **config}
        config["layers"] = json.dumps(config["layers"])
    return params_of(config)


def log_batch(
    client: MlflowClient, run_id: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = (),
    tags: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Log any number of metrics and params, and tags, in as few requests as MLflow allows."""
    run_tags = [RunTag(name, value) for name, value in (tags or {}).items()]
    while len(params) > _MOST_PARAMS or (params and len(metrics) + len(params) + len(run_tags) > _MOST_VALUES):
        client.log_batch(run_id, params=params[:_MOST_PARAMS])
        params = params[_MOST_PARAMS:]
    while len(metrics) + len(run_tags) > _MOST_VALUES:
        client.log_batch(run_id, metrics[:_MOST_VALUES])
        metrics = metrics[_MOST_VALUES:]
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
