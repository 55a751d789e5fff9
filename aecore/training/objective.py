"""What a stage minimises: the loss of a variant, or the cross-entropy of labels."""

from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from aecore.core.types import Terms
from aecore.variants import Variant


@dataclass(frozen=True)
class Objective:
    """What a stage minimises, (*batch) -> terms: a variant's loss or, without one, the cross-entropy of labels."""

    model: nn.Module
    read: nn.Module
    """Makes of a batch what the model reads."""
    variant: Variant | None

    def __call__(self, x: Tensor, labels: Tensor | None = None) -> Terms:
        if self.variant is not None:
            return self.variant.loss(cast(Any, self.model), self.read(x))
        assert labels is not None
        return {"cross_entropy": F.cross_entropy(self.model(self.read(x)).float(), labels)}

    def scored(self, x: Tensor, labels: Tensor | None = None) -> tuple[Terms, Terms]:
        """The same and, of labelled rows, how many are classified wrongly."""
        if self.variant is not None:
            return self(x), {}
        assert labels is not None
        logits = self.model(self.read(x))
        return {"cross_entropy": F.cross_entropy(logits.float(), labels)}, {"error": (logits.argmax(1) != labels).sum()}
