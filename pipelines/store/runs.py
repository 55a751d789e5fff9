"""The tracker: finds, opens, restores and ends the runs of jobs and stages.

A stage is one run, tagged with its key, however often it is attempted. Its artifacts come first and the status FINISHED
last. That is the commit: a stage with a FINISHED run is restored instead of computed. A trial of a study is one run,
too, which bears the keys and holds the results of all its stages that have no run of their own. So is a job; the driver
that holds its lease works on it. Calls wait out an outage; each call may act twice, since its answer may be lost.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput, Param, Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE

from aecore.config.facts import Facts
from aecore.core.errors import OutageError, TakenOverError
from aecore.models.storage import Result
from pipelines.graph.description import Description
from pipelines.graph.stage import Stage
from pipelines.host.environment import git_commit
from pipelines.host.messages import one_line
from pipelines.host.scratch import all_temporary, me, scratch
from pipelines.store.client import Store
from pipelines.store.errors import LostResultError
from pipelines.store.labels import ORIGIN, dataset_of, job_tags, tags_of
from pipelines.store.lease import Lease, existing_leases, taken_over
from pipelines.store.models import Models
from pipelines.store.patience import CLOSE_SECONDS, HURRY_SECONDS, within
from pipelines.store.record import EPOCH, MEASURED, OWN, STOPPED, TRAINED, Record, foreign_marks, marker, study_marker
from pipelines.store.stage_run import (
    FIGURES,
    StageRun,
    download_result,
    download_results,
    log_batch,
    params_of,
    summary_points,
    trial_params,
)
from pipelines.store.system_metrics import system_metrics

MARKED = "stage.key.names"
"""Tag of an experiment whose runs all bear their key in a tag's name; experiments of early versions lack it."""
_LEASE = "lease"
_DIED = "killed without a word, with its process or its machine; the same command continues it"


