"""How much of a GPU's memory a training stage takes, estimated from its spec. This module does not import torch."""

from collections.abc import Sequence
from math import prod

from aecore.config.specs import FinetuneSpec, LoadSpec, PretrainSpec
from aecore.models.spec import LayerSpec

_LIBRARIES = 2**30
"""Bytes that are set aside for CUDA's context and the libraries' workspaces."""
STATES = 8
"""Copies of the trained weights: gradients, Adam's two means, updates, the best ones, a checkpoint's, two to spare."""
_STEP_COPIES, _SCORING_COPIES = 4, 3
"""Copies of the values of a batch: in a step (values, gradients, temporary results), and while rows are scored."""
_FLOAT = 4
"""Bytes of a number."""


def training_memory(
    spec: PretrainSpec | FinetuneSpec, frozen: Sequence[LayerSpec], load: LoadSpec, fits: int = 1
) -> int:
    """Return the bytes of a GPU's memory that a training stage takes by estimate, CUDA's own included.

    The rows count twice, since a stage lays them on the device as floats only where these take less than half of its
    memory.

    Args:
        frozen: The layers below, which compute what a pretrained layer reads.
        load: The data that the stage reads.
        fits: Number of fits that are trained together as one.
    """
    trained = [spec.layer] if isinstance(spec, PretrainSpec) else list(spec.layers)
    weights = STATES * sum(map(weight_count, trained)) + sum(map(weight_count, frozen))
    values = sum(prod(layer.in_shape) + prod(layer.code_shape) for layer in (*frozen, *trained))
    values += sum(max(1, layer.levels) * prod(layer.in_shape) for layer in trained)  # what the decoders emit
    if spec.variant is not None and spec.variant.kind == "contractive" and len(trained) > 1:
        values += prod(trained[-1].code_shape) * max(prod(layer.in_shape) for layer in trained)  # the whole Jacobian
    scored = min(layer.scoring_rows for layer in trained)
    batch = max(_STEP_COPIES * spec.fit.batch_size, _SCORING_COPIES * scored) * values
    rows = 0 if load.data.in_memory == "never" else load.facts.rows * prod(trained[0].in_shape)
    rows *= fits if frozen else 1  # each fit has codes of its own, but all read the same data
    return _LIBRARIES + _FLOAT * (fits * (weights + batch) + 2 * rows)


def weight_count(layer: LayerSpec) -> int:
    """Return the number of weights of a layer's encoder and decoder, biases and normalisation left out."""
    if layer.kind == "dense":
        one = prod(layer.in_shape) * prod(layer.code_shape)
    else:
        one = layer.in_shape[0] * layer.code_shape[0] * layer.kernel**2
    encoder = one * (2 if layer.stochastic else 1)
    return encoder + (0 if layer.tied else one * max(1, layer.levels))
