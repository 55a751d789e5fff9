"""Tests of the measures of a study, on models of which the numbers are known."""

import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

from aecore.config.experiment import Conv, Data, Dense, Experiment, Fit
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.config.specs import FinetuneSpec, MeasureSpec, Numerics, ReferenceSpec
from aecore.data.splits import Arrays
from aecore.evaluation.clusters import cluster_agreement
from aecore.evaluation.probes import labels_of, linear_probe, nearest
from aecore.evaluation.scoring import BySplit
from aecore.evaluation.threads import Threads, side_by_side
from aecore.evaluation.units import unit_activity
from aecore.models.layers import Layer
from aecore.models.spec import LayerSpec
from aecore.models.stack import Stack
from aecore.models.storage import Result
from aecore.stages.context import Context
from aecore.stages.finetune import few_labels, finetune
from aecore.stages.measure import measure
from aecore.stages.reference import reference
from aecore.variants import Denoising, Plain, Variational
from pipelines.graph.recipe import build
from tests.test_stages import CLASSES

measure_spec = partial(MeasureSpec, classes=CLASSES, labels=(100, 9999), seed=0, pictures=True)


def trained(arrays: Arrays, specs: list[LayerSpec], variant: Any, epochs: int = 15) -> Result:
    spec = FinetuneSpec(
        layers=(*specs[:-1], variant.build(specs[-1], len(specs))), task="reconstruct", classes=(), variant=variant,
        fit=Fit(epochs=epochs, lr=3e-3), seed=0, numerics=Numerics(),
    )  # fmt: skip
    return finetune(spec, Context(), data=arrays)


def classified(arrays: Arrays, stack: Result, labels: int | None) -> Result:
    layers = tuple(LayerSpec.model_validate({**layer, "stochastic": False}) for layer in stack.config["layers"])
    spec = FinetuneSpec(
        layers=layers, task="classify", classes=CLASSES, variant=None, fit=Fit(epochs=5, lr=3e-3), seed=0,
        numerics=Numerics(), labels=labels,
    )  # fmt: skip
    return finetune(spec, Context(), data=arrays, stack=stack)


def pca(arrays: Arrays, width: int) -> Result:
    layer = LayerSpec(
        kind="dense", in_shape=(1, 8, 8), code_shape=(width,), activation="linear", likelihood="gaussian",
        out_activation="linear", levels=0, dropout=0, normalization="none", tied=False,
    )  # fmt: skip
    return reference(ReferenceSpec(kind="pca", layers=(layer,), seed=0), Context(), data=arrays)


def test_pca_is_scikit_learns(digits: tuple[Facts, Arrays]) -> None:
    _, arrays = digits
    found = measure(measure_spec(variant=None), Context(), data=arrays, stack=pca(arrays, 10))
    x, test = (split.x.reshape(len(split.x), -1) / 16 for split in (arrays.train, arrays.test))
    theirs = PCA(10).fit(x)
    squares = np.square(test - theirs.inverse_transform(theirs.transform(test)))
    assert found.metrics["test/reconstruction_mse"] == pytest.approx(squares.mean(), rel=1e-4)
    assert np.allclose(found.weights["sse"], squares.sum(1), rtol=1e-3, atol=1e-5)
    assert found.metrics["test/unexplained"] == pytest.approx(
        squares.sum() / np.square(test - x.mean(0)).sum(), rel=1e-4
    )
    # PCA's axes are orthonormal, so the Jacobian of ten codes has ten rows of length 1
    assert found.metrics["contraction/norm"] == pytest.approx(np.sqrt(10), rel=1e-4)
    assert max(found.config["contraction"]["ratio"]) <= 1


def test_pca_of_full_width_is_exact(digits: tuple[Facts, Arrays]) -> None:
    _, arrays = digits
    spec = measure_spec(variant=None, pictures=False)
    found = measure(spec, Context(), data=arrays, stack=pca(arrays, 64))
    assert found.metrics["test/reconstruction_mse"] < 1e-6 and "map" not in found.weights


@pytest.fixture(scope="module")
def measured(digits: tuple[Facts, Arrays]) -> dict[str, Result]:
    facts, arrays = digits
    found = {}
    for name, variant in {"plain": Plain(), "denoising": Denoising(level=0.4), "variational": Variational()}.items():
        network = Dense(widths=(48, 12), code_activation="linear")
        stack = trained(arrays, layer_specs(network, Data(), facts), variant, epochs=40)
        classifiers = [classified(arrays, stack, count) for count in (100, None)]
        spec = measure_spec(variant=variant)
        found[name] = measure(spec, Context(), data=arrays, stack=stack, classifiers=classifiers, judge=classifiers[-1])
    return found


def test_every_variant_has_the_same_measures(measured: dict[str, Result]) -> None:
    names = {name: {m for m in r.metrics if not m.startswith(("vae/", "sample/"))} for name, r in measured.items()}
    assert names["plain"] == names["denoising"] == names["variational"]
    assert all(np.isfinite(list(result.metrics.values())).all() for result in measured.values())
    rows = {result.weights["sse"].shape for result in measured.values()}
    assert rows == {result.weights[f"correct/{n}"].shape for result in measured.values() for n in ("probe", "knn")}


