"""What torch's CPU kernels need to be quick; above all, the faster of its two libraries for a dense layer's products.

torch sends float32 products to MKL, which leaves AVX-512 unused on other makers' processors; oneDNN does not, and is
about twice as fast there (784 x 256, batch 64 and more, two cores), no slower elsewhere.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_EXCEPTIONS = torch.tensor([-0.0, -1.0, 3e38, -3e38, torch.inf, -torch.inf, torch.nan, 200.0, -200.0, 1e-40] * 2)
_LEAST = 1_500_000  # multiplications; below, the call costs more than it saves
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        # as the weight lies, or autograd would turn it
        turned = not weight.is_contiguous()
        grad_weight = _product(x.t(), grad.t()).t() if turned else _product(grad.t(), x.t())
        return grad_x, grad_weight, grad.sum(0)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    assert _ONEDNN is not None
    return _ONEDNN(x, weight, bias, "none", [], "")


def arrange(model: nn.Module, rows: int) -> None:
    """Let the weights of dense layers lie as products with so many rows are quickest, or, with 0, as torch lays them.

    A weight with more outputs than inputs, a decoder's, then lies turned: the products divide among threads what lies
    side by side. With two cores that share no cache a step of 784-256-784 takes a tenth less, else some 4 %.
    """
    for weight in model.parameters():
        if weight.ndim == 2:
            turned = weight.shape[0] > weight.shape[1] and rows * weight.numel() >= _LEAST
            weight.data = weight.data.t().contiguous().t() if turned else weight.data.contiguous()


def map_constants() -> None:
    """Have in memory what torch's kernels of exponentials and logarithms give for exceptional numbers.

    With AVX-512 they read it under a mask, for whichever of 16 numbers are such. An empty mask spares the processor
    what it would read, but where the page is not there, it finds out in microcode, and the page does not come: 64 x 784
    numbers take `log1p` 530 us for 24, `sigmoid` 480 for 11, and so do losses with them. A page is not there if
    the system did not have that part of torch's file in its cache when the process first came near it, or has
    since been short of memory.
    """
    torch.log1p(_EXCEPTIONS)
    torch.expm1(_EXCEPTIONS)


def linear(
    x: Float[Tensor, "batch inputs"], weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"]
) -> Float[Tensor, "batch outputs"]:
    """`torch.nn.functional.linear`, differentiable once outside of `torch.func`."""
    fast = (
        _ONEDNN is not None
        and len(x) * weight.numel() >= _LEAST
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )
    return _OneDnnLinear.apply(x, weight, bias) if fast else F.linear(x, weight, bias)


map_constants()  # for whoever does not train
