"""Plans a study: which trials it consists of, and of which stages each trial is made. Nothing runs here."""

import itertools
import json
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from pydantic import ValidationError

from aecore.config.experiment import Conv, Experiment, Finetune, overlay, share_of_features
from aecore.config.facts import Facts
from aecore.config.specs import Numerics
from aecore.core.errors import InputError
from aecore.core.fingerprint import fingerprint
from aecore.evaluation.trial import in_set, is_reference, trial_name
from pipelines.graph.recipe import build
from pipelines.graph.stage import Stage
from pipelines.graph.work import guessed_seconds, shape_of
from pipelines.study.schema import Labels, Range, Study, first_problem
from pipelines.study.stages import measuring_stage, nested, reference_stages, trained_stages

COST_SHAPE, COST_WORK = "cost.shape", "cost.work"
"""Tags of a trial's run: `shape_of` its stages, and the sum of their `guessed_seconds`."""


class TrialPlan(NamedTuple):
    """A trial before it has run: a study row (a variant or a reference) with one choice of settings and one seed."""

    row: str
    settings: dict[str, Any]
    seed: int
    kind: str
    """The variant's kind, or the reference's name."""
    stage: Stage
    """The trial's last stage, which measures the trained network; its key identifies the trial."""
    data: str = ""
    """Name of the data set, where a study has several."""

    @property
    def name(self) -> str:
        """The trial's name in messages and in the report."""
        return in_set(self.data, trial_name(self.row, self.settings, self.seed))

    @property
    def is_reference(self) -> bool:
        """Whether the trial is of a reference, not of a variant."""
        return is_reference(self.kind)

    @property
    def is_fixed_reference(self) -> bool:
        """Whether the trial is of a reference without settings to search."""
        return self.is_reference and not self.settings

    @property
    def trained(self) -> Stage:
        """The stage that ends the trial's unsupervised training: of the whole, or else of the last layer."""
        inputs = self.stage.inputs
        stage = inputs.get("stack") or inputs.get("detector") or inputs["layers"]
        return stage[-1] if isinstance(stage, tuple) else stage

    def tags(self) -> dict[str, str]:
        """Return the tags of the trial's MLflow run; its shape and work let a later forecast use what it has cost."""
        kept = [stage for stage in self.stages().values() if stage.kept]
        work = sum(map(guessed_seconds, kept))
        return {
            "row": self.row, "settings": json.dumps(self.settings), "seed": str(self.seed),
            COST_SHAPE: shape_of(kept), COST_WORK: f"{work:.6g}", **({"data": self.data} if self.data else {}),
        }  # fmt: skip

    def of_set(self, data: str) -> "TrialPlan":
        """Return the trial as one of the data set of this name, which its stages are named for; their keys stay."""
        return self._replace(data=data, stage=self.stage.named_for(data)) if data else self

    def stages(self) -> dict[str, Stage]:
        """Return all stages of the trial by key, in an order in which they can run; `stage` comes last."""
        return {stage.key: stage for stage in _with_inputs(self.stage)}


def plan_trials(study: Study, facts: Facts, numerics: Numerics) -> list[TrialPlan]:
    """Plan all trials of a study, references included, except the trials whose settings Optuna will choose.

    Raises:
        InputError: a study row or setting does not fit the data or the budget, or changes a field that does not exist;
            or settings are to be chosen by an accuracy, and the data have no labels.
    """
    if study.choose != "reconstruction" and not facts.can_classify:
        lack = "all training rows are of one class" if facts.classes else "the data have none"
        if facts.has_anomalies:
            lack = "with data.anomaly they tell only anomalies"
        raise InputError(f"choose: {study.choose} needs labels, but {lack}; use reconstruction")
    for row in study.searched_rows if study.search != "grid" else ():
        for settings in _most_demanding(study, row, facts):
            plan_trial(study, row, settings, study.seeds[0], facts, numerics)
    plans: dict[str, TrialPlan] = {}
    for row in (*study.variants, *study.references):
        for settings in settings_to_try(study, row):
            for seed in study.seeds:
                plan = plan_trial(study, row, settings, seed, facts, numerics)
                same = plans.setdefault(plan.stage.key, plan)  # random draws may repeat
                if same.row != row and row in study.variants:
                    raise InputError(f"variants.{row}: {plan.name} is the same as {same.name}; leave one of them out")
    return list(plans.values())


