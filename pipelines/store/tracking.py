"""MLflow, the one store of finished results; nothing else imports it.

A stage is one run, tagged with its key, however often it was attempted. Artifacts come first, the status FINISHED last:
that is the commit, and what has it is restored instead of computed. A job is one driver's at a time, by a lease. Calls
wait out an outage, and each may be given twice, since an answer may be lost on its way.
"""

import errno
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import mlflow
import psutil
import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, infer_signature
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from aecore.config.facts import Facts
from aecore.core.errors import InputError, OutageError, TakenOverError
from aecore.models.storage import Result, Weights, load_weights, save_weights
from pipelines.graph.stage import Stage
from pipelines.host.environment import store_uri
from pipelines.host.scratch import all_temporary, is_dead, me, scratch

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


# MLflow's own 7 tries of 120 s each hold a call up for a quarter of an hour; whoever can wait longer does so itself
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")


os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")


os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")  # it would run what a file says


logging.getLogger("mlflow").setLevel(logging.WARNING)  # on stdout's neighbour stderr, between lines of progress


logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # whose errors are raised, too


logging.getLogger("alembic").setLevel(logging.WARNING)


logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # environments that uv makes have no pip


_FOLDER, _FIGURES, _MODEL = "result", "figures", "model"
_LOADER, _EARLIER_LOADER = "aecore.serving.model", "aecore.pyfunc"
"""Module that loads our models in MLflow, and the one of models that were logged before it moved."""
_STOPPED, _MARKED = "stopped.epoch", "stage.key.names"
_SYSTEM_SECONDS = 5.0
_MODEL_NEEDS = ("mlflow", "jaxtyping", "numpy", "pandas", "pydantic", "safetensors", "scikit-learn", "torch")
_LEASE = "diabolo.lease."
_BEAT_SECONDS, _POLL_SECONDS, _SILENT_SECONDS = 10.0, 2.0, 60.0
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
"""Seconds between the first two tries of a call, doubled each time, and at most."""
_HURRY_SECONDS, _CLOSE_SECONDS = 1.5, 60.0
"""What closing a job's runs may take: when it is to end now, and otherwise."""
_PASSING = {
    "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED",
    "ABORTED", "CANCELLED",
}  # fmt: skip
"""MLflow's codes for what may be better later; it calls a lost connection an internal error."""
_NETWORK = {"azure", "boto3", "botocore", "google", "urllib3"}
"""Packages below MLflow whose exceptions are about the network."""
T = TypeVar("T")


class Version(NamedTuple):
    """A version of a registered model."""

    number: str
    tags: dict[str, str]


class Registered(NamedTuple):
    """A version of a registered model."""

    uri: str
    """models:/NAME/VERSION."""
    digest: str
    """SHA-256 of its files."""
    result: Result
    """Of the finetuning that made it."""
    model_id: str | None
    """MLflow's own name for it."""


class LostResultError(Exception):
    """A finished stage's artifacts are gone or altered."""


