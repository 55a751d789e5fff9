"""Stages as a whole: the table of variants x problems, and what pretraining hands on."""

import re
import weakref
from typing import Any, get_args

import numpy as np
import pytest
import torch

from aecore.config.experiment import Conv, Data, Dense, Fit
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.config.specs import EvaluateSpec, FinetuneSpec, Numerics, PretrainSpec
from aecore.core.types import Precision
from aecore.data.splits import Arrays
from aecore.data.stream import Shuffled
from aecore.models.rebuild import build_layer, build_stack
from aecore.models.spec import LayerSpec
from aecore.models.stack import Stack
from aecore.models.storage import Result
from aecore.stages.context import CPU, Context
from aecore.stages.evaluate import evaluate
from aecore.stages.finetune import finetune
from aecore.stages.pretrain import pretrain_layer
from aecore.stages.rows import preprocessing, resident_bytes, training_rows
from aecore.training.memory import free_memory
from aecore.training.numerics import numerics
from aecore.training.objective import Objective
from aecore.variants import Plain, Variant

VARIANTS = get_args(get_args(Variant)[0])
CLASSES = tuple("0123456789")


def pretrain(arrays: Arrays, specs: list[LayerSpec], variant: Any, epochs: int = 3, seed: int = 0) -> list[Result]:
    layers: list[Result] = []
    for number, layer in enumerate(specs, 1):
        spec = PretrainSpec(
            number=number,
            layer=variant.build(layer, number),
            variant=variant,
            fit=Fit(epochs=epochs),
            seed=seed,
            numerics=Numerics(),
        )
        layers.append(pretrain_layer(spec, Context(), data=arrays, below=layers))
    return layers


def tuning(specs: list[LayerSpec], task: str = "classify", **fit: Any) -> FinetuneSpec:
    return FinetuneSpec.model_validate(
        {
            "layers": specs, "task": task, "classes": CLASSES if task == "classify" else (), "seed": 0,
            "variant": None if task == "classify" else VARIANTS[0](), "fit": {"epochs": 2, **fit}, "numerics": {},
        }
    )  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.__name__)
def test_every_variant_says_where_it_comes_from(variant: Any) -> None:
    assert re.search(r"\d{4}", variant.paper) and variant.__doc__ and variant.__module__.endswith(variant().kind)


PROBLEMS: dict[str, tuple[Dense | Conv, str]] = {
    "relu": (Dense(widths=(24, 12), activation="relu"), "bernoulli"),
    "sigmoid": (Dense(widths=(24, 12), activation="sigmoid"), "bernoulli"),
    "tanh gaussian": (Dense(widths=(24, 12), activation="tanh"), "gaussian"),
    "categorical": (Dense(widths=(24,)), "categorical"),
    "conv": (Conv(widths=(4, 6), dense=(8,)), "bernoulli"),
}


def problem_layers(problem: str, facts: Facts) -> list[LayerSpec]:
    network, likelihood = PROBLEMS[problem]
    return layer_specs(network, Data.model_validate({"likelihood": likelihood}), facts)


def has_learned(result: Result) -> bool:
    history = result.config["history"]
    finite = all(np.isfinite(list(epoch.values())).all() for epoch in history)
    return finite and history[-1]["train/loss"] < history[0]["train/loss"]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.__name__)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_variants_on_problems(problem: str, variant: Any, digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = digits
    specs = problem_layers(problem, facts)
    epochs, steps = (4 if problem == "categorical" else 11), len(arrays.train.x) // 64
    layers = pretrain(arrays, specs, variant(), epochs=epochs)
    for result in layers:
        assert len(result.config["history"]) * steps >= 200 or problem == "categorical"
        assert has_learned(result)
    again = pretrain(arrays, specs, variant(), epochs=epochs)
    for one, two in zip(layers, again, strict=True):
        assert all(np.array_equal(one.weights[name], two.weights[name]) for name in one.weights)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.__name__)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_variants_end_to_end(problem: str, variant: Any, digits: tuple[Facts, Arrays]) -> None:
    """All layers at once from random weights, and unrolled from pretrained ones: lower codes are codes, no more."""
    facts, arrays = digits
    specs = problem_layers(problem, facts)
    layers = pretrain(arrays, specs, variant(), epochs=1)
    tuned = tuning([*specs[:-1], variant().build(specs[-1], len(specs))], "reconstruct", epochs=3)
    tuned = tuned.model_copy(update={"variant": variant()})
    for given in ([], layers):
        result = finetune(tuned, Context(), data=arrays, layers=given)
        assert has_learned(result)
        stack = build_stack(result)
        assert [layer.log_variance is not None for layer in stack] == [False] * (len(specs) - 1) + [
            variant().kind == "variational"
        ]