def warn_of_labels(study: Study, facts: Facts) -> None:
    """Warn of numbers of labelled rows that are left out, since they cannot hold a row of each class."""
    small = [count for count in study.labels.counts if facts.can_classify and count < len(facts.classes)]
    if small:
        warnings.warn(
            f"labels.counts: {', '.join(map(str, small))} labelled rows cannot hold each of the {len(facts.classes)} "
            "classes; left out",
            stacklevel=2,
        )


def settings_to_try(study: Study, row: str) -> list[dict[str, Any]]:
    """Return the settings to try in a study row: all combinations of a grid, or random draws, the same at each call.

    A study row without settings has one trial per seed. Where Optuna chooses, no settings are known yet.
    """
    space = study.space(row)
    if not space:
        return [{}]
    if study.search == "optuna":
        return []
    if study.search == "grid":
        values = [v for v in space.values() if isinstance(v, list)]
        return [dict(zip(space, choice, strict=True)) for choice in itertools.product(*values)]
    generator = random.Random(fingerprint("settings", row, study.seeds[0]))
    return [{name: _draw(values, generator) for name, values in space.items()} for _ in range(study.budget.settings)]


def largest_settings(study: Study, row: str, facts: Facts) -> dict[str, Any]:
    """Return the largest value of each setting that is searched in a study row, such as the widest layers."""

    def size(value: Any) -> float:
        if isinstance(value, list | tuple):
            return sum(map(size, value))
        if (share := share_of_features(value)) is not None:
            return share * prod(facts.shape)
        return value if isinstance(value, int | float) else 0.0

    return {
        name: max(values, key=size) if isinstance(values, list) else values.high
        for name, values in study.space(row).items()
    }


def _most_demanding(study: Study, row: str, facts: Facts) -> list[dict[str, Any]]:
    """Return the choices of settings of which one asks for the most epochs: all networks and lengths of pretraining,
    each with the largest values of the other settings."""
    space = study.space(row)
    names = [name for name in space if name.startswith("network") or name == "pretrain.epochs"]
    lists = [values if isinstance(values, list) else [values.high] for values in map(space.__getitem__, names)]
    largest = largest_settings(study, row, facts)
    return [largest | dict(zip(names, choice, strict=True)) for choice in itertools.product(*lists)]


def _draw(values: list[Any] | Range, generator: random.Random) -> Any:
    if isinstance(values, list):
        return generator.choice(values)
    if values.log:
        return math.exp(generator.uniform(math.log(values.low), math.log(values.high)))
    return generator.uniform(values.low, values.high)


