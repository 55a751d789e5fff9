"""A study: variants x settings x seeds as parallel Ray Tune trials, measured alike. Nothing else imports ray.tune."""

import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from math import ceil, prod
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError, model_validator

from aecore.config import Conv, Dense, Experiment, Finetune, Fit, overlay
from aecore.errors import InputError, shown
from aecore.fingerprint import Frozen, fingerprint
from aecore.imports import quickly
from aecore.specs import (
    Facts,
    FinetuneSpec,
    LayerSpec,
    LoadSpec,
    MeasureSpec,
    Numerics,
    ReferenceSpec,
    layer_specs,
    resolve,
)
from aecore.storage import Result
from pipelines.run import (
    Resources,
    Share,
    Tell,
    check_reach,
    checkpoints_of,
    compute,
    load_rows,
    restore,
    run_trial,
    share_of,
    start_ray,
)
from pipelines.scratch import scratch
from pipelines.stacked import build, load_stage
from pipelines.stage import Stage
from pipelines.trial import REFERENCES, Trial, trial_name

if TYPE_CHECKING:
    from ray import ObjectRef

    from pipelines.tracking import Tracker

_ROW = r"\w[\w .:-]{0,99}"
"""What MLflow takes in a metric's name."""
_OVERRIDES = {"variant", "network", "pretrain", "finetune", "settings"}
_JUDGE = Fit(epochs=10, batch_size=128)
_JUDGE_WIDTHS = (128, 64)
_TELL_SECONDS = 1.0
_LATE = "the study's time was up"
Runs = Mapping[str, tuple[str, dict[str, float]]]
"""Finished runs by their stages' keys, with their metrics."""
_MOST_AS_ONE = 64
"""Trials that are one Tune trial: with what a lost worker costs in mind; memory is looked after where they train."""


