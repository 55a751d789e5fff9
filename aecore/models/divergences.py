"""Kullback-Leibler divergences, in nats."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def kl_to_rate(code: Tensor, rate: float | Tensor) -> Tensor:
    """Return the sum over units of KL(Bernoulli(rate) || Bernoulli(mean activation)), a scalar (Ng, CS294A, sec. 3).

    The mean activation of a unit is taken over the batch. A convolutional unit is a channel, and its mean is taken over
    places as well.

    Args:
        code: activations in (0, 1), of shape (batch, units) or (batch, channels, height, width).
        rate: the target of the mean activation, in (0, 1).
    """
    mean = code.float().transpose(0, 1).flatten(1).mean(1)
    return (rate * (rate / mean).log() + (1 - rate) * ((1 - rate) / (1 - mean)).log()).sum()


def kl_to_prior(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(0, 1)) for each row, of shape (batch,) (Kingma & Welling 2014, appendix B).

    Args:
        mean, log_variance: the parameters of a diagonal Gaussian, each of shape (batch, *code_shape).
    """
    mean, log_variance = mean.float().flatten(1), log_variance.float().flatten(1)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
