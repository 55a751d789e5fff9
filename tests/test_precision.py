"""Lower precision: what computes in it, what stays in float32, and where a result says so. On a CPU bf16 is autocast as
on a GPU; tf32 changes nothing there but the settings."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from aecore.config.experiment import Conv, Data, Dense, Fit, Network
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.config.specs import FinetuneSpec, Numerics, PretrainSpec
from aecore.core.types import LikelihoodKind, Precision, Terms
from aecore.data.splits import Arrays
from aecore.models import likelihood
from aecore.models.layers import Layer
from aecore.models.stack import Stack
from aecore.models.storage import Result
from aecore.stages.context import CPU, Context
from aecore.stages.finetune import finetune
from aecore.stages.pretrain import pretrain_layer
from aecore.training.numerics import numerics
from aecore.training.objective import Objective
from aecore.variants import Contractive, Denoising, Plain, Sparse, Variant, Variational

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
NETWORKS: dict[str, Network] = {
    "dense": Dense(widths=(12, 6), activation="sigmoid"), "conv": Conv(widths=(4, 6), activation="sigmoid"),
    "normalised": Dense(widths=(12, 6), activation="sigmoid", normalization="layer"),
}  # fmt: skip
VARIANTS: dict[str, Variant] = {
    "plain": Plain(), "l1": Sparse(), "kl": Sparse(penalty="kl"), "topk": Sparse(penalty="topk", k=0.5),
    "gaussian": Denoising(noise="gaussian"), "masking": Denoising(), "contractive": Contractive(),
    "exactly contractive": Contractive(probes=None), "variational": Variational(),
    "binarised": Variational(binarize=True),
}  # fmt: skip


def autoencoders(network: Network, variant: Variant, facts: Facts, kind: LikelihoodKind) -> list[Layer | Stack]:
    """The first layer alone, and a stack whose last layer is the variant's."""
    specs = layer_specs(network, Data(likelihood=kind), facts)
    torch.manual_seed(0)
    whole = [*specs[:-1], variant.build(specs[-1], len(specs))]
    return [Layer(variant.build(specs[0], 1)), Stack([Layer(spec) for spec in whole])]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_term_is_summed_up_in_float32(name: str, network: str, digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = digits
    x, variant = torch.tensor(arrays.train.x[:64]).float() / 16, VARIANTS[name]
    for model in autoencoders(NETWORKS[network], variant, facts, "bernoulli"):
        objective = Objective(model, torch.nn.Identity(), variant)
        terms: dict[Precision, Terms] = {}
        for precision in PRECISIONS:
            torch.manual_seed(1)
            with numerics(precision, CPU) as autocast, autocast():
                terms[precision] = {term: value.detach() for term, value in objective(x).items()}
        assert terms["fp32"].keys() == terms["bf16"].keys()
        for term, value in terms["bf16"].items():
            assert value.dtype == torch.float32
            assert float(value) == pytest.approx(float(terms["fp32"][term]), rel=0.02)


@pytest.mark.parametrize("kind", get_args(LikelihoodKind))
def test_likelihoods_of_bfloat16_are_float32(kind: LikelihoodKind) -> None:
    out, target = torch.randn(64, *([5] if kind == "categorical" else []), 40), torch.rand(64, 40)
    exact = likelihood.reconstruction_loss(kind, out, target)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = likelihood.reconstruction_loss(kind, out.bfloat16(), target)
        means = likelihood.mean(kind, out.bfloat16())
        same = likelihood.mean(kind, out)
    assert rounded.dtype == torch.float32 and float(rounded) == pytest.approx(float(exact), rel=0.01)
    assert torch.allclose(means.float(), likelihood.mean(kind, out), atol=0.02)
    assert torch.equal(same, likelihood.mean(kind, out))


def test_a_sum_of_many_codes_does_not_lose_its_last_ones() -> None:
    class Ones(torch.nn.Module):
        def encode(self, x: Tensor) -> Tensor:
            return torch.ones(1, 1001, dtype=torch.bfloat16)  # bf16 has 1000 and 1004, but no 1001

        def reconstruction_loss(self, code: Tensor, x: Tensor) -> Tensor:
            return torch.zeros(())

    model: Any = Ones()
    assert float(Sparse(weight=1.0).loss(model, torch.zeros(1, 1))["l1"]) == 1001


def training(
    facts: Facts, precision: Precision, network: Network = NETWORKS["dense"]
) -> tuple[list[PretrainSpec], FinetuneSpec]:
    """Specs of a stack's stages in one precision."""
    specs = layer_specs(network, Data(), facts)
    layers = [
        PretrainSpec(
            number=number, layer=layer, variant=Plain(), fit=Fit(epochs=2), seed=0,
            numerics=Numerics(precision=precision),
        )
        for number, layer in enumerate(specs, 1)
    ]  # fmt: skip
    tuned = FinetuneSpec(
        layers=tuple(specs), task="classify", classes=facts.classes, variant=None, fit=Fit(epochs=2), seed=0,
        numerics=Numerics(precision=precision),
    )  # fmt: skip
    return layers, tuned


def trained(digits: tuple[Facts, Arrays], precision: Precision, network: str = "dense") -> list[Result]:
    facts, arrays = digits
    layers, tuned = training(facts, precision, NETWORKS[network])
    results: list[Result] = []
    for spec in layers:
        results.append(pretrain_layer(spec, Context(), data=arrays, below=results))
    return [*results, finetune(tuned, Context(), data=arrays, layers=results)]


@pytest.mark.parametrize("network", ["dense", "conv"])
def test_results_name_their_precision_and_are_close(network: str, digits: tuple[Facts, Arrays]) -> None:
    stages = {precision: trained(digits, precision, network) for precision in PRECISIONS}
    for precision, results in stages.items():
        assert [result.config["precision"] for result in results] == [precision] * len(results)
    for one, two, three in zip(stages["fp32"], stages["bf16"], stages["tf32"], strict=True):
        losses = [result.config["history"][-1]["val/loss"] for result in (one, two, three)]
        assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] != losses[0]
        assert losses[2] == losses[0]
        assert all(np.array_equal(one.weights[name], three.weights[name]) for name in one.weights)
        assert all(two.weights[name].dtype == value.dtype for name, value in one.weights.items())


