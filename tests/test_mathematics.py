"""Reference and limit tests of likelihoods, noise, penalties, bounds and kernels."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from aecore.core.errors import InputError
from aecore.core.types import Activation, Noise
from aecore.models import generation, likelihood
from aecore.models.corruption import corrupt, draw_noise
from aecore.models.divergences import kl_to_prior, kl_to_rate
from aecore.models.jacobian import squared_norm
from aecore.models.layers import Layer
from aecore.models.spec import LayerSpec
from aecore.models.stack import Stack
from aecore.variants import Contractive, Denoising, Plain, Sparse, Variational


def test_squared_error_is_summed_over_features_and_averaged_over_rows() -> None:
    out, target = torch.randn(6, 3, 4), torch.rand(6, 3, 4)
    expected = sum(float((out[n] - target[n]).square().sum()) for n in range(6)) / 6
    assert float(likelihood.reconstruction_loss("gaussian", out, target)) == pytest.approx(expected, rel=1e-6)


def test_bernoulli_is_the_negative_log_likelihood() -> None:
    out, target = torch.randn(6, 5), torch.randint(0, 2, (6, 5)).float()
    expected = -torch.distributions.Bernoulli(logits=out).log_prob(target).sum(1).mean()
    assert torch.allclose(likelihood.reconstruction_loss("bernoulli", out, target), expected, atol=1e-5)
    assert torch.allclose(likelihood.mean("bernoulli", out), torch.distributions.Bernoulli(logits=out).mean)


def test_categorical_is_the_negative_log_likelihood_of_the_levels() -> None:
    out, levels = torch.randn(6, 256, 3, 2, 2), torch.randint(0, 256, (6, 3, 2, 2))
    distribution = torch.distributions.Categorical(logits=out.movedim(1, -1))
    expected = -distribution.log_prob(levels).flatten(1).sum(1).mean()
    assert torch.allclose(likelihood.reconstruction_loss("categorical", out, levels / 255), expected, rtol=1e-5)
    mean = (distribution.probs * torch.arange(256)).sum(-1) / 255
    assert torch.allclose(likelihood.mean("categorical", out), mean, atol=1e-5)


def test_continuous_bernoulli_is_a_density_of_grey_values() -> None:
    out = torch.tensor([[-3.0], [0.001], [2.0]])
    grid = torch.linspace(0, 1, 2001)
    for logit in out:
        density = torch.stack(
            [-likelihood.reconstruction_loss("continuous_bernoulli", logit[None], x.view(1, 1)) for x in grid]
        ).exp()
        assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-3)
        mean = float(torch.trapezoid(density * grid, grid))
        assert float(likelihood.mean("continuous_bernoulli", logit[None])) == pytest.approx(mean, abs=1e-3)


def test_gaussian_noise_has_its_level() -> None:
    x = torch.full((400, 500), 0.5)
    noise = corrupt(x, "gaussian", 0.3) - x
    assert float(noise.mean()) == pytest.approx(0, abs=3e-3) and float(noise.std()) == pytest.approx(0.3, rel=0.01)


def test_masking_sets_its_share_to_zero() -> None:
    y = corrupt(torch.full((400, 500), 0.5), "masking", 0.25)
    assert set(y.unique().tolist()) == {0.0, 0.5}
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.005)


def test_salt_and_pepper_are_equally_frequent() -> None:
    y = corrupt(torch.full((400, 500), 0.5), "salt_and_pepper", 0.4)
    assert set(y.unique().tolist()) == {0.0, 0.5, 1.0}
    assert float((y == 0).float().mean()) == pytest.approx(0.2, abs=0.005)
    assert float((y == 1).float().mean()) == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("noise", ["gaussian", "masking", "salt_and_pepper"])
def test_rows_are_corrupted_at_several_levels_by_one_draw(noise: Noise) -> None:
    x = torch.rand(40, 50)
    torch.manual_seed(0)
    draw = draw_noise(x, noise)
    for level in (0.1, 0.5):
        torch.manual_seed(0)
        assert torch.equal(corrupt(x, noise, level, draw), corrupt(x, noise, level))
        parts = [corrupt(rows, noise, level, own) for rows, own in zip(x.split(16), draw.split(16), strict=True)]
        assert torch.equal(torch.cat(parts), corrupt(x, noise, level, draw))


def dense(activation: Activation = "tanh", inputs: int = 6, units: int = 3, **fields: Any) -> LayerSpec:
    return LayerSpec(
        kind="dense", in_shape=(inputs,), code_shape=(units,), activation=activation,
        **{"likelihood": "gaussian", "out_activation": "linear", "levels": 0, "dropout": 0, "normalization": "none",
           "tied": False, **fields},
    )  # fmt: skip


def conv(activation: Activation = "elu") -> LayerSpec:
    return LayerSpec(
        kind="conv", in_shape=(1, 6, 6), code_shape=(4, 3, 3), activation=activation, likelihood="gaussian",
        out_activation="linear", levels=0, dropout=0, normalization="none", tied=False, kernel=3, stride=2, padding=1,
    )  # fmt: skip


@pytest.mark.parametrize("noise", ["gaussian", "masking", "salt_and_pepper"])
def test_without_noise_denoising_is_plain(noise: Noise) -> None:
    layer, x = Layer(dense()), torch.rand(8, 6)
    plain = Plain().loss(layer, x)["reconstruction"]
    assert torch.equal(Denoising(noise=noise, level=0).loss(layer, x)["reconstruction"], plain)
    assert not torch.equal(Denoising(noise=noise, level=0.5).loss(layer, x)["reconstruction"], plain)


@pytest.mark.parametrize(
    ("without", "with_"),
    [
        (Sparse(weight=0), Sparse(weight=0.5)),
        (Sparse(penalty="kl", weight=0), Sparse(penalty="kl", weight=0.5)),
        (Sparse(penalty="topk", k=3), Sparse(penalty="topk", k=1)),
        (Contractive(weight=0), Contractive(weight=0.5)),
        (Denoising(level=0), Denoising(level=0.5)),
    ],
)
def test_at_weight_zero_every_variant_is_plain_bit_for_bit(without: Any, with_: Any) -> None:
    x = torch.rand(8, 6)
    grads: list[list[torch.Tensor]] = []
    for variant in (Plain(), without, with_):
        torch.manual_seed(0)
        layer = Layer(variant.build(dense("sigmoid"), 1))
        loss = torch.stack([*variant.loss(layer, x).values()]).sum()
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(grads[0], grads[1], strict=True))
    assert not torch.equal(grads[0][1], grads[2][1])


def test_without_divergence_and_spread_the_variational_one_is_plain() -> None:
    variant, x = Variational(beta=0), torch.rand(8, 6)
    torch.manual_seed(0)
    layer = Layer(variant.build(dense("linear"), 1))
    assert layer.log_variance is not None and layer.log_variance.bias is not None
    torch.nn.init.zeros_(layer.log_variance.weight)
    with torch.no_grad():
        layer.log_variance.bias.sub_(200)
    with torch.no_grad():
        terms = variant.loss(layer, x)
    assert torch.equal(terms["reconstruction"], Plain().loss(layer, x)["reconstruction"])
    assert float(terms["kl"]) == 0


def test_kl_to_rate_is_the_textbooks() -> None:
    code = torch.rand(500, 7) * 0.8 + 0.1
    mean = code.mean(0)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(torch.full_like(mean, 0.05)), torch.distributions.Bernoulli(mean)
    ).sum()
    assert torch.allclose(kl_to_rate(code, 0.05), expected, rtol=1e-5)
    # by hand: 0.05 log(0.05 / 0.2) + 0.95 log(0.95 / 0.8)
    assert float(kl_to_rate(torch.full((4, 1), 0.2), 0.05)) == pytest.approx(0.0939432, abs=1e-6)
    assert float(kl_to_rate(torch.full((4, 9), 0.05), 0.05)) == pytest.approx(0, abs=1e-6)
    # the mean over the batch comes first: rows that differ are no penalty when their mean is the rate
    assert float(kl_to_rate(torch.tensor([[0.0], [0.1]]), 0.05)) == pytest.approx(0, abs=1e-6)
    channels = torch.rand(5, 3, 4, 4)
    assert torch.allclose(kl_to_rate(channels, 0.1), kl_to_rate(channels.movedim(1, 3).reshape(-1, 3), 0.1))


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "linear"])
def test_kl_refuses_codes_that_are_no_rates(activation: Activation) -> None:
    with pytest.raises(InputError, match=r"kl needs codes in \(0, 1\), layer 1 has"):
        Sparse(penalty="kl").build(dense(activation), 1)
    with pytest.raises(InputError, match="dropout"):
        Sparse(penalty="kl").build(dense("sigmoid", dropout=0.1), 1)


def test_topk_keeps_the_largest_and_more_of_them_when_encoding() -> None:
    variant = Sparse(penalty="topk", k=2, alpha=2)
    layer = Layer(variant.build(dense("linear", 12, 10), 1))
    x = torch.randn(50, 12)
    everything = layer.encoder.affine(x)
    training, encoding = layer.train().encode(x), layer.eval().encode(x)
    assert ((training != 0).sum(1) == 2).all() and ((encoding != 0).sum(1) == 4).all()
    assert torch.allclose(training.max(1).values, everything.max(1).values)
    assert torch.allclose(training.sum(1), everything.topk(2).values.sum(1), atol=1e-6)
    # the decoder reads the same two, whatever the encoder hands out
    assert torch.equal(layer.mean(encoding), layer.mean(training))
    with pytest.raises(InputError, match="11 codes are more than the 10"):
        Sparse(penalty="topk", k=11).build(dense("linear", 12, 10), 1)


ENCODERS: dict[str, Callable[[], Layer | Stack]] = {
    "dense sigmoid": lambda: Layer(dense("sigmoid")),
    "dense relu": lambda: Layer(dense("relu")),
    "dense tanh": lambda: Layer(dense("tanh")),
    "dense elu": lambda: Layer(dense("elu")),
    "dense gelu": lambda: Layer(dense("gelu")),
    "dense linear": lambda: Layer(dense("linear")),
    "dense, layer norm": lambda: Layer(dense("tanh", normalization="layer")),
    "two layers": lambda: Stack([Layer(dense("sigmoid", 6, 5)), Layer(dense("elu", 5, 3))]),
    "top-k": lambda: Layer(dense("linear", 6, 5, top_k=2, top_k_encoding=2)),
    "conv": lambda: Layer(conv()),
    "conv relu under dense": lambda: Stack([Layer(conv("relu")), Layer(dense("tanh", 36, 4))]),
}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_contraction_is_the_jacobians_squared_norm(encoder: str) -> None:
    torch.manual_seed(0)
    model = ENCODERS[encoder]()
    model.double()
    x = torch.randn(4, *(model.first if isinstance(model, Stack) else model).spec.in_shape, dtype=torch.float64)
    reference = torch.stack(
        [torch.autograd.functional.jacobian(lambda r: model.encode(r[None])[0], row).square().sum() for row in x]
    )
    assert torch.allclose(squared_norm(model, x, None), reference, rtol=1e-4)
    # the estimate along random directions is unbiased, and so is its gradient
    estimate = squared_norm(model, x, probes=4000)
    assert torch.allclose(estimate, reference, rtol=0.15)
    slopes = []
    for probes in (None, 4000):
        model.zero_grad()
        squared_norm(model, x, probes).sum().backward()
        slopes.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert float((slopes[0] - slopes[1]).norm() / slopes[0].norm()) < 0.15


_MEMORY_OF_THE_EXACT_JACOBIAN = """
import resource, sys, torch
from aecore.models.jacobian import squared_norm
from aecore.models.layers import Layer
from aecore.models.spec import LayerSpec

