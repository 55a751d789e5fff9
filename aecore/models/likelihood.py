"""Reconstruction terms: what the decoder's output means, and what it costs to be wrong."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.distributions import ContinuousBernoulli

from aecore.core.types import LikelihoodKind


def reconstruction_loss(
    kind: LikelihoodKind, out: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."]
) -> Float[Tensor, ""]:
    """Sum over features, mean over the batch: squared error for gaussian, nats for the others.

    Args:
        out: what the decoder emits: means (gaussian), logits of shape (batch, *shape) (bernoulli and
            continuous_bernoulli, Loaiza-Ganem & Cunningham 2019) or of shape (batch, levels, *shape) (categorical).
        target: (batch, *shape); in [0, 1] unless gaussian. Categorical reads it as levels / (levels - 1).
    """
    out = out.float()  # sums over features lose too much in bf16
    if kind == "gaussian":
        total = F.mse_loss(out, target, reduction="sum")
    elif kind == "bernoulli":
        total = F.binary_cross_entropy_with_logits(out, target, reduction="sum")
    elif kind == "continuous_bernoulli":
        total = -ContinuousBernoulli(logits=out, validate_args=False).log_prob(target).sum()
    else:
        total = F.cross_entropy(out, (target * (out.shape[1] - 1)).round().long(), reduction="sum")
    return total / len(target)


def mean(kind: LikelihoodKind, out: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """The reconstruction, (batch, *shape): the mean of the distribution that `out` parameterises."""
    if kind == "gaussian":
        return out
    if kind == "bernoulli":
        return out.sigmoid()
    if kind == "continuous_bernoulli":
        return ContinuousBernoulli(logits=out.float(), validate_args=False).mean
    levels = torch.linspace(0, 1, out.shape[1], device=out.device)
    return torch.einsum("bl...,l->b...", out.float().softmax(1), levels)
