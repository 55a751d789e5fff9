"""Checkpoints inside a fit: broken off anywhere, it ends with the bits of an unbroken one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aecore.config.experiment import Data, Dense, Fit
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.config.specs import FinetuneSpec, Numerics, PretrainSpec
from aecore.data.splits import Arrays
from aecore.models.storage import Result
from aecore.stages.context import Context
from aecore.stages.finetune import finetune
from aecore.stages.pretrain import pretrain_layer
from aecore.training.checkpoint import Checkpoints
from aecore.variants import Denoising

STATE: dict[str, Any] = {"history": [1.5, float("inf")]}
ARRAYS: dict[str, np.ndarray] = {"a": np.arange(5, dtype=np.float32), "b": np.array(7, np.int64)}


class KilledError(Exception):
    pass


def spec(**fit: Any) -> PretrainSpec:
    facts = Facts(digest="d", shape=(8,), levels=0, classes=(), rows=600)
    layer = layer_specs(Dense(widths=(5,), dropout=0.2, normalization="batch"), Data(), facts)[0]
    return PretrainSpec(
        number=1, layer=layer, variant=Denoising(level=0.3), fit=Fit.model_validate({"epochs": 8, **fit}), seed=0,
        numerics=Numerics(),
    )  # fmt: skip


def until(epoch: int, reported: list[int]) -> Any:
    def report(number: int, metrics: dict[str, float]) -> None:
        reported.append(number)
        if number == epoch:
            raise KilledError

    return report


def same(one: Result, two: Result) -> bool:
    curves = [
        [{k: v for k, v in epoch.items() if k not in ("seconds", "time")} for epoch in result.config["history"]]
        for result in (one, two)
    ]
    return curves[0] == curves[1] and all(np.array_equal(one.weights[name], two.weights[name]) for name in one.weights)


@pytest.mark.parametrize("fit", [{}, {"schedule": "plateau"}, {"schedule": "cosine", "clip": 0.5}, {"patience": 2}])
@pytest.mark.parametrize("killed", [[1], [5], [2, 3, 7]])
def test_broken_off_it_ends_with_the_same_bits(
    killed: list[int], fit: dict[str, Any], vectors: Arrays, tmp_path: Path
) -> None:  # fmt: skip
    unbroken = pretrain_layer(spec(**fit), Context(), data=vectors)
    place = Checkpoints(str(tmp_path / "stage"), seconds=0)
    for epoch in killed:
        if epoch > len(unbroken.config["history"]):
            continue
        reported: list[int] = []
        with pytest.raises(KilledError):
            pretrain_layer(spec(**fit), Context(report=until(epoch, reported), checkpoints=place), data=vectors)
        assert reported == list(range(1, epoch + 1))
    resumed = pretrain_layer(spec(**fit), Context(checkpoints=place), data=vectors)
    assert same(unbroken, resumed)
    assert len(list((tmp_path / "stage").iterdir())) <= 2
    place.clear()
    assert not (tmp_path / "stage").exists()


def test_epochs_before_the_checkpoint_are_reported_again_with_their_times(vectors: Arrays, tmp_path: Path) -> None:
    place, seen = Checkpoints(str(tmp_path), seconds=0), []

    def report(number: int, metrics: dict[str, float]) -> None:
        seen.append((number, metrics["time"]))
        if len(seen) == 4:
            raise KilledError

    with pytest.raises(KilledError):
        pretrain_layer(spec(), Context(report=report, checkpoints=place), data=vectors)
    before = list(seen)
    pretrain_layer(spec(), Context(report=report, checkpoints=place), data=vectors)
    # killed in the fourth, three are kept
    assert seen[4:7] == before[:3] and [number for number, _ in seen[4:]] == list(range(1, 9))


@pytest.mark.parametrize("fit", [{"epochs": 4}, {"epochs": 200, "patience": 1, "lr": 0.03}])
def test_a_result_that_was_lost_costs_no_training(
    fit: dict[str, Any], vectors: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Checkpoints(str(tmp_path), seconds=1e9)  # due after the last epoch alone
    first = pretrain_layer(spec(**fit), Context(checkpoints=place), data=vectors)
    epochs = len(first.config["history"])
    assert epochs == 4 or epochs < 100
    reported: list[int] = []
    monkeypatch.setattr("aecore.training.fit.AdamW.step", lambda *args: pytest.fail("trained again"))
    again = pretrain_layer(spec(**fit), Context(report=until(0, reported), checkpoints=place), data=vectors)
    assert same(first, again) and reported == list(range(1, epochs + 1))
    assert first.config["best_epoch"] == again.config["best_epoch"]


def test_finetuning_goes_on_too(digits: tuple[Facts, Arrays], tmp_path: Path) -> None:
    facts, arrays = digits
    tuning = FinetuneSpec(
        layers=tuple(layer_specs(Dense(widths=(16,)), Data(), facts)), task="classify", classes=facts.classes,
        variant=None, fit=Fit(epochs=4), seed=3, numerics=Numerics(),
    )  # fmt: skip
    unbroken = finetune(tuning, Context(), data=arrays)
    place = Checkpoints(str(tmp_path), seconds=0)
    with pytest.raises(KilledError):
        finetune(tuning, Context(report=until(3, []), checkpoints=place), data=arrays)
    assert same(unbroken, finetune(tuning, Context(checkpoints=place), data=arrays))


def test_what_was_saved_is_loaded_and_the_newest_counts(tmp_path: Path) -> None:
    place = Checkpoints(str(tmp_path / "a" / "b"), seconds=0)
    assert place.load() is None
    for number in (1, 2, 10):
        place.save(number, {**STATE, "number": number}, ARRAYS)
    found = place.load()
    assert found is not None and found[0] == {**STATE, "number": 10}
    for name, value in ARRAYS.items():
        assert np.array_equal(found[1][name], value) and found[1][name].shape == value.shape
    assert sorted(file.name for file in (tmp_path / "a" / "b").iterdir()) == ["000010.json", "000010.safetensors"]


@pytest.mark.parametrize("torn", ["weights", "json", "missing", "foreign"])
def test_a_damaged_one_is_skipped_with_a_warning(torn: str, tmp_path: Path) -> None:
    place = Checkpoints(str(tmp_path), seconds=0)
    place.save(1, STATE, ARRAYS)
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    place.save(2, STATE, ARRAYS)
    for name, data in kept.items():
        (tmp_path / name).write_bytes(data)
    weights, state = tmp_path / "000002.safetensors", tmp_path / "000002.json"
    if torn == "weights":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif torn == "json":
        state.write_text(state.read_text()[:20])
    elif torn == "missing":
        weights.unlink()
    else:
        state.write_text(json.dumps([1, 2]))
    with pytest.warns(UserWarning, match="checkpoint 2 .* is damaged"):
        found = place.load()
    assert found is not None and found[0] == STATE


def test_a_place_that_cannot_be_written_costs_no_training(vectors: Arrays, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = Checkpoints(str(tmp_path / "file" / "stage"), seconds=0)
    with pytest.warns(UserWarning, match="a crash now starts over"):
        result = pretrain_layer(spec(epochs=2), Context(checkpoints=place), data=vectors)
    assert len(result.config["history"]) == 2


def test_what_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Checkpoints(str(tmp_path / "stage"), seconds=0)
    place.save(1, STATE, ARRAYS)

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise OSError("no network")

    monkeypatch.setattr("aecore.training.checkpoint.filesystem_of", lambda *_: (Broken(), "stage"))
    with pytest.warns(UserWarning, match=r"checkpoints stay in .*stage \(no network\): they may be deleted"):
        place.clear()


def test_object_stores_are_written_alike(tmp_path: Path) -> None:
    place = Checkpoints(f"file://{tmp_path}/stage", seconds=0)
    place.save(3, STATE, ARRAYS)
    assert place.load() is not None
    place.clear()
    assert place.load() is None


def test_a_checkpoint_is_due_after_its_time() -> None:
    assert next(Checkpoints("x", seconds=1000).clock()) is False
    clock = Checkpoints("x", seconds=0).clock()
    assert [next(clock) for _ in range(3)] == [True, True, True]
