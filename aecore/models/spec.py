"""The description that a layer is built from. This module does not import torch."""

from math import prod
from typing import Annotated, Literal

from aecore.core.fingerprint import Frozen, Later
from aecore.core.types import Activation, LikelihoodKind, Shape

_SCORING_ROWS = 2048
"""Most rows in a batch that is scored."""
_SCORING_VALUES = 2**25
"""Most values that the decoder may emit for a batch that is scored."""


class LayerSpec(Frozen):
    """One layer, which maps rows (batch, *in_shape) to codes (batch, *code_shape) and back: all choices that the shapes
    of its weights and its mathematics depend on."""

    kind: Literal["dense", "conv"]
    in_shape: Shape
    """Shape of one row that the layer reads; a dense layer flattens it."""
    code_shape: Shape
    """Shape of one code: (units,) of a dense layer, (channels, height, width) of a convolutional one."""
    activation: Activation
    """Activation of the encoder, which makes the code."""
    likelihood: LikelihoodKind
    """Reconstruction term of the rows that the layer reads."""
    out_activation: Activation
    """Activation that the decoder ends in: the one that made the layer's input, so that both have one range."""
    levels: int
    """Number of grey levels per channel for a categorical likelihood; 0 for the others."""
    dropout: float
    """Share of the codes that are set to 0 in training."""
    normalization: Literal["none", "batch", "layer"]
    """Normalisation before the encoder's activation."""
    tied: bool
    """Whether the decoder uses the transposed weight of the encoder."""
    kernel: int = 0
    """Side of the kernel in pixels; 0 for a dense layer, as are `stride` and `padding`."""
    stride: int = 0
    padding: int = 0
    top_k: int = 0
    """Number of codes per row, the largest, that the decoder reads; 0 is all of them."""
    top_k_encoding: int = 0
    """Number of codes per row, the largest, that the encoder emits outside of training; 0 is all of them."""
    stochastic: bool = False
    """Whether the code is the mean of a Gaussian whose log-variance the layer learns too."""
    missing: Annotated[bool, Later()] = False
    """Whether values of the rows may be missing, that is NaN: the encoder then reads a value that it keeps for each
    feature in their place, and the reconstruction term leaves them out."""
    blocks: Annotated[tuple[tuple[int, int], ...], Later()] = ()
    """Where in a row the values of each category begin and end, with a softmax over each; none in rows of numbers."""

    @property
    def scoring_rows(self) -> int:
        """Number of rows to score at once: fewer where a row has many outputs, such as 256 for each colour value."""
        outputs = max(self.levels, 1) * prod(self.in_shape)
        return max(1, min(_SCORING_ROWS, _SCORING_VALUES // outputs))
