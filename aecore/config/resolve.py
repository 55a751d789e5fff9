"""The choices that each `auto` of an experiment stands for with the data at hand, and the layers of the network."""

import warnings
from math import prod
from pathlib import Path
from typing import Any, Literal

from aecore.config.experiment import Conv, Data, Dense, Experiment, share_of_features
from aecore.config.facts import Facts
from aecore.core.errors import InputError
from aecore.core.types import Activation, LikelihoodKind, Shape
from aecore.models.spec import LayerSpec

MEMORY_BYTES = 2**31
"""Size of the largest Parquet set, in bytes of its values, that `data.in_memory: auto` holds in memory."""
_MOST_WEIGHTS = 2**33
"""Most weights in a layer; with their gradients and Adam's two means, more would not fit on any device."""


def resolve_likelihood(data: Data, facts: Facts) -> LikelihoodKind:
    """Return the reconstruction term for these data."""
    if data.likelihood != "auto":
        return data.likelihood
    if not facts.levels:
        return "gaussian"
    return "categorical" if len(facts.shape) == 3 and facts.shape[0] == 3 else "bernoulli"


def resolve_standardize(data: Data, facts: Facts) -> bool:
    """Say whether features of these data are standardised.

    Raises:
        InputError: standardisation is asked for with a likelihood that needs values in their original range.
    """
    likelihood = resolve_likelihood(data, facts)
    if data.standardize == "auto":
        return not facts.levels and len(facts.shape) == 1 and likelihood == "gaussian"
    if data.standardize and likelihood != "gaussian":
        raise InputError(
            f"data.standardize: the {likelihood} likelihood needs unstandardised values; "
            "set --data.likelihood gaussian or --data.standardize false"
        )
    return data.standardize


def resolve_in_memory(data: Data, facts: Facts) -> Literal["always", "never"]:
    """Say whether the rows are held in memory, which for `auto` depends on their number, shape and type; an InputError
    says that anomalies must be counted in memory."""
    is_large = data.name == "parquet" and facts.rows * facts.row_bytes > MEMORY_BYTES
    found = data.in_memory if data.in_memory != "auto" else "never" if is_large else "always"
    if found == "never" and data.contamination not in ("clean", "mixed"):
        raise InputError(
            "data.contamination: a share is counted in memory, but these rows are read from disk; use clean or mixed, "
            "or --data.in_memory always"
        )
    return found


def resolve_anomalies(data: Data, facts: Facts) -> Literal["none", "clean", "mixed"]:
    """Say whether labels tell anomalies among the test rows, and whether training rows may be anomalies as well."""
    if not facts.has_anomalies:
        return "none"
    return "clean" if data.contamination == "clean" else "mixed"


def resolve_references(data: Data, facts: Facts) -> Literal["none", "clean", "mixed"]:
    """Say whether a served model that reconstructs keeps reference rows to score others by, and whether these may be
    anomalies. Without labels any row may be one, and rows of vectors are scored all the same."""
    return "mixed" if not facts.has_anomalies and len(facts.shape) == 1 else resolve_anomalies(data, facts)


def absolute_places(data: Data) -> dict[str, Any]:
    """Return the fields of `data` that name places, `root` and `path`, as absolute paths, which mean the same place to
    processes that run in other folders; URIs stay as they are."""

    def absolute(path: str) -> str:
        return path if "://" in path else str(Path(path).absolute())

    path = data.path
    places = tuple(map(absolute, path)) if isinstance(path, tuple) else path and absolute(path)
    return {"root": data.root.absolute(), "path": places}


def resolve_widths(network: Dense | Conv, facts: Facts) -> tuple[int, ...]:
    """Return the number of units of each of `network.widths`, of which some may be shares of the number of features."""
    most = network.max_width if isinstance(network, Dense) else None

    def units(width: int | str) -> int:
        share = share_of_features(width)
        if share is None:
            return int(width)
        count = max(1, round(share * prod(facts.shape)))
        return count if most is None else min(count, most)

    return tuple(map(units, network.widths))


def resolve(experiment: Experiment, facts: Facts) -> Experiment:
    """Return the experiment with each `auto` replaced by the choice that it stands for, with numbers of units in place
    of shares of the number of features, and with absolute paths.

    Raises:
        InputError: the data do not allow a choice.
    """
    data = experiment.data.model_copy(
        update={
            "likelihood": resolve_likelihood(experiment.data, facts),
            "standardize": resolve_standardize(experiment.data, facts),
            "in_memory": resolve_in_memory(experiment.data, facts),
            # stages may be computed by processes that run in other folders
            **absolute_places(experiment.data),
        }
    )
    finetune = experiment.finetune
    if finetune is not None and finetune.task == "classify" and facts.has_anomalies:
        raise InputError(
            "finetune.task: classify needs classes, but with data.anomaly the labels tell only anomalies; use "
            "reconstruct, or leave data.anomaly out"
        )
    if finetune is not None and finetune.task == "auto":
        if facts.classes and not facts.can_classify:
            warnings.warn(
                "finetune.task: all training rows are of one class, so that there is nothing to classify; auto takes "
                "reconstruct",
                stacklevel=2,
            )
        finetune = finetune.model_copy(update={"task": "classify" if facts.can_classify else "reconstruct"})
    if finetune is not None and finetune.task == "classify" and not facts.classes:
        raise InputError("finetune.task: classify needs labels, but the data have none; use reconstruct")
    if finetune is not None and finetune.task == "classify" and not facts.can_classify:
        raise InputError(
            "finetune.task: classify needs training rows of two classes or more, but all are of one; use reconstruct, "
            "or put rows of another class into training"
        )
    network = experiment.network
    if isinstance(network, Dense):
        network = network.model_copy(update={"widths": resolve_widths(network, facts), "max_width": None})
    return experiment.model_copy(update={"data": data, "network": network, "finetune": finetune})