def experiment_of(study: Study, row: str, settings: Mapping[str, Any], seed: int) -> Experiment:
    """Return the experiment of a trial: the base with the study row's fields, the settings, and the budget's epochs
    and steps.

    Raises:
        InputError: the study row changes a field that does not exist, or its layers do not fit the budget.
    """
    base = study.base.model_dump()
    base["finetune"] = base["finetune"] or Finetune().model_dump()
    values = overlay(base, {key: value for key, value in study.variants[row].items() if key != "settings"})
    values = overlay(values, {key: value for key, value in nested(settings).items() if key != "labels"})
    try:
        network = Experiment.model_validate(values).network
    except ValidationError as error:
        raise InputError(first_problem(f"variants.{row}", error)) from None
    whole = values["finetune"] is not None
    if not whole and study.choose != "finetuned":
        raise InputError(
            f"variants.{row}.finetune: null, but each row is trained as a whole; leave it out or set choose finetuned"
        )
    budget, epochs = study.budget, study.budget.epochs
    steps = budget.steps
    if values["pretrain"] is not None:
        # fields of pretraining that neither the study row nor the settings set are as in finetuning, so that a stacked
        # row differs in one field from a row that is trained end to end
        own = {k: v for k, v in (study.variants[row].get("pretrain") or {}).items() if v is not None}
        own |= {k.removeprefix("pretrain."): v for k, v in settings.items() if k.startswith("pretrain.")}
        fit = {k: v for k, v in (values["finetune"] or base["finetune"]).items() if k != "task"}
        layers = len(network.widths) + (len(network.dense) if isinstance(network, Conv) else 0)
        asked = own.get("epochs") if study.choose == "finetuned" else None
        epochs_per_layer, epochs = _divide_epochs(budget.epochs, row, layers, whole, asked)
        values["pretrain"] = {**fit, **own, "epochs": epochs_per_layer, "steps": budget.steps_of(epochs_per_layer)}
        if steps is not None:  # all that the layers leave, were they to take as many epochs as they may
            steps -= layers * (budget.steps_of((budget.epochs - epochs) // layers) or 0)
    if whole:
        values["finetune"] |= {"task": "reconstruct", "epochs": epochs, "steps": steps}
    return Experiment.model_validate({**values, "control": False, "seed": seed})


def _divide_epochs(budget: int, row: str, layers: int, whole: bool, asked: int | None) -> tuple[int, int]:
    """Return for how many epochs each layer of a study row is pretrained, and for how many the whole is trained.

    Args:
        whole: whether the whole is trained, which takes half of the budget.
        asked: how many epochs per layer were asked for, which may be fewer than the budget allows; None takes as many
            as it allows. What the layers leave is not spent on the whole, so that the question stays what they are
            worth.
    """
    if whole:
        allowed = max(1, budget // (2 * layers))
        rest = budget - allowed * layers
        if rest < 1:
            raise InputError(
                f"budget.epochs: {budget} leave row {row} with its {layers} layers no epoch for the whole; allow at "
                f"least {layers + 1}"
            )
    else:
        allowed, rest = budget // layers, 0
        if allowed < 1:
            raise InputError(
                f"budget.epochs: {budget} are fewer than the {layers} layers of row {row}; allow at least {layers}"
            )
    if asked and asked > allowed:
        raise InputError(
            f"variants.{row}: pretrain.epochs {asked} with {layers} layers is more than budget.epochs {budget} allows, "
            f"{allowed} per layer{', as the whole takes half' if whole else ''}; raise the budget or try fewer epochs"
        )
    return asked or allowed, rest


def plan_trial(
    study: Study, row: str, settings: dict[str, Any], seed: int, facts: Facts, numerics: Numerics
) -> TrialPlan:
    """Plan one trial; raise an InputError if its study row does not fit the data or sets an unknown field."""
    study = study.model_copy(update={"labels": _labels_of(study, settings)})
    name = trial_name(row, settings, seed)
    for reference in study.references:
        if row == reference:
            trained = reference_stages(study, reference, settings, seed, facts)
            return TrialPlan(row, settings, seed, row, measuring_stage(study, name, trained, seed, facts, numerics))
    experiment = experiment_of(study, row, settings, seed)
    try:
        graph = build(experiment, facts, numerics, f"{name}: ", served=False)
    except InputError as error:
        raise InputError(f"variants.{row}: {error}") from None
    trained = trained_stages(graph)
    kind = experiment.variant.kind
    return TrialPlan(row, settings, seed, kind, measuring_stage(study, name, trained, seed, facts, numerics))


def _labels_of(study: Study, settings: Mapping[str, Any]) -> Labels:
    """Return the supervised part of a trial, with the settings that bear on it."""
    try:
        return Labels.model_validate(overlay(study.labels.model_dump(), nested(settings).get("labels", {})))
    except ValidationError as error:
        raise InputError(first_problem("settings.labels", error)) from None


def shared_stages(plans: Sequence[TrialPlan]) -> list[Stage]:
    """Return the stages that several trials need, in an order in which they can run.

    What only the seeds of one reference share is not among them: one worker computes them all.
    """
    users: dict[str, set[str]] = {}
    stages: dict[str, Stage] = {}
    for plan in plans:
        for key, stage in plan.stages().items():
            stages.setdefault(key, stage)
            users.setdefault(key, set()).add(plan.row if plan.is_fixed_reference else plan.stage.key)
    return [stage for key, stage in stages.items() if stage.kept and len(users[key]) > 1]


def describe_plans(study: Study, plans: Sequence[TrialPlan], finished: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each trial: whether it is finished, and how many of its stages other trials need too.

    Args:
        finished: The run of each finished trial, by the key of its stage.
    """
    shared = {stage.key for stage in shared_stages(plans)}
    for plan in plans:
        stages = [stage for stage in plan.stages().values() if stage.kept]
        counts = f"{len(stages)} stages, {sum(stage.key in shared for stage in stages)} shared"
        run_id = finished.get(plan.stage.key)
        state = f"finished, run {run_id}" if run_id else "would run"
        yield f"{plan.name:40} {plan.stage.key[:12]}  {counts:22} {state}"
    for row in study.searched_rows if study.search == "optuna" else ():
        yield f"{row:40} Optuna chooses {study.budget.settings} settings; the best is trained with all seeds"


def _with_inputs(stage: Stage) -> Iterator[Stage]:
    for parent in stage.parents():
        yield from _with_inputs(parent)
    yield stage
