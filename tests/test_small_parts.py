"""Tests of storage, of measures with known answers, and of the figures of one model."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from aecore.evaluation.clusters import cluster_agreement
from aecore.evaluation.figures import model as figures
from aecore.evaluation.figures.look import legible, plane
from aecore.evaluation.generative import frechet
from aecore.evaluation.probes import accuracy_interval, confusion, linear_probe, nearest
from aecore.evaluation.scoring import over_batches
from aecore.evaluation.threads import side_by_side
from aecore.models.storage import load_weights, save_weights

RNG = np.random.default_rng(0)


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    weights: dict[str, np.ndarray] = {
        "a": RNG.normal(size=(3, 4)).astype(np.float32),
        "b": np.arange(3),
        "c": np.zeros((), np.float32),
    }
    save_weights(tmp_path, {"x": [1, None]}, weights)
    config, again = load_weights(tmp_path)
    assert config == {"x": [1, None]}
    assert all(
        np.array_equal(weights[name], again[name]) and weights[name].dtype == again[name].dtype for name in weights
    )


def test_transposed_weights_are_saved_as_they_read(tmp_path: Path) -> None:
    weight = np.arange(6.0).reshape(2, 3).T
    save_weights(tmp_path, {}, {"w": weight})
    assert np.array_equal(load_weights(tmp_path)[1]["w"], weight)


def test_altered_weights_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path, {}, {"a": np.zeros(5)})
    file = tmp_path / "weights.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="checksum"):
        load_weights(tmp_path)


def test_any_altered_or_missing_byte_is_noticed(tmp_path: Path) -> None:
    save_weights(tmp_path, {"history": [1e-3, None], "name": "é", "n": {"a": float("inf")}}, {"a": np.arange(2.0)})
    config, _ = load_weights(tmp_path)
    assert config == {"history": [1e-3, None], "name": "é", "n": {"a": float("inf")}}
    for file in sorted(tmp_path.iterdir()):
        raw = file.read_bytes()
        damaged = [raw[:length] for length in range(len(raw))] + [raw + b"\n", raw.replace(b"\n", b"\r\n") + b" "]
        for place in range(len(raw)):
            damaged += [raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :] for bit in (1, 32)]
        for data in damaged:
            file.write_bytes(data)
            with pytest.raises(ValueError):
                load_weights(tmp_path)
        file.write_bytes(raw)


def test_config_is_readable_json(tmp_path: Path) -> None:
    save_weights(tmp_path, {"layer": {"width": 3}}, {})
    assert json.loads((tmp_path / "config.json").read_text())["layer"] == {"width": 3}


def separable(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rows)
    return (np.eye(3)[labels] * 4 + rng.normal(size=(rows, 3))).astype(np.float32) * [1, 100, 0.01], labels


def test_probe_and_neighbours_on_known_clusters() -> None:
    train, validation, test = separable(600, 0), separable(200, 1), separable(500, 2)
    # of three unit normals, 4 sqrt 2 apart, the best classifier gets about 99.5 % right
    with side_by_side() as threads:
        probe = linear_probe(threads, train, validation)
        assert probe.accuracy(test) == (probe.predict(test[0]) == test[1]).mean() > 0.98
        scaled = (train[0] / [1, 100, 0.01], train[1])
        assert (nearest(threads, scaled, test[0] / [1, 100, 0.01])() == test[1]).mean() > 0.98
    noise = RNG.permutation(test[1])
    assert (probe.predict(test[0]) == noise).mean() == pytest.approx(1 / 3, abs=0.08)


def test_clusters_are_scored_up_to_their_names() -> None:
    train, _, test = separable(600, 0), separable(200, 1), separable(500, 2)
    found = cluster_agreement(train[0] / [1, 100, 0.01], (test[0] / [1, 100, 0.01], test[1]), 3)
    assert found["accuracy"] > 0.98 and found["nmi"] > 0.9 and found["ari"] > 0.9
    chance = cluster_agreement(train[0], (test[0], RNG.permutation(test[1])), 3)
    assert chance["nmi"] < 0.05 and abs(chance["ari"]) < 0.05 and chance["accuracy"] < 0.5


def test_frechet_distance_of_known_gaussians() -> None:
    a, b = RNG.normal(size=(200_000, 2)), RNG.normal(size=(200_000, 2)) * [2, 3] + [1, 0]
    # the means are 1 apart, the standard deviations 1 and 2, and 1 and 3
    assert frechet(a, b) == pytest.approx(1 + 1 + 4, rel=0.02)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("right", "rows"), [(979, 1000), (5, 10), (10, 10), (0, 7)])
def test_interval_is_wilsons(right: int, rows: int) -> None:
    reference = binomtest(right, rows).proportion_ci(method="wilson")
    low, high = accuracy_interval(right / rows, rows)
    assert low == pytest.approx(reference.low, abs=1e-6) and high == pytest.approx(reference.high, abs=1e-6)


def test_confusion_counts_pairs() -> None:
    table = confusion(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3)
    assert table.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_batches_change_nothing() -> None:
    x = RNG.normal(size=(50, 3)).astype(np.float32)
    whole = over_batches(lambda rows: rows * 2, x, torch.device("cpu"), batch_size=7)
    assert np.array_equal(whole.numpy(), x * 2)


def size(png: bytes) -> tuple[int, int]:
    image = Image.open(io.BytesIO(png)).convert("L")
    shades = np.asarray(image)
    assert shades.std() > 5, "an empty picture"
    return image.size


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (20,)])
def test_reconstructions_and_units(shape: tuple[int, ...]) -> None:
    x = RNG.random((12, *shape)).astype(np.float32)
    assert size(figures.reconstructions(x, 1 - x, 0.1))[0] > 500
    assert size(figures.units([RNG.normal(size=(16, *shape)), RNG.normal(size=(5, *shape))]))[0] > 500


@pytest.mark.parametrize("features", [1, 2, 16])
@pytest.mark.parametrize("labelled", [True, False])
def test_codes_map(features: int, labelled: bool) -> None:
    codes = RNG.normal(size=(60, features)).astype(np.float32)
    labels = RNG.integers(0, 3, 60) if labelled else None
    assert min(size(figures.codes_map(plane(codes), features, labels, ("a", "b", "c"), "test"))) > 500


def test_loss_curves_of_layers_and_finetuning() -> None:
    history = [{"train/loss": 1 / n, "val/loss": 1.1 / n} for n in range(1, 9)]
    errors = [{**epoch, "val/error": 0.1} for epoch in history]
    stages = {"layer 1": {"history": history, "best_epoch": 8}, "finetuning": {"history": errors, "best_epoch": 3}}
    assert size(figures.loss_curves(stages))[0] > 700


@pytest.mark.parametrize("classes", [2, 10, 47])
def test_confusion_figure(classes: int) -> None:
    table = np.eye(classes, dtype=np.int64) * 90 + 1
    assert min(size(figures.confusion(table, [f"class {n}" for n in range(classes)]))) > 500


HOSTILE = ("$\\frac$", "$", "a\nb", "\x1b[31m", "\u202e", "<script>", "x" * 500, "")


def test_names_of_classes_are_text_in_figures() -> None:
    assert min(size(figures.confusion(np.eye(8, dtype=np.int64) * 90 + 1, HOSTILE))) > 500
    assert min(size(figures.codes_map(RNG.normal(size=(60, 2)), 2, np.arange(60) % 8, HOSTILE, "test"))) > 500
    assert [legible(name) for name in HOSTILE[:4]] == [r"\$\frac\$", r"\$", r"a\nb", r"\x1b[31m"]


@pytest.mark.parametrize("codes", [RNG.normal(size=(64, 300)), np.zeros((64, 5)), np.eye(64)])
def test_activations_grids_and_triptychs(codes: np.ndarray) -> None:
    assert size(figures.activations(codes))[0] > 700
    images = RNG.random((20, 3, 8, 8)).astype(np.float32)
    assert size(figures.image_grid(images, 10, "Twenty"))[0] > 500
    assert size(figures.triptych(images[:5], 1 - images[:5], images[:5] / 2, "noise"))[0] > 700
