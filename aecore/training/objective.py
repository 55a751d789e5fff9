"""The loss that a training stage minimises: that of a variant, or the cross-entropy of labels."""

from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from aecore.core.types import Terms
from aecore.models.autoencoder import Autoencoder
from aecore.variants import Variant


@dataclass(frozen=True)
class Objective:
    """The loss that a training stage minimises: that of a variant or, without a variant, the cross-entropy of labels.

    A call with a batch returns the weighted terms of the loss, whose sum is minimised. A step may be replayed on a GPU,
    so it has to consist of operations on tensors, and no value may reach Python (`.tolist()`, `.numpy()`).
    """

    model: nn.Module
    """The model that is trained."""
    read: nn.Module
    """Turns the rows of a batch into what the model reads: the preprocessing and the frozen layers below."""
    variant: Variant | None

    def __call__(self, x: Tensor, labels: Tensor | None = None) -> Terms:
        if self.variant is not None:
            return self.variant.loss(cast(Autoencoder, self.model), self.inputs(x))
        assert labels is not None
        return {"cross_entropy": F.cross_entropy(self.model(self.inputs(x)).float(), labels)}

    def scored(self, x: Tensor, labels: Tensor | None = None) -> tuple[Terms, Terms]:
        """Return the terms of the loss of a validation batch, and further sums over its rows: a classifier's errors."""
        if self.variant is not None:
            return self(x), {}
        assert labels is not None
        logits = self.model(self.inputs(x))
        return {"cross_entropy": F.cross_entropy(logits.float(), labels)}, {"error": (logits.argmax(1) != labels).sum()}

    def inputs(self, x: Tensor) -> Tensor:
        """Return a batch as the model reads it, in float32 even where frozen layers compute in bfloat16."""
        return self.read(x).float()