def test_finetuning_starts_from_exactly_the_pretrained_weights(digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = digits
    specs = layer_specs(Dense(widths=(24, 12)), Data(), facts)
    layers = pretrain(arrays, specs, VARIANTS[0]())
    still: dict[str, Any] = {"lr": 1e-30, "epochs": 1}
    tuned = finetune(tuning(specs, **still), Context(), data=arrays, layers=layers)
    control = finetune(tuning(specs, **still), Context(), data=arrays)
    for number, layer in enumerate(layers):
        weight = f"encoders.{number}.affine.weight"
        assert np.array_equal(tuned.weights[weight], layer.weights["encoder.affine.weight"])
        assert not np.array_equal(control.weights[weight], layer.weights["encoder.affine.weight"])
    # the control differs in its encoders alone
    assert np.array_equal(tuned.weights["head.weight"], control.weights["head.weight"])
    unrolled = finetune(tuning(specs, "reconstruct", **still), Context(), data=arrays, layers=layers)
    for number, layer in enumerate(layers):
        for name, value in layer.weights.items():
            assert np.array_equal(unrolled.weights[f"layers.{number}.{name}"], value)


def test_finetuning_frees_all_weights(digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = digits
    specs = layer_specs(Dense(widths=(24, 12)), Data(), facts)
    layers = pretrain(arrays, specs, VARIANTS[0]())
    tuned = finetune(tuning(specs), Context(), data=arrays, layers=layers)
    for number, layer in enumerate(layers):
        moved = tuned.weights[f"encoders.{number}.affine.weight"] - layer.weights["encoder.affine.weight"]
        assert np.abs(moved).max() > 0


def test_upper_layers_are_fed_clean_codes_of_frozen_lower_ones(digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = digits
    specs = layer_specs(Dense(widths=(24, 12), dropout=0.5), Data(), facts)
    lower = pretrain(arrays, specs[:1], VARIANTS[0]())
    seen: list[torch.Tensor] = []

    class Spy(Plain):
        def loss(self, model: Any, x: torch.Tensor) -> Any:
            seen.append(x.detach())
            return super().loss(model, x)

    spec = PretrainSpec.model_construct(
        number=2, layer=specs[1], variant=Spy(), fit=Fit(epochs=1, batch_size=2000), seed=0, numerics=Numerics()
    )
    pretrain_layer(spec, Context(), data=arrays, below=lower)
    layer = build_layer(lower[0]).eval()
    codes = layer.encode(torch.tensor(arrays.train.x).float() / 16).detach()
    assert torch.allclose(seen[0].sum(), codes.sum(), rtol=1e-4) and seen[0].shape == codes.shape


def test_evaluation_names_its_numbers(digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = digits
    specs = layer_specs(Dense(widths=(24, 12)), Data(), facts)
    layers = pretrain(arrays, specs, VARIANTS[0](), epochs=10)
    tuned = finetune(tuning(specs, epochs=30), Context(), data=arrays, layers=layers)
    spec = EvaluateSpec(task="classify", classes=facts.classes, pictures=True)
    result = evaluate(spec, Context(), data=arrays, layers=layers, finetuned=tuned)
    found = result.metrics
    assert found["test/accuracy"] == pytest.approx(1 - found["test/error"])
    assert found["test/accuracy_low"] < found["test/accuracy"] < found["test/accuracy_high"]
    assert found["test/accuracy"] > 0.8 and found["knn/accuracy"] > 0.5 and found["probe/accuracy"] > 0.5
    assert set(result.figures) == {"confusion", "reconstructions", "units", "codes", "loss_curves"}
    stack = Stack([build_layer(layer) for layer in layers]).eval()
    x = torch.tensor(arrays.test.x).float() / 16
    with torch.no_grad():
        assert found["test/reconstruction_mse"] == pytest.approx(float((stack.reconstruct(x) - x).square().mean()))


def test_reconstruction_without_labels(digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = digits
    bare = arrays._replace(**{
        name: getattr(arrays, name)._replace(y=None) for name in ("train", "validation", "test")
    })  # fmt: skip
    specs = layer_specs(Dense(widths=(24, 12)), Data(), facts)
    layers = pretrain(bare, specs, VARIANTS[0]())
    tuned = finetune(tuning(specs, "reconstruct", epochs=20), Context(), data=bare, layers=layers)
    spec = EvaluateSpec(task="reconstruct", classes=(), pictures=True)
    unrolled = evaluate(spec, Context(), data=bare, layers=layers, finetuned=tuned)
    before = evaluate(spec.model_copy(update={"task": None}), Context(), data=bare, layers=layers)
    assert unrolled.metrics["test/reconstruction_mse"] < before.metrics["test/reconstruction_mse"]
    assert "probe/accuracy" not in unrolled.metrics and "confusion" not in unrolled.figures


def test_a_large_set_stays_as_it_came_and_gives_the_same_numbers(
    digits: tuple[Facts, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, arrays = digits
    specs = layer_specs(Dense(widths=(24, 12)), Data(), facts)
    resident = pretrain(arrays, specs, VARIANTS[0]())
    monkeypatch.setattr("aecore.stages.rows._RESIDENT_BYTES", 0)
    monkeypatch.setattr("aecore.stages.rows._PREPARED_BYTES", 0)
    train, _, read = training_rows(arrays, preprocessing(arrays, CPU), Context(), 64, False, "fp32")
    assert not isinstance(train, Shuffled) and train[0].dtype == torch.uint8
    assert float(read(train[0]).max()) == 1.0
    for one, two in zip(resident, pretrain(arrays, specs, VARIANTS[0]()), strict=True):
        # products of batches of another size may round otherwise
        assert all(np.allclose(one.weights[name], two.weights[name], atol=1e-5) for name in one.weights)


def test_rows_that_several_stages_read_are_prepared_once_and_let_go(digits: tuple[Facts, Arrays]) -> None:
    _, arrays = digits

    def floats(data: Arrays) -> torch.Tensor:
        train = training_rows(data, preprocessing(data, CPU), Context(), 64, False, "fp32").train
        assert not isinstance(train, Shuffled)
        return train[0]

    first = floats(arrays)
    assert floats(arrays) is first
    assert torch.equal(floats(arrays._replace(scale=arrays.scale * 2)), 2 * first)
    copied = arrays._replace(train=arrays.train._replace(x=arrays.train.x.copy()))
    assert floats(copied) is not first and torch.equal(floats(copied), first)
    held = weakref.ref(first)
    del first
    assert held() is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_codes_that_are_computed_once_have_the_numbers_of_a_step(
    precision: Precision, digits: tuple[Facts, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, arrays = digits
    layer = pretrain(arrays, layer_specs(Dense(widths=(24, 12)), Data(), facts)[:1], VARIANTS[0]())[0]
    read = torch.nn.Sequential(preprocessing(arrays, CPU), build_layer(layer).encoder).requires_grad_(False)
    once = training_rows(arrays, read, Context(), 24, False, precision).train
    monkeypatch.setattr("aecore.stages.rows._RESIDENT_BYTES", 0)
    rows = training_rows(arrays, read, Context(), 24, False, precision)
    assert not isinstance(rows.train, Shuffled) and not isinstance(once, Shuffled)
    with numerics(precision, CPU) as autocast, autocast():
        codes = Objective(build_layer(layer), rows.read, Plain()).inputs(rows.train[0])
    assert codes.dtype == once[0].dtype == torch.float32 and torch.equal(codes, once[0])
    exact = read(torch.tensor(arrays.train.x))
    assert torch.equal(exact, once[0]) == (precision == "fp32")


def test_a_gpu_holds_what_half_of_its_free_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aecore.stages.rows.free_memory", lambda device, share: share * 60 * 2**30)
    prepare = torch.nn.Identity()
    assert resident_bytes(torch.device("cuda"), prepare) == 30 * 2**30
    assert resident_bytes(torch.device("cuda"), prepare, 0.5) == 15 * 2**30
    assert resident_bytes(CPU, prepare) == 2**26


@pytest.mark.parametrize(("share", "free"), [(1.0, 55), (0.5, 30), (0.1, 0)])
def test_a_process_plans_with_its_share_of_a_gpu(share: float, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up GPU has 80 bytes: 45 are free, other processes hold 15, and this process holds 20, of which 10 are
    in use and 10 in reserve."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (45, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    assert free_memory(torch.device("cuda"), share) == free
