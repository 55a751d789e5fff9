"""The recipe: an experiment and the facts about its data, to a chain of stages."""

import warnings
from dataclasses import replace
from math import prod
from typing import NamedTuple

from aecore.config.experiment import Experiment, Fit
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs, resolve
from aecore.config.specs import EvaluateSpec, FinetuneSpec, LoadSpec, Numerics, PretrainSpec
from aecore.core.errors import InputError
from aecore.models.spec import LayerSpec
from pipelines.graph.stage import Inputs, Stage


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


def build(experiment: Experiment, facts: Facts, numerics: Numerics, label: str = "", served: bool = True) -> Stacked:
    """The graph of an experiment; nothing runs.

    Args:
        label: what the names of the stages begin with.
        served: whether what is finetuned is a model to be served.

    Raises:
        InputError: the experiment does not fit its data.
    """
    experiment = resolve(experiment, facts)
    variant, task = experiment.variant, experiment.finetune.task if experiment.finetune else None
    assert task != "auto"
    unsupervised = experiment.pretrain is not None or task == "reconstruct"
    code_activation = variant.code_activation if unsupervised else None
    specs = tuple(layer_specs(experiment.network, experiment.data, facts, code_activation))
    _warn_of_identity(experiment, specs)
    _check_batches(experiment, facts)
    data = load_stage(experiment, facts)

    layers: list[Stage] = []
    if experiment.pretrain is not None:
        built = _with_dropout(specs, experiment.pretrain, experiment.network.dropout)
        built = tuple(variant.build(spec, number) for number, spec in enumerate(built, 1))
        for number, spec in enumerate(built, 1):
            pretrain = PretrainSpec(
                number=number, layer=spec, variant=variant, fit=experiment.pretrain, seed=experiment.seed,
                numerics=numerics,
            )  # fmt: skip
            inputs: Inputs = {"data": data, "below": tuple(layers)}
            layers.append(Stage(f"{label}layer {number}", "stages.pretrain_layer", pretrain, inputs))
        specs = tuple(spec.model_copy(update={"stochastic": False}) for spec in built)

    finetune = control = evaluate_control = None
    if experiment.finetune is not None and task is not None:
        tuned = _with_dropout(specs, experiment.finetune, experiment.network.dropout)
        if task == "reconstruct":  # of a stack as a whole only the bottleneck is the variant's
            tuned = (*tuned[:-1], variant.build(tuned[-1], len(tuned)))
        tuning = FinetuneSpec(
            layers=tuned, task=task, classes=facts.classes if task == "classify" else (),
            variant=variant if task == "reconstruct" else None,
            fit=Fit.model_validate(experiment.finetune.model_dump(exclude={"task"})),
            seed=experiment.seed, numerics=numerics, served=served,
        )  # fmt: skip
        finetune = Stage(f"{label}finetune", "stages.finetune", tuning, _inputs(data, layers))
        if experiment.control and layers:
            control = Stage(f"{label}control", "stages.finetune", tuning, _inputs(data, []))

    def evaluation(name: str, pretrained: list[Stage], finetuned: Stage | None, pictures: bool) -> Stage:
        drawn = variant if unsupervised and pictures else None
        spec = EvaluateSpec(task=task, classes=facts.classes, pictures=pictures, variant=drawn)
        inputs = _inputs(data, pretrained) | ({"finetuned": finetuned} if finetuned else {})
        return Stage(label + name, "evaluation.evaluate", spec, inputs)

    evaluate = evaluation("evaluate", layers, finetune, pictures=True)
    if control is not None:
        evaluate_control = evaluation("evaluate control", [], control, pictures=False)
    return Stacked(experiment, data, tuple(layers), finetune, evaluate, control, evaluate_control)


def from_parent(graph: Stacked, parent: Stage) -> Stacked:
    """The same experiment without pretraining: its finetuning starts from the weights of another day's."""
    assert graph.finetune is not None
    finetune = replace(graph.finetune, inputs={"data": graph.data, "parent": parent})
    evaluate = replace(graph.evaluate, inputs={"data": graph.data, "finetuned": finetune})
    return graph._replace(layers=(), finetune=finetune, evaluate=evaluate, control=None, evaluate_control=None)


def load_stage(experiment: Experiment, facts: Facts) -> Stage:
    """The reading of a resolved experiment's data."""
    return Stage("data", "stages.load", LoadSpec(data=experiment.data, facts=facts), kept=False)


def _inputs(data: Stage, layers: list[Stage]) -> dict[str, Stage | tuple[Stage, ...]]:
    return {"data": data, "layers": tuple(layers)} if layers else {"data": data}


def _with_dropout(specs: tuple[LayerSpec, ...], fit: Fit, network: float) -> tuple[LayerSpec, ...]:
    dropout = network if fit.dropout is None else fit.dropout
    return tuple(spec.model_copy(update={"dropout": dropout}) for spec in specs)


def _check_batches(experiment: Experiment, facts: Facts) -> None:
    """Whether an epoch has steps to take, and more than one."""
    rows = min(facts.rows, experiment.data.limit or facts.rows)  # at most: the splits are cut by a task
    for name, fit in (("pretrain", experiment.pretrain), ("finetune", experiment.finetune)):
        if fit is not None and fit.batch_size == 1 and experiment.network.normalization == "batch":
            raise InputError(f"{name}.batch_size: one row has no batch statistics; use 2 or normalization layer")
        if fit is not None and fit.batch_size > rows:
            warnings.warn(
                f"{name}.batch_size: {fit.batch_size} is more than the {rows} rows there are, so that an epoch is one "
                "step; use a smaller one",
                stacklevel=2,
            )


def _warn_of_identity(experiment: Experiment, specs: tuple[LayerSpec, ...]) -> None:
    """An overcomplete layer under no constraint can copy its input and learn nothing (Vincent et al. 2010, 2.3)."""
    fit = experiment.pretrain or experiment.finetune
    if fit is None or (experiment.pretrain is None and experiment.finetune and experiment.finetune.task == "classify"):
        return  # nothing is trained to reconstruct
    constrained = experiment.variant.kind != "plain" or fit.weight_decay
    for number, spec in enumerate(_with_dropout(specs, fit, experiment.network.dropout), 1):
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
