"""The run of a stage in MLflow while the stage is computed: opened, logged epoch by epoch, committed."""

import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from aecore.core.errors import OutageError, TakenOverError
from aecore.core.imports import fast_imports
from aecore.core.notes import describe
from aecore.models.storage import Result
from pipelines.execution.assignment import Assignment
from pipelines.graph.stage import Stage
from pipelines.host.messages import one_line, say

if TYPE_CHECKING:
    from pipelines.store.runs import Tracker
    from pipelines.store.stage_run import StageRun

NOTES = "notes"
"""Tag of a run: which measures are left out or were taken on a sample, and why; see `aecore.core.notes`."""
_MOST_CHARACTERS = 4000
"""Length of the notes in a tag, of which MLflow takes 5,000 characters."""
_LOG_SECONDS, _SAY_SECONDS = 2.0, 1.0
"""Time between two logs to MLflow, and between two lines on stderr."""
STUDY_LOG_SECONDS = 30.0
"""Time between two logs to MLflow in a study, of which many stages run at once."""
_LAST_LOG_SECONDS = 5.0
"""Seconds that the end of a stage waits for logging that is under way."""
_MONITOR_SECONDS = 30.0
"""Seconds after which a stage also logs the load of its machine."""


class Computed(NamedTuple):
    """The run and the result of a finished stage, which are sent to the driver and to the next stages."""

    run_id: str
    result: Result
    """Without figures and example rows, which are in MLflow."""


class Point(NamedTuple):
    """The metrics of one epoch."""

    epoch: int
    milliseconds: int
    """Unix time."""
    metrics: dict[str, float]