@pytest.mark.parametrize("resident", [True, False])
def test_frozen_layers_validation_and_reference_rows_compute_in_the_precision_of_the_fit(
    resident: bool, digits: tuple[Facts, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not resident:
        monkeypatch.setattr("aecore.stages.rows._RESIDENT_BYTES", 0)
        monkeypatch.setattr("aecore.stages.rows._PREPARED_BYTES", 0)
    seen: list[torch.dtype] = []
    linear = torch.nn.functional.linear

    def watched(*arguments: Any) -> Tensor:
        seen.append((out := linear(*arguments)).dtype)
        return out

    monkeypatch.setattr("aecore.models.layers.F.linear", watched)
    dtypes: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for precision, dtype in dtypes.items():
        seen.clear()
        trained(digits, precision)
        assert set(seen) == {dtype}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_and_convolutions_have_one_precision(precision: Precision) -> None:
    def settings() -> tuple[str, bool]:
        # torch raises where its older and newer names for these settings disagree
        assert torch.backends.cuda.matmul.allow_tf32 == (torch.get_float32_matmul_precision() != "highest")
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    cudnn: Any = torch.backends.cudnn  # its hints lack `conv`
    before, convolutions = settings(), cudnn.conv
    with numerics(precision, CPU) as autocast:
        assert settings() == (("high", True) if precision == "tf32" else ("highest", False))
        assert (convolutions.fp32_precision == "tf32") == (precision == "tf32")
        with autocast():
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
            assert precision != "bf16" or not torch.is_autocast_cache_enabled()
    assert settings() == before
