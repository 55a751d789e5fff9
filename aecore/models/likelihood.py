"""Reconstruction terms: the distributions that a decoder's output stands for, their means, and their losses."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.distributions import ContinuousBernoulli

from aecore.core.types import LikelihoodKind

Blocks = Sequence[tuple[int, int]]
"""Where in a row the values of each category begin and end (`LayerSpec.blocks`)."""


def reconstruction_loss(
    kind: LikelihoodKind, out: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."], blocks: Blocks = (),
    missing: bool = False,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the reconstruction term, summed over features and averaged over the batch.

    It is the squared error for `gaussian` and the negative log-likelihood in nats for the others. In a row with
    categories, whose numbers are `gaussian`, each category adds the cross-entropy of its softmax.

    Args:
        out: the decoder's output. For `gaussian` these are means, for `bernoulli` and `continuous_bernoulli`
            (Loaiza-Ganem & Cunningham 2019) logits, all (batch, *shape); for `categorical` logits (batch, levels,
            *shape). The values of a category are logits too.
        target: (batch, *shape), in [0, 1] unless `gaussian`. `categorical` reads a value as level / (levels - 1).
        missing: values of the target may be missing, that is NaN; they are left out of the sum.
    """
    out = out.float()  # sums over features lose too much in bf16
    if kind == "gaussian":
        total = _gaussian(out, target, blocks, missing)
    elif kind == "categorical":
        total = F.cross_entropy(out, (target * (out.shape[1] - 1)).round().long(), reduction="sum")
    elif missing:
        losses = _losses(kind, out, target.nan_to_num())
        total = torch.where(target.isnan(), 0, losses).sum()
    elif kind == "bernoulli":
        total = F.binary_cross_entropy_with_logits(out, target, reduction="sum")
    else:
        total = _losses(kind, out, target).sum()
    return total / len(target)


def _gaussian(out: Tensor, target: Tensor, blocks: Blocks, missing: bool) -> Tensor:
    """Return the squared error of the numbers and the cross-entropy of the categories, summed over all rows."""
    if not blocks:
        return _squares(out, target, missing)
    terms = []
    for start, stop, is_block in _parts(blocks, out.shape[1]):
        logits, truth = out[:, start:stop], target[:, start:stop]
        if is_block:  # without any truth a row adds nothing
            terms.append(F.cross_entropy(logits, truth.nan_to_num() if missing else truth, reduction="sum"))
        else:
            terms.append(_squares(logits, truth, missing))
    return torch.stack(terms).sum()


def _squares(out: Tensor, target: Tensor, missing: bool) -> Tensor:
    """Return the squared error, summed over all rows. A missing target is the output itself, which has no error."""
    target = torch.where(target.isnan(), out.detach(), target) if missing else target
    return F.mse_loss(out, target, reduction="sum")


def _losses(kind: LikelihoodKind, out: Tensor, target: Tensor) -> Tensor:
    """Return the negative log-likelihood of each value, (batch, *shape), for `bernoulli` and `continuous_bernoulli`."""
    if kind == "bernoulli":
        return F.binary_cross_entropy_with_logits(out, target, reduction="none")
    return -ContinuousBernoulli(logits=out, validate_args=False).log_prob(target)


def bernoulli_rows(out: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Return the negative log-likelihood of each row in nats, for `bernoulli`; missing values are left out."""
    losses = _losses("bernoulli", out, target.nan_to_num())
    return torch.where(target.isnan(), 0, losses).flatten(1).sum(1)


def mean(kind: LikelihoodKind, out: Float[Tensor, "batch ..."], blocks: Blocks = ()) -> Float[Tensor, "batch ..."]:
    """Return the mean of the distribution that the decoder's output stands for: the reconstruction, (batch, *shape).
    The values of a category become probabilities."""
    if kind == "gaussian" and not blocks:
        return out
    if kind == "gaussian":
        parts = ((out[:, start:stop], is_block) for start, stop, is_block in _parts(blocks, out.shape[1]))
        return torch.cat([part.float().softmax(1) if is_block else part.float() for part, is_block in parts], 1)
    if kind == "bernoulli":
        return out.sigmoid()
    if kind == "continuous_bernoulli":
        return ContinuousBernoulli(logits=out.float(), validate_args=False).mean
    levels = torch.linspace(0, 1, out.shape[1], device=out.device)
    with torch.autocast(out.device.type, enabled=False):  # this product is a sum over levels
        return torch.einsum("bl...,l->b...", out.float().softmax(1), levels)


def _parts(blocks: Blocks, width: int) -> Iterator[tuple[int, int, bool]]:
    """Yield where each part of a row of so many values begins and ends, and whether it is a category or numbers."""
    end = 0
    for start, stop in (*blocks, (width, width)):
        if end < start:
            yield end, start, False
        if start < stop:
            yield start, stop, True
        end = stop