class Tracker(NamedTuple):
    """Where results are kept; small enough to travel to every task."""

    uri: str
    experiment_id: str
    patience: float = 0.0
    """Seconds for which each call waits for an MLflow that does not answer, before it raises an OutageError."""
    marked: bool = False
    """Whether all of the experiment's runs bear their key in a tag's name."""

    @property
    def client(self) -> MlflowClient:
        """Patient, and only for calls that may be given twice."""
        return cast(MlflowClient, _Patient(self.direct, self.wait_for))

    @property
    def direct(self) -> MlflowClient:
        """Raises at once."""
        return MlflowClient(tracking_uri=self.uri)

    def wait_for(self, call: Callable[[], T]) -> T:
        """What `call` returns, tried again with growing pauses for as long as MLflow does not answer.

        Raises:
            OutageError: patience is at its end.
        """
        began, pause, told = time.monotonic(), _FIRST_WAIT, False
        while True:
            try:
                return call()
            except Exception as error:
                if not _may_pass(error):
                    raise
                reason = " ".join(str(error).split())[:160]
                left = began + self.patience - time.monotonic()
                if left <= 0:
                    waited = f"has not answered for {self.patience:g} s" if self.patience else "does not answer"
                    raise OutageError(
                        f"MLflow at {_redacted(self.uri)} {waited} ({reason}); "
                        "the same command goes on from what is kept"
                    ) from error
            if not told:
                _say(f"warning: MLflow does not answer ({reason}); waiting for it, {self.patience:g} s at most")
                told = True
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_WAIT)

    def find(self, key: str) -> str | None:
        """The finished run of a stage (or job), if there is one."""
        found = self.finished(key)
        return found[0] if found else None

    def finished(self, key: str) -> tuple[str, dict[str, float]] | None:
        """The same with its metrics."""
        run = self._with_key(key, " and attributes.status = 'FINISHED'")
        return (run.info.run_id, _metrics(run)) if run else None

    def metrics(self, run_id: str) -> dict[str, float]:
        """The last value of each metric of a run, system metrics left out."""
        return _metrics(self.client.get_run(run_id))

    def restore(self, run_id: str) -> Result:
        """The result of a finished stage.

        Raises:
            LostResultError: its artifacts are gone or altered; the run is FAILED then, and the stage is to be computed.
            OutageError: they cannot be had now.
        """
        try:
            config, weights = self._download(run_id)
        except LostResultError:
            self.client.set_terminated(run_id, "FAILED")
            raise
        return Result(config, weights, self.metrics(run_id))

    def _download(self, run_id: str) -> tuple[dict[str, Any], Weights]:
        client = self.client
        if not client.list_artifacts(run_id, _FOLDER):
            raise LostResultError(f"run {run_id} has no {_FOLDER}/")
        with scratch() as folder:
            try:
                return load_weights(Path(client.download_artifacts(run_id, _FOLDER, str(folder))))
            except (FileNotFoundError, ValueError) as error:
                raise LostResultError(" ".join(str(error).split())[:200]) from error

    def save_figures(self, run_id: str, folder: Path) -> list[Path]:
        """Download a run's figures into `folder`."""
        client = self.client
        names = [item.path for item in client.list_artifacts(run_id, _FIGURES)]
        folder.mkdir(parents=True, exist_ok=True)
        saved = []
        for name in names:
            with scratch() as temporary:
                path = client.download_artifacts(run_id, name, str(temporary))
                saved.append(folder / Path(name).name)
                saved[-1].write_bytes(Path(path).read_bytes())
        return saved

    def open_run(
        self, stage: Stage, parent: str, began: int | None = None, run_id: str | None = None,
        more: Mapping[str, str] | None = None,
    ) -> "StageRun":  # fmt: skip
        """The run of a stage, nested under the job's: a new one, or that of an earlier attempt.

        Args:
            began: when the stage began, Unix time in milliseconds; now by default.
            run_id: the run, if this attempt has opened it already.
            more: further tags.
        """
        client = self.client
        if run_id is not None:
            client.log_batch(run_id, tags=[RunTag(name, value) for name, value in (more or {}).items()])
            return StageRun(self, run_id, _last_epoch(client, run_id))
        tags = {
            "mlflow.runName": stage.name,
            MLFLOW_PARENT_RUN_ID: parent,
            "stage.key": stage.key,
            "stage.fn": stage.fn,
            "attempts": "1",
            **(more or {}),
        }
        run, earlier = self._find_or_create(stage.key, tags, began)
        run_id = run.info.run_id
        if earlier:
            # a run that is open still is this attempt's own
            ended = run.info.status != "RUNNING"
            tags["attempts"] = str(int(run.data.tags["attempts"]) + ended)
            if "error" in run.data.tags:
                tags["error"] = ""  # of an earlier attempt
            client.update_run(run_id, status="RUNNING")
            client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        _log_params(client, run_id, stage.spec.model_dump(mode="json"))
        return StageRun(self, run_id, _last_epoch(client, run_id) if earlier else 0)

    def _find_or_create(self, key: str, tags: Mapping[str, str], began: int | None = None) -> tuple[Run, bool]:
        """The run with this key, and whether it was there."""
        client = self.direct

        def look_then_create() -> tuple[Run, bool]:  # each time: one may have been made though nobody said so
            found = self._with_key(key, client=client)
            if found:
                return found, True
            return client.create_run(self.experiment_id, began, {**tags, _mark(key): "1"}), False

        return self.wait_for(look_then_create)

    @contextmanager
    def job_run(self, job: str, key: str, tags: Mapping[str, str], config: dict[str, Any]) -> Iterator[str]:
        """The top-level run of a job: FINISHED, FAILED on an error, KILLED when interrupted.

        The job's earlier run is taken up again, so that a job is one run however often it was started. Where another
        driver works on the same job, this one waits until that has ended or died.

        Args:
            config: logged as params of a new run; only what `key` covers, since params never change.

        Raises:
            TakenOverError: this driver was silent for so long that another has taken the job.
        """
        client = self.client
        tags = {
            "mlflow.runName": job,
            "mlflow.user": _user(),
            "job": job,
            "stage.key": key,
            "git.commit": _git_commit(),
            "driver": me(),
            **tags,
        }
        lease = _Lease(self, key, job)
        run_id = None
        lease.take()
        try:
            self._close_abandoned(client)
            run, earlier = self._find_or_create(key, tags)
            run_id = run.info.run_id
            with system_metrics(self.uri, run_id), all_temporary():
                if earlier:
                    client.update_run(run_id, status="RUNNING")
                    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
                if not run.data.params:  # a new run, or one whose driver got no further
                    _log_params(client, run_id, config)
                yield run_id
            lease.check()
            client.set_terminated(run_id, "FINISHED")
        except BaseException as error:
            lease.end()
            if lease.lost:
                raise TakenOverError(
                    f"another driver has taken this {job} over, since this one was silent for {_SILENT_SECONDS:g} s; "
                    "what that one does counts"
                ) from error
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            status = "KILLED" if interrupted else "FAILED"
            hurry = interrupted or isinstance(error, OutageError)
            hasty = self._replace(patience=0.0)

            def close() -> None:
                if run_id is not None:
                    hasty._close(hasty.direct, run_id, status)
                lease.remove()

            _within(_HURRY_SECONDS if hurry else _CLOSE_SECONDS, close)
            raise
        lease.end()
        _within(_HURRY_SECONDS, partial(self.wait_for, lease.remove))

    def stop(self, key: str, epoch: int) -> None:
        """End the run of a trial that a scheduler stopped after so many epochs."""
        self._end(key, "KILLED", _STOPPED, str(epoch))

    def fail(self, key: str, error: str) -> None:
        """End the run of a trial whose process died without a word."""
        self._end(key, "FAILED", "error", error)

    def _end(self, key: str, status: str, tag: str, value: str) -> None:
        if run := self._with_key(key, " and attributes.status = 'RUNNING'"):
            self.client.set_tag(run.info.run_id, tag, value)
            self._close(self.client, run.info.run_id, status)

    def stopped(self, key: str) -> int | None:
        """The epoch after which a scheduler stopped a trial, if one did."""
        run = self._with_key(key, f" and tags.`{_STOPPED}` LIKE '%'")
        return int(run.data.tags[_STOPPED]) if run else None

    def trials(self, study: str, row: str) -> list[tuple[dict[str, Any], str]]:
        """Settings and run of each finished trial of a study's row."""
        found = self._search(
            f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{study}' and tags.`row` = '{row}' and attributes.status = 'FINISHED'",
            1000,
        )
        return [(json.loads(run.data.tags["settings"]), run.info.run_id) for run in found]

    def log_folder(self, run_id: str, folder: Path, place: str) -> None:
        """Upload everything in `folder` to `place` among the run's artifacts."""
        self.client.log_artifacts(run_id, str(folder), place)

    def log_data(
        self, run_id: str, name: str, facts: Facts, context: str = "training", model_id: str | None = None
    ) -> None:
        """Record which data a run read, and with which model."""
        inputs = self.client.get_run(run_id).inputs
        if inputs and inputs.dataset_inputs:
            return
        profile = {"rows": facts.rows, "shape": facts.shape, "classes": len(facts.classes)}
        dataset = Dataset(
            name=name, digest=facts.digest[:36], source_type="local", source=json.dumps({"digest": facts.digest}),
            profile=json.dumps(profile),
        )  # fmt: skip
        models = [LoggedModelInput(model_id)] if model_id else None
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])], models)

    def log_summary(self, run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Final metrics and tags of a job or stage; a metric that stands there already is not logged twice, nor is how
        long an earlier attempt took."""
        client = self.client
        known = client.get_run(run_id).data.metrics
        now = int(time.time() * 1000)
        points = [
            Metric(name, value, now, 0)
            for name, value in metrics.items()
            if name not in known or (known[name] != value and not name.endswith("_seconds"))
        ]
        client.log_batch(run_id, points, tags=[RunTag(name, value) for name, value in tags.items()])

    def model_uri(self, run_id: str) -> str:
        """The model that a finetuning logged."""
        outputs = self.client.get_run(run_id).outputs
        assert outputs is not None, "a finished finetuning has a model"
        return f"models:/{outputs.model_outputs[0].model_id}"

    def register(self, name: str, uri: str, tags: Mapping[str, str] | None = None) -> str:
        """Register a logged model under `name`; the version, which is the same if it was registered before."""
        mlflow.set_tracking_uri(self.uri)

        def look_then_register() -> str:
            for known in self.direct.search_model_versions(f"name = '{name}'"):
                if known.source == uri or known.tags.get("model.uri") == uri:
                    return str(known.version)
            return str(mlflow.register_model(uri, name, tags={"model.uri": uri}).version)

        number = self.wait_for(look_then_register)
        known = self.client.get_model_version(name, number).tags if tags else {}
        for tag, value in (tags or {}).items():
            if tag not in known:  # who registers first says what it is
                self.client.set_model_version_tag(name, number, tag, value)
        return number

    def version(self, name: str, alias: str) -> Version | None:
        """The version of a registered model that has this alias, if there is one."""
        try:
            found = self.client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return Version(str(found.version), dict(found.tags))

    def set_alias(self, name: str, alias: str, number: str) -> None:
        """Let an alias name this version, and no other any more."""
        self.client.set_registered_model_alias(name, alias, number)

    def runs(self, tags: Mapping[str, str], status: str = "FINISHED", limit: int = 1000) -> list[Run]:
        """Runs with all of these tags, the newest first."""
        conditions = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
        return self._search(" and ".join([*conditions, f"attributes.status = '{status}'"]), limit)

    @contextmanager
    def lease(self, key: str, what: str) -> Iterator[Callable[[], None]]:
        """The right to do something, one driver's at a time; gives what raises a TakenOverError when it is lost."""
        lease = _Lease(self, key, what)
        lease.take()
        try:
            yield lease.check
        finally:
            lease.end()
            _within(_HURRY_SECONDS, partial(self.wait_for, lease.remove))

    def load_model(self, uri: str) -> Registered:
        """A registered model by models:/NAME@ALIAS or models:/NAME/VERSION. Only safetensors and JSON are read.

        Raises:
            InputError: there is none, it was altered, or `aecore.pyfunc` is not what made it.
        """
        found = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
        if not found:
            raise InputError(
                f"model: {uri} names no registered model; write models:/NAME@ALIAS or models:/NAME/VERSION"
            )
        name, alias, number = found.groups()
        client = self.client
        try:
            version = (
                client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
            )
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise InputError(
                f"model: {_redacted(self.uri)} has no {uri}; jobs.train --register NAME makes a version, and "
                "jobs.retrain a champion"
            ) from None
        mlflow.set_tracking_uri(self.uri)
        exact = f"models:/{name}/{version.version}"
        with scratch() as temporary:
            try:
                download = partial(mlflow.artifacts.download_artifacts, exact, dst_path=str(temporary))
                folder = Path(self.wait_for(download))
                flavor = yaml.safe_load((folder / "MLmodel").read_text())["flavors"].get("python_function", {})
                if flavor.get("loader_module") not in (_LOADER, _EARLIER_LOADER):
                    raise InputError(
                        f"model: {uri} was not made by jobs.train, and is not unpickled; name one that was"
                    )
                config, weights = load_weights(folder / flavor["data"])
                digest = json.loads((folder / flavor["data"] / "config.json").read_text())["sha256"]
            except (OSError, ValueError, KeyError, MlflowException, yaml.YAMLError) as error:
                if isinstance(error, InputError):
                    raise
                reason = " ".join(str(error).split())[:160]
                raise InputError(f"model: {uri} is lost or was altered ({reason}); register it again") from error
        source = version.source or ""
        model_id = source.removeprefix("models:/") if source.startswith("models:/m-") else None
        return Registered(exact, digest, Result(config, weights, {}), model_id)

    def _search(self, condition: str, limit: int, client: MlflowClient | None = None) -> list[Any]:
        return list((client or self.client).search_runs([self.experiment_id], condition, max_results=limit))

    def _with_key(self, key: str, condition: str = "", client: MlflowClient | None = None) -> Run | None:
        """The run with this key, if there is one: by a tag's name or, of runs from before there was one, by a value."""
        found = self._search(f"tags.`{_mark(key)}` = '1'{condition}", 1, client)
        if not found and not self.marked:
            found = self._search(f"tags.`stage.key` = '{key}'{condition}", 1, client)
        return found[0] if found else None

    def _open(self) -> list[Any]:
        # few of many: MLflow would go through all tags of a name, of finished runs too, to find them
        return self._search("attributes.status = 'RUNNING'", 1000)

    def _close(self, client: MlflowClient, run_id: str, status: str) -> None:
        """End a run and whichever runs nested in it are open."""
        for run in self._open():
            if run.data.tags.get(MLFLOW_PARENT_RUN_ID) == run_id:
                self._close(client, run.info.run_id, status)
        client.set_terminated(run_id, status)

    def _close_abandoned(self, client: MlflowClient) -> None:
        """End the runs of drivers of this machine that died without a word, and stages whose job has ended."""
        found = self._open()
        for run in found:
            if "job" in run.data.tags and is_dead(run.data.tags.get("driver", "")):
                self._close(client, run.info.run_id, "KILLED")
        for run in self._open() if found else ():
            parent = run.data.tags.get(MLFLOW_PARENT_RUN_ID) if "stage.fn" in run.data.tags else None
            if parent and client.get_run(parent).info.status != "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")


