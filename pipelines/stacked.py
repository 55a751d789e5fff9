"""The recipe: an experiment and the facts about its data, to a chain of stages."""

import warnings
from math import prod
from typing import NamedTuple

from aecore.config import Experiment, Fit, Task
from aecore.specs import (
    EvaluateSpec,
    Facts,
    FinetuneSpec,
    LayerSpec,
    LoadSpec,
    Numerics,
    PretrainSpec,
    layer_specs,
    resolve,
)
from pipelines.stage import Stage


class Stacked(NamedTuple):
    """The stages of one stacked-autoencoder experiment."""

    experiment: Experiment
    """With every `auto` resolved."""
    data: Stage
    layers: tuple[Stage, ...]
    finetune: Stage | None
    evaluate: Stage
    control: Stage | None
    evaluate_control: Stage | None

    def kept(self) -> list[Stage]:
        """The stages whose results MLflow keeps, in the order they run."""
        rest = (self.finetune, self.evaluate, self.control, self.evaluate_control)
        return [*self.layers, *(stage for stage in rest if stage is not None)]


def build(experiment: Experiment, facts: Facts, numerics: Numerics) -> Stacked:
    """The graph of an experiment; nothing runs.

    Raises:
        InputError: the experiment does not fit its data.
    """
    experiment = resolve(experiment, facts)
    specs = tuple(layer_specs(experiment.network, experiment.data, facts))
    _warn_of_identity(experiment, specs)
    data = Stage("data", "load", LoadSpec(data=experiment.data, facts=facts), kept=False)

    layers: list[Stage] = []
    for number, spec in enumerate(_with_dropout(specs, experiment.pretrain), 1) if experiment.pretrain else ():
        pretrain = PretrainSpec(
            number=number, layer=spec, variant=experiment.variant, fit=experiment.pretrain,
            seed=experiment.seed, numerics=numerics,
        )  # fmt: skip
        layers.append(Stage(f"layer {number}", "pretrain_layer", pretrain, {"data": data, "below": tuple(layers)}))

    task: Task | None = None
    finetune = control = evaluate_control = None
    if experiment.finetune is not None:
        assert experiment.finetune.task != "auto"
        task = experiment.finetune.task
        tuning = FinetuneSpec(
            layers=_with_dropout(specs, experiment.finetune), task=task,
            classes=facts.classes if task == "classify" else (),
            variant=experiment.variant if task == "reconstruct" else None,
            fit=Fit.model_validate(experiment.finetune.model_dump(exclude={"task"})),
            seed=experiment.seed, numerics=numerics,
        )  # fmt: skip
        finetune = Stage("finetune", "finetune", tuning, _inputs(data, layers))
        if experiment.control and layers:
            control = Stage("control", "finetune", tuning, _inputs(data, []))

    def evaluation(name: str, pretrained: list[Stage], finetuned: Stage | None, pictures: bool) -> Stage:
        spec = EvaluateSpec(task=task, classes=facts.classes, pictures=pictures)
        inputs = _inputs(data, pretrained) | ({"finetuned": finetuned} if finetuned else {})
        return Stage(name, "evaluate", spec, inputs)

    evaluate = evaluation("evaluate", layers, finetune, pictures=True)
    if control is not None:
        evaluate_control = evaluation("evaluate control", [], control, pictures=False)
    return Stacked(experiment, data, tuple(layers), finetune, evaluate, control, evaluate_control)


def _inputs(data: Stage, layers: list[Stage]) -> dict[str, Stage | tuple[Stage, ...]]:
    return {"data": data, "layers": tuple(layers)} if layers else {"data": data}


def _with_dropout(specs: tuple[LayerSpec, ...], fit: Fit) -> tuple[LayerSpec, ...]:
    if fit.dropout is None:
        return specs
    return tuple(spec.model_copy(update={"dropout": fit.dropout}) for spec in specs)


def _warn_of_identity(experiment: Experiment, specs: tuple[LayerSpec, ...]) -> None:
    """An overcomplete layer under no constraint can copy its input and learn nothing (Vincent et al. 2010, 2.3)."""
    fit = experiment.pretrain or experiment.finetune
    if fit is None or (experiment.pretrain is None and experiment.finetune and experiment.finetune.task == "classify"):
        return  # nothing is trained to reconstruct
    constrained = experiment.variant.kind != "plain" or fit.weight_decay
    for number, spec in enumerate(_with_dropout(specs, fit), 1):
        if prod(spec.code_shape) >= prod(spec.in_shape) and not (constrained or spec.dropout):
            warnings.warn(
                f"layer {number} is overcomplete ({prod(spec.in_shape)} -> {prod(spec.code_shape)}) and nothing "
                "constrains it: it may learn the identity map; make it narrower, or use --variant.kind denoising, "
                "weight decay or dropout",
                stacklevel=2,
            )
    if specs[0].kind == "dense" and specs[0].levels:
        warnings.warn(
            f"a dense decoder of {prod(specs[0].in_shape)} values in {specs[0].levels} levels has "
            f"{prod(specs[0].in_shape) * specs[0].levels:,} outputs; --network.kind conv or --data.likelihood gaussian "
            "is far faster",
            stacklevel=2,
        )
