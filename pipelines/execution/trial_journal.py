"""The run of a trial in MLflow while the trial is computed: looked for, opened, logged at the end, committed."""

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from aecore.core.errors import OutageError, TakenOverError
from aecore.core.imports import fast_imports
from aecore.models.storage import Result
from pipelines.execution.assignment import Assignment, Opened, StoreAddress
from pipelines.execution.compute import restore, stages_below, unless_lost
from pipelines.execution.journal import NOTES, STUDY_LOG_SECONDS, Computed, Point, node_tags, notes_of
from pipelines.graph.stage import Stage
from pipelines.host.messages import one_line, say
from pipelines.store.record import EPOCH

if TYPE_CHECKING:
    from pipelines.store.record import Record
    from pipelines.store.runs import Tracker
    from pipelines.store.stage_run import StageRun

Results = dict[str, Any]
"""Results by the keys of stages: a `Computed` for each stage that MLflow keeps, and the rows of the data."""
_LAST_LOG_SECONDS = 5.0
"""Seconds that the end of a trial waits for logging that is under way."""


class TrialJournal:
    """A trial while it is computed: what MLflow has of it, its run, its epochs and its commit.

    Args:
        results: All results of this process; what MLflow has is added.
        beside: The number of trials that are computed side by side, this one included; they share the costs.
    """

    def __init__(self, stage: Stage, assignment: Assignment, results: Results, beside: int) -> None:
        self.stage, self.assignment, self.results, self.beside = stage, assignment, results, beside
        self.finished: Computed | None = None
        """The trial's last stage, if another process has finished it before."""
        self.missing: set[str] = set()
        """Keys of the stages that are computed here for this trial, or were so by an earlier attempt."""
        self._own: dict[str, Result] = {}
        """Trained stages from an earlier attempt, which lie in this trial's run already."""
        self._spent: Mapping[str, float] = {}
        """The costs of earlier attempts, by metric."""
        self._totals: Mapping[str, float] | None = None
        self._points: list[Point] = []
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._log_now_and_then, daemon=True)

    def __enter__(self) -> Self:
        if opened := self.assignment.opened:
            self._take_over(opened)
        else:
            self._open()
        if self.finished is None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    @cached_property
    def tracker(self) -> "Tracker":
        with fast_imports():
            from pipelines.store.runs import Tracker  # imports MLflow, which takes seconds

        return Tracker(*self.assignment.store)

    def report(self, stage: Stage, before: int, epoch: int, metrics: dict[str, float]) -> None:
        """Take the metrics of an epoch.

        Args:
            before: Epochs of the trial's stages before this one.
        """
        if _is_unsupervised(stage):
            self._points.append(_point(before + epoch, metrics))
        if self.assignment.tell is not None:
            self.assignment.tell(stage, epoch, {name: value for name, value in metrics.items() if name != "time"})

    def epochs_before(self, stage: Stage) -> int:
        """Return the number of epochs of unsupervised training that come before a stage."""
        count = 0
        for other in stages_below(self.stage):
            if other.key == stage.key:
                break
            if _is_unsupervised(other) and other.key in self.results:
                count += len(self.results[other.key].result.config["history"])
        return count

    def hand_over(self) -> Opened | Exception:
        """Upload the trained stages; return the open run, for the process that measures the trial."""
        self._stop_logging()
        try:
            self._keep()
        except Exception as error:
            return self._fail(self._unpublished(error))
        run = self._run
        restored = [stage for stage in stages_below(self.stage) if stage.kept and stage.key not in self.missing]
        known = {stage.key: self.results[stage.key].run_id for stage in restored if stage.key in self.results}
        return Opened(
            run.run_id, run.files, run.attempt, run.last_epoch, run.metrics, self.totals(), self.spent(), known
        )  # fmt: skip

    def close(self, outcome: Result | Exception) -> Computed | Exception:
        """Commit the trial, or end its run as failed.

        Returns:
            The last stage, finished, or the exception with which computing or committing it failed.
        """
        self._stop_logging()
        if isinstance(outcome, Exception):
            return self._fail(outcome)
        try:
            self._keep()
            if notes := notes_of(outcome):
                self.tracker.log_summary(self._run.run_id, {}, {NOTES: notes})
            self._run.commit_trial(self.stage.key, outcome, self._all_points(), self.totals(), self.spent())
        except Exception as error:
            return self._fail(self._unpublished(error))
        self._clear_checkpoints()
        return Computed(self._run.run_id, replace(outcome, figures={}, example=None))

    def totals(self) -> Mapping[str, float]:
        """Return the epochs of unsupervised training and the seconds of all training, restored stages included."""
        if self._totals is not None:
            return self._totals
        stages = [stage for stage in stages_below(self.stage) if stage.kept]
        metrics = {stage.key: self._metrics_of(stage) for stage in stages}
        epochs = sum(metrics[stage.key].get("epochs", 0) for stage in stages if _is_unsupervised(stage))
        return {"epochs": epochs, "train_seconds": sum(one.get("train_seconds", 0) for one in metrics.values())}

    def spent(self) -> dict[str, float]:
        """Return the CPU and GPU seconds of all attempts so far, by metric; killed attempts have told none."""
        share, seconds = self.assignment.share, (time.monotonic() - self._began) / self.beside
        costs = {"cpu_seconds": share.cpus * seconds, "gpu_seconds": share.gpus * seconds}
        return {name: self._spent.get(name, 0.0) + value for name, value in costs.items()}

    def _open(self) -> None:
        """Look for the trial and its stages in MLflow, restore what is finished, and open the run if the trial is not
        finished itself."""
        found, earlier = self._look()
        if record := found.get(self.stage.key):
            earlier = record
            results = unless_lost(record.run_id, partial(self.tracker.results, record, self.stage.key))
            if results:
                if f"study.{self.assignment.parent}" not in record.tags:
                    self.tracker.add_to_study(record.run_id, self.assignment.parent)
                self.finished = Computed(record.run_id, results[self.stage.key])
                self._clear_checkpoints()
                return
        if earlier:
            self._read_own(earlier.files)
            self._spent = {name: earlier.metrics.get(name, 0.0) for name in ("cpu_seconds", "gpu_seconds")}
        self._restore_below(self.stage, found)
        self._run: StageRun = self.tracker.open_trial(
            self.stage, self.assignment.parent, self.missing, tags={**self.assignment.tags, **node_tags()},
            earlier=earlier.run_id if earlier else None,
        )  # fmt: skip

    def _take_over(self, opened: Opened) -> None:
        """Go on with a run that another process has opened and into which it has put the trained stages."""
        from pipelines.store.stage_run import StageRun, trial_params

        self._totals, self._spent = opened.totals, opened.spent
        self.assignment = replace(self.assignment, known={**self.assignment.known, **opened.known})
        self._read_own(opened.files)
        self._restore_below(self.stage, {})
        self._run = StageRun(
            self.tracker, opened.run_id, opened.files, last_epoch=opened.last_epoch, metrics=opened.metrics,
            params=trial_params(self.stage), attempt=opened.attempt,
        )  # fmt: skip

    def _read_own(self, files: str) -> None:
        """Take the trained stages that lie in the trial's run already, as far as they are whole."""
        keys = {stage.key for stage in stages_below(self.stage)}
        self._own = {key: result for key, result in self.tracker.trained(files).items() if key in keys}
        self.missing |= self._own.keys()
        for key, result in self._own.items():
            self.results.setdefault(key, Computed("", result))

    def _look(self) -> "tuple[dict[str, Record], Record | None]":
        """Return the finished runs that hold the trial or stages of it, by key, and the trial's own unfinished run.

        A stage can only be finished where the stages before it are. So one search tells that a trial is new.
        """
        found: dict[str, Record] = {}
        own: Record | None = None
        strangers = False
        for stage in [*stages_below(self.stage), self.stage]:
            if not stage.kept or self._exists(stage, found):
                continue
            if not all(self._exists(parent, found) for parent in stage.parents()):
                continue
            records = self.tracker.holders(stage.key)
            for record in sorted(records, key=lambda record: record.key != stage.key):
                if record.is_finished:
                    found |= {key: record for key in record.places if key not in found}
                elif record.key == self.stage.key:
                    own = record
                strangers |= record.key != self.stage.key
        if strangers and own is None and self.stage.key not in found:
            own = next(iter(self.tracker.holders(self.stage.key)), None)
        return found, own

    def _exists(self, stage: Stage, found: "Mapping[str, Record]") -> bool:
        key = stage.key
        return not stage.kept or key in self.results or key in self.assignment.known or key in found

    def _restore_below(self, stage: Stage, found: "Mapping[str, Record]") -> None:
        """Restore the stages that a stage needs, or else those that these need; note the ones that are missing."""
        for parent in stage.parents():
            if not parent.kept or parent.key in self.missing:
                continue
            if parent.key in self.results:
                if not self.results[parent.key].run_id:  # trained in this process for another trial
                    self.missing.add(parent.key)
                continue
            if computed := self._restored(parent, found):
                self.results[parent.key] = computed
            else:
                self.missing.add(parent.key)
                self._restore_below(parent, found)

    def _restored(self, stage: Stage, found: "Mapping[str, Record]") -> Computed | None:
        key = stage.key
        if key in self.assignment.known:
            return _known(self.assignment.store, self.assignment.known[key], key)
        if key not in found:
            return None
        record = found[key]
        results = unless_lost(record.run_id, partial(self.tracker.results, record, key)) or {}
        for other in stages_below(self.stage):
            if other.key in results:
                self.results.setdefault(other.key, Computed(record.run_id, results[other.key]))
        return self.results.get(key)

    def _metrics_of(self, stage: Stage) -> Mapping[str, float]:
        if stage.key in self.results:
            return self.results[stage.key].result.metrics
        if stage.key in self.assignment.known:
            return self.tracker.metrics(self.assignment.known[stage.key])
        finished = self.tracker.finished(stage.key)
        return finished[1] if finished else {}

    def _keep(self) -> None:
        """Upload the stages that were trained for this trial, unless all of them lie in its run already."""
        mine = {key: self.results[key].result for key in sorted(self.missing)}
        if mine.keys() - self._own.keys():
            self._run.keep(mine)

    def _all_points(self) -> list[Point]:
        """Return the epochs of unsupervised training that were trained for this trial."""
        return [
            _point(self.epochs_before(stage) + epoch, metrics)
            for stage in stages_below(self.stage)
            if stage.key in self.missing and stage.key in self.results and _is_unsupervised(stage)
            for epoch, metrics in enumerate(self.results[stage.key].result.config["history"], 1)
        ]

    def _log_now_and_then(self) -> None:
        """Log the epochs of a long trial as they come, but rarely."""
        warned = False
        while not self._ended.wait(STUDY_LOG_SECONDS):
            try:
                hasty = self._run.waiting_like(self.tracker._replace(patience=0.0))
                hasty.log(list(self._points))
                self._run = hasty.waiting_like(self.tracker)
            except Exception as error:
                if not warned:
                    say(f"warning: {self.stage.name}: its epochs are kept, to be logged later ({one_line(error)})")
                warned = True

    def _stop_logging(self) -> None:
        self._ended.set()
        self._thread.join(_LAST_LOG_SECONDS)

    def _unpublished(self, error: Exception) -> Exception:
        places = [self.assignment.checkpoints(stage) for stage in stages_below(self.stage) if stage.trains]
        kept = next((f", and is kept in {place.place.rpartition('/')[0]}" for place in places if place), "")
        if isinstance(error, OutageError):
            return OutageError(f"{self.stage.name} is computed{kept}, but not published: {error}")
        return error

    def _fail(self, error: Exception) -> Exception:
        """End the run as failed, with the error, if MLflow answers; else only print a warning. Return the error."""
        if not isinstance(error, TakenOverError):
            try:
                hasty = self.tracker._replace(patience=0.0)
                if not hasty.find(self.stage.key):  # another study may have finished the trial meanwhile
                    self._run.fail(error, self._points, self.spent())
            except Exception as outage:
                say(f"warning: {self.stage.name}: its failure is not in MLflow ({one_line(outage)})")
        return error

    def _clear_checkpoints(self) -> None:
        for stage in (*stages_below(self.stage), self.stage):
            if stage.kept and (checkpoints := self.assignment.checkpoints(stage)):
                checkpoints.clear()


@lru_cache(maxsize=16)
def _known(store: StoreAddress, run_id: str, key: str) -> Computed | None:
    """Return a finished stage that several trials share; a process that computes several of them downloads it once."""
    from pipelines.store.runs import Tracker

    result = restore(run_id, Tracker(*store), key)
    return Computed(run_id, result) if result else None


def _is_unsupervised(stage: Stage) -> bool:
    return getattr(stage.spec, "variant", None) is not None and stage.trains


def _point(epoch: int, metrics: Mapping[str, float]) -> Point:
    values = {f"{EPOCH}{name}": value for name, value in metrics.items() if name != "time"}
    return Point(epoch, round(1000 * metrics["time"]), values)