class Range(Frozen):
    """Numbers to draw a setting from."""

    low: float
    high: float
    log: bool = False
    """Draw evenly on a logarithmic scale."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"settings: a range from {self.low:g} to {self.high:g} is empty; set low below high")
        return self


Settings = dict[str, list[Any] | Range]
_SETTINGS = TypeAdapter(Settings)


class Budget(Frozen):
    """What each trial may spend, the same for all."""

    epochs: PositiveInt = 40
    """Passes over the training rows of a trial's unsupervised training; a row with `pretrain` spends half of them layer
    by layer, in equal parts, and the rest on the whole."""
    settings: PositiveInt = 8
    """Settings that random and optuna try of each variant."""
    hours: PositiveFloat | None = None
    """Wall time after which no trial goes on; null sets no limit."""


class Labels(Frozen):
    """The supervised side of the comparison."""

    counts: tuple[PositiveInt, ...] = (100, 1000, 5000)
    """Labelled training rows of the label-efficiency curve; those the data have not are left out, all of them added."""
    fit: Fit = Fit(epochs=15)
    """Finetuning of each trained encoder with a softmax head."""


class Study(Frozen):
    """Which autoencoder should I use on my data, and does the difference mean anything?"""

    name: str = "study"
    """Title of the report."""
    base: Experiment = Experiment(pretrain=None, finetune=Finetune(task="reconstruct", batch_size=32), control=False)
    """What all trials share."""
    variants: dict[str, dict[str, Any]] = Field({"plain": {}}, min_length=1)
    """Rows of the comparison, by name: what each overrides of the base in `variant`, `network`, `pretrain` or
    `finetune`, and its own `settings`."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of weights, batches and noise; each row is trained with each."""
    settings: Settings = Field({})
    """Searched in every row, by dotted name: a list of values, or a range {low, high, log}."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """How settings are tried: all combinations, random ones, or by Optuna, which tries them with the first seed and
    then takes the best to the others."""
    scheduler: Literal["none", "asha"] = "none"
    """asha stops trials whose reconstruction lags (Li et al. 2020)."""
    choose: Literal["reconstruction", "probe"] = "reconstruction"
    """Which validation measure chooses a row's settings: squared error, or the linear probe's accuracy."""
    budget: Budget = Budget()
    labels: Labels = Labels()

    @model_validator(mode="after")
    def _can_be_compared(self) -> Self:
        if self.base.finetune is not None and self.base.finetune.task == "classify":
            raise ValueError("base.finetune.task: a study trains without labels; labels.fit is the supervised part")
        for row, override in self.variants.items():
            if not re.fullmatch(_ROW, row):
                raise ValueError(f"variants.{row}: metrics bear a row's name; use letters, digits, spaces and . - _ :")
            if row in REFERENCES:
                raise ValueError(f"variants.{row}: a reference of this name is there unasked; choose another name")
            if unknown := set(override) - _OVERRIDES:
                raise ValueError(
                    f"variants.{row}.{min(unknown)}: a row may differ in {', '.join(sorted(_OVERRIDES))}; "
                    "the rest must be equal for all, in base"
                )
        if self.scheduler == "asha" and self.choose == "probe":
            raise ValueError("scheduler: asha stops by reconstruction; set choose reconstruction or scheduler none")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} has one twice; name each once")
        spaces = [self.space(row) for row in self.variants]
        for name, values in (item for space in spaces for item in space.items()):
            if not re.match(r"(variant|network)(\.|$)|(pretrain|finetune)\.", name):
                raise ValueError(
                    f"settings.{name}: only fields of variant, network, pretrain and finetune are searched"
                )
            if name.endswith((".epochs", ".task")):
                raise ValueError(f"settings.{name}: equal for all trials; budget.epochs sets what each may spend")
            if values == []:
                raise ValueError(f"settings.{name}: no values to try; list some, or leave it out")
        if self.search == "grid" and any(isinstance(values, Range) for space in spaces for values in space.values()):
            raise ValueError("search: a grid needs lists of values, not ranges; list them or use random or optuna")
        return self

    def space(self, row: str) -> Settings:
        """What is searched in a row."""
        try:
            return {**self.settings, **_SETTINGS.validate_python(self.variants[row].get("settings", {}))}
        except ValidationError as error:
            raise ValueError(_told(f"variants.{row}.settings", error)) from None

    @property
    def choose_metric(self) -> str:
        """The metric of a trial that chooses a row's settings."""
        return "val/probe_accuracy" if self.choose == "probe" else "val/reconstruction_mse"


class Member(NamedTuple):
    """A trial before it has run."""

    row: str
    settings: dict[str, Any]
    seed: int
    kind: str
    stage: Stage
    """Its measures; it stands on all the rest."""

    @property
    def name(self) -> str:
        """For people."""
        return trial_name(self.row, self.settings, self.seed)

    def tags(self) -> dict[str, str]:
        """What marks the trial's MLflow run."""
        return {"row": self.row, "settings": json.dumps(self.settings), "seed": str(self.seed)}

    def stages(self) -> dict[str, Stage]:
        """All stages that the trial stands on, by key, in order; its measures come last."""
        return {stage.key: stage for stage in _below(self.stage)}


class Ended(NamedTuple):
    """A study that is over."""

    trials: list[Trial]
    """All of them, the stopped and the failed ones included."""
    computed: int
    """Stages computed."""
    restored: int
    """Stages that were finished before."""


def expand(study: Study, facts: Facts, numerics: Numerics) -> list[Member]:
    """All trials that are known before any has run, the references included; what Optuna will try is not.

    Raises:
        InputError: a row does not fit its data, or overrides what is not there.
    """
    rows = [
        member(study, row, settings, seed, facts, numerics)
        for row in study.variants
        for settings in combinations(study, row)
        for seed in study.seeds
    ]
    return rows + [reference(study, kind, seed, facts, numerics) for kind in REFERENCES for seed in study.seeds]


