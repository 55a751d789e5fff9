"""MLflow, the one store of finished results; nothing else imports it.

A stage is one run, tagged with its key, however often it was attempted. Artifacts come first, the status FINISHED last:
that is the commit, and what has it is restored instead of computed.
"""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import psutil
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from aecore.errors import InputError
from aecore.specs import Facts
from aecore.storage import Result, load_weights, save_weights
from pipelines.stage import Stage, store_uri

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
logging.getLogger("mlflow").setLevel(logging.WARNING)  # on stdout's neighbour stderr, between lines of progress
logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # environments that uv makes have no pip

_FOLDER, _FIGURES, _MODEL = "result", "figures", "model"
_STOPPED = "stopped.epoch"
_SYSTEM_SECONDS = 5.0
_MODEL_NEEDS = ("mlflow", "jaxtyping", "numpy", "pandas", "pydantic", "safetensors", "scikit-learn", "torch")


class LostResultError(Exception):
    """A finished stage's artifacts are gone or altered."""


class Tracker(NamedTuple):
    """Where results are kept; small enough to travel to every task."""

    uri: str
    experiment_id: str

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.uri)

    def find(self, key: str) -> str | None:
        """The finished run of a stage (or job), if there is one."""
        runs = self._search(f"tags.`stage.key` = '{key}' and attributes.status = 'FINISHED'", 1)
        return runs[0].info.run_id if runs else None

    def metrics(self, run_id: str) -> dict[str, float]:
        """The last value of each metric of a run, system metrics left out."""
        metrics = self.client.get_run(run_id).data.metrics
        return {name: value for name, value in metrics.items() if not name.startswith("system/")}

    def restore(self, run_id: str) -> Result:
        """The result of a finished stage.

        Raises:
            LostResultError: its artifacts are gone or altered; the run is FAILED then, and the stage is to be computed.
        """
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = mlflow.artifacts.download_artifacts(
                    run_id=run_id, artifact_path=_FOLDER, dst_path=folder, tracking_uri=self.uri
                )
                config, weights = load_weights(Path(path))
            except (MlflowException, OSError, ValueError) as error:
                self.client.set_terminated(run_id, "FAILED")
                raise LostResultError(" ".join(str(error).split())[:200]) from error
        return Result(config, weights, self.metrics(run_id))

    def save_figures(self, run_id: str, folder: Path) -> list[Path]:
        """Download a run's figures into `folder`."""
        names = [item.path for item in self.client.list_artifacts(run_id, _FIGURES)]
        folder.mkdir(parents=True, exist_ok=True)
        saved = []
        for name in names:
            with tempfile.TemporaryDirectory() as temporary:
                path = mlflow.artifacts.download_artifacts(
                    run_id=run_id, artifact_path=name, dst_path=temporary, tracking_uri=self.uri
                )
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
        earlier = self._search(f"tags.`stage.key` = '{stage.key}'", 1)
        tags = {
            "mlflow.runName": stage.name,
            MLFLOW_PARENT_RUN_ID: parent,
            "stage.key": stage.key,
            "stage.fn": stage.fn,
            "attempts": "1",
            **(more or {}),
        }
        if earlier:
            # a run that is open still is this attempt's own
            ended = earlier[0].info.status != "RUNNING"
            tags["attempts"] = str(int(earlier[0].data.tags["attempts"]) + ended)
        if earlier:
            run_id = earlier[0].info.run_id
            client.update_run(run_id, status="RUNNING")
            client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        else:
            run_id = client.create_run(self.experiment_id, began, tags).info.run_id
        _log_params(client, run_id, stage.spec.model_dump(mode="json"))
        return StageRun(self, run_id, _last_epoch(client, run_id) if earlier else 0)

    @contextmanager
    def job_run(self, job: str, key: str, tags: Mapping[str, str], config: dict[str, Any]) -> Iterator[str]:
        """The top-level run of a job: FINISHED, FAILED on an error, KILLED when interrupted.

        The job's earlier run is taken up again, so that a job is one run however often it was started.

        Args:
            config: logged as params of a new run; only what `key` covers, since params never change.
        """
        client = self.client
        self._close_abandoned(client)
        process = psutil.Process()
        tags = {
            "mlflow.runName": job,
            "mlflow.user": _user(),
            "job": job,
            "stage.key": key,
            "git.commit": _git_commit(),
            "driver": f"{socket.gethostname()} {process.pid} {process.create_time()}",
            **tags,
        }
        earlier = self._search(f"tags.`stage.key` = '{key}'", 1)
        run_id = earlier[0].info.run_id if earlier else client.create_run(self.experiment_id, tags=tags).info.run_id
        try:
            if earlier:
                client.update_run(run_id, status="RUNNING")
                client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
            else:
                _log_params(client, run_id, config)
            with system_metrics(self.uri, run_id):
                yield run_id
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            self._close(client, run_id, "KILLED" if interrupted else "FAILED")
            raise
        client.set_terminated(run_id, "FINISHED")

    def stop(self, key: str, epoch: int) -> None:
        """End the run of a trial that a scheduler stopped after so many epochs."""
        self._end(key, "KILLED", _STOPPED, str(epoch))

    def fail(self, key: str, error: str) -> None:
        """End the run of a trial whose process died without a word."""
        self._end(key, "FAILED", "error", error)

    def _end(self, key: str, status: str, tag: str, value: str) -> None:
        for run in self._search(f"tags.`stage.key` = '{key}' and attributes.status = 'RUNNING'", 1):
            self.client.set_tag(run.info.run_id, tag, value)
            self._close(self.client, run.info.run_id, status)

    def stopped(self, key: str) -> int | None:
        """The epoch after which a scheduler stopped a trial, if one did."""
        runs = self._search(f"tags.`stage.key` = '{key}' and tags.`{_STOPPED}` LIKE '%'", 1)
        return int(runs[0].data.tags[_STOPPED]) if runs else None

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

    def log_data(self, run_id: str, name: str, facts: Facts, context: str = "training") -> None:
        """Record which data a run read."""
        inputs = self.client.get_run(run_id).inputs
        if inputs and inputs.dataset_inputs:
            return
        profile = {"rows": facts.rows, "shape": facts.shape, "classes": len(facts.classes)}
        dataset = Dataset(
            name=name, digest=facts.digest[:36], source_type="local", source=json.dumps({"digest": facts.digest}),
            profile=json.dumps(profile),
        )  # fmt: skip
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def log_summary(self, run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Final metrics and tags of a job; a metric that stands there already is not logged twice."""
        known = self.client.get_run(run_id).data.metrics
        now = int(time.time() * 1000)
        points = [Metric(name, value, now, 0) for name, value in metrics.items() if known.get(name) != value]
        self.client.log_batch(run_id, points, tags=[RunTag(name, value) for name, value in tags.items()])

    def model_uri(self, run_id: str) -> str:
        """The model that a finetuning logged."""
        outputs = self.client.get_run(run_id).outputs
        assert outputs is not None, "a finished finetuning has a model"
        return f"models:/{outputs.model_outputs[0].model_id}"

    def register(self, name: str, uri: str) -> str:
        """Register a logged model under `name`; the version, which is the same if it was registered before."""
        mlflow.set_tracking_uri(self.uri)
        for known in self.client.search_model_versions(f"name = '{name}'"):
            if known.source == uri or known.tags.get("model.uri") == uri:
                return str(known.version)
        return str(mlflow.register_model(uri, name, tags={"model.uri": uri}).version)

    def _search(self, condition: str, limit: int) -> list[Any]:
        return list(self.client.search_runs([self.experiment_id], condition, max_results=limit))

    def _close(self, client: MlflowClient, run_id: str, status: str) -> None:
        """End a run and whichever runs nested in it are open."""
        for run in self._search(f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}' and attributes.status = 'RUNNING'", 1000):
            self._close(client, run.info.run_id, status)
        client.set_terminated(run_id, status)

    def _close_abandoned(self, client: MlflowClient) -> None:
        """End the runs of drivers of this machine that died without a word, and stages whose job has ended."""
        for run in self._search("tags.`job` LIKE '%' and attributes.status = 'RUNNING'", 1000):
            host, pid, created = (run.data.tags.get("driver", "") + "  ").split(" ")[:3]
            if host == socket.gethostname() and not _alive(int(pid), float(created)):
                self._close(client, run.info.run_id, "KILLED")
        for run in self._search("tags.`stage.fn` LIKE '%' and attributes.status = 'RUNNING'", 1000):
            if client.get_run(run.data.tags[MLFLOW_PARENT_RUN_ID]).info.status != "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")


class StageRun:
    """The open run of a stage."""

    def __init__(self, tracker: Tracker, run_id: str, seen: int) -> None:
        self.tracker, self.client, self.run_id = tracker, tracker.client, run_id
        self.seen = seen  # epochs that this or an earlier attempt has logged

    def log(self, points: Sequence[tuple[int, int, Mapping[str, float]]]) -> None:
        """Log epochs (number, Unix time in milliseconds, metrics), each once whatever the number of attempts."""
        fresh = [point for point in points if point[0] > self.seen]
        metrics = [Metric(name, value, when, epoch) for epoch, when, found in fresh for name, value in found.items()]
        for start in range(0, len(metrics), 1000):  # MLflow's limit
            self.client.log_batch(self.run_id, metrics[start : start + 1000])
        self.seen = max([self.seen, *(point[0] for point in points)])

    def commit(self, result: Result, served: Any = None) -> None:
        """Upload everything that the stage returned, then set FINISHED, which makes it count.

        Args:
            served: what the model makes of `result.example`, where there is one.
        """
        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, [Metric(name, value, now, 0) for name, value in result.metrics.items()])
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / _FOLDER
            save_weights(folder, result.config, result.weights)
            for name, png in result.figures.items():
                (Path(temporary) / _FIGURES).mkdir(exist_ok=True)
                (Path(temporary) / _FIGURES / f"{name}.png").write_bytes(png)
            self.client.log_artifacts(self.run_id, temporary)
            if result.example is None:
                return self.close("FINISHED")
            mlflow.set_tracking_uri(self.tracker.uri)
            # models are logged to an active run, which is FINISHED on leaving; MLflow prints its address
            try:
                with redirect_stdout(sys.stderr), mlflow.start_run(run_id=self.run_id, nested=True):
                    _log_model(folder, result.example, served)
            except BaseException:
                self.client.update_run(self.run_id, status="RUNNING")  # how the job ends, this run ends
                raise

    def fail(self, error: Exception) -> None:
        """End the run as FAILED and say why."""
        text = " ".join(str(error).split())[:500]
        self.client.set_tag(self.run_id, "error", f"{type(error).__name__}: {text}")
        self.close("FAILED")

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)


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
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None and found.lifecycle_stage != "active":
            raise InputError(
                f"MLFLOW_EXPERIMENT_NAME: experiment {experiment} is deleted in {_redacted(uri)}; "
                "restore it or choose another name"
            )
        if found is not None:
            return Tracker(uri, found.experiment_id)
        artifacts = (local.parent / "mlruns" / experiment).as_uri() if local is not None else None
        return Tracker(uri, client.create_experiment(experiment, artifacts)) if create else None
    except (MlflowException, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"MLFLOW_TRACKING_URI: cannot use {_redacted(uri)} ({reason}); start the server or correct the address"
        ) from error


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


def _log_model(folder: Path, example: Any, output: Any) -> None:
    """Log the model in `folder` so that it loads anywhere: our own code travels with it, pickle does not."""
    import aecore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on type hints that a loader module cannot follow
        mlflow.pyfunc.log_model(
            name=_MODEL,
            loader_module="aecore.pyfunc",
            data_path=str(folder),
            code_paths=[str(Path(aecore.__file__).parent)],
            pip_requirements=[f"{name}=={version(name)}" for name in _MODEL_NEEDS],
            signature=mlflow.models.infer_signature(example, output),
            input_example=example,
        )


@contextmanager
def system_metrics(uri: str, run_id: str) -> Iterator[None]:
    """CPU, memory, disk, network and GPU of this node, while the block runs."""
    monitor = SystemMetricsMonitor(run_id, sampling_interval=_SYSTEM_SECONDS, resume_logging=True, tracking_uri=uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


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


def _alive(pid: int, created: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - created) < 2  # a clock may have been set since
    except psutil.NoSuchProcess:
        return False
