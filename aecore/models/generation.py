"""Samples from a variational autoencoder, walks through its codes, and bounds on the likelihood that it gives to
data."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from aecore.models import likelihood
from aecore.models.divergences import kl_to_prior
from aecore.models.stack import Stack

STEPS = 10
"""Images per walk through the codes."""
_WALKS = 8
_IMPORTANCE_SAMPLES = 200
_ACTIVE_VARIANCE = 1e-2


def samples(stack: Stack, count: int, seed: int = 0) -> Float[Tensor, "count ..."]:
    """Return the means of p(x|z) for `count` codes z drawn from the prior N(0, 1), of shape (count, *in_shape)."""
    code = torch.randn(count, *stack.code_shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return torch.cat([stack.mean(part) for part in code.to(_device(stack)).split(1000)])


def manifold(stack: Stack, side: int = 10) -> Float[Tensor, "count ..."]:
    """Decode the plane of a two-dimensional code at quantiles of the prior, row by row from the upper left, to
    (side * side, *in_shape) (Kingma & Welling 2014, fig. 4)."""
    quantiles = torch.special.ndtri((torch.arange(side) + 0.5) / side)
    code = torch.cartesian_prod(-quantiles, quantiles).flip(1)
    with torch.no_grad():
        return stack.mean(code.view(-1, *stack.code_shape).to(_device(stack)))


def traversals(stack: Stack, x: Tensor) -> Float[Tensor, "count ..."]:
    """Decode walks from the code of the first row of `x` to images (walks * STEPS, *in_shape). In each walk one unit
    moves from -3 to 3; the units are those that vary most over the first 1,000 rows, at most eight."""
    with torch.no_grad():
        codes = stack.encode(x[:1000])
        order = codes.flatten(1).var(0, correction=min(1, len(codes) - 1)).argsort(descending=True)[:_WALKS]
        walk = codes[:1].flatten(1).repeat(len(order) * STEPS, 1)
        steps = torch.linspace(-3, 3, STEPS, device=walk.device)
        for n, unit in enumerate(order):
            walk[n * STEPS : (n + 1) * STEPS, unit] = steps
        return stack.mean(walk.view(-1, *stack.code_shape))


def interpolation(stack: Stack, x: Tensor) -> Float[Tensor, "count ..."]:
    """Decode straight walks from the code of one row to the code of the next, for at most the first eight pairs of
    rows, to images (walks * STEPS, *in_shape)."""
    with torch.no_grad():
        codes = stack.encode(x[: 2 * _WALKS])
        share = torch.linspace(0, 1, STEPS, device=codes.device).view(1, -1, *[1] * (codes.ndim - 1))
        ends = codes[1::2][:, None]
        starts = codes[0::2][: len(ends), None]
        return stack.mean((starts + share * (ends - starts)).flatten(0, 1))


def bound(stack: Stack, x: Tensor) -> dict[str, float]:
    """Return the two parts of the negative evidence lower bound, means over the rows of `x` in nats.

    `reconstruction` is estimated with one sample of the code per row; `kl` is the divergence from the prior.
    """
    parts = {"reconstruction": 0.0, "kl": 0.0}
    for rows in x.split(2000):
        mean, log_variance = stack.posterior(rows)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        parts["reconstruction"] += float(stack.reconstruction_loss(code, rows)) * len(rows) / len(x)
        parts["kl"] += float(kl_to_prior(mean, log_variance).sum()) / len(x)
    return parts


def importance_weighted(stack: Stack, x: Tensor, count: int = _IMPORTANCE_SAMPLES) -> float:
    """Return the importance-weighted bound, the mean over rows of log 1/K sum_k p(x, z_k) / q(z_k | x) with samples
    z_k ~ q(z | x), in nats (Burda et al. 2016, eq. 8).

    Args:
        x: rows of zeros and ones, of shape (rows, *in_shape).
        count: K, the number of samples per row.
    """
    total = 0.0
    for rows in x.split(200):
        mean, log_variance = stack.posterior(rows)
        weights = []
        for _ in range(count):
            noise = torch.randn_like(mean)
            code = mean + (0.5 * log_variance).exp() * noise
            # the normalising constants of prior and posterior cancel
            prior_to_posterior = 0.5 * (noise.square() + log_variance - code.square()).flatten(1).sum(1)
            weights.append(prior_to_posterior - likelihood.bernoulli_rows(stack.decode(code), rows))
        total += float((torch.stack(weights).logsumexp(0) - math.log(count)).sum())
    return total / len(x)


def active_units(stack: Stack, x: Tensor) -> float:
    """Count the units of the code that tell rows apart: the variance of their posterior mean over the rows of `x`
    exceeds 0.01 (Burda et al. 2016, sec. 5)."""
    codes = torch.cat([stack.encode(rows).flatten(1) for rows in x.split(2000)])
    return float((codes.var(0) > _ACTIVE_VARIANCE).sum())


def _device(stack: Stack) -> torch.device:
    return next(stack.parameters()).device
