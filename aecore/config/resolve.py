"""Every `auto` of an experiment, replaced by what it stands for with the data at hand."""

from math import prod
from pathlib import Path
from typing import Literal

from aecore.config.experiment import Conv, Data, Dense, Experiment
from aecore.config.facts import Facts
from aecore.core.errors import InputError
from aecore.core.types import Activation, LikelihoodKind, Shape
from aecore.models.spec import LayerSpec

_MOST_WEIGHTS = 2**33
"""Of a layer: with their gradients and Adam's two means, more than any device holds."""
MEMORY_BYTES = 2**31
"""Largest Parquet set, in bytes of its values, that `data.in_memory: auto` holds in memory."""


def resolve_likelihood(data: Data, facts: Facts) -> LikelihoodKind:
    """The reconstruction term that `auto` stands for."""
    if data.likelihood != "auto":
        return data.likelihood
    if not facts.levels:
        return "gaussian"
    return "categorical" if len(facts.shape) == 3 and facts.shape[0] == 3 else "bernoulli"


def resolve_standardize(data: Data, facts: Facts) -> bool:
    """Whether features are standardised, `auto` resolved.

    Raises:
        InputError: standardisation with a likelihood that needs the original range.
    """
    if data.standardize == "auto":
        return not facts.levels and len(facts.shape) == 1 and resolve_likelihood(data, facts) == "gaussian"
    if data.standardize and resolve_likelihood(data, facts) != "gaussian":
        raise InputError(
            f"data.standardize: the {resolve_likelihood(data, facts)} likelihood needs unstandardised values; "
            "set --data.likelihood gaussian or --data.standardize false"
        )
    return data.standardize


def resolve_in_memory(data: Data, facts: Facts) -> Literal["always", "never"]:
    """Whether the rows are held in memory, `auto` resolved by their number and shape."""
    if data.in_memory != "auto":
        return data.in_memory
    values = facts.rows * prod(facts.shape) * (1 if facts.levels else 4)
    return "never" if data.name == "parquet" and values > MEMORY_BYTES else "always"


def _absolute(path: str | None) -> str | None:
    return path if path is None or "://" in path else str(Path(path).absolute())


def resolve(experiment: Experiment, facts: Facts) -> Experiment:
    """The experiment with every `auto` replaced by what it stands for with these data.

    Raises:
        InputError: a choice that the data do not allow.
    """
    data = experiment.data.model_copy(
        update={
            "likelihood": resolve_likelihood(experiment.data, facts),
            "standardize": resolve_standardize(experiment.data, facts),
            "in_memory": resolve_in_memory(experiment.data, facts),
            # tasks run in other folders
            "root": experiment.data.root.absolute(),
            "path": _absolute(experiment.data.path),
        }
    )
    finetune = experiment.finetune
    if finetune is not None and finetune.task == "auto":
        finetune = finetune.model_copy(update={"task": "classify" if facts.classes else "reconstruct"})
    if finetune is not None and finetune.task == "classify" and not facts.classes:
        raise InputError("finetune.task: classify needs labels, the data have none; use reconstruct")
    return experiment.model_copy(update={"data": data, "finetune": finetune})


def layer_specs(
    network: Dense | Conv, data: Data, facts: Facts, code_activation: Activation | None = None
) -> list[LayerSpec]:
    """The stack's layers, outermost first, with every shape worked out.

    Args:
        code_activation: of the bottleneck, where the network names none.

    Raises:
        InputError: the network does not fit the data.
    """
    likelihood = resolve_likelihood(data, facts)
    if likelihood == "categorical" and not facts.levels:
        raise InputError("data.likelihood: categorical needs integer pixels, these are floats; use gaussian")
    if likelihood == "categorical" and network.tied:
        raise InputError(
            "network.tied: a categorical decoder has an output a level and cannot share the encoder's weights; "
            "set --network.tied false or --data.likelihood gaussian"
        )
    if network.kind == "conv" and len(facts.shape) != 3:
        raise InputError(f"network.kind: conv needs images, data.name {data.name} has vectors; use dense")
    plan: list[tuple[Literal["dense", "conv"], int]] = [(network.kind, width) for width in network.widths]
    if isinstance(network, Conv):
        plan += [("dense", width) for width in network.dense]

    bottleneck = network.code_activation or code_activation or network.activation
    specs: list[LayerSpec] = []
    shape = facts.shape
    for number, (kind, width) in enumerate(plan, 1):
        last = number == len(plan)
        below = specs[-1].activation if specs else "linear"
        conv: dict[str, int] = {}
        code_shape: Shape = (width,)
        if kind == "conv":
            assert isinstance(network, Conv)
            if network.stride > max(network.kernel, *shape[1:]):
                raise InputError(
                    f"network.stride: {network.stride} leaps over the {shape[1]} x {shape[2]} input of layer "
                    f"{number}; use a smaller one"
                )
            if network.kernel > min(shape[1:]):
                raise InputError(
                    f"network.kernel: {network.kernel} is larger than the {shape[1]} x {shape[2]} input of layer "
                    f"{number}; use a smaller kernel or stride, or fewer convolutional layers"
                )
            padding = (network.kernel - 1) // 2
            sides = [(side + 2 * padding - network.kernel) // network.stride + 1 for side in shape[1:]]
            code_shape = (width, *sides)
            conv = {"kernel": network.kernel, "stride": network.stride, "padding": padding}
        levels = facts.levels if likelihood == "categorical" and not specs else 0
        weights = width * max(1, levels) * (shape[0] * conv["kernel"] ** 2 if conv else prod(shape))
        if weights > _MOST_WEIGHTS:
            raise InputError(
                f"network.{'widths' if number <= len(network.widths) else 'dense'}: {width} units make {weights:.1e} "
                f"weights of layer {number}, more than any device holds; use fewer"
            )
        specs.append(
            LayerSpec(
                kind=kind,
                in_shape=shape,
                code_shape=code_shape,
                activation=bottleneck if last else network.activation,
                # codes of a sigmoid layer lie in (0, 1) and are fitted by cross-entropy (Vincent et al. 2010, sec. 2)
                likelihood=likelihood if not specs else "bernoulli" if below == "sigmoid" else "gaussian",
                out_activation="linear" if below == "sigmoid" else below,
                levels=levels,
                dropout=network.dropout,
                normalization=network.normalization,
                tied=network.tied,
                **conv,
            )
        )
        shape = code_shape
    return specs
