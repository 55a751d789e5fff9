"""The classifier: the encoders of a stack under a softmax head."""

from collections.abc import Sequence
from math import prod

from jaxtyping import Float
from torch import Tensor, nn

from aecore.models.autoencoder import Batch
from aecore.models.layers import Encoder


class Classifier(nn.Module):
    """The encoders of a stack under a linear head, which maps rows (batch, *in_shape) to logits (batch, classes)."""

    def __init__(self, encoders: Sequence[Encoder], classes: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.head = nn.Linear(prod(encoders[-1].spec.code_shape), classes)

    def encode(self, x: Batch) -> Batch:
        """Return the code of the last encoder, (batch, *code_shape)."""
        for encoder in self.encoders:
            x = encoder(x)
        return x

    def forward(self, x: Batch) -> Float[Tensor, "batch classes"]:
        return self.head(self.encode(x).flatten(1))
