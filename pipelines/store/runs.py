"""The tracker: finds, opens, restores and ends the runs of jobs and stages.

A stage is one run, tagged with its key, however often it is attempted. Its artifacts come first and the status FINISHED
last. That is the commit: a stage with a FINISHED run is restored instead of computed. A job is one run, too; the driver
that holds its lease works on it. Calls wait out an outage; each call may act twice, since its answer may be lost.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Run, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_USER

from aecore.config.facts import Facts
from aecore.core.errors import OutageError, TakenOverError
from aecore.models.storage import Result
from pipelines.graph.stage import Stage
from pipelines.host.environment import git_commit, user_name
from pipelines.host.scratch import all_temporary, me, scratch
from pipelines.store.client import Store
from pipelines.store.errors import LostResultError
from pipelines.store.lease import Lease, existing_leases, taken_over
from pipelines.store.models import Models
from pipelines.store.patience import CLOSE_SECONDS, HURRY_SECONDS, within
from pipelines.store.stage_run import FIGURES, StageRun, download_result, log_batch, params_of, summary_points
from pipelines.store.system_metrics import PREFIX, system_metrics

MARKED = "stage.key.names"
"""Tag of an experiment whose runs all bear their key in a tag's name; experiments of early versions lack it."""
_STOPPED, _LEASE = "stopped.epoch", "lease"


