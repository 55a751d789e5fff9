"""Models rebuilt from the results of the stages that trained them."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from aecore.models.classifier import Classifier
from aecore.models.layers import Layer
from aecore.models.prepare import Prepare
from aecore.models.spec import LayerSpec
from aecore.models.stack import Stack
from aecore.models.storage import Result, Weights

if TYPE_CHECKING:
    pass


def build_layer(result: Result) -> Layer:
    """The layer that `pretrain_layer` returned."""
    layer = Layer(LayerSpec.model_validate(result.config["layer"]))
    set_weights(layer, result.weights)
    return layer


def build_stack(result: Result) -> Stack:
    """The unrolled autoencoder that `finetune` or `reference` returned."""
    stack = Stack([Layer(LayerSpec.model_validate(layer)) for layer in result.config["layers"]])
    set_weights(stack, result.weights)
    return stack


def build_autoencoder(result: Result) -> Stack | None:
    """The autoencoder of the model that `finetune` returned: itself, or what the classifier was finetuned from."""
    if result.config["task"] == "reconstruct":
        return build_stack(result)
    if not (layers := result.config["autoencoder"]):
        return None
    prefix = "autoencoder."
    weights = {name.removeprefix(prefix): v for name, v in result.weights.items() if name.startswith(prefix)}
    return build_stack(Result({"layers": layers}, weights, {}))


def build_classifier(result: Result) -> Classifier:
    """The classifier that `finetune` returned."""
    layers = [Layer(LayerSpec.model_validate(layer)) for layer in result.config["layers"]]
    classifier = Classifier([layer.encoder for layer in layers], len(result.config["classes"]))
    set_weights(classifier, result.weights)
    return classifier


def build_prepare(result: Result) -> Prepare:
    """The preprocessing that the model of `finetune` was trained behind."""
    shift, scale = (torch.tensor(result.weights[f"prepare.{name}"]) for name in ("shift", "scale"))
    return Prepare(shift, scale)


def get_weights(module: nn.Module) -> Weights:
    return {name: value.detach().cpu().numpy() for name, value in module.state_dict().items()}


def set_weights(module: nn.Module, weights: Weights) -> None:
    # a classifier's weights lie beside its preprocessing; a layer that is a code no more needs no log-variance
    needed = module.state_dict().keys()
    module.load_state_dict({name: torch.tensor(value) for name, value in weights.items() if name in needed})