def layer_specs(
    network: Dense | Conv, data: Data, facts: Facts, code_activation: Activation | None = None
) -> list[LayerSpec]:
    """Return the layers of the stack with all their shapes; the first layer reads the data.

    Args:
        code_activation: activation of the bottleneck if the network names none.

    Raises:
        InputError: the network does not fit the data.
    """
    likelihood = resolve_likelihood(data, facts)
    _check_network(network, data, facts, likelihood)
    plan: list[tuple[Literal["dense", "conv"], int]] = [
        (network.kind, width) for width in resolve_widths(network, facts)
    ]
    if isinstance(network, Conv):
        plan += [("dense", width) for width in network.dense]

    bottleneck = network.code_activation or code_activation or network.activation
    categorical_levels = facts.levels if likelihood == "categorical" else 0
    reads: dict[str, Any] = {"likelihood": likelihood, "out_activation": "linear", "levels": categorical_levels}
    blocks = facts.columns.blocks
    reads |= {"blocks": blocks, "missing": data.missing == "impute" or bool(blocks)}
    shape, specs = facts.shape, []
    for number, (kind, width) in enumerate(plan, 1):
        if isinstance(network, Conv) and kind == "conv":
            fields = _conv_fields(network, shape, width, number)
        else:
            fields = {"code_shape": (width,)}
        activation = bottleneck if number == len(plan) else network.activation
        spec = LayerSpec(
            kind=kind, in_shape=shape, activation=activation, dropout=network.dropout,
            normalization=network.normalization, tied=network.tied, **fields, **reads,
        )  # fmt: skip
        _check_size(spec, number, "widths" if number <= len(network.widths) else "dense")
        specs.append(spec)
        shape = spec.code_shape
        if activation == "sigmoid":
            # these codes lie in (0, 1) and are fitted by cross-entropy (Vincent et al. 2010, sec. 2)
            reads = {"likelihood": "bernoulli", "out_activation": "linear", "levels": 0}
        else:
            reads = {"likelihood": "gaussian", "out_activation": activation, "levels": 0}
    return specs


def _check_network(network: Dense | Conv, data: Data, facts: Facts, likelihood: LikelihoodKind) -> None:
    if likelihood == "categorical" and not facts.levels:
        raise InputError("data.likelihood: categorical needs integer pixels, but these are floats; use gaussian")
    if likelihood == "categorical" and network.tied:
        raise InputError(
            "network.tied: a categorical decoder has an output per level and cannot share the encoder's weights; "
            "set --network.tied false or --data.likelihood gaussian"
        )
    if facts.columns.blocks and likelihood != "gaussian":
        raise InputError(
            f"data.likelihood: {likelihood} does not suit a table with columns of text, whose term is a cross-entropy; "
            "use gaussian, or leave such columns out with --data.categories 0"
        )
    if network.kind == "conv" and len(facts.shape) != 3:
        raise InputError(f"network.kind: conv needs images, but data.name {data.name} has vectors; use dense")


def _conv_fields(network: Conv, in_shape: Shape, channels: int, number: int) -> dict[str, Any]:
    """Return the shape of a convolutional layer's code and its kernel, stride and padding, as fields of its spec."""
    height, width = in_shape[1:]
    if network.stride > max(network.kernel, height, width):
        raise InputError(
            f"network.stride: {network.stride} leaps over the {height} x {width} input of layer {number}; use a "
            "smaller stride"
        )
    if network.kernel > min(height, width):
        raise InputError(
            f"network.kernel: {network.kernel} is larger than the {height} x {width} input of layer {number}; use a "
            "smaller kernel or stride, or fewer convolutional layers"
        )
    padding = (network.kernel - 1) // 2
    sides = [(side + 2 * padding - network.kernel) // network.stride + 1 for side in (height, width)]
    return {
        "code_shape": (channels, *sides), "kernel": network.kernel, "stride": network.stride, "padding": padding
    }  # fmt: skip


def _check_size(spec: LayerSpec, number: int, field: str) -> None:
    units = spec.code_shape[0]
    inputs = spec.in_shape[0] * spec.kernel**2 if spec.kind == "conv" else prod(spec.in_shape)
    weights = units * max(1, spec.levels) * inputs
    if weights > _MOST_WEIGHTS:
        raise InputError(
            f"network.{field}: {units} units give layer {number} {weights:.1e} weights, more than any device holds; "
            "use fewer units"
        )
