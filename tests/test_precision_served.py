"""Trained models are measured and served in the precision of their training."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from aecore.config.experiment import Conv, Data, Dense
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.config.specs import ContestSpec, EvaluateSpec, MeasureSpec
from aecore.core.types import Precision
from aecore.data.splits import Arrays
from aecore.evaluation.scoring import build_trained
from aecore.models.autoencoder import Batch
from aecore.models.layers import Encoder
from aecore.models.storage import Result
from aecore.serving.model import Model
from aecore.stages.contest import contest
from aecore.stages.context import CPU, Context
from aecore.stages.evaluate import evaluate
from aecore.stages.finetune import finetune
from aecore.stages.measure import measure
from aecore.variants import Variational
from tests.test_stages import CLASSES, pretrain, tuning


def of(precision: Precision, result: Result) -> Result:
    """Return the result as if its model had been trained in this precision."""
    return replace(result, config={**result.config, "precision": precision})


@pytest.fixture(scope="module", params=["dense", "conv"])
def models(request: pytest.FixtureRequest, digits: tuple[Facts, Arrays]) -> dict[str, Result]:
    facts, arrays = digits
    network: Any = Dense(widths=(24, 6)) if request.param == "dense" else Conv(widths=(4,), dense=(6,))
    specs = layer_specs(network, Data(), facts)
    layers = pretrain(arrays, specs, Variational(), epochs=5)
    unrolled = tuning([*specs[:-1], Variational().build(specs[-1], len(specs))], "reconstruct", epochs=10)
    unrolled = unrolled.model_copy(update={"variant": Variational()})
    return {
        "classifier": finetune(tuning(specs, epochs=10), Context(), data=arrays, layers=layers),
        "autoencoder": finetune(unrolled, Context(), data=arrays, layers=layers),
    }


def assert_near_but_not_equal(exact: np.ndarray, rounded: np.ndarray) -> None:
    assert exact.dtype == rounded.dtype == np.float32
    assert np.isfinite(rounded).all() and not np.array_equal(exact, rounded)
    assert np.abs(rounded - exact).max() < 0.05 * max(1.0, np.abs(exact).max())


def test_what_is_served(models: dict[str, Result], digits: tuple[Facts, Arrays]) -> None:
    rows = digits[1].test.x
    for result in models.values():
        columns, exact, rounded = (
            Model(one, CPU).measure(rows) for one in (result, of("fp32", result), of("bf16", result))
        )
        assert all(np.array_equal(columns[name], exact[name]) for name in columns)
        for name in set(exact) & {"code", "probability", "reconstruction_mse"}:
            assert_near_but_not_equal(exact[name], rounded[name])
    autoencoder, in_bf16 = models["autoencoder"], Model(of("bf16", models["autoencoder"]), CPU)
    model = Model(autoencoder, CPU)
    codes = model.measure(rows)["code"]
    assert_near_but_not_equal(model.decode(codes), in_bf16.decode(codes))
    assert_near_but_not_equal(model.sample(20), in_bf16.sample(20))


def test_what_is_evaluated_and_measured(models: dict[str, Result], digits: tuple[Facts, Arrays]) -> None:
    arrays = digits[1]
    arrays = arrays._replace(test=arrays.test.take(np.arange(60)))
    classifier, stack = models["classifier"], models["autoencoder"]
    measured = MeasureSpec(variant=Variational(), classes=CLASSES, labels=(9999,), seed=0, pictures=True)
    scored = EvaluateSpec(task="classify", classes=CLASSES, pictures=False)
    unrolled = EvaluateSpec(task="reconstruct", classes=CLASSES, pictures=True, variant=Variational())

    def results(precision: Precision) -> tuple[Result, ...]:
        own, judge = of(precision, stack), of(precision, classifier)
        return (
            measure(measured, Context(), data=arrays, stack=own, classifiers=[judge], judge=judge),
            evaluate(scored, Context(), data=arrays, finetuned=judge),
            evaluate(unrolled, Context(), data=arrays, finetuned=own),
        )

    for exact, rounded in zip(results("fp32"), results("bf16"), strict=True):
        assert exact.metrics.keys() == rounded.metrics.keys() and exact.figures.keys() == rounded.figures.keys()
        for name, value in exact.metrics.items():
            unstable = name.startswith("cluster/")  # k-means may end elsewhere
            assert rounded.metrics[name] == pytest.approx(value, rel=0.1, abs=1 if unstable else 0.05), name
        for name, values in exact.weights.items():
            assert rounded.weights[name].dtype == values.dtype
            if name in ("reconstructed", "restored", "codes", "map", "samples", "sse"):
                assert values.dtype == np.float32 and not np.array_equal(values, rounded.weights[name])
        for name in ("test/reconstruction_mse", "vae/bound", "vae/iw_bound"):
            assert name not in exact.metrics or rounded.metrics[name] != exact.metrics[name]
        if "contraction/norm" in exact.metrics:  # a derivative, which would be mostly rounding
            assert rounded.metrics["contraction/norm"] == exact.metrics["contraction/norm"]
            assert rounded.config["contraction"] == exact.config["contraction"]


def test_a_contest_of_precisions(models: dict[str, Result], digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = digits
    spec = ContestSpec(metric="reconstruction", facts=facts, split="random", test=0.2)
    champion, challenger = models["autoencoder"], of("bf16", models["autoencoder"])
    scores = contest(spec, Context(), data=arrays, champion=champion, challenger=challenger).metrics
    assert 0 < abs(scores["difference"]) < 0.05


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_torch_is_told_the_precision_and_then_has_its_own_again(
    precision: Precision, models: dict[str, Result], digits: tuple[Facts, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings() -> tuple[str, bool, bool]:
        autocast = torch.is_autocast_enabled("cpu")
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, autocast

    seen: set[tuple[str, bool, bool]] = set()
    forward = Encoder.forward

    def recording(self: Encoder, x: Batch) -> Batch:
        seen.add(settings())
        return forward(self, x)

    monkeypatch.setattr(Encoder, "forward", recording)
    before, rows = settings(), digits[1].test.x[:5]
    for result in models.values():
        Model(of(precision, result), CPU).measure(rows)
    build_trained(of(precision, models["autoencoder"]), (), CPU).reconstruct(torch.rand(5, 1, 8, 8))
    tf32 = precision == "tf32"
    assert seen == {("high" if tf32 else "highest", tf32, precision == "bf16")}
    assert settings() == before