def combinations(study: Study, row: str) -> list[dict[str, Any]]:
    """The settings of a row: all combinations of a grid, random draws, or none yet where Optuna chooses."""
    space = study.space(row)
    if not space:
        return [{}]
    if study.search == "optuna":
        return []
    if study.search == "grid":
        values = [v for v in space.values() if isinstance(v, list)]
        return [dict(zip(space, choice, strict=True)) for choice in itertools.product(*values)]
    draw = random.Random(fingerprint("settings", row, study.seeds[0]))
    return [{name: _draw(values, draw) for name, values in space.items()} for _ in range(study.budget.settings)]


def _draw(values: list[Any] | Range, draw: random.Random) -> Any:
    if isinstance(values, list):
        return draw.choice(values)
    if values.log:
        return math.exp(draw.uniform(math.log(values.low), math.log(values.high)))
    return draw.uniform(values.low, values.high)


def experiment_of(study: Study, row: str, settings: Mapping[str, Any], seed: int) -> Experiment:
    """The experiment of a row: the base, overridden, with the budget's epochs."""
    base = study.base.model_dump()
    base["finetune"] = base["finetune"] or Finetune().model_dump()
    values = overlay(base, {key: value for key, value in study.variants[row].items() if key != "settings"})
    for name, value in settings.items():
        *path, last = name.split(".")
        nested: dict[str, Any] = {last: value}
        for part in reversed(path):
            nested = {part: nested}
        values = overlay(values, nested)
    try:
        network = Experiment.model_validate(values).network
    except ValidationError as error:
        raise InputError(_told(f"variants.{row}", error)) from None
    if values["finetune"] is None:
        raise InputError(f"variants.{row}.finetune: null, but each row is trained as a whole; leave it out")
    layers = len(network.widths) + (len(network.dense) if isinstance(network, Conv) else 0)
    epochs = study.budget.epochs
    if values["pretrain"] is not None:
        each = max(1, epochs // (2 * layers))
        if epochs <= each * layers:
            raise InputError(
                f"budget.epochs: {epochs} leave row {row} with its {layers} layers no epoch for the whole; "
                f"allow at least {layers + 1}"
            )
        epochs -= each * layers
        own = {k: v for k, v in (study.variants[row].get("pretrain") or {}).items() if v is not None}
        own |= {k.removeprefix("pretrain."): v for k, v in settings.items() if k.startswith("pretrain.")}
        fit = {k: v for k, v in values["finetune"].items() if k != "task"}
        values["pretrain"] = {**fit, **own, "epochs": each}
    values["finetune"] |= {"task": "reconstruct", "epochs": epochs}
    return Experiment.model_validate({**values, "control": False, "seed": seed})


def _told(place: str, error: ValidationError) -> str:
    """One line of the first error, with the names of fields that lead to it."""
    found = error.errors(include_url=False)
    first = next((e for e in found if e["type"] == "value_error"), found[0])
    if first["type"] == "value_error":
        return f"{place}: {first['msg'].removeprefix('Value error, ')}"
    path = ".".join([place, *map(str, first["loc"])])
    return f"{path}: {first['msg']}, got {shown(first['input'])}"


def member(
    study: Study, row: str, settings: dict[str, Any], seed: int, facts: Facts, numerics: Numerics
) -> Member:  # fmt: skip
    """One trial of a row, or of a reference."""
    for kind in REFERENCES:
        if row == kind:
            return reference(study, kind, seed, facts, numerics)
    experiment = experiment_of(study, row, settings, seed)
    label = f"{trial_name(row, settings, seed)}: "
    try:
        graph = build(experiment, facts, numerics, label, served=False)
    except InputError as error:
        raise InputError(f"variants.{row}: {error}") from None
    assert graph.finetune is not None and isinstance(graph.finetune.spec, FinetuneSpec)
    stage = _measured(study, graph.finetune, graph.finetune.spec.layers, graph.data, seed, facts, numerics, label)
    return Member(row, settings, seed, experiment.variant.kind, stage)


def reference(
    study: Study, kind: Literal["pca", "random"], seed: int, facts: Facts, numerics: Numerics
) -> Member:  # fmt: skip
    """PCA of the base's width, or the base's network with random weights, measured like any other trial."""
    experiment = resolve(study.base, facts)
    data = load_stage(experiment, facts)
    layers = tuple(layer_specs(experiment.network, experiment.data, facts))
    if kind == "pca":
        features = prod(facts.shape)
        width = min(prod(layers[-1].code_shape), features)
        layers = (
            LayerSpec(
                kind="dense", in_shape=facts.shape, code_shape=(width,), activation="linear", likelihood="gaussian",
                out_activation="linear", levels=0, dropout=0, normalization="none", tied=False,
            ),
        )  # fmt: skip
    spec = ReferenceSpec(kind=kind, layers=layers, seed=0 if kind == "pca" else seed)
    label = f"{trial_name(kind, {}, seed)}: "
    made = Stage(f"{label}stack", "stages.reference", spec, {"data": data})
    return Member(kind, {}, seed, kind, _measured(study, made, layers, data, seed, facts, numerics, label))


def _measured(
    study: Study, stack: Stage, layers: tuple[LayerSpec, ...], data: Stage, seed: int, facts: Facts, numerics: Numerics,
    label: str,
) -> Stage:  # fmt: skip
    """The measures of a trained stack, and the classifiers that they need."""
    assert isinstance(data.spec, LoadSpec)
    variant = stack.spec.variant if isinstance(stack.spec, FinetuneSpec) else None
    # `limit` and the splits leave fewer rows than there are; a count that is too large is all of them
    rows = min(facts.rows, data.spec.data.limit or facts.rows)
    counts = [count for count in study.labels.counts if count < 0.5 * rows] if facts.classes else []
    classifiers = [
        Stage(
            f"{label}classify, {'all' if count is None else count} labels", "stages.finetune",
            _classify(layers, facts, study.labels.fit, seed, numerics, count), {"data": data, "stack": stack},
        )
        for count in ([*counts, None] if facts.classes else [])
    ]  # fmt: skip
    inputs: dict[str, Stage | tuple[Stage, ...]] = {"data": data, "stack": stack, "classifiers": tuple(classifiers)}
    if variant is not None and variant.kind == "variational" and facts.classes:
        network = Dense(widths=_JUDGE_WIDTHS, activation="relu")
        judge = _classify(tuple(layer_specs(network, data.spec.data, facts)), facts, _JUDGE, 0, numerics, None)
        inputs["judge"] = Stage("judge of samples", "stages.finetune", judge, {"data": data})
    spec = MeasureSpec(
        variant=variant, classes=facts.classes, labels=(*counts, rows) if facts.classes else (), seed=seed,
        pictures=seed == study.seeds[0],
    )  # fmt: skip
    return Stage(label.removesuffix(": "), "evaluation.measure", spec, inputs)


def _classify(
    layers: tuple[LayerSpec, ...], facts: Facts, fit: Fit, seed: int, numerics: Numerics, labels: int | None
) -> FinetuneSpec:
    return FinetuneSpec(
        layers=tuple(layer.model_copy(update={"stochastic": False}) for layer in layers), task="classify",
        classes=facts.classes, variant=None, fit=fit, seed=seed, numerics=numerics, labels=labels, served=False,
    )  # fmt: skip


def shared(members: Sequence[Member]) -> list[Stage]:
    """The stages that several trials stand on, in an order in which they can run."""
    used = [set(m.stages()) for m in members if m.kind not in REFERENCES]
    used += [{key for m in same for key in m.stages()} for same in _references(members)]
    uses = Counter(key for keys in used for key in keys)
    stages: dict[str, Stage] = {}
    for m in members:
        for key, stage in m.stages().items():
            stages.setdefault(key, stage)
    return [stage for key, stage in stages.items() if stage.kept and uses[key] > 1]


def _references(members: Sequence[Member]) -> list[list[Member]]:
    """Those of each kind, which are one of Tune's trials: seeds share what a reference is made of."""
    kinds = [[m for m in members if m.kind == kind] for kind in REFERENCES]
    return [same for same in kinds if same]


def run(
    study: Study, facts: Facts, tracker: "Tracker", parent: str, resources: Resources, say: Callable[[str], None]
) -> Ended:
    """Finish every trial; those that are finished are restored, and Ray starts only if one is not.

    Args:
        parent: the study's MLflow run.
    """
    members = expand(study, facts, resources.numerics)
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


def _finished(members: Sequence[Member], tracker: "Tracker") -> Runs:
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

    def prepare(self, members: Sequence[Member], say: Callable[[str], None]) -> None:
        """Compute what several trials stand on, each once, as chained tasks."""
        common = shared(members)
        if common:
            say(f"{len(common)} stages that several trials share come first")
            compute(common, self.tracker, self.parent, self.resources, say, study=True)

    def trials(self, members: Sequence[Member], say: Callable[[str], None]) -> tuple[dict[str, str], dict[str, int]]:
        """Run trials on Ray Tune; errors by key, and epochs of those that were stopped by key."""
        if not members:
            return {}, {}
        with quickly():
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

    def _groups(self, members: Sequence[Member]) -> list[list[Member]]:
        """Trials that are to train as one: on GPUs, where no scheduler looks at each, those that differ in numbers
        alone, but so that no GPU is idle."""
        start_ray()
        share = share_of(self.resources)
        first, members = _references(members), [m for m in members if m.kind not in REFERENCES]
        if not share.gpus or self.study.scheduler != "none":
            return first + [[m] for m in members]
        import ray

        at_once = int(ray.cluster_resources().get("GPU", 0) / share.gpus)
        at_once = max(1, min(at_once, self.resources.max_concurrent or at_once))
        return first + grouped(members, max(1, min(_MOST_AS_ONE, ceil(len(members) / at_once))))

    def optimise(self, row: str, say: Callable[[str], None]) -> tuple[list[Member], dict[str, str], dict[str, int]]:
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

    def _member(self, row: str, settings: dict[str, Any], seed: int) -> Member:
        return member(self.study, row, settings, seed, self.facts, self.resources.numerics)

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
            some = expand(self.study, self.facts, self.resources.numerics)[0].stages()
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
    with quickly():
        import ray
        from ray import tune

        from pipelines.tracking import Tracker

    members = [member(study, *choice, facts, numerics) for choice in _choices(config)]
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


def grouped(members: Sequence[Member], most: int) -> list[list[Member]]:
    """Trials that differ in numbers alone (see `aecore.fused`), so many together at most, in order."""
    alike: dict[str, list[Member]] = {}
    for m in members:
        alike.setdefault(_but_for_numbers(m), []).append(m)
    return [same[start : start + most] for same in alike.values() for start in range(0, len(same), most)]


def _but_for_numbers(m: Member) -> str:
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
    members: Sequence[Member], tracker: "Tracker", parent: str, share: Share, done: dict[str, Any], tell: Tell,
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

    from aecore.fused import together

    def work(m: Member, fit: Callable[..., Any]) -> Result:
        return run_trial(m.stage, tracker, parent, m.tags(), share._replace(fit=fit), dict(done), tell)

    torch.set_num_threads(share.cpus)
    with redirect_stdout(sys.stderr):  # as each does for itself, and not in turn
        ended = together([partial(work, m) for m in members], everywhere)
    return {m.stage.key: one for m, one in zip(members, ended, strict=True)}


def _ended(
    m: Member, tracker: "Tracker", runs: Runs, epochs: int, errors: dict[str, str],
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


def _below(stage: Stage) -> Iterator[Stage]:
    for parent in stage.parents():
        yield from _below(parent)
    yield stage
