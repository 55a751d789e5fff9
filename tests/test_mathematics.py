"""Reference and limit tests of likelihoods, noise and kernels."""

import pytest
import torch
import torch.nn.functional as F

from aecore import kernels, likelihood
from aecore.corruption import Noise, corrupt
from aecore.networks import Layer
from aecore.specs import LayerSpec
from aecore.variants import Denoising, Plain


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
def test_without_noise_denoising_is_plain(noise: Noise) -> None:
    spec = LayerSpec(
        kind="dense", in_shape=(6,), code_shape=(3,), activation="tanh", likelihood="gaussian",
        out_activation="linear", levels=0, dropout=0, normalization="none", tied=False,
    )  # fmt: skip
    layer, x = Layer(spec), torch.rand(8, 6)
    plain = Plain().loss(layer, x)["reconstruction"]
    assert torch.equal(Denoising(noise=noise, level=0).loss(layer, x)["reconstruction"], plain)
    assert not torch.equal(Denoising(noise=noise, level=0.5).loss(layer, x)["reconstruction"], plain)


@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(64, 784, 256), (1, 512, 512), (7, 300, 400), (4, 20, 10)])
def test_the_fast_linear_is_linear(batch: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(batch, inputs), torch.randn(outputs, inputs), torch.randn(outputs)]
    results = []
    for function in (kernels.linear, F.linear):
        x, weight, bias = (t.clone().requires_grad_() for t in tensors)
        out = function(x, weight, bias)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, weight.grad, bias.grad])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_the_fast_linear_refuses_to_be_differentiated_twice() -> None:
    x, weight, bias = torch.randn(4, 512), torch.randn(512, 512, requires_grad=True), torch.zeros(512)
    out = kernels.linear(x, weight, bias)
    if type(out.grad_fn).__name__ == "AddmmBackward0":
        pytest.skip("torch was built without oneDNN: its own linear is used")
    grad = torch.autograd.grad(out.square().sum(), weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
