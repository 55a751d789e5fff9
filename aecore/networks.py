"""Layers and stacks, dense and convolutional, all with `encode` and `decode`."""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from aecore import likelihood
from aecore.config import Activation
from aecore.kernels import linear
from aecore.specs import LayerSpec

Terms = dict[str, Tensor]
"""Weighted terms of an objective, scalars: the objective is their sum, each is logged under its name."""

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "elu": F.elu,
    "linear": lambda x: x,
}


_RECTIFIERS = ("relu", "gelu")
"""A decoder that ends in one of these is fitted before it: behind it, units that emit nothing get no gradient and stay
dead (784-256-128-64 on MNIST: 0.028 squared error a pixel behind relu, 0.017 before it)."""


class Autoencoder(Protocol):
    """What a variant's loss may ask of a model: one layer or a whole stack."""

    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, code: Tensor) -> Tensor: ...
    def reconstruct(self, x: Tensor) -> Tensor: ...
    def reconstruction_loss(self, x: Tensor, target: Tensor) -> Tensor: ...


class Encoder(nn.Module):
    """(batch, *in_shape) -> (batch, *code_shape): affine, normalisation, activation, dropout."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        channels = spec.code_shape[0]
        self.affine: nn.Linear | nn.Conv2d
        if spec.kind == "dense":
            self.affine = nn.Linear(prod(spec.in_shape), channels)
        else:
            self.affine = nn.Conv2d(spec.in_shape[0], channels, spec.kernel, spec.stride, spec.padding)
        # one default for all activations: He et al. 2015 for rectifiers, Glorot & Bengio 2010 for the others
        if spec.activation in ("relu", "gelu", "elu"):
            nn.init.kaiming_uniform_(self.affine.weight, nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(self.affine.weight)
        assert self.affine.bias is not None
        nn.init.zeros_(self.affine.bias)
        self.norm: nn.Module = nn.Identity()
        if spec.normalization == "batch":
            self.norm = nn.BatchNorm1d(channels) if spec.kind == "dense" else nn.BatchNorm2d(channels)
        elif spec.normalization == "layer":
            self.norm = nn.LayerNorm(spec.code_shape)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        if isinstance(self.affine, nn.Linear):
            z = linear(x.flatten(1), self.affine.weight, self.affine.bias)
        else:
            z = self.affine(x)
        h = _ACTIVATIONS[self.spec.activation](self.norm(z))
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

    def encode(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return self.encoder(x)

    def decode(self, code: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Parameters of the likelihood: means for gaussian, logits for the others."""
        out = self.decoder(code, self.encoder.affine.weight if self.spec.tied else None)
        return out if self.spec.out_activation in _RECTIFIERS else _ACTIVATIONS[self.spec.out_activation](out)

    def mean(self, code: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The reconstruction that `code` stands for, (batch, *in_shape)."""
        mean = likelihood.mean(self.spec.likelihood, self.decode(code))
        return _ACTIVATIONS[self.spec.out_activation](mean) if self.spec.out_activation in _RECTIFIERS else mean

    def reconstruct(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return self.mean(self.encode(x))

    def reconstruction_loss(
        self, x: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, ""]:
        """The reconstruction term of `target` given `x` (the same unless `x` was corrupted)."""
        return likelihood.reconstruction_loss(self.spec.likelihood, self.decode(self.encode(x)), target)


class Stack(nn.Module):
    """Layers on top of each other, unrolled: encoders upward, then decoders downward (Hinton & Salakhutdinov 2006)."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(cast(Sequence[Layer], self.layers))  # ModuleList does not say what it holds

    @property
    def first(self) -> Layer:
        """The layer that reads the data."""
        return next(iter(self))

    def encode(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        for layer in self:
            x = layer.encode(x)
        return x

    def decode(self, code: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Parameters of the likelihood of the data."""
        for layer in reversed(list(self)[1:]):
            code = layer.mean(code)
        return self.first.decode(code)

    def mean(self, code: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The reconstruction that `code` stands for, in the space of the data."""
        return likelihood.mean(self.first.spec.likelihood, self.decode(code))

    def reconstruct(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return self.mean(self.encode(x))

    def reconstruction_loss(
        self, x: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, ""]:
        return likelihood.reconstruction_loss(self.first.spec.likelihood, self.decode(self.encode(x)), target)


class Classifier(nn.Module):
    """The encoders of a stack under a softmax head; emits logits, (batch, classes)."""

    def __init__(self, encoders: Sequence[Encoder], classes: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.head = nn.Linear(prod(encoders[-1].spec.code_shape), classes)

    def encode(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        for encoder in self.encoders:
            x = encoder(x)
        return x

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        return self.head(self.encode(x).flatten(1))


class Prepare(nn.Module):
    """Raw rows -> what the first layer reads: float32, scaled to [0, 1] or standardised. Holds no learned weight."""

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
