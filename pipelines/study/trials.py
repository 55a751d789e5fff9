"""The trials of a study on Ray Tune, which asks for work whenever the cluster has room."""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from aecore.core.errors import OutageError, TakenOverError
from pipelines.cluster.connection import start_ray
from pipelines.cluster.nodes import check_reach
from pipelines.cluster.placement import bundle_of
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share, count_gpus, share_of
from pipelines.execution.assignment import Assignment, assign
from pipelines.execution.compute import load_rows
from pipelines.graph.needs import device_memory
from pipelines.graph.stage import Stage
from pipelines.host.environment import has_embedded_ray
from pipelines.host.messages import one_line
from pipelines.host.scratch import scratch
from pipelines.study.agenda import LATE, Agenda
from pipelines.study.desk import Desk, Room
from pipelines.study.measuring import Measuring
from pipelines.study.plan import TrialPlan
from pipelines.study.schema import Study
from pipelines.study.sets import StudySet
from pipelines.study.spending import Spending
from pipelines.study.worker import SharedSet, choices, compute_trial, share_of_row

if TYPE_CHECKING:
    from ray import ObjectRef

    from pipelines.store.runs import Tracker


_LOG_SECONDS, _LOOK_SECONDS = 60.0, 5.0
"""Seconds between two logs of what a study has spent, and between two looks for trials that ended without a word."""


class TrialRunner:
    """Runs the trials of one study. Each data set is read once into the memory of Ray, and all its trials share it."""

    def __init__(
        self, study: Study, sets: Sequence[StudySet], tracker: "Tracker", parent: str, resources: Resources
    ) -> None:  # fmt: skip
        self.study, self.sets, self.tracker, self.parent, self.resources = study, sets, tracker, parent, resources
        self.deadline = time.monotonic() + 3600 * study.budget.hours if study.budget.hours else None
        self.spending = Spending.after(study.budget, tracker.metrics(parent))
        _, self._origin = tracker.origin_of(parent)
        self.known: dict[str, str] = {}
        """The runs of the finished stages that several trials share, by key."""

    @property
    def late(self) -> bool:
        """Whether the study's time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def run(self, agenda: Agenda) -> None:
        """Run the trials of an agenda until all have ended."""
        start_ray()
        check_reach(self.tracker.uri, self.resources.storage_path)
        agenda.grows = not has_embedded_ray()
        share = self._share(agenda)  # once: the last GPU may be lost, and then Ray waits for another
        room = Room(share, self.resources, as_one=self.study.scheduler != "asha")
        sets = self._load(agenda)
        with self._measuring(share, {name: one.rows for name, one in sets.items()}) as measuring:
            desk = Desk(self.study, agenda, room, measuring, self.spending)
            try:
                self._fit(desk, self._assign(share), sets)
                if measuring:
                    desk.take_measured(measuring.take_rest(self.deadline))
            finally:
                if not desk.taken_over:
                    self.log_spending()
        if desk.taken_over:
            raise TakenOverError(desk.taken_over)
        agenda.close(agenda.halted or LATE)

    def _fit(self, desk: Desk, assignment: Assignment, sets: dict[str, SharedSet]) -> None:
        """Let Ray Tune run trials as long as the desk has some, and as the study has time."""
        # an interrupted job ends as KILLED and at once; Tune's own handler would first wait for its trials
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        # Tune would write each report to three files, and its own state every ten seconds; nobody reads them
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "86400"
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new output cannot be silenced
        # the desk limits what waits, as the cluster grows and shrinks; Tune's own limit would be one trial
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = "1000"
        from ray import tune

        # it warns of each trial that it finds no file of; nobody reads them either
        logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
        # nor is what it says of lost trials true: they have run again as others
        logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
        trainable = tune.with_parameters(compute_trial, sets=sets, assignment=assignment)
        with redirect_stdout(sys.stderr), scratch() as folder:
            tune.Tuner(
                tune.with_resources(trainable, partial(_reserved, assignment.share, self.resources)),
                tune_config=tune.TuneConfig(
                    search_alg=_searcher(desk, self),
                    scheduler=_scheduler(self.study),
                    num_samples=-1,  # until the searcher has no more
                    reuse_actors=True,
                    time_budget_s=self.deadline and max(1.0, self.deadline - time.monotonic()),
                    trial_name_creator=_name_of,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=tune.RunConfig(
                    storage_path=str(folder), name="trials", verbose=0,
                    callbacks=[_callback(desk, self)],
                ),
            ).fit()  # fmt: skip

    def log_spending(self) -> None:
        """Log what the study has spent, so that the next command goes on from it; no outage delays the study."""
        with suppress(OutageError):
            self.tracker._replace(patience=0.0).log_last(self.parent, self.spending.metrics())

    @contextmanager
    def _measuring(self, share: Share, rows: "dict[str, ObjectRef]") -> Iterator[Measuring | None]:
        """Yield what measures trials on CPUs while others train on GPUs; None where trials have no GPU."""
        if not share.gpus:
            yield None
            return
        with Measuring(self._assign(share), self.resources, rows).cancelled_at_the_end() as measuring:
            yield measuring

    def _share(self, agenda: Agenda) -> Share:
        """Return the share of the cluster that each group gets: what the largest needs, or the largest settings where a
        search chooses them."""
        gpus = count_gpus(self.resources) if self.resources.gpus != 0 and self.study.scheduler != "asha" else 0
        later = {*self.study.searched_rows} if self.study.search == "optuna" else set()
        later |= {*self.study.variants} if self.study.scheduler == "race" else set()
        groups = agenda.groups(gpus or None) + [(one.largest(row), 1) for one in self.sets for row in sorted(later)]
        needs = [device_memory(stage, count) for plan, count in groups for stage in plan.stages().values()]
        return share_of(self.resources, max(need or 0 for need in needs))

    def clear_checkpoints(self, plan: TrialPlan) -> None:
        """Delete the checkpoints of a trial that will not go on."""
        assignment = self._assign(Share(0, 1))
        for stage in plan.stages().values():
            if checkpoints := assignment.checkpoints(stage):
                checkpoints.clear()

    def share_of(self, stages: Sequence[Stage]) -> Share:
        """Return the share of the cluster that stages get which several trials need."""
        return share_of(self.resources, max(device_memory(stage) or 0 for stage in stages))

    def _assign(self, share: Share) -> Assignment:
        assignment = assign(self.tracker, self.parent, share, self.resources, in_study=True)
        return replace(assignment, known=self.known, tags=self._origin)

    def _load(self, agenda: Agenda) -> dict[str, SharedSet]:
        """Let tasks read the data sets of the trials that wait or may come, each once, and return them by name."""
        import ray

        names = {one.name for one in self.sets} if agenda.sources else {plan.data for plan in agenda.waiting()}
        load = ray.remote(num_cpus=1)(load_rows)
        sets = {
            one.name: SharedSet(ray.put(one), load.remote(one.load_spec())) for one in self.sets if one.name in names
        }
        if len(sets) > 1:
            # else trials that wait for a set could hold all the CPUs that the task which reads it needs
            ray.wait([one.rows for one in sets.values()], num_returns=len(sets), fetch_local=False)
        return sets


def _reserved(share: Share, resources: Resources, config: dict[str, Any]) -> Any:
    """Return what one of Tune's trials reserves of the cluster, a `ray.tune.PlacementGroupFactory`."""
    from ray import tune

    (row, *_), *_ = choices(config)
    bundle, placement = bundle_of(share_of_row(row, share), resources)
    return tune.PlacementGroupFactory([bundle], **placement)


