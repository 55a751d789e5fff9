"""The Jacobian of an encoder: how far a code moves when its input does."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from aecore.models.activations import ACTIVATIONS
from aecore.models.autoencoder import Autoencoder, Batch
from aecore.models.layers import Layer
from aecore.models.spec import LayerSpec

_CHUNK_VALUES = 2**22
"""Most values in a tensor of the directions that are pulled back at once (16 MB of float32)."""


def squared_norm(model: Autoencoder, x: Batch, probes: int | None = None) -> Float[Tensor, " batch"]:
    """Return the squared Frobenius norm of the encoder's Jacobian, ||d encode(x) / dx||_F^2, one value per row.

    The Jacobian is taken where the encoder reads the row, at the value that it keeps for a missing one.

    The result is differentiable. One dense layer has a closed form: the sum over units of their squared slope times the
    squared norm of their weights (Rifai et al. 2011, eq. 5, for any activation). Other encoders are estimated without
    bias along random directions v of +-1, by E||v^T J||^2 = ||J||_F^2 (Hutchinson 1990), or computed exactly. The code
    of a row must not depend on the other rows, as it does with batch normalisation in training.

    Args:
        probes: number of random directions per row; None computes the norm exactly, with one backward pass per unit of
            the code. Passes run in batches of bounded memory; where gradients are recorded, all passes stay in memory.
    """
    x = model.filled(x)
    if isinstance(model, Layer) and _has_closed_form(model.spec):
        affine = model.encoder.affine
        assert affine.bias is not None
        slope = ACTIVATIONS[model.spec.activation].slope(F.linear(x.flatten(1), affine.weight, affine.bias))
        with torch.autocast(x.device.type, enabled=False):  # this product is a sum over units
            return slope.to(affine.weight.dtype).square() @ affine.weight.square().sum(1)
    code, pull, *_ = torch.func.vjp(model.encode, x)

    def squared_pullback(direction: Tensor) -> Tensor:
        return pull(direction)[0].flatten(1).square().sum(1)

    if probes is not None:
        signs = (torch.randint(0, 2, code.shape, device=x.device).to(code.dtype) * 2 - 1 for _ in range(probes))
        return torch.stack([squared_pullback(direction) for direction in signs]).mean(0)

    def squared_gradient(unit: Tensor) -> Tensor:
        return squared_pullback(unit.view(code.shape[1:]).expand_as(code))

    units = code[0].numel()
    chunk = max(1, _CHUNK_VALUES // max(x.numel(), code.numel(), 1))
    identity = torch.eye(units, dtype=code.dtype, device=code.device)
    parts = [torch.func.vmap(squared_gradient)(part).sum(0) for part in identity.split(chunk)]
    return torch.stack(parts).sum(0)


def _has_closed_form(spec: LayerSpec) -> bool:
    return spec.kind == "dense" and spec.normalization == "none" and not (spec.top_k or spec.top_k_encoding)
