"""The trials of a study, each a graph of stages, before any has run."""

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import ValidationError

from aecore.config.experiment import Conv, Dense, Experiment, Finetune, Fit, overlay
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs, resolve
from aecore.config.specs import FinetuneSpec, LoadSpec, MeasureSpec, Numerics, ReferenceSpec
from aecore.core.errors import InputError
from aecore.core.fingerprint import fingerprint
from aecore.models.spec import LayerSpec
from pipelines.graph.recipe import build, load_stage
from pipelines.graph.stage import Stage
from pipelines.study.schema import Range, Study, _told
from pipelines.study.trial import REFERENCES, trial_name

if TYPE_CHECKING:
    pass


_JUDGE = Fit(epochs=10, batch_size=128)
_JUDGE_WIDTHS = (128, 64)


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


def _below(stage: Stage) -> Iterator[Stage]:
    for parent in stage.parents():
        yield from _below(parent)
    yield stage
