"""Trials on Ray Tune: which are run, how they end, and which are run again."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from aecore.config.facts import Facts
from aecore.config.specs import LoadSpec
from aecore.core.errors import TakenOverError
from aecore.core.imports import fast_imports
from aecore.evaluation.trial import trial_name
from pipelines.cluster.connection import start_ray
from pipelines.cluster.nodes import check_reach
from pipelines.cluster.placement import bundle_of, most_trials
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share, count_gpus, share_of
from pipelines.execution.assignment import Assignment, assign
from pipelines.execution.chain import cause_of, may_pass
from pipelines.execution.compute import load_rows
from pipelines.graph.needs import device_memory
from pipelines.host.messages import say
from pipelines.host.scratch import scratch
from pipelines.study.groups import groups_of
from pipelines.study.measuring import Measuring, reason_of
from pipelines.study.plan import TrialPlan, largest_settings, plan_trial, plan_trials
from pipelines.study.schema import Study
from pipelines.study.worker import choices, compute_trial, share_of_row

if TYPE_CHECKING:
    from ray import ObjectRef

    from pipelines.store.runs import Tracker

LATE = "the study's time was up"
"""The error of a trial that `budget.hours` cut off."""


@dataclass
class Endings:
    """Errors of trials that failed and last epochs of trials that were stopped, by the key of the trial's stage."""

    errors: dict[str, str] = field(default_factory=dict)
    stopped: dict[str, int] = field(default_factory=dict)
    """The epoch at which the scheduler stopped the trial."""

    def update(self, other: "Endings") -> None:
        """Add the endings of further trials."""
        self.errors |= other.errors
        self.stopped |= other.stopped