def _name_of(trial: Any) -> str:
    return "trial"  # Ray makes time series of names, for its dashboard


def _scheduler(study: Study) -> Any:
    """Return Tune's scheduler for a study; None where each trial runs to its end."""
    if study.scheduler != "asha":
        return None
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler("epoch", "score", "min", max_t=study.budget.epochs, stop_last_trials=False)


def _searcher(desk: Desk, runner: TrialRunner) -> Any:
    """Return a searcher for Tune that asks the desk for each trial."""
    from ray.tune.search import Searcher

    class Asking(Searcher):
        def suggest(self, trial_id: str) -> Any:
            config = desk.next_config()
            return Searcher.FINISHED if config is None and (desk.agenda.is_done or runner.late) else config

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            """Do nothing: the callback of `_callback` gets more than this."""

        def save(self, checkpoint_path: str) -> None:
            """Do nothing: what is finished is in MLflow."""

    return Asking()


def _callback(desk: Desk, runner: TrialRunner) -> Any:
    """Return a callback for Tune that tells the desk how trials end, and logs each minute what they have spent."""
    from ray import tune

    class Telling(tune.Callback):
        logged_at = looked_at = time.monotonic()
        told: ClassVar[set[str]] = set()

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            desk.poll()
            now = time.monotonic()
            if now - self.logged_at > _LOG_SECONDS:
                self.logged_at = now
                threading.Thread(target=runner.log_spending, daemon=True).start()  # Tune's loop waits for no store
            if now - self.looked_at > _LOOK_SECONDS:
                self.looked_at = now
                # Tune calls nothing for a trial whose worker could not be taken over from the trial before
                for trial in trials:
                    if trial.status == "ERROR" and trial.trial_id not in self.told:
                        self.on_trial_error(iteration, trials, trial)

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            held = trial.placement_group_factory.required_resources
            desk.begin(trial.trial_id, trial.config, Share(held.get("GPU", 0.0), held["CPU"]))

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            desk.take_ended(trial.trial_id, trial.config, trial.last_result)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.told.add(trial.trial_id)
            lines = str(trial.get_error() or "its worker was lost").strip().splitlines()
            desk.take_lost(trial.trial_id, trial.config, one_line(lines[-1], 300))

    return Telling()