class StageRun:
    """The open run of a stage."""

    def __init__(self, tracker: Tracker, run_id: str, seen: int) -> None:
        self.tracker, self.client, self.run_id = tracker, tracker.client, run_id
        self.seen = seen  # epochs that this or an earlier attempt has logged

    def log(self, points: Sequence[tuple[int, int, Mapping[str, float]]]) -> None:
        """Log epochs (number, Unix time in milliseconds, metrics), each once whatever the number of attempts."""
        fresh = [point for point in points if point[0] > self.seen]
        # whole epochs up to MLflow's limit: killed between two batches, no epoch is there in part
        size = max(1, 1000 // max((len(found) for _, _, found in fresh), default=1))
        for start in range(0, len(fresh), size):
            batch = fresh[start : start + size]
            metrics = [Metric(name, value, when, n) for n, when, found in batch for name, value in found.items()]
            self.client.log_batch(self.run_id, metrics)
        self.seen = max([self.seen, *(point[0] for point in points)])

    def commit(self, result: Result, served: Any = None) -> None:
        """Upload everything that the stage returned, then set FINISHED, which makes it count.

        Args:
            served: what the model makes of `result.example`, where there is one.
        """
        self.tracker.log_summary(self.run_id, result.metrics, {})
        with scratch() as temporary:
            folder = temporary / _FOLDER
            save_weights(folder, result.config, result.weights)
            for name, png in result.figures.items():
                (temporary / _FIGURES).mkdir(exist_ok=True)
                (temporary / _FIGURES / f"{name}.png").write_bytes(png)
            self.tracker.wait_for(partial(self._upload, temporary))
            if result.example is not None:
                self.tracker.wait_for(partial(self._log_model, folder, result.example, served))
        for lease in _held.values():
            lease.check()
        self.close("FINISHED")

    def _upload(self, folder: Path) -> None:
        """Upload, and read back what counts: a torn upload may not become a result."""
        hasty = self.tracker._replace(patience=0.0)
        if not (folder / _FOLDER).is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        hasty.direct.log_artifacts(self.run_id, str(folder))
        try:
            hasty._download(self.run_id)
        except (LostResultError, OutageError) as error:
            raise ConnectionError(f"upload of {_FOLDER}/ is not whole: {error}") from error

    def _log_model(self, folder: Path, example: Any, served: Any) -> None:
        """Log the model in `folder` so that it loads anywhere: our own code travels with it, pickle does not.

        What an earlier try left is taken up again, so that a run has one model.
        """
        import aecore

        client = self.tracker.direct
        experiment = self.tracker.experiment_id
        found = client.search_logged_models([experiment], f"source_run_id = '{self.run_id}'")
        run = client.get_run(self.run_id)
        model = found[0] if found else client.create_logged_model(
            experiment, _MODEL, source_run_id=self.run_id, params=run.data.params
        )  # fmt: skip
        outputs = run.outputs.model_outputs if run.outputs else []
        linked = model.model_id in [output.model_id for output in outputs]
        mlflow.set_tracking_uri(self.tracker.uri)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on type hints that a loader module cannot follow
            Model.log(
                artifact_path=None,
                flavor=_Untried,
                validate_serving_input=False,
                name=_MODEL,
                model_id=model.model_id,
                run_id=None if linked else self.run_id,  # links it to the run
                loader_module=_LOADER,
                data_path=str(folder),
                code_paths=[str(Path(aecore.__file__).parent)],
                pip_requirements=[f"{name}=={version(name)}" for name in _MODEL_NEEDS],
                signature=infer_signature(example, served),
                input_example=example,
            )

    def fail(self, error: Exception) -> None:
        """End the run as FAILED and say why, if MLflow answers."""
        text = " ".join(str(error).split())[:500]
        client = self.tracker._replace(patience=0.0).client
        with suppress(OutageError):  # the error itself is more than that it cannot be written down
            client.set_tag(self.run_id, "error", f"{type(error).__name__}: {text}")
            client.set_terminated(self.run_id, "FAILED")

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)


