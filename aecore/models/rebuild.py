"""Builds models from the results of the stages that trained them, and turns their weights into arrays and back."""

import torch
from torch import nn

from aecore.models.classifier import Classifier
from aecore.models.layers import Layer
from aecore.models.prepare import Prepare
from aecore.models.spec import LayerSpec
from aecore.models.stack import Stack
from aecore.models.storage import Result, Weights

_AUTOENCODER = "autoencoder."


def build_layer(result: Result) -> Layer:
    """Build the layer that the stage `pretrain_layer` returned."""
    layer = Layer(LayerSpec.model_validate(result.config["layer"]))
    set_weights(layer, result.weights)
    return layer


def build_stack(result: Result) -> Stack:
    """Build the unrolled autoencoder that the stage `finetune` or `reference` returned."""
    stack = Stack(_layers(result))
    set_weights(stack, result.weights)
    return stack


def build_autoencoder(result: Result) -> Stack | None:
    """Build the autoencoder in a result of `finetune`: the finetuned model itself, or the autoencoder that a classifier
    was finetuned from. Return None for a classifier without one."""
    if result.config["task"] == "reconstruct":
        return build_stack(result)
    if not (layers := result.config["autoencoder"]):
        return None
    weights = {n.removeprefix(_AUTOENCODER): v for n, v in result.weights.items() if n.startswith(_AUTOENCODER)}
    return build_stack(Result({"layers": layers}, weights, {}))


def build_classifier(result: Result) -> Classifier:
    """Build the classifier that the stage `finetune` returned."""
    classifier = Classifier([layer.encoder for layer in _layers(result)], len(result.config["classes"]))
    set_weights(classifier, result.weights)
    return classifier


def build_prepare(result: Result) -> Prepare:
    """Build the preprocessing that belongs to the model that the stage `finetune` returned."""
    shift, scale = (torch.tensor(result.weights[f"prepare.{name}"]) for name in ("shift", "scale"))
    return Prepare(shift, scale)


def get_weights(module: nn.Module) -> Weights:
    """Return the module's parameters and buffers as NumPy arrays, by name."""
    return {name: value.detach().cpu().numpy() for name, value in module.state_dict().items()}


def set_weights(module: nn.Module, weights: Weights) -> None:
    """Load the module's parameters and buffers from `weights`; entries that the module lacks are ignored. A classifier
    lacks the other weights of its result, and a layer that is used for its code alone lacks the log-variance."""
    needed = module.state_dict().keys()
    module.load_state_dict({name: torch.tensor(value) for name, value in weights.items() if name in needed})


def _layers(result: Result) -> list[Layer]:
    return [Layer(LayerSpec.model_validate(layer)) for layer in result.config["layers"]]