layer = Layer(LayerSpec(
    kind="conv", in_shape=(3, 32, 32), code_shape=(16, 16, 16), activation="elu", likelihood="gaussian",
    out_activation="linear", levels=0, dropout=0, normalization="none", tied=False, kernel=3, stride=2, padding=1,
))
x = torch.randn(8, 3, 32, 32)
with torch.no_grad():
    squared_norm(layer, x, probes=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    squared_norm(layer, x, probes=None)
unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in kB elsewhere
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
"""


def test_the_exact_jacobian_takes_bounded_memory() -> None:
    # the Jacobians of the eight rows have 0.4 GB, and computing all of them at once took 2.6 GB
    run = subprocess.run(
        [sys.executable, "-c", _MEMORY_OF_THE_EXACT_JACOBIAN], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 400_000 * 1024


@pytest.mark.parametrize("directions", [1, 5])
def test_the_exact_jacobian_is_the_same_in_any_chunks(directions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = Layer(conv()), torch.randn(4, 1, 6, 6)
    whole = squared_norm(layer, x, None)
    monkeypatch.setattr("aecore.models.jacobian._CHUNK_VALUES", directions * x.numel())
    assert torch.allclose(squared_norm(layer, x, None), whole, rtol=1e-5)


def test_the_exact_jacobian_is_that_of_the_codes_that_dropout_left() -> None:
    torch.manual_seed(0)
    layer, x = Layer(conv().model_copy(update={"dropout": 0.5})), torch.randn(4, 1, 6, 6)
    everything = squared_norm(layer.eval(), x, None)
    left = squared_norm(layer.train(), x, None)  # those that are left are doubled
    assert ((left > 0) & (left < 4 * everything)).all() and not torch.allclose(left, everything)


def test_a_code_that_depends_on_other_rows_has_no_jacobian() -> None:
    with pytest.raises(InputError, match=r"network\.normalization: batch"):
        Contractive().build(dense(normalization="batch"), 1)


def test_kl_to_prior_is_torch_distributions() -> None:
    mean, log_variance = torch.randn(20, 3, 2), torch.randn(20, 3, 2)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    assert torch.allclose(kl_to_prior(mean, log_variance), expected, rtol=1e-5, atol=1e-6)


def test_beta_scales_the_divergence_alone() -> None:
    torch.manual_seed(0)
    layer, x = Layer(Variational().build(dense("linear"), 1)), torch.rand(8, 6)
    terms = {}
    for beta in (1.0, 3.0):
        torch.manual_seed(1)
        terms[beta] = Variational(beta=beta).loss(layer, x)
    assert torch.equal(terms[1.0]["reconstruction"], terms[3.0]["reconstruction"])
    assert torch.allclose(3 * terms[1.0]["kl"], terms[3.0]["kl"])


def test_binarisation_is_drawn_anew_and_needs_bernoulli() -> None:
    variant = Variational(binarize=True)
    layer = Layer(variant.build(dense("linear", likelihood="bernoulli"), 1))
    x = torch.full((64, 6), 0.5)
    losses = {float(variant.loss(layer, x)["reconstruction"].detach()) for _ in range(5)}
    assert len(losses) == 5
    with pytest.raises(InputError, match=r"variant\.binarize: needs the bernoulli likelihood"):
        variant.build(dense("linear"), 1)


def linear_gaussian_bernoulli() -> Stack:
    """A variational stack with one code and one pixel, whose likelihood a quadrature knows."""
    stack = Stack([Layer(dense("linear", 1, 1, likelihood="bernoulli", stochastic=True))])
    layer = stack.first
    assert layer.log_variance is not None and layer.decoder.weight is not None
    with torch.no_grad():
        layer.encoder.affine.weight.fill_(0.8)
        layer.log_variance.weight.fill_(0.3)
        layer.decoder.weight.fill_(1.5)
        layer.decoder.bias.fill_(-0.4)
    return stack


def test_bounds_lie_below_the_likelihood_and_come_close() -> None:
    stack, x = linear_gaussian_bernoulli(), torch.tensor([[0.0], [1.0]]).repeat(500, 1)
    z = torch.linspace(-10, 10, 20_001)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).exp()
    one = float(torch.trapezoid(prior * torch.sigmoid(1.5 * z - 0.4), z))
    exact = (math.log(one) + math.log(1 - one)) / 2
    torch.manual_seed(0)
    with torch.no_grad():
        bound = -sum(generation.bound(stack, x).values())
        weighted = generation.importance_weighted(stack, x, 500)
    assert bound < weighted - 0.01
    assert weighted == pytest.approx(exact, abs=0.005)


def test_active_units_are_those_that_tell_rows_apart() -> None:
    stack = Stack([Layer(dense("linear", 4, 3, likelihood="bernoulli", stochastic=True))])
    with torch.no_grad():
        stack.first.encoder.affine.weight.copy_(torch.eye(4)[:3] * torch.tensor([[1.0], [0.01], [0.5]]))
    assert generation.active_units(stack, torch.randn(2000, 4)) == 2


def test_walks_start_and_end_where_they_say() -> None:
    stack = Stack([Layer(dense("linear", 6, 2, stochastic=True))]).eval()
    x = torch.rand(20, 6)
    between = generation.interpolation(stack, x)
    assert torch.allclose(between[0], stack.reconstruct(x[:1])[0], atol=1e-6)
    assert torch.allclose(between[generation.STEPS - 1], stack.reconstruct(x[1:2])[0], atol=1e-6)
    plane = generation.manifold(stack, 4)
    upper_left = torch.special.ndtri(torch.tensor([0.125, 0.875]))
    assert torch.allclose(plane[0], stack.mean(upper_left[None])[0], atol=1e-6)
    assert generation.traversals(stack, x).shape == (2 * generation.STEPS, 6)
    assert torch.equal(generation.samples(stack, 3), generation.samples(stack, 3))


def test_a_row_far_from_all_others_has_a_finite_bound() -> None:
    torch.manual_seed(0)
    spec = LayerSpec(
        kind="dense", in_shape=(4,), code_shape=(3,), activation="linear", likelihood="gaussian",
        out_activation="linear", levels=0, dropout=0, normalization="none", tied=False, stochastic=True,
    )  # fmt: skip
    layer = Layer(spec)
    x = torch.cat([torch.randn(7, 4), torch.full((1, 4), 3e4)])
    assert layer.posterior(x)[1].max() == 40
    assert all(torch.isfinite(term) for term in Variational().loss(layer, x).values())
    whole, (_, usual) = layer.log_variance, layer.posterior(x[:7])
    assert whole is not None and torch.equal(usual, whole(x[:7].flatten(1)))