@pytest.mark.parametrize("variant", [Denoising(level=0.2), Variational()])
def test_layers_that_were_only_pretrained_are_measured_and_classified(
    variant: Any, digits: tuple[Facts, Arrays]
) -> None:
    facts, arrays = digits
    network = Dense(widths=(48, 24), code_activation=variant.code_activation)
    experiment = Experiment(
        network=network, variant=variant, pretrain=Fit(epochs=15, batch_size=32, lr=3e-3), finetune=None, control=False
    )
    graph = build(experiment, facts, Numerics(), served=False)
    layers: tuple[Result, ...] = ()
    for stage in graph.layers:
        layers += (stage.function()(stage.spec, Context(), data=arrays, below=layers),)
    specs = tuple(LayerSpec.model_validate({**layer.config["layer"], "stochastic": False}) for layer in layers)
    spec = FinetuneSpec(
        layers=specs,
        task="classify",
        classes=CLASSES,
        variant=None,
        fit=Fit(epochs=15, batch_size=32),
        seed=0,
        numerics=Numerics(),
    )
    classifier = finetune(spec, Context(), data=arrays, layers=layers)
    found = measure(
        measure_spec(variant=variant, labels=(9999,)), Context(), data=arrays, layers=layers, classifiers=[classifier]
    )
    assert found.metrics["val/finetuned_accuracy"] == 1 - classifier.metrics["best/error"]
    assert found.metrics["test/unexplained"] < 0.9 and found.metrics["finetuned/accuracy"] > 0.8
    assert found.config["labels"]["counts"] == [1222] and len(found.config["history"]) == 15
    assert all(np.isfinite(value) for value in found.metrics.values())


def test_labels_help_and_the_last_point_is_all_of_them(measured: dict[str, Result]) -> None:
    for result in measured.values():
        curve = result.config["labels"]
        assert curve["counts"] == [100, 1222]
        assert curve["probe"][0] < curve["probe"][-1] == result.metrics["probe/accuracy"]
        assert curve["finetuned"][0] < curve["finetuned"][-1] == result.metrics["finetuned/accuracy"]


def test_noise_hurts_and_denoising_restores_better(measured: dict[str, Result]) -> None:
    for result in measured.values():
        for curve in result.config["robustness"].values():
            assert curve["levels"][0] == 0 and curve["mse"][-1] > curve["mse"][0]
            assert curve["mse"][0] == pytest.approx(result.metrics["test/reconstruction_mse"])
            assert curve["accuracy"][0] == result.metrics["probe/accuracy"] > curve["accuracy"][-1]
    plain, denoising = (measured[name].config["robustness"]["masking"]["mse"] for name in ("plain", "denoising"))
    assert denoising[-1] < plain[-1]


def test_the_noise_is_the_same_for_all(measured: dict[str, Result]) -> None:
    assert np.array_equal(measured["plain"].weights["corrupted"], measured["variational"].weights["corrupted"])
    assert not np.array_equal(measured["plain"].weights["restored"], measured["variational"].weights["restored"])


def test_what_only_a_variational_one_has(measured: dict[str, Result]) -> None:
    found = measured["variational"].metrics
    assert found["vae/bound"] == pytest.approx(-found["vae/reconstruction"] - found["vae/kl"])
    assert found["vae/kl"] > 1 and 1 <= found["vae/active_units"] <= 12
    assert found["sample/frechet"] > found["sample/frechet_floor"] > 0
    assert measured["variational"].weights["samples"].shape == (100, 1, 8, 8)
    assert "vae/bound" not in measured["plain"].metrics and "samples" not in measured["plain"].weights


@pytest.mark.parametrize("kind", ["conv", "unlabelled vectors"])
def test_other_data_and_networks_are_measured_too(kind: str, digits: tuple[Facts, Arrays], vectors: Arrays) -> None:
    if kind == "conv":
        facts, arrays = digits
        network: Any = Conv(widths=(4,), dense=(2,))
        spec = measure_spec(variant=Variational())
    else:
        facts = Facts(digest="d", shape=(8,), levels=0, classes=(), rows=600)
        splits = {name: getattr(vectors, name)._replace(y=None) for name in ("train", "validation", "test")}
        arrays, network = vectors._replace(**splits), Dense(widths=(4,))
        spec = MeasureSpec(variant=Variational(), classes=(), labels=(), seed=0, pictures=True)
    stack = trained(arrays, layer_specs(network, Data(), facts), Variational(), epochs=2)
    found = measure(spec, Context(), data=arrays, stack=stack)
    assert np.isfinite(list(found.metrics.values())).all()
    assert ("probe/accuracy" in found.metrics) == (kind == "conv") == ("manifold" in found.weights)
    assert "vae/bound" in found.metrics and ("vae/iw_bound" in found.metrics) == (kind == "conv")