class _Untried:
    """MLflow's pyfunc, without loading the model to try it: that would import torch into the driver."""

    @staticmethod
    def save_model(validate_serving_input: bool, **kwargs: Any) -> None:
        mlflow.pyfunc.save_model(**kwargs)


class _Patient:
    """A client whose calls wait out an outage. A call's arguments, times included, are the same at each try."""

    def __init__(self, client: MlflowClient, wait_for: Callable[[Callable[[], Any]], Any]) -> None:
        self._client, self._wait_for = client, wait_for

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **kwargs: self._wait_for(partial(method, *args, **kwargs))


class _Lease:
    """The right to work on a job, one driver's at a time.

    Whoever wants it registers a model of a name of its own, then looks: alone, it holds; else it takes its own back and
    waits. Of two that come at once, the later one at least sees the other, so that never two hold; and the first by
    name stays, so that one does. A name is used once, so that whoever removes a dead driver's lease can never remove
    another's. A heartbeat shows that the driver lives; no clocks are compared.
    """

    def __init__(self, tracker: Tracker, key: str, job: str) -> None:
        self.tracker, self.job = tracker, job
        self.prefix = f"{_LEASE}{key[:32]}."
        self.name = ""
        self.ended = threading.Event()
        self.lost = False
        self.beats: dict[str, tuple[str, float]] = {}  # of others: the last one, and when it was first seen
        self.looked = time.monotonic()

    def take(self) -> None:
        """Wait until no other living driver has it; then it is this one's."""
        told = False
        while True:
            others = self._others()
            if not others:
                try:
                    self._create()
                    until = time.monotonic() + _POLL_SECONDS
                    while (others := self._others()) and self.name < min(others) and time.monotonic() < until:
                        time.sleep(_POLL_SECONDS / 20)
                    if not others:
                        break
                except BaseException:
                    self.end()
                    _within(_HURRY_SECONDS, self.remove)
                    raise
                self.tracker.wait_for(self.remove)
            if not told:
                owner = others[min(others)]
                _say(f"another driver ({owner}) works on the same {self.job}: waiting until it has ended")
                told = True
            time.sleep(_POLL_SECONDS)
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Raises a TakenOverError where another driver has removed this lease."""
        try:
            self.tracker.client.get_registered_model(self.name)
        except MlflowException as error:
            self.lost = error.error_code == "RESOURCE_DOES_NOT_EXIST"
            if self.lost:
                raise TakenOverError(f"another driver has taken this {self.job} over") from error
            raise

    def end(self) -> None:
        """Let the heart stop; whatever becomes of `remove`, the lease counts as a dead driver's."""
        self.ended.set()
        _held.pop(self.name, None)

    def remove(self) -> None:
        """Let the next one have it at once."""
        _held.pop(self.name, None)
        _remove(self.tracker.direct, self.name)

    def _create(self) -> None:
        self.name = self.prefix + uuid.uuid4().hex[:12]
        _held[self.name] = self
        with _unless("RESOURCE_ALREADY_EXISTS"):  # by a try whose answer was lost, since nobody else uses this name
            self.tracker.client.create_registered_model(
                self.name, {"owner": me(), "beat": "0"}, "Held while a job of Diabolo runs."
            )

    def _others(self) -> dict[str, str]:
        """Leases of other living drivers on the same job, and their owners; those of the dead are removed."""
        client = self.tracker.client
        models = client.search_registered_models(f"name LIKE '{_LEASE}%'", max_results=1000)
        now = time.monotonic()
        if now - self.looked > _SILENT_SECONDS / 4:  # MLflow or this process was away: nobody could be heard
            self.beats.clear()
        self.looked = now
        found = {}
        for model in models:
            if model.name == self.name:
                continue
            owner, beat = model.tags.get("owner", ""), model.tags.get("beat", "")
            last = self.beats.get(model.name)
            if last is None or last[0] != beat:
                last = self.beats[model.name] = beat, now
            silent = now - last[1] > _SILENT_SECONDS
            forgotten = owner == me() and model.name not in _held
            if silent or forgotten or is_dead(owner):
                self.tracker.wait_for(partial(_remove, self.tracker.direct, model.name))
            elif model.name.startswith(self.prefix):
                found[model.name] = owner
        return found

    def _beat(self) -> None:
        client = self.tracker.direct
        for number in itertools.count(1):
            if self.ended.wait(_BEAT_SECONDS):
                return
            try:
                client.set_registered_model_tag(self.name, "beat", str(number))
            except Exception as error:  # an outage: others cannot hear anybody either
                if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST" and not self.ended.is_set():
                    self.lost = True
                    # wakes the driver, wherever it waits
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return


