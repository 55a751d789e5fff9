from math import prod
from typing import Any

import pytest
import torch

from aecore.config.experiment import Conv, Data, Dense
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.core.errors import InputError
from aecore.models.classifier import Classifier
from aecore.models.layers import Layer
from aecore.models.prepare import Prepare
from aecore.models.stack import Stack

GREY = Facts(digest="", shape=(1, 28, 28), levels=256, classes=tuple("0123456789"), rows=100)
COLOUR = GREY.model_copy(update={"shape": (3, 32, 32)})
ODD = GREY.model_copy(update={"shape": (1, 9, 7)})
VECTOR = GREY.model_copy(update={"shape": (20,), "levels": 0})

NETWORKS: dict[str, tuple[Dense | Conv, Facts]] = {
    "dense": (Dense(widths=(12, 6)), GREY),
    "overcomplete": (Dense(widths=(40, 30)), VECTOR),
    "tied": (Dense(widths=(12, 6), tied=True), GREY),
    "sigmoid": (Dense(widths=(12, 6), activation="sigmoid"), VECTOR),
    "batch": (Dense(widths=(12, 6), normalization="batch", dropout=0.5), VECTOR),
    "layer": (Dense(widths=(12, 6), normalization="layer", activation="tanh"), VECTOR),
    "linear code": (Dense(widths=(12, 6), code_activation="linear", activation="relu"), GREY),
    "conv": (Conv(widths=(4, 6)), GREY),
    "conv to dense": (Conv(widths=(4, 6), dense=(10,), activation="gelu"), ODD),
    "conv tied": (Conv(widths=(4, 6), tied=True, kernel=4), GREY),
    "conv batch": (Conv(widths=(4, 6), normalization="batch", kernel=5, stride=3), GREY),
    "conv layer": (Conv(widths=(4,), normalization="layer", stride=1), ODD),
    "conv colour": (Conv(widths=(4, 6)), COLOUR),
    "dense colour": (Dense(widths=(5,)), COLOUR),
}


