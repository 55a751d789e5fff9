"""Trials on Ray Tune: a function computes the stages of a trial in one process, on a share of a device."""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from aecore.config.facts import Facts
from aecore.config.specs import FinetuneSpec, LoadSpec, Numerics
from aecore.core.errors import TakenOverError
from aecore.core.imports import fast_imports
from aecore.evaluation.trial import REFERENCES, trial_name
from pipelines.cluster.connection import start_ray
from pipelines.cluster.nodes import check_reach
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import share_of
from pipelines.execution.assignment import Assignment, assign
from pipelines.execution.compute import compute_graphs, free_device_memory, load_rows
from pipelines.execution.journal import Computed
from pipelines.graph.stage import Stage
from pipelines.host.messages import one_line, say
from pipelines.host.scratch import scratch
from pipelines.study.groups import groups_of
from pipelines.study.plan import TrialPlan, plan_trial, plan_trials
from pipelines.study.schema import Study

if TYPE_CHECKING:
    from ray import ObjectRef

    from pipelines.store.runs import Tracker

LATE = "the study's time was up"
"""The error of a trial that `budget.hours` cut off."""
_TELL_SECONDS = 1.0
"""Least time between two reports of a trial to Tune where no scheduler uses them."""
Choice = tuple[str, dict[str, Any], int]
"""Row, settings and seed of a trial."""


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
        self.deadline = time.monotonic() + 3600 * study.budget.hours if study.budget.hours else None

    @property
    def late(self) -> bool:
        """Whether the study's time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def plan_of(self, row: str, settings: dict[str, Any], seed: int) -> TrialPlan:
        """Return the plan of one trial of the study."""
        return plan_trial(self.study, row, settings, seed, self.facts, self.resources.numerics)

    def run(self, plans: Sequence[TrialPlan], tell: Callable[[str], None]) -> Endings:
        """Run trials and return the endings of those that did not finish. A trial that loses its worker or node runs
        again, up to `resources.retries` times."""
        endings = Endings()
        if not plans:
            return endings
        with fast_imports():
            from ray import tune
            from ray.exceptions import RayActorError

        for retries_left in range(self.resources.retries, -1, -1):
            groups = [
                [{"row": m.row, "settings": m.settings, "seed": m.seed} for m in group]
                for group in groups_of(plans, self._groups_at_once())
            ]
            results = self.fit({"trials": tune.grid_search(groups)}, None, 1)
            ended = self.endings(results)
            lost = {
                self.plan_of(*choice).stage.key
                for result in results
                if isinstance(result.error, RayActorError)
                for choice in choices(result.config)
            }
            plans = [m for m in plans if retries_left and m.stage.key in lost & ended.errors.keys()]
            for plan in plans:
                del ended.errors[plan.stage.key]
            endings.update(ended)
            if not plans:
                break
            tell(f"warning: {len(plans)} trials lost their worker or node; they run once more")
        return endings

    def fit(self, space: dict[str, Any], search: Any, count: int) -> Any:
        """Let Ray Tune run trials.

        Args:
            space: The configs that trials are drawn from, `param_space` of a `ray.tune.Tuner`.
            search: A searcher of `ray.tune.search`, or None.
            count: How many trials are drawn from the space.

        Returns:
            A `ray.tune.ResultGrid`.
        """
        # an interrupted job ends as KILLED and at once; Tune's own handler would first wait for its trials
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        # Tune would write each report to three files, which nobody reads
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        import ray
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler

        start_ray()
        check_reach(self.tracker.uri, self.resources.storage_path)
        share = share_of(self.resources)
        if self.data is None:
            self.data = ray.remote(num_cpus=1)(load_rows).remote(self._load_spec())
        trainable = tune.with_parameters(
            compute_trial,
            study=self.study,
            facts=self.facts,
            numerics=self.resources.numerics,
            assignment=assign(self.tracker, self.parent, share, self.resources, in_study=True),
            data=[self.data],  # in a list, a reference stays a reference
        )
        scheduler = None
        if self.study.scheduler == "asha":
            scheduler = ASHAScheduler(
                "epoch", "score", "min", max_t=self.study.budget.epochs, stop_last_trials=False
            )  # fmt: skip
        with redirect_stdout(sys.stderr), scratch() as folder:
            return tune.Tuner(
                tune.with_resources(trainable, {"CPU": share.cpus, "GPU": share.gpus}),
                param_space=space,
                tune_config=tune.TuneConfig(
                    search_alg=search,
                    scheduler=scheduler,
                    num_samples=count,
                    reuse_actors=True,
                    max_concurrent_trials=self.resources.max_concurrent,
                    time_budget_s=self.deadline and max(1.0, self.deadline - time.monotonic()),
                    trial_name_creator=_name_of,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=tune.RunConfig(
                    storage_path=str(folder), name="trials", verbose=0, callbacks=[_line_per_trial()]
                ),
            ).fit()

    def endings(self, results: Any) -> Endings:
        """Return the endings of the trials that did not finish in Tune's `results`, and end their MLflow runs."""
        endings = Endings()
        for result, choice in [(one, choice) for one in results for choice in choices(one.config)]:
            plan = self.plan_of(*choice)
            key = plan.stage.key
            if self.tracker.find(key):
                continue
            metrics = result.metrics or {}
            reported = metrics.get("errors", {})
            if result.error is not None or key in reported:
                cause = getattr(result.error, "cause", None) or result.error
                text = str(cause).strip() or type(cause).__name__
                endings.errors[key] = reported.get(key) or one_line(text.splitlines()[-1], 300)
                if TakenOverError.__name__ not in endings.errors[key]:  # else the run belongs to another driver now
                    self.tracker.fail(key, endings.errors[key])
            elif not self.late and (epoch := metrics.get("epoch")):
                endings.stopped[key] = epoch
                self.tracker.stop(key, epoch)
                self._clear_checkpoints(plan)
            else:
                endings.errors[key] = LATE
                self.tracker.fail(key, LATE)
        return endings

    def _groups_at_once(self) -> int | None:
        """Return how many groups of trials run at the same time; None where trials are not trained together as one: on
        CPUs, and with a scheduler, which needs the epochs of each trial."""
        start_ray()
        share = share_of(self.resources)
        if not share.gpus or self.study.scheduler != "none":
            return None
        import ray

        at_once = int(ray.cluster_resources().get("GPU", 0) / share.gpus)
        return max(1, min(at_once, self.resources.max_concurrent or at_once))

    def _load_spec(self) -> LoadSpec:
        first = plan_trials(self.study, self.facts, self.resources.numerics)[0]
        return next(stage.spec for stage in first.stages().values() if isinstance(stage.spec, LoadSpec))

    def _clear_checkpoints(self, plan: TrialPlan) -> None:
        assignment = assign(self.tracker, self.parent, share_of(self.resources), self.resources)
        for stage in plan.stages().values():
            if checkpoints := assignment.checkpoints(stage):
                checkpoints.clear()


