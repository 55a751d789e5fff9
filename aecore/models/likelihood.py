"""Reconstruction terms: the distributions that a decoder's output stands for, their means, and their losses."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.distributions import ContinuousBernoulli

from aecore.core.types import LikelihoodKind


def reconstruction_loss(
    kind: LikelihoodKind, out: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."]
) -> Float[Tensor, ""]:
    """Return the reconstruction term, summed over features and averaged over the batch.

    It is the squared error for `gaussian` and the negative log-likelihood in nats for the others.

    Args:
        out: the decoder's output. For `gaussian` these are means, for `bernoulli` and `continuous_bernoulli`
            (Loaiza-Ganem & Cunningham 2019) logits, all (batch, *shape); for `categorical` logits (batch, levels,
            *shape).
        target: (batch, *shape), in [0, 1] unless `gaussian`. `categorical` reads a value as level / (levels - 1).
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
    """Return the mean of the distribution that the decoder's output stands for: the reconstruction, (batch, *shape)."""
    if kind == "gaussian":
        return out
    if kind == "bernoulli":
        return out.sigmoid()
    if kind == "continuous_bernoulli":
        return ContinuousBernoulli(logits=out.float(), validate_args=False).mean
    levels = torch.linspace(0, 1, out.shape[1], device=out.device)
    with torch.autocast(out.device.type, enabled=False):  # this product is a sum over levels
        return torch.einsum("bl...,l->b...", out.float().softmax(1), levels)
