"""Divergences between distributions, in nats."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def kl_to_rate(code: Tensor, rate: float | Tensor) -> Tensor:
    """Sum over units of KL(Bernoulli(rate) || Bernoulli(mean activation)), nats (Ng, CS294A, sec. 3).

    The mean over the batch comes first; a convolutional unit is a channel, averaged over places too.

    Args:
        code: (batch, units) or (batch, channels, height, width), in (0, 1).
    """
    mean = code.float().transpose(0, 1).flatten(1).mean(1)
    return (rate * (rate / mean).log() + (1 - rate) * ((1 - rate) / (1 - mean)).log()).sum()


def kl_to_prior(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each row, (batch,), nats (Kingma & Welling 2014, appendix B).

    Args:
        mean, log_variance: (batch, *code_shape).
    """
    mean, log_variance = mean.float().flatten(1), log_variance.float().flatten(1)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
