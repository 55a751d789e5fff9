"""The Jacobian of an encoder: how far a code moves when its input does."""

import torch
from jaxtyping import Float
from torch import Tensor

from aecore.models.activations import SLOPES
from aecore.models.layers import Layer
from aecore.models.products import linear
from aecore.models.protocol import Autoencoder
from aecore.models.spec import LayerSpec


def squared_norm(
    model: Autoencoder, x: Float[Tensor, "batch ..."], probes: int | None = None
) -> Float[Tensor, " batch"]:
    """||d encode(x) / dx||_F^2 of each row, (batch,), differentiable.

    One dense layer has a closed form: the sum over units of their squared slope times the squared norm of their weights
    (Rifai et al. 2011, eq. 5, for any activation). Others are estimated without bias along random directions of +-1,
    E||v^T J||^2 = ||J||_F^2 (Hutchinson 1990), or computed exactly.

    Args:
        probes: random directions a row; None is exact.
    """
    if isinstance(model, Layer) and _has_closed_form(model.spec):
        affine = model.encoder.affine
        assert affine.bias is not None
        slope = SLOPES[model.spec.activation](linear(x.flatten(1), affine.weight, affine.bias))
        return slope.square() @ affine.weight.square().sum(1)
    if probes is None:
        return _exact(model, x)
    code, pull, *_ = torch.func.vjp(model.encode, x)
    norms = []
    for _ in range(probes):
        direction = torch.randint(0, 2, code.shape, device=x.device).to(code.dtype) * 2 - 1
        norms.append(pull(direction)[0].flatten(1).square().sum(1))
    return torch.stack(norms).mean(0)


def _has_closed_form(spec: LayerSpec) -> bool:
    return spec.kind == "dense" and spec.normalization == "none" and not (spec.top_k or spec.top_k_encoding)


def _exact(model: Autoencoder, x: Tensor) -> Tensor:
    def encode_one(row: Tensor) -> Tensor:
        return model.encode(row[None])[0].flatten()

    jacobian = torch.func.vmap(torch.func.jacrev(encode_one))(x)
    return jacobian.flatten(1).square().sum(1)
