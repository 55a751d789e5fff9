"""The arithmetic of products: float32, TF32 or bfloat16."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from aecore.core.types import Precision

Autocast = Callable[[], AbstractContextManager]
"""Makes the context in which a model is called."""


@contextmanager
def numerics(precision: Precision, device: torch.device) -> Iterator[Autocast]:
    """Set how float32 matrices and convolutions are multiplied within the block, and yield what models are called in.

    `fp32` multiplies with all 24 bits, `tf32` lets a GPU round the factors to 11 bits, `bf16` computes products in
    bfloat16 by torch's autocast. Whatever computes what a model reads (the frozen layers below) has to do so in the
    same block, or in one like it.
    """
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield (lambda: torch.autocast(device.type, torch.bfloat16)) if precision == "bf16" else nullcontext
    finally:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = convolutions
