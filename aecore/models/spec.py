"""The description of one layer, from which it is built. Nothing here imports torch."""

from math import prod
from typing import Literal

from aecore.core.fingerprint import Frozen
from aecore.core.types import Activation, LikelihoodKind, Shape

_SCORING_ROWS, _SCORING_VALUES = 2048, 2**25
"""Most rows of a batch that is scored at once, and most values that its decoder may emit."""


class LayerSpec(Frozen):
    """One layer, complete: all that its weights' shapes and its mathematics depend on."""

    kind: Literal["dense", "conv"]
    in_shape: Shape
    code_shape: Shape
    activation: Activation
    likelihood: LikelihoodKind
    """Reconstruction term of what the layer reads."""
    out_activation: Activation
    """The activation that made the layer's input, in which the decoder ends, so that it can emit what it must fit."""
    levels: int
    """Grey levels a channel (categorical only)."""
    dropout: float
    normalization: Literal["none", "batch", "layer"]
    tied: bool
    kernel: int = 0
    stride: int = 0
    padding: int = 0
    top_k: int = 0
    """Codes of a row that the decoder reads, the largest; 0 is all."""
    top_k_encoding: int = 0
    """Codes of a row that the encoder emits when it isn't training; 0 is all."""
    stochastic: bool = False
    """The code is the mean of a Gaussian, whose log-variance the layer learns too."""

    @property
    def scoring_rows(self) -> int:
        """Rows of a batch that is scored at once: fewer where each has many outputs, such as 256 per colour value."""
        outputs = max(self.levels, 1) * prod(self.in_shape)
        return max(1, min(_SCORING_ROWS, _SCORING_VALUES // outputs))
