"""The noise models of the denoising autoencoder (Vincent et al. 2010, section 3.3)."""

import torch
from jaxtyping import Float
from torch import Tensor

from aecore.core.types import Noise, is_zero


def draw_noise(x: Float[Tensor, "batch ..."], noise: Noise) -> Float[Tensor, "batch ..."]:
    """Draw the random numbers that `corrupt` needs, one per feature, from torch's global generator.

    They are standard normal for `gaussian` noise and uniform on [0, 1) for the others.
    """
    return torch.randn_like(x) if noise == "gaussian" else torch.rand_like(x)


def corrupt(
    x: Float[Tensor, "batch ..."], noise: Noise, level: float | Float[Tensor, ""],
    draw: Float[Tensor, "batch ..."] | None = None,
) -> Float[Tensor, "batch ..."]:  # fmt: skip
    """Return a corrupted copy of `x`.

    Args:
        noise: `gaussian` adds N(0, level^2); `masking` sets a share `level` of the features to 0; `salt_and_pepper`
            sets a share `level` of them to 0 or 1, each with probability one half.
        draw: the result of `draw_noise`, passed in to corrupt the same rows at several levels with the same draw; None
            draws anew.
    """
    if is_zero(level):
        return x
    draw = draw_noise(x, noise) if draw is None else draw
    if noise == "gaussian":
        return x + level * draw
    if noise == "masking":
        return x * (draw >= level)
    # a draw below level / 2 becomes pepper (0), one from there to level salt (1)
    return torch.where(draw < level, (draw >= level / 2).to(x.dtype), x)
