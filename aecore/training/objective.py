"""What a training stage minimises: the loss of a variant, or the cross-entropy of labels."""

from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from aecore.core.types import Terms
from aecore.models.autoencoder import Autoencoder
from aecore.variants import Variant


@dataclass(frozen=True)
class Objective:
    """What a training stage minimises: the loss of a variant or, without one, the cross-entropy of labels.

    Calling it with a batch returns the weighted terms, whose sum is minimised. A step may be captured and replayed on a
    GPU, so all that it does has to be done by operations on tensors, and no value may reach Python (`.tolist()`,
    `.numpy()`).
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
        """Return the terms of a batch of validation and further sums over its rows: classification errors, if any."""
        if self.variant is not None:
            return self(x), {}
        assert labels is not None
        logits = self.model(self.inputs(x))
        return {"cross_entropy": F.cross_entropy(logits.float(), labels)}, {"error": (logits.argmax(1) != labels).sum()}

    def inputs(self, x: Tensor) -> Tensor:
        """Return what the model reads of a batch, in float32 even where frozen layers compute in bfloat16."""
        return self.read(x).float()
