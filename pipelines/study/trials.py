"""A study: variants x settings x seeds as parallel Ray Tune trials, measured alike. Nothing else imports ray.tune."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from aecore.config.facts import Facts
from aecore.config.specs import FinetuneSpec, LoadSpec, Numerics
from aecore.core.fingerprint import fingerprint
from aecore.core.imports import fast_imports
from aecore.models.storage import Result
from pipelines.cluster.connection import start_ray
from pipelines.cluster.nodes import check_reach
from pipelines.cluster.resources import Resources, Share
from pipelines.cluster.share import share_of
from pipelines.execution.run import Tell, checkpoints_of, compute, load_rows, restore, run_trial
from pipelines.graph.stage import Stage
from pipelines.host.scratch import scratch
from pipelines.study.plan import TrialPlan, plan_trial, plan_trials, reference_groups, shared_stages
from pipelines.study.schema import Study
from pipelines.study.trial import REFERENCES, Trial, trial_name

if TYPE_CHECKING:
    from ray import ObjectRef

    from pipelines.store.runs import Tracker


_TELL_SECONDS = 1.0
_LATE = "the study's time was up"
Runs = Mapping[str, tuple[str, dict[str, float]]]
"""Finished runs by their stages' keys, with their metrics."""
_MOST_AS_ONE = 64
"""Trials that are one Tune trial: with what a lost worker costs in mind; memory is looked after where they train."""


class Ended(NamedTuple):
    """A study that is over."""

    trials: list[Trial]
    """All of them, the stopped and the failed ones included."""
    computed: int
    """Stages computed."""
    restored: int
    """Stages that were finished before."""


def run(
    study: Study, facts: Facts, tracker: "Tracker", parent: str, resources: Resources, say: Callable[[str], None]
) -> Ended:
    """Finish every trial; those that are finished are restored, and Ray starts only if one is not.

    Args:
        parent: the study's MLflow run.
    """
    members = plan_trials(study, facts, resources.numerics)
    job = _Job(study, facts, tracker, parent, resources)
    stopped: dict[str, int] = {}
    errors: dict[str, str] = {}
    before = _finished(members, tracker)
    for m in members:
        if m.stage.key in before:
            say(f"{m.name}: restored")
        elif study.scheduler == "asha" and (epoch := tracker.stopped(m.stage.key)) is not None:
            stopped[m.stage.key] = epoch
            say(f"{m.name}: stopped at epoch {epoch} before")
    missing = [m for m in members if m.stage.key not in before and m.stage.key not in stopped]
    if missing:
        job.prepare(missing, say)
        failed, halted = job.trials(missing, say)
        errors |= dict.fromkeys((m.stage.key for m in missing), _LATE) if job.late else {}
        errors |= failed
        stopped |= halted
    if study.search == "optuna":
        for row in study.variants:
            if study.space(row):
                found, failed, halted = job.optimise(row, say)
                members += found
                errors |= failed
                stopped |= halted
    runs = _finished(members, tracker)
    trials = [_ended(m, tracker, runs, study.budget.epochs, errors, stopped) for m in members]
    return Ended(trials, len(runs.keys() - before.keys()), len(before))


def _finished(members: Sequence[TrialPlan], tracker: "Tracker") -> Runs:
    """Those of the finished stages of some trials."""
    stages = {key for m in members for key, stage in m.stages().items() if stage.kept}
    found = {key: tracker.finished(key) for key in stages}
    return {key: run for key, run in found.items() if run}