def test_few_labels_make_as_many_steps_as_many(digits: tuple[Facts, Arrays]) -> None:
    _, arrays = digits
    few = few_labels(arrays, 100, seed=0, least=640)
    assert len(few.train.x) == 600 and len(np.unique(few.train.x, axis=0)) == 100
    assert few.train.y is not None and np.bincount(few.train.y).tolist() == [60] * 10
    other = few_labels(arrays, 100, seed=1, least=640)
    assert not np.array_equal(few.train.x, other.train.x)
    assert len(few_labels(arrays, 10_000, seed=0, least=640).train.x) == len(arrays.train.x)


def test_classifying_starts_from_the_stack(digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = digits
    stack = trained(arrays, layer_specs(Dense(widths=(24, 6)), Data(), facts), Plain(), epochs=1)
    layers = tuple(LayerSpec.model_validate(layer) for layer in stack.config["layers"])
    spec = FinetuneSpec(
        layers=layers, task="classify", classes=CLASSES, variant=None, fit=Fit(epochs=1, lr=1e-30), seed=0,
        numerics=Numerics(),
    )  # fmt: skip
    tuned = finetune(spec, Context(), data=arrays, stack=stack)
    for number in range(2):
        before = stack.weights[f"layers.{number}.encoder.affine.weight"]
        assert np.array_equal(tuned.weights[f"encoders.{number}.affine.weight"], before)


def test_dead_and_saturated_units_are_counted() -> None:
    layer = LayerSpec(
        kind="dense", in_shape=(4,), code_shape=(4,), activation="sigmoid", likelihood="gaussian",
        out_activation="linear", levels=0, dropout=0, normalization="none", tied=False,
    )  # fmt: skip
    net = Stack([Layer(layer)])
    codes = np.tile([[0.01, 0.5, 0.2, 0.99], [0.02, 0.5, 0.8, 0.5]], (10, 1))
    found = unit_activity(net, codes)
    assert found["units/dead"] == 0.25 and found["units/saturated"] == pytest.approx(3 / 8)
    assert found["units/mean_activation"] == pytest.approx(codes.mean())


IMPORTS_IN_THREADS = """
import sys, threading, torch

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("scipy", "sklearn") and threading.current_thread() is not threading.main_thread():
            print(name)

sys.meta_path.insert(0, Watch())
from aecore.stages.context import Context
from aecore.stages.evaluate import evaluate
from aecore.stages.pretrain import pretrain_layer
from aecore.config.experiment import Dense, Experiment, Finetune, Fit
from aecore.data.dataset import inspect, load
from aecore.config.resolve import resolve
from aecore.config.specs import Numerics
from aecore.config.specs import MeasureSpec
from aecore.stages.measure import measure
from pipelines.graph.recipe import build

torch.set_num_threads(3)
experiment = Experiment(network=Dense(widths=(4,)), pretrain=Fit(epochs=1), finetune=Finetune(epochs=1))
facts = inspect(experiment.data)
experiment = resolve(experiment, facts)
arrays = load(experiment.data, facts)
specs = {stage.name: stage.spec for stage in build(experiment, facts, Numerics()).kept()}
layer = pretrain_layer(specs["layer 1"], Context(), data=arrays)
found = evaluate(specs["evaluate"], Context(), data=arrays, layers=[layer])
print(*sorted(found.figures), "probe/accuracy" in found.metrics)
spec = MeasureSpec(variant=experiment.variant, classes=facts.classes, labels=(100,), seed=0, pictures=False)
print("cluster/nmi" in measure(spec, Context(), data=arrays, layers=[layer]).metrics)
"""


def test_no_two_threads_import_scikit_learn() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTS_IN_THREADS], capture_output=True, text=True, check=True
    )
    assert done.stdout == "codes loss_curves reconstructions units True\nTrue\n"


def test_threads_read_the_same_out_of_codes(digits: tuple[Facts, Arrays]) -> None:
    _, arrays = digits
    codes = BySplit(*(split.x.reshape(len(split.x), -1).astype(np.float32) for split in arrays[:3]))
    labels = labels_of(arrays)
    assert labels is not None
    train, test = (codes.train, labels.train), (codes.test, labels.test)

    def read(threads: Threads) -> list[Any]:
        probe = linear_probe(threads, train, (codes.validation, labels.validation))
        neighbours = nearest(threads, train, np.tile(codes.test, (9, 1)))  # so many that they are cut into parts
        clusters = threads.start(cluster_agreement, codes.train, test, 10)
        models = [(score, model.coef_.tolist()) for score, model in (fitted() for fitted in probe.candidates)]
        return [models, probe.predict(codes.test).tolist(), neighbours().tolist(), clusters()]

    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with side_by_side("sklearn.cluster") as threads:
                found.append(read(threads))
    finally:
        torch.set_num_threads(1)
    assert found[0] == found[1]
    theirs = KNeighborsClassifier(5).fit(*train).predict(codes.test)
    assert np.array_equal(found[0][2], np.tile(theirs, 9))


def test_a_failure_in_a_thread_is_told() -> None:
    try:
        torch.set_num_threads(2)
        with side_by_side() as threads:
            failure = threads.start(int, "no number")
            with pytest.raises(ValueError, match="no number"):
                failure()
    finally:
        torch.set_num_threads(1)
