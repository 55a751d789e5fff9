"""The recipe: from an experiment and the facts about its data to a chain of stages."""

import warnings
from dataclasses import replace
from math import prod
from typing import NamedTuple

from aecore.config.experiment import Experiment, Fit
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs, resolve, resolve_anomalies, resolve_references
from aecore.config.specs import EvaluateSpec, FinetuneSpec, LoadSpec, Numerics, PretrainSpec
from aecore.core.errors import InputError
from aecore.models.spec import LayerSpec
from pipelines.graph.stage import Inputs, Stage


class Stacked(NamedTuple):
    """The stages of one stacked-autoencoder experiment."""

    experiment: Experiment
    """The experiment, in which every `auto` is resolved."""
    data: Stage
    layers: tuple[Stage, ...]
    finetune: Stage | None
    evaluate: Stage
    control: Stage | None
    evaluate_control: Stage | None

    def kept(self) -> list[Stage]:
        """Return the stages whose results MLflow keeps, in the order in which they run."""
        rest = (self.finetune, self.evaluate, self.control, self.evaluate_control)
        return [*self.layers, *(stage for stage in rest if stage is not None)]


def build(experiment: Experiment, facts: Facts, numerics: Numerics, label: str = "", served: bool = True) -> Stacked:
    """Build the stages of an experiment, without running any.

    Args:
        label: prefix of the stages' names.
        served: whether the finetuned network is a model to be served.

    Raises:
        InputError: the experiment does not fit its data.
    """
    experiment = resolve(experiment, facts)
    variant, task = experiment.variant, experiment.finetune.task if experiment.finetune else None
    assert task != "auto"
    reconstructs = experiment.pretrain is not None or task == "reconstruct"
    code_activation = variant.code_activation if reconstructs else None
    specs = tuple(layer_specs(experiment.network, experiment.data, facts, code_activation))
    _warn_of_identity(experiment, specs)
    _check_batches(experiment, facts)
    data = load_stage(experiment, facts)

    layers: tuple[Stage, ...] = ()
    if experiment.pretrain is not None:
        specs = _with_dropout(specs, experiment.pretrain, experiment.network.dropout)
        specs = tuple(variant.build(spec, number) for number, spec in enumerate(specs, 1))
        for number, layer in enumerate(specs, 1):
            pretrain = PretrainSpec(
                number=number, layer=layer, variant=variant, fit=experiment.pretrain, seed=experiment.seed,
                numerics=numerics,
            )  # fmt: skip
            inputs: Inputs = {"data": data, "below": layers}
            layers += (Stage(f"{label}layer {number}", "stages.pretrain_layer", pretrain, inputs),)
        # from here on a layer's code is the mean and no sample, until finetuning makes the bottleneck stochastic again
        specs = tuple(spec.model_copy(update={"stochastic": False}) for spec in specs)

    anomalies = resolve_anomalies(experiment.data, facts)
    finetune = control = evaluate_control = None
    if experiment.finetune is not None and task is not None:
        tuned = _with_dropout(specs, experiment.finetune, experiment.network.dropout)
        if task == "reconstruct":  # in the whole stack the variant builds the bottleneck only
            tuned = (*tuned[:-1], variant.build(tuned[-1], len(tuned)))
        tuning = FinetuneSpec(
            layers=tuned, task=task, classes=facts.classes if task == "classify" else (),
            variant=variant if task == "reconstruct" else None,
            fit=Fit.model_validate(experiment.finetune.model_dump(exclude={"task"})),
            seed=experiment.seed, numerics=numerics, served=served, columns=facts.columns,
            anomalies=resolve_references(experiment.data, facts) if served and task == "reconstruct" else "none",
        )  # fmt: skip
        finetune = Stage(f"{label}finetune", "stages.finetune", tuning, _inputs(data, layers))
        if experiment.control and layers:
            control = Stage(f"{label}control", "stages.finetune", tuning, _inputs(data, ()))

    trained_by = variant if reconstructs else None
    evaluation = EvaluateSpec(
        task=task, classes=facts.classes, pictures=True, variant=trained_by, anomalies=anomalies, columns=facts.columns
    )
    evaluate = _evaluation(f"{label}evaluate", evaluation, _inputs(data, layers), finetune)
    if control is not None:
        bare = evaluation.model_copy(update={"pictures": False, "variant": None})
        evaluate_control = _evaluation(f"{label}evaluate control", bare, _inputs(data, ()), control)
    return Stacked(experiment, data, layers, finetune, evaluate, control, evaluate_control)