class _Job:
    """What the steps of a study share: where results go, and, once Ray is up, the data and each trial's share."""

    def __init__(self, study: Study, facts: Facts, tracker: "Tracker", parent: str, resources: Resources) -> None:
        self.study, self.facts, self.tracker, self.parent = study, facts, tracker, parent
        # trials side by side, each with one thread, outrun one trial with all threads
        self.resources = resources if resources.cpus else resources.model_copy(update={"cpus": 1})
        self.data: ObjectRef | None = None
        self.deadline = time.monotonic() + 3600 * study.budget.hours if study.budget.hours else None

    @property
    def late(self) -> bool:
        """Whether the study's time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def prepare(self, members: Sequence[TrialPlan], say: Callable[[str], None]) -> None:
        """Compute what several trials stand on, each once, as chained tasks."""
        common = shared_stages(members)
        if common:
            say(f"{len(common)} stages that several trials share come first")
            compute(common, self.tracker, self.parent, self.resources, say, study=True)

    def trials(self, members: Sequence[TrialPlan], say: Callable[[str], None]) -> tuple[dict[str, str], dict[str, int]]:
        """Run trials on Ray Tune; errors by key, and epochs of those that were stopped by key."""
        if not members:
            return {}, {}
        with fast_imports():
            from ray import tune
            from ray.exceptions import RayActorError

        errors: dict[str, str] = {}
        stopped: dict[str, int] = {}
        for left in range(self.resources.retries, -1, -1):
            groups = [
                [{"row": m.row, "settings": m.settings, "seed": m.seed} for m in g] for g in self._groups(members)
            ]
            results = self._fit({"trials": tune.grid_search(groups)}, None, 1)
            failed, halted = self._outcome(results)
            stopped |= halted
            dead = [choice for r in results if isinstance(r.error, RayActorError) for choice in _choices(r.config)]
            lost = {self._member(*choice).stage.key for choice in dead}
            members = [m for m in members if left and m.stage.key in lost and m.stage.key in failed]
            errors |= {key: error for key, error in failed.items() if key not in {m.stage.key for m in members}}
            if not members:
                break
            say(f"warning: {len(members)} trials lost their worker or node; once more")
        return errors, stopped

    def _groups(self, members: Sequence[TrialPlan]) -> list[list[TrialPlan]]:
        """Trials that are to train as one: on GPUs, where no scheduler looks at each, those that differ in numbers
        alone, but so that no GPU is idle."""
        start_ray()
        share = share_of(self.resources)
        first, members = reference_groups(members), [m for m in members if m.kind not in REFERENCES]
        if not share.gpus or self.study.scheduler != "none":
            return first + [[m] for m in members]
        import ray

        at_once = int(ray.cluster_resources().get("GPU", 0) / share.gpus)
        at_once = max(1, min(at_once, self.resources.max_concurrent or at_once))
        return first + grouped(members, max(1, min(_MOST_AS_ONE, ceil(len(members) / at_once))))

    def optimise(self, row: str, say: Callable[[str], None]) -> tuple[list[TrialPlan], dict[str, str], dict[str, int]]:
        """Let Optuna choose settings with the first seed, then run the best with the others."""
        from ray import tune
        from ray.tune.search.optuna import OptunaSearch

        study, first = self.study, self.study.seeds[0]
        before = [
            (settings, self.tracker.metrics(run_id)[study.choose_metric])
            for settings, run_id in self.tracker.trials(self.parent, row)
        ]
        tried = {json.dumps(settings, sort_keys=True): (settings, score) for settings, score in before}
        errors: dict[str, str] = {}
        stopped: dict[str, int] = {}
        left = study.budget.settings - len(tried)
        if left > 0:
            space = {
                f"set:{name}": tune.choice(v) if isinstance(v, list)
                else (tune.loguniform if v.log else tune.uniform)(v.low, v.high)
                for name, v in study.space(row).items()
            }  # fmt: skip
            mode = "max" if study.choose == "probe" else "min"
            search = OptunaSearch(
                metric="chosen", mode=mode, seed=first,
                points_to_evaluate=[_flat(s) for s, _ in tried.values()] or None,
                evaluated_rewards=[score for _, score in tried.values()] or None,
            )  # fmt: skip
            results = self._fit({"row": row, "seed": first, **space}, search, left)
            errors, stopped = self._outcome(results)
            for settings in (_settings(result.config) for result in results if result.config):
                if run_id := self.tracker.find(self._member(row, settings, first).stage.key):
                    score = self.tracker.metrics(run_id)[study.choose_metric]
                    tried[json.dumps(settings, sort_keys=True)] = settings, score
                else:
                    say(f"{trial_name(row, settings, first)}: did not finish")
        members = [self._member(row, settings, first) for settings, _ in tried.values()]
        if tried:
            sign = -1 if study.choose == "probe" else 1
            best = min(tried.values(), key=lambda one: sign * one[1])[0]
            others = [self._member(row, best, seed) for seed in study.seeds[1:]]
            failed, halted = self.trials([m for m in others if not self.tracker.find(m.stage.key)], say)
            members += others
            errors |= failed
            stopped |= halted
        return members, errors, stopped

    def _member(self, row: str, settings: dict[str, Any], seed: int) -> TrialPlan:
        return plan_trial(self.study, row, settings, seed, self.facts, self.resources.numerics)

    def _fit(self, space: dict[str, Any], search: Any, count: int) -> Any:
        # the progress table and its log files: the first goes to stderr, the others nobody reads
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # an interrupted job ends as KILLED, at once
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
        import ray
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler

        start_ray()
        check_reach(self.tracker.uri, self.resources.storage_path)
        share = share_of(self.resources)._replace(study=True)
        if self.data is None:
            some = plan_trials(self.study, self.facts, self.resources.numerics)[0].stages()
            spec = next(s.spec for s in some.values() if isinstance(s.spec, LoadSpec))
            assert isinstance(spec, LoadSpec)
            self.data = ray.remote(num_cpus=1)(load_rows).remote(spec)
        trainable = tune.with_parameters(
            _trial, study=self.study, facts=self.facts, numerics=self.resources.numerics,
            store=tuple(self.tracker), parent=self.parent, share=share, data=[self.data],
        )  # fmt: skip
        asha = (
            ASHAScheduler("epoch", "score", "min", max_t=self.study.budget.epochs, stop_last_trials=False)
            if self.study.scheduler == "asha"
            else None
        )
        with redirect_stdout(sys.stderr), scratch() as folder:
            return tune.Tuner(
                tune.with_resources(trainable, {"CPU": share.cpus, "GPU": share.gpus}),
                param_space=space,
                tune_config=tune.TuneConfig(
                    search_alg=search, scheduler=asha, num_samples=count, reuse_actors=True,
                    max_concurrent_trials=self.resources.max_concurrent,
                    time_budget_s=self.deadline and max(1.0, self.deadline - time.monotonic()),
                    trial_name_creator=_trial_name, trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=tune.RunConfig(storage_path=str(folder), name="trials", verbose=1),
            ).fit()  # fmt: skip

    def _outcome(self, results: Any) -> tuple[dict[str, str], dict[str, int]]:
        errors: dict[str, str] = {}
        stopped: dict[str, int] = {}
        for result, choice in [(one, choice) for one in results for choice in _choices(one.config)]:
            one = self._member(*choice)
            key = one.stage.key
            if self.tracker.find(key):
                continue
            told = (result.metrics or {}).get("errors", {})
            if result.error is not None or key in told:
                cause = getattr(result.error, "cause", None) or result.error
                errors[key] = told.get(key) or " ".join(str(cause).strip().splitlines()[-1].split())[:300]
                self.tracker.fail(key, errors[key])
            elif not self.late and (epoch := (result.metrics or {}).get("epoch")):
                stopped[key] = epoch
                self.tracker.stop(key, epoch)
                for stage in one.stages().values():
                    if place := checkpoints_of(stage, self.tracker.uri, share_of(self.resources)):
                        place.clear()
            else:
                errors[key] = _LATE
        return errors, stopped


def _trial(
    config: dict[str, Any], *, study: Study, facts: Facts, numerics: Numerics, store: tuple[str, str, float, bool],
    parent: str, share: Share, data: "list[ObjectRef]",
) -> None:  # fmt: skip
    """The body of a trial, or of several that train as one: restores or computes its stages in this process, and tells
    Tune of every epoch."""
    with fast_imports():
        import ray
        from ray import tune

        from pipelines.store.runs import Tracker

    members = [plan_trial(study, *choice, facts, numerics) for choice in _choices(config)]
    loaded = next(s for s in members[0].stages().values() if isinstance(s.spec, LoadSpec))
    told = 0.0

    def tell(stage: Stage, epoch: int, metrics: dict[str, float]) -> None:
        nonlocal told
        whole = isinstance(stage.spec, FinetuneSpec) and stage.spec.task == "reconstruct"
        # a report waits for Tune's loop; without a scheduler it is only for the eye
        if whole and (study.scheduler != "none" or time.monotonic() - told > _TELL_SECONDS):
            score = metrics["val/reconstruction"]
            # Tune wants every metric in every report; Optuna goes by the last
            tune.report({"epoch": epoch, "score": score, "chosen": score})
            told = time.monotonic()

    done = {loaded.key: ray.get(data[0])}
    if members[0].kind in REFERENCES:
        ended: dict[str, Result | Exception] = {}
        for m in members:
            try:
                ended[m.stage.key] = run_trial(m.stage, Tracker(*store), parent, m.tags(), share, done, tell)
            except Exception as error:
                ended[m.stage.key] = error
        # at an epoch that no scheduler looks at: others are not to be compared with them
        tune.report({"epoch": 0, "score": math.nan, "chosen": math.nan, "errors": _errors(ended)})
        return
    if len(members) > 1:
        ended = run_as_one(members, Tracker(*store), parent, share, done, tell)
        tune.report({"epoch": study.budget.epochs, "errors": _errors(ended)})
        return
    result = run_trial(members[0].stage, Tracker(*store), parent, members[0].tags(), share, done, tell)
    last = result.config["history"][-1]["val/reconstruction"]
    tune.report({"epoch": study.budget.epochs, "score": last, "chosen": result.metrics[study.choose_metric]})


def _errors(ended: Mapping[str, Result | Exception]) -> dict[str, str]:
    """A line for each that failed, by key."""
    lines = {key: f"{type(e).__name__}: {e}" for key, e in ended.items() if isinstance(e, Exception)}
    return {key: " ".join(line.split())[:300] for key, line in lines.items()}


def grouped(members: Sequence[TrialPlan], most: int) -> list[list[TrialPlan]]:
    """Trials that differ in numbers alone (see `aecore.fused`), so many together at most, in order."""
    alike: dict[str, list[TrialPlan]] = {}
    for m in members:
        alike.setdefault(_but_for_numbers(m), []).append(m)
    return [same[start : start + most] for same in alike.values() for start in range(0, len(same), most)]


def _but_for_numbers(m: TrialPlan) -> str:
    """What a trial's training has in common with those that it may be trained with."""
    specs = [s.spec.model_dump(mode="json") for s in m.stages().values() if hasattr(s.spec, "fit")]
    for spec in specs:
        spec["seed"] = None
        spec["fit"] = {name: spec["fit"][name] for name in ("epochs", "batch_size")}
        for name, value in (spec["variant"] or {}).items():
            if isinstance(value, float):
                spec["variant"][name] = bool(value)
    return fingerprint(*specs)