_held: dict[str, _Lease] = {}
"""This process's leases."""


def _metrics(run: Run) -> dict[str, float]:
    return {name: value for name, value in run.data.metrics.items() if not name.startswith("system/")}


def _mark(key: str) -> str:
    """The name of a tag that no other run has: MLflow's tables have an index of tags' names, none of their values."""
    return f"stage.key.{key}"


def _remove(client: MlflowClient, lease: str) -> None:
    with _unless("RESOURCE_DOES_NOT_EXIST"):
        client.delete_registered_model(lease)


@contextmanager
def _unless(code: str) -> Iterator[None]:
    """Ignore MLflow's error of this code."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != code:
            raise


def _may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later: the network or the server failed, not what was asked for."""
    if isinstance(error, MlflowException):
        return error.error_code in _PASSING
    code = getattr(getattr(error, "response", None), "status_code", None)  # of an artifact store over HTTP
    if code is not None:
        return code >= 500 or code in (408, 429)
    if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
        return False
    if getattr(error, "errno", None) == errno.EROFS:
        return False
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK


def _within(seconds: float, act: Callable[[], None]) -> None:
    """Do something, but wait no longer than this; what hangs is left to a thread that ends with the process."""

    def quietly() -> None:
        try:
            act()
        except Exception as error:
            _say(f"warning: {' '.join(str(error).split())[:160]}")

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _last_epoch(client: MlflowClient, run_id: str) -> int:
    return max((point.step for point in client.get_metric_history(run_id, "seconds")), default=0)