class Journal:
    """Opens, logs and ends the MLflow run of one stage while the stage is computed.

    A thread imports MLflow, opens the run and logs the epochs, so that training waits for none of these. An MLflow that
    does not answer costs no training either: epochs are kept and logged later, and `close` waits for as long as the
    store's patience lasts.
    """

    def __init__(self, stage: Stage, assignment: Assignment) -> None:
        self.stage, self.assignment = stage, assignment
        self.points: list[Point] = []
        """Epochs that have not been logged yet."""
        self._milliseconds = round(time.time() * 1000)
        self._started_at = self._said_at = time.monotonic()
        self._line = ""
        self._run: StageRun | None = None
        self._finished_run_id: str | None = None
        """The stage's run, if another job has finished the stage meanwhile. A finished run is not changed any more."""
        self._open_lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._log_as_epochs_come, daemon=True)

    def __enter__(self) -> Self:
        # training releases Python's lock (GIL) at each operation and by default waits 5 ms until a busy thread returns
        # it; MLflow's connections, a second of computing in such a thread, would cost small layers 3 s
        sys.setswitchinterval(2e-4 if self.stage.trains else 5e-3)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    @cached_property
    def run_id(self) -> str:
        """The id of the stage's run, which is opened now if it is not open yet."""
        self._open(self._tracker)
        return self._finished_run_id or (self._run.run_id if self._run else "")

    def report(self, epoch: int, metrics: dict[str, float]) -> None:
        """Take the metrics of an epoch, to be logged by the thread; print them on stderr at most once per second."""
        metrics = dict(metrics)
        self.points.append(Point(epoch, round(1000 * metrics.pop("time")), metrics))
        shown = {name: value for name, value in metrics.items() if name in ("train/loss", "val/loss", "val/error")}
        self._line = f"{self.stage.name}: epoch {epoch}  " + "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        now = time.monotonic()
        if now - self._said_at > _SAY_SECONDS or epoch == 1:
            self._say(self._line)
            self._said_at, self._line = now, ""
        if self.assignment.tell is not None:
            self.assignment.tell(self.stage, epoch, metrics)

    def close(self, outcome: Result | Exception) -> Computed | Exception:
        """Commit the result of the stage, or end its run as failed.

        Returns:
            The finished stage, or the exception with which computing or committing it failed.
        """
        self._ended.set()
        self._thread.join(_LAST_LOG_SECONDS)
        if self._line:
            self._say(self._line)
        seconds = time.monotonic() - self._started_at
        ending = self._commit(outcome) if isinstance(outcome, Result) else outcome
        failed = isinstance(ending, Exception)
        self._say(f"{self.stage.name}: {'failed' if failed else 'done'} after {seconds:.1f} s")
        if isinstance(ending, Exception) and not isinstance(ending, TakenOverError):
            self._fail(ending)
        return ending

    def _say(self, line: str) -> None:
        if not self.assignment.quiet:
            say(line)

    @cached_property
    def _tracker(self) -> "Tracker":
        with fast_imports():
            from pipelines.store.runs import Tracker  # imports MLflow, which takes seconds

        return Tracker(*self.assignment.store)

    def _open(self, tracker: "Tracker") -> None:
        with self._open_lock:
            if self._run is None and self._finished_run_id is None:
                self._finished_run_id = tracker.find(self.stage.key)
            if self._run is None and self._finished_run_id is None:
                tags = {**self.assignment.tags, **node_tags()}
                self._run = tracker.open_run(
                    self.stage, self.assignment.parent, job=self.assignment.job, tags=tags,
                    started_at=self._milliseconds,
                )  # fmt: skip

    def _log_as_epochs_come(self) -> None:
        """Open the run and log the reported epochs until the stage ends; epochs that cannot be logged are tried
        again."""
        warned, monitored = False, self.assignment.quiet  # a study would log the load of a machine once per stage
        with ExitStack() as stack:
            while True:
                try:
                    hasty = self._tracker._replace(patience=0.0)
                    self._open(hasty)
                    self._log_points()
                    if self._run and not monitored and time.monotonic() - self._started_at > _MONITOR_SECONDS:
                        from pipelines.store.system_metrics import system_metrics

                        monitored = True
                        stack.enter_context(system_metrics(hasty.uri, self._run.run_id))
                except Exception as error:
                    if not warned and not self._ended.is_set():
                        say(f"warning: {self.stage.name}: its epochs are kept, to be logged later ({one_line(error)})")
                    warned = True
                if self._ended.wait(STUDY_LOG_SECONDS if self.assignment.quiet else _LOG_SECONDS):
                    return

    def _log_points(self) -> None:
        count = len(self.points)  # more may come meanwhile
        if self._run is not None and count:
            self._run.log(self.points[:count])
        del self.points[:count]

    def _commit(self, result: Result) -> Computed | Exception:
        checkpoints = self.assignment.checkpoints(self.stage)
        try:
            served = None
            if result.example is not None:
                from aecore.serving.model import Model

                model = Model(result)
                rows = model.as_served(result.example)
                served = rows, model.predict(rows)
            self._open(self._tracker)
            if self._run is not None and not self._tracker.find(self.stage.key):
                self._run = self._run.waiting_like(self._tracker)
                self._log_points()
                if notes := notes_of(result):
                    self._tracker.log_summary(self._run.run_id, {}, {NOTES: notes})
                    say(f"warning: {self.stage.name}: {notes}")
                self._run.commit(result, served)
        except OutageError as error:
            place = f", and is kept in {checkpoints.place}" if checkpoints else ""
            return OutageError(f"{self.stage.name} is computed{place}, but not published: {error}")
        except Exception as error:
            return error
        if checkpoints is not None:
            checkpoints.clear()
        return Computed(self.run_id, replace(result, figures={}, example=None))

    def _fail(self, error: Exception) -> None:
        """End the stage's run as failed, with the error, if MLflow answers; else only print a warning."""
        try:
            hasty = self._tracker._replace(patience=0.0)
            self._open(hasty)
            if self._run is not None:
                self._log_points()
                self._run.fail(error)
        except Exception as outage:
            say(f"warning: {self.stage.name}: its failure is not in MLflow ({one_line(outage)})")


def notes_of(result: Result) -> str:
    """Return the notes on the measures of a result in one line; empty if there are none."""
    return "; ".join(describe(result.config.get("notes", {})))[:_MOST_CHARACTERS]


def noted(run_id: str, tracker: "Tracker") -> dict[str, str]:
    """Return the tag with the notes on the measures of a stage's run, for the run of its job; empty if it has none."""
    tags = tracker.client.get_run(run_id).data.tags
    return {NOTES: tags[NOTES]} if NOTES in tags else {}


def node_tags() -> dict[str, str]:
    """Return a tag that names the node of this process; no tag if the process does not use Ray."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {}
    return {"ray.node_id": ray.get_runtime_context().get_node_id()}