class Tracker(Store):
    """Finds, opens, restores and ends the runs in an MLflow store; small enough to be sent to every task."""

    @property
    def models(self) -> Models:
        """The registered models of the store."""
        return Models(self)

    def find(self, key: str) -> str | None:
        """Return the id of the finished run of a stage or job, if there is one."""
        finished = self.finished(key)
        return finished[0] if finished else None

    def finished(self, key: str) -> tuple[str, dict[str, float]] | None:
        """Return id and metrics of the finished run of a stage or job, if there is one."""
        run = self._run_of(key, " and attributes.status = 'FINISHED'")
        return (run.info.run_id, _metrics_of(run)) if run else None

    def is_known(self, key: str) -> bool:
        """Return whether a stage or job has a run, finished or not."""
        return self._run_of(key) is not None

    def metrics(self, run_id: str) -> dict[str, float]:
        """Return the last value of each metric of a run, without the load of its machine."""
        return _metrics_of(self.client.get_run(run_id))

    def restore(self, run_id: str) -> Result:
        """Return the result of a finished stage.

        Raises:
            LostResultError: The artifacts are missing or were altered. The run is then set FAILED, so that the stage
                will be computed again.
            OutageError: MLflow does not answer.
        """
        try:
            config, weights = download_result(self, run_id)
        except LostResultError:
            self.client.set_terminated(run_id, "FAILED")
            raise
        return Result(config, weights, self.metrics(run_id))

    def open_run(
        self, stage: Stage, parent: str, *, tags: Mapping[str, str] | None = None, started_at: int | None = None
    ) -> StageRun:
        """Open the run of a stage, nested in the job's run: a new run, or the run of earlier attempts.

        Each opening of a run counts as an attempt, so that a worker opens the run of its stage only once.

        Args:
            tags: Further tags of the run.
            started_at: When the stage began, Unix time in milliseconds; now by default.
        """
        own_tags = {
            MLFLOW_RUN_NAME: stage.name, MLFLOW_PARENT_RUN_ID: parent, "stage.key": stage.key, "stage.fn": stage.fn,
            "attempts": "1", **(tags or {}),
        }  # fmt: skip
        run, exists = self.find_or_create(stage.key, own_tags, started_at)
        run_id, client = run.info.run_id, self.client
        params = params_of(stage.spec.model_dump(mode="json"), run.data.params)
        if not exists:
            return StageRun(self, run_id, params=params)
        history = client.get_metric_history(run_id, "seconds") if "seconds" in run.data.metrics else []
        own_tags["attempts"] = str(int(run.data.tags.get("attempts", "0")) + 1)
        if "error" in run.data.tags:
            own_tags["error"] = ""  # the error of an earlier attempt
        client.update_run(run_id, status="RUNNING")
        log_batch(client, run_id, tags=own_tags)  # last, so that an opening that fails is not counted
        return StageRun(self, run_id, max((point.step for point in history), default=0), run.data.metrics, params)

    def continue_run(self, stage: Stage, run_id: str) -> StageRun:
        """Return the run of a stage that another process of the same attempt has opened and written nothing to."""
        return StageRun(self, run_id, params=params_of(stage.spec.model_dump(mode="json")))

    @contextmanager
    def job_run(self, job: str, key: str, tags: Mapping[str, str], config: dict[str, Any]) -> Iterator[str]:
        """Open the run of a job for the block. The run ends FINISHED, FAILED on an error, or KILLED when interrupted.

        A job's earlier run is opened again, so that a job is one run however often it was started. If another driver
        works on the same job, this driver waits until the other has ended or died.

        Args:
            config: Logged as params of a new run. It holds only what `key` covers, since params never change.

        Raises:
            TakenOverError: This driver was silent for so long that another has taken the job over.
        """
        hasty = self._replace(patience=0.0)
        lease = Lease(self, key, job, on_removal=hasty.close_abandoned)
        run_id = None
        lease.take()
        try:
            self.close_abandoned()
            run_id = self._open_job(job, key, {**tags, _LEASE: lease.name}, config)
            with system_metrics(self.uri, run_id), all_temporary():
                yield run_id
            lease.check()
            self.client.set_terminated(run_id, "FINISHED")
        except BaseException as error:
            lease.stop()
            if lease.is_lost or (isinstance(error, TakenOverError) and lease.is_taken_over()):
                raise TakenOverError(taken_over(job)) from error
            is_interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            status = "KILLED" if is_interrupted else "FAILED"

            def close() -> None:
                if run_id is not None:
                    hasty.close_run(run_id, status)
                lease.remove()

            within(HURRY_SECONDS if is_interrupted or isinstance(error, OutageError) else CLOSE_SECONDS, close)
            raise
        lease.release()

    @contextmanager
    def lease(self, key: str, purpose: str) -> Iterator[Callable[[], None]]:
        """Hold a lease for the block: the right to do something, which one driver has at a time.

        Yields:
            A function that raises a TakenOverError if the lease was lost.
        """
        lease = Lease(self, key, purpose)
        lease.take()
        try:
            yield lease.check
        finally:
            lease.release()

    def stop(self, key: str, epoch: int) -> None:
        """End the run of a trial that a scheduler stopped after this epoch."""
        self._end(key, "KILLED", _STOPPED, str(epoch))

    def fail(self, key: str, error: str) -> None:
        """End the open run of a stage or trial whose process died without ending it."""
        self._end(key, "FAILED", "error", error)

    def stopped(self, key: str) -> int | None:
        """Return the epoch after which a scheduler stopped a trial, if one did."""
        run = self._run_of(key, f" and tags.`{_STOPPED}` LIKE '%'")
        return int(run.data.tags[_STOPPED]) if run else None

    def trials(self, study: str, row: str) -> list[tuple[dict[str, Any], str]]:
        """Return settings and run id of each finished trial of a study row; `study` is the id of the study's run."""
        condition = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{study}' and tags.`row` = '{row}'"
        runs = self.search(f"{condition} and attributes.status = 'FINISHED'")
        return [(json.loads(run.data.tags["settings"]), run.info.run_id) for run in runs]

    def runs(self, tags: Mapping[str, str], status: str = "FINISHED", limit: int | None = None) -> list[Run]:
        """Return the runs with all of these tags, the newest first."""
        conditions = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
        return self.search(" and ".join([*conditions, f"attributes.status = '{status}'"]), limit)

    def save_figures(self, run_id: str, folder: Path) -> list[Path]:
        """Download a run's figures into `folder`; return their paths."""
        client = self.client
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for item in client.list_artifacts(run_id, FIGURES):
            with scratch() as temporary:
                figure = Path(client.download_artifacts(run_id, item.path, str(temporary)))
                paths.append(folder / Path(item.path).name)
                paths[-1].write_bytes(figure.read_bytes())
        return paths

    def log_folder(self, run_id: str, folder: Path, place: str) -> None:
        """Upload everything in `folder` to `place` among the run's artifacts."""
        self.client.log_artifacts(run_id, str(folder), place)

    def log_data(
        self, run_id: str, name: str, facts: Facts, context: str = "training", model_id: str | None = None
    ) -> None:
        """Record which data a run read, and with which model, unless data are recorded already."""
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
        """Log final metrics and tags of a job, without values that are logged already and seconds of a rerun."""
        known = self.client.get_run(run_id).data.metrics if metrics else {}
        run_tags = [RunTag(name, value) for name, value in tags.items()]
        self.client.log_batch(run_id, summary_points(metrics, known), tags=run_tags)

    def find_or_create(self, key: str, tags: Mapping[str, str], started_at: int | None = None) -> tuple[Run, bool]:
        """Return the run with this key, and whether it existed before. If it did not, it is created with these tags."""
        client, has_tried = self.direct, False
        started_at = round(1000 * time.time()) if started_at is None else started_at

        def look_then_create() -> tuple[Run, bool]:
            nonlocal has_tried
            if run := self._run_of(key, client=client):
                return run, not has_tried  # if an answer was lost, the run is the one that the last try made
            has_tried = True
            return client.create_run(self.experiment_id, started_at, {**tags, marker(key): "1"}), False

        return self.wait_for(look_then_create)

    def close_run(self, run_id: str, status: str) -> None:
        """End a run and the open runs that are nested in it, the innermost first."""
        parents = {run.info.run_id: run.data.tags.get(MLFLOW_PARENT_RUN_ID) for run in self._open_runs()}
        to_close = [run_id]
        for outer in to_close:
            to_close += [run for run, parent in parents.items() if parent == outer]
        for run in reversed(to_close):
            self.client.set_terminated(run, status)

    def close_abandoned(self) -> None:
        """End the runs of jobs whose driver has died and lost its lease, and the runs of stages whose job has ended."""
        client, open_runs = self.client, self._open_runs()
        jobs = [run for run in open_runs if "job" in run.data.tags and _LEASE in run.data.tags]
        leases = existing_leases(self) if jobs else set()
        for job in (run for run in jobs if run.data.tags[_LEASE] not in leases):
            run = client.get_run(job.info.run_id)  # the run may have ended since, or have a new driver
            if run.info.status == "RUNNING" and run.data.tags[_LEASE] == job.data.tags[_LEASE]:
                self.close_run(run.info.run_id, "KILLED")
        open_runs = self._open_runs() if open_runs else []
        open_ids = {run.info.run_id for run in open_runs}
        for run in open_runs:
            parent = run.data.tags.get(MLFLOW_PARENT_RUN_ID, "") if "stage.fn" in run.data.tags else ""
            if parent and parent not in open_ids and client.get_run(parent).info.status != "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")

    def _open_job(self, job: str, key: str, tags: Mapping[str, str], config: Mapping[str, Any]) -> str:
        tags = {
            MLFLOW_RUN_NAME: job, MLFLOW_USER: user_name(), "job": job, "stage.key": key, "git.commit": git_commit(),
            "driver": me(), **tags,
        }  # fmt: skip
        run, exists = self.find_or_create(key, tags)
        if exists:
            self.client.update_run(run.info.run_id, status="RUNNING")
        # a run without params is new, or its driver died early
        params = [] if run.data.params else params_of(config)
        log_batch(self.client, run.info.run_id, params=params, tags=tags if exists else {})
        return str(run.info.run_id)

    def _end(self, key: str, status: str, tag: str, value: str) -> None:
        if run := self._run_of(key, " and attributes.status = 'RUNNING'"):
            self.client.set_tag(run.info.run_id, tag, value)
            self.close_run(run.info.run_id, status)

    def _run_of(self, key: str, condition: str = "", client: MlflowClient | None = None) -> Run | None:
        """Return the run with this key that fulfils a further condition, if there is one."""
        runs = self.search(f"tags.`{marker(key)}` = '1'{condition}", 1, client)
        if not runs and not self.marked:
            runs = self.search(f"tags.`stage.key` = '{key}'{condition}", 1, client)
        return runs[0] if runs else None

    def _open_runs(self) -> list[Run]:
        # without a condition on tags: MLflow would go through all tags of a name, those of finished runs too
        return self.search("attributes.status = 'RUNNING'")


def marker(key: str) -> str:
    """Return the name of a tag that only the run with this key has.

    MLflow's tables have an index of the names of tags and none of their values.
    """
    return f"stage.key.{key}"


def _metrics_of(run: Run) -> dict[str, float]:
    return {name: value for name, value in run.data.metrics.items() if not name.startswith(PREFIX)}