def connect(uri: str | None = None, experiment: str | None = None, create: bool = True) -> Tracker | None:
    """The store named by MLFLOW_TRACKING_URI, else SQLite in the working directory; its schema is made here, once.

    Returns:
        None where there is no store yet and `create` is false.

    Raises:
        InputError: the store cannot be reached.
    """
    uri = uri or store_uri()
    experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "diabolo"
    local = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    if local is not None:
        if not create and not local.exists():
            return None
        local = local.resolve()  # tasks run in other folders
        uri = f"sqlite:///{local}"
    try:
        if local is not None and not local.exists():
            _make_store(local)
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None and found.lifecycle_stage != "active":
            raise InputError(
                f"MLFLOW_EXPERIMENT_NAME: experiment {experiment} is deleted in {_redacted(uri)}; "
                "restore it or choose another name"
            )
        if found is not None:
            return Tracker(uri, found.experiment_id, marked=_MARKED in found.tags)
        artifacts = (local.parent / "mlruns" / experiment).as_uri() if local is not None else None
        if not create:
            return None
        with _unless("RESOURCE_ALREADY_EXISTS"):  # made by another driver just now
            return Tracker(uri, client.create_experiment(experiment, artifacts, {_MARKED: "yes"}), marked=True)
        return connect(uri, experiment)
    except (MlflowException, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"MLFLOW_TRACKING_URI: cannot use {_redacted(uri)} ({reason}); start the server or correct the address"
        ) from error


