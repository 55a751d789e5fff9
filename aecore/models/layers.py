"""Layers and stacks, dense and convolutional, all with `encode` and `decode`."""

from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aecore.core.types import LikelihoodKind
from aecore.models import likelihood
from aecore.models.activations import ACTIVATIONS, RECTIFIERS
from aecore.models.products import linear
from aecore.models.spec import LayerSpec


def _affine(spec: LayerSpec) -> nn.Linear | nn.Conv2d:
    affine: nn.Linear | nn.Conv2d
    if spec.kind == "dense":
        affine = nn.Linear(prod(spec.in_shape), spec.code_shape[0])
    else:
        affine = nn.Conv2d(spec.in_shape[0], spec.code_shape[0], spec.kernel, spec.stride, spec.padding)
    # one default for all activations: He et al. 2015 for rectifiers, Glorot & Bengio 2010 for the others
    if spec.activation in ("relu", "gelu", "elu"):
        nn.init.kaiming_uniform_(affine.weight, nonlinearity="relu")
    else:
        nn.init.xavier_uniform_(affine.weight)
    assert affine.bias is not None
    nn.init.zeros_(affine.bias)
    return affine


def _apply(affine: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    return linear(x.flatten(1), affine.weight, affine.bias) if isinstance(affine, nn.Linear) else affine(x)


def largest(code: Float[Tensor, "batch ..."], k: int) -> Float[Tensor, "batch ..."]:
    """The `k` largest codes of each row, the others set to 0 (Makhzani & Frey 2014); all of them where k is 0."""
    if not k:
        return code
    flat = code.flatten(1)
    kept = flat.topk(min(k, flat.shape[1]), sorted=False).indices
    return torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).view_as(code)


class Encoder(nn.Module):
    """(batch, *in_shape) -> (batch, *code_shape): affine, normalisation, activation, top-k, dropout."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        channels = spec.code_shape[0]
        self.affine = _affine(spec)
        self.norm: nn.Module = nn.Identity()
        if spec.normalization == "batch":
            self.norm = nn.BatchNorm1d(channels) if spec.kind == "dense" else nn.BatchNorm2d(channels)
        elif spec.normalization == "layer":
            self.norm = nn.LayerNorm(spec.code_shape)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        h = ACTIVATIONS[self.spec.activation](self.norm(_apply(self.affine, x)))
        h = largest(h, self.spec.top_k if self.training else self.spec.top_k_encoding)
        return F.dropout(h, self.spec.dropout) if self.training and self.spec.dropout else h


class Decoder(nn.Module):
    """(batch, *code_shape) -> the parameters of the likelihood of the layer's input."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        outputs = max(spec.levels, 1) * (prod(spec.in_shape) if spec.kind == "dense" else spec.in_shape[0])
        if spec.kind == "dense":
            weight = torch.empty(outputs, prod(spec.code_shape))
        else:
            weight = torch.empty(spec.code_shape[0], outputs, spec.kernel, spec.kernel)
        self.weight = None if spec.tied else nn.Parameter(nn.init.xavier_uniform_(weight))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, code: Float[Tensor, "batch ..."], tied: Tensor | None) -> Float[Tensor, "batch ..."]:
        """`tied` is the encoder's weight, used where this decoder has none of its own."""
        spec = self.spec
        weight = tied if self.weight is None else self.weight
        assert weight is not None, "a tied decoder is given its encoder's weight"
        if spec.kind == "dense":
            weight = weight.T if self.weight is None else weight
            out = linear(code.flatten(1), weight, self.bias)
        else:
            # what the stride rounded off on the way in is padded back on the way out
            side = [(n - 1) * spec.stride - 2 * spec.padding + spec.kernel for n in spec.code_shape[1:]]
            extra = [full - got for full, got in zip(spec.in_shape[1:], side, strict=True)]
            out = F.conv_transpose2d(code, weight, self.bias, spec.stride, spec.padding, extra)
        shape = (spec.levels, *spec.in_shape) if spec.levels else spec.in_shape
        return out.reshape(len(code), *shape)


class Layer(nn.Module):
    """One autoencoder layer: x (batch, *in_shape) -> code (batch, *code_shape) -> x again."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.log_variance = _affine(spec) if spec.stochastic else None

    @property
    def likelihood(self) -> LikelihoodKind:
        """Of what the layer reads."""
        return self.spec.likelihood

    def encode(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return self.encoder(x)

    def posterior(self, x: Float[Tensor, "batch ..."]) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:
        """Mean and log-variance of q(code | x), each (batch, *code_shape); of a stochastic layer."""
        assert self.log_variance is not None, "only a stochastic layer has a posterior"
        return self.encode(x), _apply(self.log_variance, x)

    def decode(self, code: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Parameters of the likelihood: means for gaussian, logits for the others."""
        out = self.decoder(largest(code, self.spec.top_k), self.encoder.affine.weight if self.spec.tied else None)
        return out if self.spec.out_activation in RECTIFIERS else ACTIVATIONS[self.spec.out_activation](out)

    def mean(self, code: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The reconstruction that `code` stands for, (batch, *in_shape)."""
        mean = likelihood.mean(self.spec.likelihood, self.decode(code))
        return ACTIVATIONS[self.spec.out_activation](mean) if self.spec.out_activation in RECTIFIERS else mean

    def reconstruct(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return self.mean(self.encode(x))

    def reconstruction_loss(
        self, code: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, ""]:
        """The reconstruction term of `target` given its code."""
        return likelihood.reconstruction_loss(self.likelihood, self.decode(code), target)