def choices(config: Mapping[str, Any] | None) -> list[Choice]:
    """Return the study's trials that one of Tune's trials consists of, read from the config of Tune's trial. Tune
    forgets the config of a trial that never started; then none are returned."""
    if config is None:
        return []
    if "trials" in config:
        return [(one["row"], one["settings"], one["seed"]) for one in config["trials"]]
    return [(config["row"], settings_in(config), config["seed"])]


def settings_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the searched settings from the config of one of Tune's trials."""
    return {name.removeprefix("set:"): value for name, value in config.items() if name.startswith("set:")}


def config_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they stand in the config of one of Tune's trials."""
    return {f"set:{name}": value for name, value in settings.items()}


def compute_trial(
    config: dict[str, Any],
    *,
    study: Study,
    facts: Facts,
    numerics: Numerics,
    assignment: Assignment,
    data: "list[ObjectRef]",
) -> None:
    """Compute one of Tune's trials: one trial of the study, or several that are trained together as one.

    All stages are restored or computed in this process. Tune gets a report per epoch if there is a scheduler, else at
    most one per second, to be displayed. The last report holds the measure by which a search chooses, or the errors of
    the trials that failed.
    """
    with fast_imports():
        import ray
        from ray import tune

    plans = [plan_trial(study, *choice, facts, numerics) for choice in choices(config)]
    load = next(stage for stage in plans[0].stages().values() if isinstance(stage.spec, LoadSpec))
    told_at = 0.0

    def tell(stage: Stage, epoch: int, metrics: dict[str, float]) -> None:
        nonlocal told_at
        whole = isinstance(stage.spec, FinetuneSpec) and stage.spec.task == "reconstruct"
        # a report waits for Tune's loop
        if whole and (study.scheduler != "none" or time.monotonic() - told_at > _TELL_SECONDS):
            score = metrics["val/reconstruction"]
            # Tune wants every metric in every report; Optuna goes by the last one
            tune.report({"epoch": epoch, "score": score, "chosen": score})
            told_at = time.monotonic()

    assignments = [replace(assignment, tags=plan.tags(), tell=tell) for plan in plans]
    outcomes = compute_graphs([plan.stage for plan in plans], assignments, {load.key: ray.get(data[0])})
    if assignment.share.gpus:
        free_device_memory()  # the next trial may run in this process
    errors = {
        plan.stage.key: one_line(f"{type(outcome).__name__}: {outcome}", 300)
        for plan, outcome in zip(plans, outcomes, strict=True)
        if isinstance(outcome, Exception)
    }
    if plans[0].kind in REFERENCES:
        # epoch 0, which no scheduler judges, since other trials are not to be compared with references
        tune.report({"epoch": 0, "score": math.nan, "chosen": math.nan, "errors": errors})
    elif len(plans) > 1:
        tune.report({"epoch": study.budget.epochs, "errors": errors})
    else:
        (outcome,) = outcomes
        if not isinstance(outcome, Computed):
            raise outcome
        last = outcome.result.config["history"][-1]["val/reconstruction"]
        chosen = outcome.result.metrics[study.choose_metric]
        tune.report({"epoch": study.budget.epochs, "score": last, "chosen": chosen})


def _name_of(trial: Any) -> str:
    first, *others = choices(trial.config)
    return trial_name(*first) + (f" and {len(others)} more" if others else "")


def _line_per_trial() -> Any:
    """Return a callback for Tune that prints a line when a trial starts and when it ends."""
    from ray import tune

    class LinePerTrial(tune.Callback):
        def __init__(self) -> None:
            self.ended = 0

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            say(f"{_name_of(trial)}: begins")

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._say_end(trial, "ends", len(trials))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._say_end(trial, "fails", len(trials))

        def _say_end(self, trial: Any, what: str, started: int) -> None:
            self.ended += 1
            say(f"{_name_of(trial)}: {what}; {self.ended} ended of {started} that have begun or wait")

    return LinePerTrial()