class Tracker(Store):
    """Finds, opens, restores and ends the runs in an MLflow store; small enough to be sent to every task."""

    @property
    def models(self) -> Models:
        """The registered models of the store."""
        return Models(self)

    def find(self, key: str) -> str | None:
        """Return the id of the finished run that holds the result of a stage, or of a job, if there is one."""
        finished = self.finished(key)
        return finished[0] if finished else None

    def finished(self, key: str) -> tuple[str, dict[str, float]] | None:
        """Return id and metrics of the finished run that holds the result of a stage, or of a job, if there is one. The
        metrics of a stage that has no run of its own lie with its result."""
        run = next(iter(self.search_holders(key, " and attributes.status = 'FINISHED'", 1)), None)
        if run is None:
            return None
        record = Record.of(run)
        return record.run_id, dict(record.metrics) if record.key == key else {}

    def holders(self, key: str) -> list[Record]:
        """Return all runs that hold the result of a stage, or will hold it when they are finished."""
        return [Record.of(run) for run in self.search_holders(key)]

    def trials_of(self, study: str) -> dict[str, Record]:
        """Return all trials of a study, however they ended, by key; `study` is the id of the study's run.

        This is one search, whatever the number of trials. The trials that earlier versions have left, which are found
        by the tag of their parent, are marked for the next search.
        """
        runs = self.search(f"tags.`{study_marker(study)}` = '1'")
        if not runs:
            runs = self.search(f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{study}' and tags.`row` LIKE '%'")
            for run in runs:
                self.add_to_study(run.info.run_id, study)
        records = map(Record.of, runs)
        return {record.key: record for record in sorted(records, key=lambda record: record.is_finished)}

    def add_to_study(self, run_id: str, study: str) -> None:
        """Make a trial's run one of the trials of a further study."""
        self.client.set_tag(run_id, study_marker(study), "1")

    def run_id_of(self, key: str) -> str | None:
        """Return the id of the run of a stage or job, finished or not, if there is one."""
        run = self._run_of(key)
        return str(run.info.run_id) if run else None

    def metrics(self, run_id: str) -> dict[str, float]:
        """Return the last value of each metric of a run, without the load of its machine and the epochs of a trial."""
        return dict(Record.of(self.client.get_run(run_id)).metrics)

    def restore(self, run_id: str, key: str = "") -> Result:
        """Return the result of a finished stage.

        Args:
            key: The stage's key, where the run is a trial's and holds several results; by default the last stage's.

        Raises:
            LostResultError: The artifacts are missing or were altered. The run is then set FAILED, so that the stage
                will be computed again.
            OutageError: MLflow does not answer.
        """
        record = Record.of(self.client.get_run(run_id))
        return self.results(record, key or record.key)[key or record.key]

    def results(self, record: Record, key: str) -> dict[str, Result]:
        """Return the result of a stage and those that lie in the same file of a finished run, by key.

        Raises:
            LostResultError, OutageError: As in `restore`.
        """
        place = record.places.get(key, OWN)
        try:
            if place == OWN:
                config, weights = download_result(self, record.files)
                return {key: Result(config, weights, dict(record.metrics))}
            results = download_results(self, record.files, place)
            if key not in results:
                raise LostResultError(f"{place} of run {record.run_id} has no result of {key}")
            return results
        except LostResultError:
            self.client.set_terminated(record.run_id, "FAILED")
            raise

    def trained(self, files: str) -> dict[str, Result]:
        """Return the trained stages of a trial that is not finished, by key; none if they are not there or not whole.

        Args:
            files: The URI of the artifacts of the trial's run.
        """
        with suppress(LostResultError):
            return download_results(self, files, TRAINED)
        return {}

    def open_run(
        self, stage: Stage, parent: str, *, job: str = "", tags: Mapping[str, str] | None = None,
        started_at: int | None = None,
    ) -> StageRun:  # fmt: skip
        """Open the run of a stage, nested in the job's run: a new run, or the run of earlier attempts.

        Each opening of a run counts as an attempt, so that a worker opens the run of its stage only once.

        Args:
            job: The name of the job's run, which becomes part of the name of this run.
            tags: Further tags of the run.
            started_at: When the stage began, Unix time in milliseconds; now by default.
        """
        own_tags = {**tags_of(stage, parent, job), **(tags or {})}
        run, exists = self.find_or_create(stage.key, own_tags, started_at)
        return self._begin(run, exists, own_tags, params_of(stage.spec.model_dump(mode="json")))

    def open_trial(
        self, stage: Stage, study: str, keys: Iterable[str], *, tags: Mapping[str, str], earlier: str | None = None
    ) -> StageRun:
        """Open the run of a trial in a study's run: a new run, or the run `earlier` of earlier attempts.

        Args:
            stage: The trial's last stage.
            keys: The keys of the other stages whose results the run will hold.
        """
        client, has_tried, started_at = self.direct, False, round(1000 * time.time())
        own_tags = tags_of(stage, study) | {study_marker(study): "1", marker(stage.key): MEASURED, **tags}
        own_tags |= {marker(key): TRAINED for key in keys}

        def create() -> tuple[Run, bool]:
            nonlocal has_tried
            if earlier is not None:
                return client.get_run(earlier), True
            made = self.search_holders(stage.key, client=client) if has_tried else []  # if its answer was lost
            has_tried = True
            return made[0] if made else client.create_run(self.experiment_id, started_at, own_tags), False

        run, exists = self.wait_for(create)
        return self._begin(run, exists, own_tags, trial_params(stage))

    def origin_of(self, run_id: str) -> tuple[str, dict[str, str]]:
        """Return the name of a job's run, and the tags that the runs which are nested in it have from it."""
        tags = self.client.get_run(run_id).data.tags
        return tags.get(MLFLOW_RUN_NAME, ""), {name: tags[name] for name in ORIGIN if name in tags}

    @contextmanager
    def job_run(
        self, job: str, key: str, tags: Mapping[str, str], config: dict[str, Any], shown: Description | None = None
    ) -> Iterator[str]:
        """Open the run of a job for the block. The run ends FINISHED, FAILED on an error, or KILLED when interrupted.

        A job's earlier run is opened again, so that a job is one run however often it was started. If another driver
        works on the same job, this driver waits until the other has ended or died.

        Args:
            config: Logged as params of a new run. It holds only what `key` covers, since params never change.
            shown: What MLflow's list shows, `job` by default; the block adds results.

        Raises:
            TakenOverError: This driver was silent for so long that another has taken the job over.
        """
        hasty, shown = self._replace(patience=0.0), shown or Description(job)
        lease = Lease(self, key, job, on_removal=hasty.close_abandoned)
        run_id = None
        lease.take()
        try:
            self.close_abandoned()
            run_id = self._open_job(key, {"job": job, **tags, _LEASE: lease.name}, config, shown)
            with system_metrics(self.uri, run_id), all_temporary():
                yield run_id
            lease.check()
            self.client.set_tag(run_id, MLFLOW_RUN_NOTE, shown.text(shown.status))
            self.client.set_terminated(run_id, "FINISHED")
        except BaseException as error:
            lease.stop()
            if lease.is_lost or (isinstance(error, TakenOverError) and lease.is_taken_over()):
                raise TakenOverError(taken_over(job)) from error
            is_interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            status = "KILLED" if is_interrupted else "FAILED"
            reason = "killed; the same command continues it" if is_interrupted else f"failed: {one_line(error, 500)}"

            def close() -> None:
                if run_id is not None:
                    hasty.close_run(run_id, status)
                lease.remove()
                if run_id is not None:  # last: what the person reads may be missing, the status may not
                    hasty.client.set_tag(run_id, MLFLOW_RUN_NOTE, shown.text(reason))

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

    def stop_trial(self, run_id: str, epoch: int) -> None:
        """End the run of a trial that a scheduler stopped after this epoch."""
        self._end(run_id, "KILLED", STOPPED, str(epoch))

    def fail_trial(self, run_id: str, error: str) -> None:
        """End the open run of a trial whose process died without ending it."""
        self._end(run_id, "FAILED", "error", error)

    def fail(self, key: str, error: str) -> None:
        """End the open run of a stage whose process died without ending it."""
        if run := self._run_of(key, " and attributes.status = 'RUNNING'"):
            self._end(run.info.run_id, "FAILED", "error", error)

    def runs(self, tags: Mapping[str, str], status: str = "FINISHED", limit: int | None = None) -> list[Run]:
        """Return the runs with all of these tags, the newest first."""
        conditions = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
        return self.search(" and ".join([*conditions, f"attributes.status = '{status}'"]), limit)

    def save_figures(self, run_id: str, folder: Path) -> list[Path]:
        """Download a run's figures into `folder`; return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for item in self.client.list_artifacts(run_id, FIGURES):
            with scratch() as temporary:
                figure = Path(self.client.download_artifacts(run_id, item.path, str(temporary)))
                paths.append(folder / Path(item.path).name)
                paths[-1].write_bytes(figure.read_bytes())
        return paths

    def log_data(
        self, run_id: str, name: str, facts: Facts, about: Sequence[str] = (), model_id: str | None = None
    ) -> None:
        """Record which data a run read, unless these data are recorded already.

        Args:
            about: What `aecore.data.dataset.describe` says of them.
            model_id: The model that is applied to them; None where a model is trained.
        """
        context, models = ("inference", [LoggedModelInput(model_id)]) if model_id else ("training", None)
        read, inputs = dataset_of(name, facts, about, context), self.client.get_run(run_id).inputs
        recorded = {one.dataset.digest for one in inputs.dataset_inputs} if inputs else set()
        if read.dataset.digest not in recorded:
            self.client.log_inputs(run_id, [read], models)

    def log_summary(
        self, run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str], config: Mapping[str, Any] = {}
    ) -> None:
        """Log final metrics and tags of a job, without values that are logged already and seconds of a rerun; in the
        same request also a configuration, as params."""
        known = self.client.get_run(run_id).data if metrics or config else None
        points = summary_points(metrics, known.metrics if known else {})
        params = [param for param in params_of(config) if known and param.key not in known.params]
        log_batch(self.client, run_id, points, params, tags)

    def log_last(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Log metrics of a job, each in the place of its last value."""
        log_batch(self.client, run_id, summary_points(metrics, {}))

    def find_or_create(self, key: str, tags: Mapping[str, str], started_at: int | None = None) -> tuple[Run, bool]:
        """Return the run with this key, and whether it existed before. If it did not, it is created with these tags."""
        client, has_tried = self.direct, False
        started_at = round(1000 * time.time()) if started_at is None else started_at

        def look_then_create() -> tuple[Run, bool]:
            nonlocal has_tried
            if run := self._run_of(key, client=client):
                return run, not has_tried  # if an answer was lost, the run is the one that the last try made
            has_tried = True
            return client.create_run(self.experiment_id, started_at, {**tags, marker(key): OWN}), False

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
                note = run.data.tags.get(MLFLOW_RUN_NOTE, "")
                client.set_tag(run.info.run_id, MLFLOW_RUN_NOTE, f"Status: {_DIED}  \n{note}")
        open_runs = self._open_runs() if open_runs else []
        open_ids = {run.info.run_id for run in open_runs}
        for run in open_runs:
            parent = run.data.tags.get(MLFLOW_PARENT_RUN_ID, "") if "stage.fn" in run.data.tags else ""
            if parent and parent not in open_ids and client.get_run(parent).info.status != "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")

    def _open_job(self, key: str, tags: Mapping[str, str], config: Mapping[str, Any], shown: Description) -> str:
        commit = git_commit()
        tags = {**job_tags(shown, commit), "stage.key": key, "git.commit": commit, "driver": me(), **tags}
        run, exists = self.find_or_create(key, tags)
        if exists:
            self.client.update_run(run.info.run_id, status="RUNNING")
        # a run without params is new, or its driver died early
        params = [] if run.data.params else params_of(config)
        log_batch(self.client, run.info.run_id, params=params, tags=tags if exists else {})
        return str(run.info.run_id)

    def _end(self, run_id: str, status: str, tag: str, value: str) -> None:
        self.client.set_tag(run_id, tag, value)
        self.client.set_terminated(run_id, status)

    def _begin(self, run: Run, exists: bool, tags: dict[str, str], params: Sequence[Param]) -> StageRun:
        """Return the open run of a stage or trial; a run that existed gets its tags and counts one attempt more."""
        run_id, client, attempt = run.info.run_id, self.client, 1
        params = [param for param in params if param.key not in run.data.params]
        if not exists:
            return StageRun(self, run_id, run.info.artifact_uri or "", params=params)
        name = next((name for name in ("seconds", f"{EPOCH}seconds") if name in run.data.metrics), None)
        history = client.get_metric_history(run_id, name) if name else []
        attempt += int(run.data.tags.get("attempts", "0"))
        tags["attempts"] = str(attempt)
        if "error" in run.data.tags:
            tags["error"] = ""  # the error of an earlier attempt
        if STOPPED in run.data.tags:
            tags[STOPPED] = ""
        for name in foreign_marks(run.data.tags, tags):
            client.delete_tag(run_id, name)
        client.update_run(run_id, status="RUNNING")
        log_batch(client, run_id, tags=tags)  # last, so that an opening that fails is not counted
        return StageRun(
            self, run_id, run.info.artifact_uri or "", last_epoch=max((point.step for point in history), default=0),
            metrics=run.data.metrics, params=params, attempt=attempt,
        )  # fmt: skip

    def _run_of(self, key: str, condition: str = "", client: MlflowClient | None = None) -> Run | None:
        """Return the run of this stage or job alone that fulfils a further condition, if there is one."""
        return next(iter(self.search_holders(key, condition, 1, client, f"= '{OWN}'")), None)

    def _open_runs(self) -> list[Run]:
        # without a condition on tags: MLflow would go through all tags of a name, those of finished runs too
        return self.search("attributes.status = 'RUNNING'")
