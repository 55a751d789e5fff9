"""The preprocessing between raw rows and the first layer."""

from jaxtyping import Float, Shaped
from torch import Tensor, nn


class Prepare(nn.Module):
    """Scales raw rows to [0, 1] or standardises them for the first layer: (raw - shift) * scale as float32, without any
    learned weight. `shift` and `scale` broadcast with the rows."""

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.shifted = bool(shift.count_nonzero())

    def forward(self, raw: Shaped[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        x = raw.float()
        return (x - self.shift if self.shifted else x) * self.scale

    def inverse(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Map rows as the first layer reads them back to raw rows, as floats."""
        return x / self.scale + self.shift
