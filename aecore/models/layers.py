"""One layer of a stacked autoencoder, dense or convolutional: its encoder and its decoder."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aecore.models import likelihood
from aecore.models.activations import ACTIVATIONS
from aecore.models.autoencoder import Autoencoder, Batch
from aecore.models.spec import LayerSpec


def _affine(spec: LayerSpec) -> nn.Linear | nn.Conv2d:
    """Build the affine map from the layer's input to its pre-activations, with initial weights."""
    affine: nn.Linear | nn.Conv2d
    if spec.kind == "dense":
        affine = nn.Linear(prod(spec.in_shape), spec.code_shape[0])
    else:
        affine = nn.Conv2d(spec.in_shape[0], spec.code_shape[0], spec.kernel, spec.stride, spec.padding)
    if ACTIVATIONS[spec.activation].he_initialised:
        nn.init.kaiming_uniform_(affine.weight, nonlinearity="relu")
    else:
        nn.init.xavier_uniform_(affine.weight)
    assert affine.bias is not None
    nn.init.zeros_(affine.bias)
    return affine


def _apply(affine: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    return F.linear(x.flatten(1), affine.weight, affine.bias) if isinstance(affine, nn.Linear) else affine(x)


def keep_largest(code: Batch, k: int) -> Batch:
    """Set all but the `k` largest codes of each row to 0 (Makhzani & Frey 2014); with `k` 0 keep all of them."""
    if not k:
        return code
    flat = code.flatten(1)
    units = flat.topk(min(k, flat.shape[1]), sorted=False).indices
    return torch.zeros_like(flat).scatter(1, units, flat.gather(1, units)).view_as(code)


class Encoder(nn.Module):
    """Maps rows (batch, *in_shape) to codes (batch, *code_shape): affine, normalisation, activation, top-k, dropout.

    Where values may be missing, it reads `fill` (*in_shape) in their place, which is saved with its weights.
    """

    fill: Tensor

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        channels = spec.code_shape[0]
        if spec.missing:
            self.register_buffer("fill", torch.zeros(spec.in_shape))
        self.affine = _affine(spec)
        self.norm: nn.Module = nn.Identity()
        if spec.normalization == "batch":
            self.norm = nn.BatchNorm1d(channels) if spec.kind == "dense" else nn.BatchNorm2d(channels)
        elif spec.normalization == "layer":
            self.norm = nn.LayerNorm(spec.code_shape)

    def filled(self, x: Batch) -> Batch:
        """Return `x` with the value that the encoder keeps for a feature in place of each one that is missing."""
        return torch.where(x.isnan(), self.fill, x) if self.spec.missing else x

    def forward(self, x: Batch) -> Batch:
        h = _apply(self.affine, self.filled(x))
        if self.spec.normalization != "none":
            h = self.norm(h.to(self.affine.weight.dtype))  # means and variances lose too much in bf16
        h = ACTIVATIONS[self.spec.activation].value(h)
        h = keep_largest(h, self.spec.top_k if self.training else self.spec.top_k_encoding)
        return F.dropout(h, self.spec.dropout) if self.training and self.spec.dropout else h


class Decoder(nn.Module):
    """Maps codes (batch, *code_shape) to the parameters of the likelihood of the layer's input, (batch, *in_shape) or,
    if the likelihood is categorical, (batch, levels, *in_shape)."""

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

    def forward(self, code: Batch, tied: Tensor | None) -> Batch:
        """Decode `code`. The decoder of a tied layer has no weight of its own: it uses `tied`, the encoder's."""
        spec = self.spec
        weight = tied if self.weight is None else self.weight
        assert weight is not None, "the decoder of a tied layer needs the weight of its encoder"
        if spec.kind == "dense":
            weight = weight.T if self.weight is None else weight
            out = F.linear(code.flatten(1), weight, self.bias)
        else:
            # the encoder's stride may have left out the last places of each side; padding the output restores its size
            sides = [(n - 1) * spec.stride - 2 * spec.padding + spec.kernel for n in spec.code_shape[1:]]
            padding = [full - side for full, side in zip(spec.in_shape[1:], sides, strict=True)]
            out = F.conv_transpose2d(code, weight, self.bias, spec.stride, spec.padding, output_padding=padding)
        shape = (spec.levels, *spec.in_shape) if spec.levels else spec.in_shape
        return out.reshape(len(code), *shape)


_MOST_LOG_VARIANCE = 40.0
"""Where a row lies thousands of standard deviations from the others, the variance of its code would be infinite, and so
the loss of all rows; codes of the prior have the variance 1."""


class Layer(Autoencoder):
    """One layer of the stack, which reads the data or the codes of the layer below."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = self.input_spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.log_variance = _affine(spec) if spec.stochastic else None

    def filled(self, x: Batch) -> Batch:
        return self.encoder.filled(x)

    def encode(self, x: Batch) -> Batch:
        return self.encoder(x)

    def posterior(self, x: Batch) -> tuple[Batch, Batch]:
        assert self.log_variance is not None, "only a stochastic layer has a posterior"
        return self.encode(x), _apply(self.log_variance, self.filled(x)).clamp(max=_MOST_LOG_VARIANCE)

    def decode(self, code: Batch) -> Batch:
        out = self.decoder(keep_largest(code, self.spec.top_k), self.encoder.affine.weight if self.spec.tied else None)
        activation = ACTIVATIONS[self.spec.out_activation]
        return out if activation.is_rectifier else activation.value(out)

    def mean(self, code: Batch) -> Batch:
        mean = likelihood.mean(self.spec.likelihood, self.decode(code), self.spec.blocks)
        activation = ACTIVATIONS[self.spec.out_activation]
        return activation.value(mean) if activation.is_rectifier else mean