class TrialRunner:
    """Runs the trials of one study. The data are read once into the memory of Ray, and all trials share them."""

    def __init__(self, study: Study, facts: Facts, tracker: "Tracker", parent: str, resources: Resources) -> None:
        self.study, self.facts, self.tracker, self.parent, self.resources = study, facts, tracker, parent, resources
        self.data: ObjectRef | None = None
        self.known: dict[str, str] = {}
        """The runs of the finished stages that several trials share, by key."""
        self.deadline = time.monotonic() + 3600 * study.budget.hours if study.budget.hours else None

    @property
    def late(self) -> bool:
        """Whether the study's time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def plan_of(self, row: str, settings: dict[str, Any], seed: int) -> TrialPlan:
        """Return the plan of one trial of the study."""
        return plan_trial(self.study, row, settings, seed, self.facts, self.resources.numerics)

    def run(self, plans: Sequence[TrialPlan], tell: Callable[[str], None]) -> Endings:
        """Run trials and return the endings of those that did not finish. A trial that loses its worker, its node or a
        connection runs again, up to `resources.retries` times."""
        endings = Endings()
        if not plans:
            return endings
        with fast_imports():
            from ray import tune

        groups = self.groups(plans)
        share = self._share(groups)  # once: the last GPU may be lost, and then Ray waits for another
        for retries_left in range(self.resources.retries, -1, -1):
            configs = [[{"row": m.row, "settings": m.settings, "seed": m.seed} for m in group] for group in groups]
            with self._measuring(share) as measuring:
                results = self.fit({"trials": tune.grid_search(configs)}, None, 1, measuring)
                unmeasured = dict(measuring.wait(self.deadline)) if measuring else {}
            ended = self.endings(results, unmeasured)
            lost = {
                self.plan_of(*choice).stage.key
                for result in results
                if result.error is not None and may_pass(cause_of(result.error))
                for choice in choices(result.config)
            }
            lost |= {key for key, error in unmeasured.items() if may_pass(cause_of(error))}
            plans = [m for m in plans if retries_left and m.stage.key in lost & ended.errors.keys()]
            for plan in plans:
                del ended.errors[plan.stage.key]
            endings.update(ended)
            if not plans:
                break
            groups = self.groups(plans)
            tell(f"warning: {len(plans)} trials lost their worker, node or connection; they run once more")
        return endings

    def groups(self, plans: Sequence[TrialPlan]) -> list[list[TrialPlan]]:
        """Divide trials into the groups that Ray Tune runs as one trial each: on GPUs trials are trained together as
        one, except with a scheduler, which needs the epochs of each trial."""
        start_ray()
        gpus = count_gpus(self.resources) if self.resources.gpus != 0 and self.study.scheduler == "none" else 0
        return groups_of(plans, min(gpus, self.resources.max_concurrent or gpus) or None)

    def fit(self, space: dict[str, Any], search: Any, count: int, measuring: Measuring | None = None) -> Any:
        """Let Ray Tune run trials.

        Args:
            space: The configs that trials are drawn from, `param_space` of a `ray.tune.Tuner`.
            search: A searcher of `ray.tune.search`, or None.
            count: How many trials are drawn from the space.
            measuring: Measures the trials that were trained; None lets the trials measure themselves.

        Returns:
            A `ray.tune.ResultGrid`.
        """
        # an interrupted job ends as KILLED and at once; Tune's own handler would first wait for its trials
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        # Tune would write each report to three files, which nobody reads
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler

        start_ray()
        share = measuring.assignment.share if measuring else self._share([])
        trainable = tune.with_parameters(
            compute_trial,
            study=self.study,
            facts=self.facts,
            numerics=self.resources.numerics,
            assignment=self._assign(share),
            data=self._data(),
        )
        scheduler = None
        if self.study.scheduler == "asha":
            scheduler = ASHAScheduler(
                "epoch", "score", "min", max_t=self.study.budget.epochs, stop_last_trials=False
            )  # fmt: skip
        with redirect_stdout(sys.stderr), scratch() as folder:
            return tune.Tuner(
                tune.with_resources(trainable, partial(_reserved, share, self.resources)),
                param_space=space,
                tune_config=tune.TuneConfig(
                    search_alg=search,
                    scheduler=scheduler,
                    num_samples=count,
                    reuse_actors=True,
                    max_concurrent_trials=self.resources.max_concurrent or most_trials(share),
                    time_budget_s=self.deadline and max(1.0, self.deadline - time.monotonic()),
                    trial_name_creator=_name_of,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=tune.RunConfig(
                    storage_path=str(folder),
                    name="trials",
                    verbose=0,
                    callbacks=[_watch(partial(self._start_measuring, measuring))],
                ),
            ).fit()

    def endings(self, results: Any, unmeasured: Mapping[str, Exception] = {}) -> Endings:
        """Return the endings of the trials that did not finish in Tune's `results`, and end their MLflow runs.

        Args:
            unmeasured: Why trials that were trained could not be measured, by the key of the trial's stage.
        """
        endings, records = Endings(), self.tracker.trials_of(self.parent)
        for result, choice in [(one, choice) for one in results for choice in choices(one.config)]:
            plan = self.plan_of(*choice)
            key, record = plan.stage.key, records.get(plan.stage.key)
            if record and record.is_finished:
                continue
            run_id = record.run_id if record and record.status == "RUNNING" else None
            metrics = result.metrics or {}
            reported = metrics.get("errors", {}) | {k: reason_of(error) for k, error in unmeasured.items()}
            if result.error is not None or key in reported:
                endings.errors[key] = reported.get(key) or reason_of(result.error)
                # a driver that was taken over leaves the run to the other
                if run_id and TakenOverError.__name__ not in endings.errors[key]:
                    self.tracker.fail_trial(run_id, endings.errors[key])
            elif not self.late and key not in metrics.get("trained", {}) and (epoch := metrics.get("epoch")):
                endings.stopped[key] = epoch
                if run_id:
                    self.tracker.stop_trial(run_id, epoch)
                self._clear_checkpoints(plan)
            else:
                endings.errors[key] = LATE
                if run_id:
                    self.tracker.fail_trial(run_id, LATE)
        return endings

    @contextmanager
    def _measuring(self, share: Share) -> Iterator[Measuring | None]:
        """Yield what measures trials on CPUs while others train on GPUs; None where trials have no GPU."""
        if not share.gpus:
            yield None
            return
        with Measuring(self._assign(share), self.resources, self._data()).cancelled_at_the_end() as measuring:
            yield measuring

    def _start_measuring(self, measuring: Measuring | None, trial: Any) -> None:
        """Submit the measuring of what one of Tune's trials has trained."""
        plans = {plan.stage.key: plan for plan in (self.plan_of(*choice) for choice in choices(trial.config))}
        for key, opened in trial.last_result.get("trained", {}).items():
            assert measuring is not None
            measuring.start(plans[key], opened)

    def _share(self, groups: Sequence[Sequence[TrialPlan]]) -> Share:
        """Return the share of the cluster that each of these groups gets: what the largest needs.

        Where a search chooses the settings there are no groups yet; then it is what the largest settings need.
        """
        groups = groups or [
            [self.plan_of(row, largest_settings(self.study, row), self.study.seeds[0])] for row in self.study.variants
        ]
        needs = [device_memory(stage, len(group)) for group in groups for stage in group[0].stages().values()]
        return share_of(self.resources, max(need or 0 for need in needs))

    def _assign(self, share: Share) -> Assignment:
        return replace(assign(self.tracker, self.parent, share, self.resources, in_study=True), known=self.known)

    def _data(self) -> "list[ObjectRef]":
        """Return the reference to the data, in a list, where a reference that is sent stays a reference."""
        import ray

        if self.data is None:
            check_reach(self.tracker.uri, self.resources.storage_path)
            self.data = ray.remote(num_cpus=1)(load_rows).remote(self._load_spec())
        return [self.data]

    def _load_spec(self) -> LoadSpec:
        first = plan_trials(self.study, self.facts, self.resources.numerics)[0]
        return next(stage.spec for stage in first.stages().values() if isinstance(stage.spec, LoadSpec))

    def _clear_checkpoints(self, plan: TrialPlan) -> None:
        assignment = self._assign(Share(0, 1))
        for stage in plan.stages().values():
            if checkpoints := assignment.checkpoints(stage):
                checkpoints.clear()


def _reserved(share: Share, resources: Resources, config: dict[str, Any]) -> Any:
    """Return what one of Tune's trials reserves of the cluster, a `ray.tune.PlacementGroupFactory`."""
    from ray import tune

    (row, *_), *_ = choices(config)
    bundle, placement = bundle_of(share_of_row(row, share), resources)
    return tune.PlacementGroupFactory([bundle], **placement)


def _name_of(trial: Any) -> str:
    first, *others = choices(trial.config)
    return trial_name(*first) + (f" and {len(others)} more" if others else "")


def _watch(then: Callable[[Any], None]) -> Any:
    """Return a callback for Tune that prints a line when a trial starts and when it ends, and calls `then` with each
    trial that ends without an error."""
    from ray import tune

    class Watch(tune.Callback):
        def __init__(self) -> None:
            self.ended = 0

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            say(f"{_name_of(trial)}: begins")

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._say_end(trial, "ends", len(trials))
            then(trial)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._say_end(trial, "fails", len(trials))

        def _say_end(self, trial: Any, what: str, started: int) -> None:
            self.ended += 1
            say(f"{_name_of(trial)}: {what}; {self.ended} ended of {started} that have begun or wait")

    return Watch()
