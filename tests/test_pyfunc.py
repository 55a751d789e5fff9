"""The model that is served: its columns, and the reference that new data are compared with."""

from typing import Any

import numpy as np
import pytest
import torch

from aecore.config.experiment import Data, Dense
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.config.specs import EvaluateSpec
from aecore.data.splits import Arrays, Split
from aecore.models.rebuild import build_autoencoder, build_layer, build_stack
from aecore.models.stack import Stack
from aecore.models.storage import Result
from aecore.serving.model import Model
from aecore.stages.context import Context
from aecore.stages.evaluate import evaluate
from aecore.stages.finetune import finetune, reference_rows
from aecore.stages.rows import preprocessing
from aecore.variants import Variational
from tests.test_stages import pretrain, tuning

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(digits: tuple[Facts, Arrays]) -> dict[str, Any]:
    facts, arrays = digits
    specs = layer_specs(Dense(widths=(24, 12)), Data(), facts)
    layers = pretrain(arrays, specs, Variational(), epochs=2)
    run = Context()
    return {
        "layers": layers,
        "classify": finetune(tuning(specs), run, data=arrays, layers=layers),
        "reconstruct": finetune(tuning(specs, "reconstruct", epochs=20), run, data=arrays),
        "bare": finetune(tuning(specs), run, data=arrays),
        "unserved": finetune(tuning(specs).model_copy(update={"served": False}), run, data=arrays, layers=layers),
    }


def columns(result: Result) -> set[str]:
    return {name.removeprefix("reference.") for name in result.weights if name.startswith("reference.")}


def test_a_classifier_keeps_the_autoencoder_that_it_was_finetuned_from(
    trained: dict[str, Any], digits: tuple[Facts, Arrays]
) -> None:
    facts, arrays = digits
    result = trained["classify"]
    before, kept = Stack([build_layer(layer) for layer in trained["layers"]]), build_autoencoder(result)
    assert kept is not None and result.config["autoencoder"] == [layer.spec.model_dump(mode="json") for layer in before]
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in before.state_dict().items())
    # the error of serving is the error of the report
    spec = EvaluateSpec(task="classify", classes=facts.classes, pictures=False)
    scores = evaluate(
        spec, Context(), data=arrays, layers=trained["layers"], finetuned=result
    ).metrics  # fmt: skip
    table = Model(result).measure(arrays.test.x)
    assert table["reconstruction_mse"].mean() == pytest.approx(scores["test/reconstruction_mse"], rel=1e-5)
    right = table["prediction"] == np.array(facts.classes)[arrays.test.y]
    assert right.mean() == pytest.approx(scores["test/accuracy"])


def test_an_autoencoder_is_its_own(trained: dict[str, Any], digits: tuple[Facts, Arrays]) -> None:
    _, arrays = digits
    result = trained["reconstruct"]
    assert result.config["autoencoder"] is None and not any(name.startswith("autoencoder.") for name in result.weights)
    stack, own = build_stack(result).eval(), build_autoencoder(result)
    assert own is not None
    x = torch.tensor(arrays.test.x).float() / 16
    with torch.no_grad():
        expected = (stack.reconstruct(x) - x).square().flatten(1).mean(1).numpy()
    table = Model(result).predict(arrays.test.x)
    assert list(table.columns) == ["code", "reconstruction_mse", "anomaly_score"]
    assert np.allclose(table.reconstruction_mse, expected, atol=1e-6)


def test_the_reference_is_of_validation_rows(trained: dict[str, Any], digits: tuple[Facts, Arrays]) -> None:
    _, arrays = digits
    x, y = arrays.validation
    assert y is not None
    for name in ("classify", "reconstruct", "bare"):
        result = trained[name]
        table, kept = Model(result).measure(x), result.weights
        assert np.allclose(kept["reference.code"], table["code"], atol=1e-6)
        assert kept["reference.code"].dtype == np.float32 and kept["reference.code"].shape == (len(x), 12)
        assert np.array_equal(kept["reference.label"], y) and kept["reference.label"].dtype == np.int64
        flat = (x / 16).reshape(len(x), -1)
        assert np.allclose(kept["reference.mean"], flat.mean(0), atol=1e-6)
        assert np.allclose(kept["reference.std"], flat.std(0), atol=1e-6)
        if name == "bare":  # nothing was pretrained: there is nothing that reconstructs
            assert set(table) == {"code", "prediction", "probability"} and "error" not in columns(result)
            continue
        assert np.allclose(kept["reference.error"], table["reconstruction_mse"], atol=1e-7)
        assert table["anomaly_score"].max() == 100 and table["anomaly_score"].min() > 0
        assert np.corrcoef(table["anomaly_score"], table["reconstruction_mse"])[0, 1] > 0.8


def test_noise_is_an_anomaly(trained: dict[str, Any], digits: tuple[Facts, Arrays]) -> None:
    noise = np.random.default_rng(0).integers(0, 17, (50, 1, 8, 8), dtype=np.uint8)
    assert (Model(trained["reconstruct"]).measure(noise)["anomaly_score"] == 100).all()


def test_a_large_validation_split_is_sampled_and_labels_may_lack(
    trained: dict[str, Any], digits: tuple[Facts, Arrays]
) -> None:
    _, arrays = digits
    many = Split(np.repeat(arrays.train.x, 3, 0), None)
    stack = build_stack(trained["reconstruct"])
    reference = reference_rows(stack, stack, preprocessing(arrays, CPU), many)
    assert set(reference) == {"mean", "std", "code", "error"}
    assert len(reference["error"]) == len(reference["code"]) == 2000


def test_what_is_not_served_pays_for_no_reference(trained: dict[str, Any]) -> None:
    result = trained["unserved"]
    assert result.example is None and not columns(result) and result.config["autoencoder"] is None
    assert all(np.array_equal(value, trained["classify"].weights[name]) for name, value in result.weights.items())


def test_any_number_of_rows(trained: dict[str, Any], digits: tuple[Facts, Arrays]) -> None:
    model, x = Model(trained["classify"]), digits[1].train.x
    whole, model.batch = model.measure(x), 100
    parts = model.measure(x)
    for name, values in whole.items():
        same = np.array_equal if name == "prediction" else np.allclose
        assert same(values, parts[name]) and len(values) == len(x)
    assert len(model.predict(x[:0])) == 0