def build(name: str) -> tuple[Stack, torch.Tensor]:
    network, facts = NETWORKS[name]
    torch.manual_seed(0)
    stack = Stack([Layer(spec) for spec in layer_specs(network, Data(), facts)])
    return stack, torch.rand(5, *facts.shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_and_gradients(name: str) -> None:
    stack, x = build(name)
    h = x
    for layer in stack:
        code = layer.encode(h)
        assert code.shape == (5, *layer.spec.code_shape)
        assert layer.reconstruct(h).shape == h.shape
        assert layer.reconstruction_loss(layer.encode(h), h.detach()).isfinite()
        h = code
    assert torch.equal(stack.train(False).encode(x), _chain(stack, x))
    assert stack.reconstruct(x).shape == x.shape
    stack.train().reconstruction_loss(stack.encode(x), x).backward()
    for parameter_name, parameter in stack.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


def _chain(stack: Stack, x: torch.Tensor) -> torch.Tensor:
    for layer in stack:
        x = layer.encode(x)
    return x


def test_tied_decoders_follow_their_encoder() -> None:
    for name in ("tied", "conv tied"):
        stack, x = build(name)
        layer = stack.first
        assert not [n for n, _ in layer.decoder.named_parameters() if n != "bias"]
        before = layer.decode(layer.encode(x)).detach()
        code = layer.encode(x).detach()
        with torch.no_grad():
            layer.encoder.affine.weight.mul_(2)
        assert torch.allclose(layer.decode(code), 2 * before, atol=1e-5)


def test_tied_dense_decoder_is_the_transpose() -> None:
    stack, _ = build("tied")
    weight = stack.first.encoder.affine.weight
    code = torch.rand(3, 12)
    assert torch.allclose(stack.first.decode(code).flatten(1), code @ weight + stack.first.decoder.bias, atol=1e-6)


def test_the_decoder_of_an_upper_layer_reaches_what_the_lower_emits() -> None:
    network = Dense(widths=(12, 6), activation="relu")
    _, upper = (Layer(spec) for spec in layer_specs(network, Data(), GREY))
    assert upper.spec.likelihood == "gaussian"
    with torch.no_grad():
        upper.decoder.bias.fill_(7.5)
        assert (upper.decode(torch.zeros(1, 6)) == 7.5).all() and (upper.mean(torch.zeros(1, 6)) == 7.5).all()
        upper.decoder.bias.fill_(-1.0)
        assert (upper.decode(torch.zeros(1, 6)) == -1).all() and (upper.mean(torch.zeros(1, 6)) == 0).all()


@pytest.mark.parametrize("activation", ["relu", "elu", "tanh", "sigmoid", "linear"])
def test_layers_that_reconstruct_their_inputs_do_so_stacked(activation: Any) -> None:
    torch.manual_seed(0)
    network = Dense(widths=(12, 12), activation=activation)
    specs = layer_specs(network, Data(likelihood="gaussian"), VECTOR)
    lower, upper = (Layer(spec) for spec in specs)
    codes = lower.encode(torch.randn(50, 20)).detach()
    optimizer = torch.optim.Adam(upper.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        loss = upper.reconstruction_loss(upper.encode(codes), codes)
        loss.backward()
        optimizer.step()
    # what the layer was trained to emit is what it emits within the stack
    error = (upper.mean(upper.encode(codes)) - codes).square().sum(1).mean()
    assert error <= (loss if activation != "sigmoid" else 0.2) + 1e-3


def test_sigmoid_codes_are_fitted_by_cross_entropy_and_come_back_in_their_range() -> None:
    _, upper = (Layer(spec) for spec in layer_specs(Dense(widths=(12, 6), activation="sigmoid"), Data(), GREY))
    assert upper.spec.likelihood == "bernoulli" and upper.spec.out_activation == "linear"
    code = torch.randn(4, 6) * 10
    assert ((upper.mean(code) >= 0) & (upper.mean(code) <= 1)).all()


@pytest.mark.parametrize(("facts", "likelihood"), [(GREY, "bernoulli"), (COLOUR, "categorical"), (VECTOR, "gaussian")])
def test_the_reconstruction_term_follows_the_data(facts: Facts, likelihood: str) -> None:
    assert layer_specs(Dense(), Data(), facts)[0].likelihood == likelihood


def test_colour_has_256_levels_a_channel() -> None:
    stack, x = build("conv colour")
    assert stack.decode(stack.encode(x)).shape == (5, 256, 3, 32, 32)


@pytest.mark.parametrize(
    ("network", "fields", "facts", "message"),
    [
        (Conv(kernel=9), {}, ODD, "network.kernel: 9 is larger than the 9 x 7 input of layer 1"),
        (Conv(), {}, VECTOR, "network.kind: conv needs images"),
        (Dense(tied=True), {}, COLOUR, "network.tied: a categorical decoder"),
        (Dense(), {"likelihood": "categorical"}, VECTOR, "data.likelihood: categorical needs integer pixels"),
    ],
)
def test_what_does_not_fit_is_refused(
    network: Dense | Conv, fields: dict[str, Any], facts: Facts, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        layer_specs(network, Data.model_validate(fields), facts)


def test_classifier_emits_logits() -> None:
    stack, x = build("conv to dense")
    logits = Classifier([layer.encoder for layer in stack], 10)(x)
    assert logits.shape == (5, 10) and not torch.allclose(logits.sum(1), torch.ones(5))


def test_dropout_only_while_training() -> None:
    stack, x = build("batch")
    stack.train()
    assert not torch.equal(stack.encode(x), stack.encode(x))
    stack.eval()
    assert torch.equal(stack.encode(x), stack.encode(x))


def test_prepare_scales_bytes_and_standardises_vectors() -> None:
    raw = torch.tensor([[0, 255]], dtype=torch.uint8)
    assert Prepare(torch.tensor(0.0), torch.tensor(1 / 255))(raw).tolist() == [[0.0, 1.0]]
    x = Prepare(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.5]))(torch.tensor([[3.0, 4.0]]))
    assert x.tolist() == [[4.0, 1.0]]


def test_shapes_are_checked_while_tests_run() -> None:
    with pytest.raises(Exception, match="Type-check error"):
        Prepare(torch.tensor(0.0), torch.tensor(1.0))("not a tensor")


def test_code_shapes_multiply_out() -> None:
    specs = layer_specs(Conv(widths=(4, 6), dense=(10,)), Data(), GREY)
    assert [prod(spec.code_shape) for spec in specs] == [4 * 14 * 14, 6 * 7 * 7, 10]