def run_as_one(
    members: Sequence[TrialPlan], tracker: "Tracker", parent: str, share: Share, done: dict[str, Any], tell: Tell,
    everywhere: bool = False,
) -> dict[str, Result | Exception]:  # fmt: skip
    """Trials in this process, that train as one: each restores, computes and keeps its own stages in runs of its own,
    and fails alone.

    Args:
        everywhere: on CPU, too.

    Returns:
        The measures of each, or what it failed with, by key.
    """
    import torch

    torch.set_num_threads(share.cpus)
    with redirect_stdout(sys.stderr):  # as each does for itself, and not in turn
        ended: list[Result | Exception] = []
        for m in members:
            try:
                ended.append(run_trial(m.stage, tracker, parent, m.tags(), share, dict(done), tell))
            except Exception as error:  # it is this trial's alone
                ended.append(error)
    return {m.stage.key: one for m, one in zip(members, ended, strict=True)}


def _ended(
    m: TrialPlan, tracker: "Tracker", runs: Runs, epochs: int, errors: dict[str, str],
    stopped: dict[str, int],
) -> Trial:  # fmt: skip
    """A member as the report wants it."""
    key, planned = m.stage.key, 0 if m.kind in REFERENCES else epochs
    trial = Trial(m.row, m.settings, m.seed, m.kind, "failed", errors.get(key, "did not run"), epochs_planned=planned)
    if key in stopped:
        return trial._replace(status="stopped", error="", epochs_used=stopped[key])
    if key not in runs:
        return trial
    run_id, _ = runs[key]
    result = restore(run_id, tracker)
    if result is None:
        return trial._replace(error="its result is lost; start the study again")
    curves = dict(result.config)
    stages = [stage for stage in m.stages().values() if stage.key in runs and stage.key != key]
    spent = {stage.key: runs[stage.key][1] for stage in stages}
    unsupervised = [stage.key for stage in stages if getattr(stage.spec, "variant", None) is not None]
    return trial._replace(
        status="finished", error="", run_id=run_id, metrics=result.metrics,
        history=tuple(curves.pop("history")), curves=curves, arrays=result.weights,
        epochs_used=round(sum(spent[key].get("epochs", 0) for key in unsupervised)),
        seconds=sum(metrics.get("train_seconds", 0) for metrics in spent.values()),
    )  # fmt: skip


def _choices(config: Mapping[str, Any] | None) -> list[tuple[str, dict[str, Any], int]]:
    """Row, settings and seed of each trial that is one of Tune's, from its config of either search; none of one whose
    turn never came, since Tune forgets it."""
    if config is None:
        return []
    if "trials" in config:
        return [(one["row"], one["settings"], one["seed"]) for one in config["trials"]]
    return [(config["row"], _settings(config), config["seed"])]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("set:"): v for name, v in config.items() if name.startswith("set:")}


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {f"set:{name}": value for name, value in settings.items()}


def _trial_name(trial: Any) -> str:
    first, *others = _choices(trial.config)
    return trial_name(*first) + (f" and {len(others)} more" if others else "")