def _make_store(path: Path) -> None:
    """Make MLflow's tables elsewhere and put them in place at once.

    It takes seconds, and MLflow's own way leaves a file that can never be used again if it is killed in the middle, or
    if two drivers do it together. Where this cannot be done, MLflow does it.
    """
    with scratch() as folder:
        MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with scratch(path.parent) as beside:
                shutil.copyfile(folder / "mlflow.db", beside / "mlflow.db")
                os.link(beside / "mlflow.db", path)  # never replaces another driver's


def _redacted(uri: str) -> str:
    """An address without the password in it."""
    scheme, found, rest = uri.partition("://")
    return f"{scheme}://***@{rest.rpartition('@')[2]}" if found and "@" in rest else uri


def _log_params(client: MlflowClient, run_id: str, config: Mapping[str, Any]) -> None:
    params = [Param(name, value[:6000]) for name, value in _flat(config)]
    for start in range(0, len(params), 100):  # MLflow's limit
        client.log_batch(run_id, params=params[start : start + 100])


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield from _flat({str(n): item for n, item in enumerate(value, 1)}, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


@contextmanager
def system_metrics(uri: str, run_id: str) -> Iterator[None]:
    """CPU, memory, disk, network and GPU of this node, while the block runs."""
    monitor = SystemMetricsMonitor(run_id, sampling_interval=_SYSTEM_SECONDS, resume_logging=True, tracking_uri=uri)
    monitor.start()
    wait = 0.0
    try:
        yield
        wait = _HURRY_SECONDS
    finally:  # it asks MLflow once more, which may not answer
        _within(wait, monitor.finish)


def _git_commit() -> str:
    """The commit that runs; GIT_COMMIT names it where the folder is shipped without its history (`ray job submit`)."""
    if given := os.environ.get("GIT_COMMIT"):
        return given
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _user() -> str:
    try:
        return psutil.Process().username()
    except (KeyError, psutil.Error):
        return "unknown"