def _evaluation(name: str, spec: EvaluateSpec, inputs: Inputs, finetuned: Stage | None) -> Stage:
    return Stage(name, "evaluation.evaluate", spec, {**inputs, "finetuned": finetuned} if finetuned else inputs)


def from_parent(graph: Stacked, parent: Stage) -> Stacked:
    """Return the graph of the same experiment without pretraining: finetuning starts from the weights of `parent`, the
    finetuning stage of an earlier day."""
    assert graph.finetune is not None
    finetune = replace(graph.finetune, inputs={"data": graph.data, "parent": parent})
    evaluate = replace(graph.evaluate, inputs={"data": graph.data, "finetuned": finetune})
    return graph._replace(layers=(), finetune=finetune, evaluate=evaluate, control=None, evaluate_control=None)


def load_stage(experiment: Experiment, facts: Facts) -> Stage:
    """Build the stage that reads the data of a resolved experiment."""
    return Stage("data", "stages.load", LoadSpec(data=experiment.data, facts=facts), kept=False)


def _inputs(data: Stage, layers: tuple[Stage, ...]) -> Inputs:
    return {"data": data, "layers": layers} if layers else {"data": data}


def _with_dropout(specs: tuple[LayerSpec, ...], fit: Fit, network: float) -> tuple[LayerSpec, ...]:
    dropout = network if fit.dropout is None else fit.dropout
    return tuple(spec.model_copy(update={"dropout": dropout}) for spec in specs)


def _check_batches(experiment: Experiment, facts: Facts) -> None:
    """Refuse batches of one row under batch normalisation, and warn of batches that are larger than the data."""
    rows = min(facts.rows, experiment.data.limit or facts.rows)  # an upper bound, as tasks split the rows
    for name, fit in (("pretrain", experiment.pretrain), ("finetune", experiment.finetune)):
        if fit is not None and fit.batch_size == 1 and experiment.network.normalization == "batch":
            raise InputError(
                f"{name}.batch_size: one row has no batch statistics; use 2 or more, or normalization layer"
            )
        if fit is not None and fit.batch_size > rows and fit.steps is None:
            warnings.warn(
                f"{name}.batch_size: {fit.batch_size} is more than the {rows} rows of the data, so that an epoch is "
                "one step; use smaller batches",
                stacklevel=2,
            )


def _warn_of_identity(experiment: Experiment, specs: tuple[LayerSpec, ...]) -> None:
    """Warn of overcomplete layers without a constraint, which can copy their input and learn nothing (Vincent et al.
    2010, 2.3), and of dense decoders with an output per level."""
    fit = experiment.pretrain or experiment.finetune
    if fit is None or (experiment.pretrain is None and experiment.finetune and experiment.finetune.task == "classify"):
        return  # nothing is trained to reconstruct
    constrained = experiment.variant.kind != "plain" or fit.weight_decay > 0
    if experiment.pretrain is None:  # trained as a whole, the narrowest layer is the bottleneck
        constrained |= min(prod(spec.code_shape) for spec in specs) < prod(specs[0].in_shape)
    for number, spec in enumerate(_with_dropout(specs, fit, experiment.network.dropout), 1):
        inputs, codes = prod(spec.in_shape), prod(spec.code_shape)
        if codes >= inputs and not (constrained or spec.dropout):
            warnings.warn(
                f"layer {number} is overcomplete ({inputs} -> {codes}) and nothing constrains it, so that it may learn "
                "the identity map; make it narrower, or use --variant.kind denoising, weight decay or dropout",
                stacklevel=2,
            )
    values, levels = prod(specs[0].in_shape), specs[0].levels
    if specs[0].kind == "dense" and levels:
        warnings.warn(
            f"a dense decoder of {values} values in {levels} levels has {values * levels:,} outputs; "
            "--network.kind conv or --data.likelihood gaussian is far faster",
            stacklevel=2,
        )
