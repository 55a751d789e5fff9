"""What a variational autoencoder makes of its prior, and what its codes are worth: samples, walks and bounds."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from aecore.models.divergences import kl_to_prior
from aecore.models.stack import Stack

STEPS = 10
"""Images of a walk through the codes."""
_IMPORTANCE_SAMPLES = 200
_WALKS = 8
_ACTIVE = 1e-2


def samples(stack: Stack, count: int, seed: int = 0) -> Float[Tensor, "count ..."]:
    """Means of p(x|z) for z drawn from the prior N(0, 1), (count, *shape of the data)."""
    code = torch.randn(count, *stack.code_shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return torch.cat([stack.mean(part) for part in code.to(_device(stack)).split(1000)])


def manifold(stack: Stack, side: int = 10) -> Float[Tensor, "count ..."]:
    """The plane of a two-dimensional code at quantiles of the prior, (side * side, *shape), row by row from the upper
    left (Kingma & Welling 2014, fig. 4)."""
    quantiles = torch.special.ndtri((torch.arange(side) + 0.5) / side)
    code = torch.stack([torch.cartesian_prod(-quantiles, quantiles)[:, i] for i in (1, 0)], 1)
    with torch.no_grad():
        return stack.mean(code.view(-1, *stack.code_shape).to(_device(stack)))


def traversals(stack: Stack, x: Tensor) -> Float[Tensor, "count ..."]:
    """From the code of the first row of x, one code at a time from -3 to 3: STEPS images for each of the most active
    codes, at most eight."""
    with torch.no_grad():
        codes = stack.encode(x[:1000])
        order = codes.flatten(1).var(0).argsort(descending=True)[:_WALKS]
        walk = codes[:1].flatten(1).repeat(len(order) * STEPS, 1)
        steps = torch.linspace(-3, 3, STEPS, device=walk.device)
        for n, unit in enumerate(order):
            walk[n * STEPS : (n + 1) * STEPS, unit] = steps
        return stack.mean(walk.view(-1, *stack.code_shape))


def interpolation(stack: Stack, x: Tensor) -> Float[Tensor, "count ..."]:
    """From the code of one row to that of the next in STEPS images, for the first rows of x, at most eight walks."""
    with torch.no_grad():
        codes = stack.encode(x[: 2 * _WALKS])
        share = torch.linspace(0, 1, STEPS, device=codes.device).view(1, -1, *[1] * (codes.ndim - 1))
        starts, ends = codes[0::2][:, None], codes[1::2][:, None]
        starts = starts[: len(ends)]
        return stack.mean((starts + share * (ends - starts)).flatten(0, 1))


def bound(stack: Stack, x: Tensor) -> dict[str, float]:
    """The two parts of the negative evidence lower bound, means over the rows of x in nats: `reconstruction`, by one
    sample a row, and `kl`."""
    parts = {"reconstruction": 0.0, "kl": 0.0}
    for rows in x.split(2000):
        mean, log_variance = stack.posterior(rows)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        parts["reconstruction"] += float(stack.reconstruction_loss(code, rows)) * len(rows) / len(x)
        parts["kl"] += float(kl_to_prior(mean, log_variance).sum()) / len(x)
    return parts


def importance_weighted(stack: Stack, x: Tensor, count: int = _IMPORTANCE_SAMPLES) -> float:
    """Mean over rows of log 1/K sum_k p(x, z_k) / q(z_k | x), z_k ~ q(z | x), nats (Burda et al. 2016, eq. 8).

    Args:
        x: (rows, *shape) of zeros and ones.
        count: K.
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
            likelihood = F.binary_cross_entropy_with_logits(stack.decode(code), rows, reduction="none")
            weights.append(prior_to_posterior - likelihood.flatten(1).sum(1))
        total += float((torch.stack(weights).logsumexp(0) - math.log(count)).sum())
    return total / len(x)


def active_units(stack: Stack, x: Tensor) -> float:
    """How many codes tell rows apart: the variance over x of their posterior mean exceeds 0.01 (Burda et al. 2016,
    sec. 5)."""
    codes = torch.cat([stack.encode(rows).flatten(1) for rows in x.split(2000)])
    return float((codes.var(0) > _ACTIVE).sum())


def _device(stack: Stack) -> torch.device:
    return next(stack.parameters()).device
