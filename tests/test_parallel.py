"""Data-parallel training: a team takes the steps that one worker takes."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from aecore.config.experiment import Data, Dense, Fit
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.config.specs import Numerics, PretrainSpec
from aecore.data.splits import Arrays, Split
from aecore.data.stream import Stream
from aecore.models.spec import LayerSpec
from aecore.models.storage import Result, load_weights, save_weights
from aecore.stages.context import Context
from aecore.stages.pretrain import pretrain_layer
from aecore.training.team import Team
from aecore.variants import Denoising, Plain
from tests.test_stream import open_data, write

FACTS = Facts(digest="d", shape=(8,), levels=0, classes=(), rows=600)


def arrays() -> Arrays:
    x = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    one, zero = np.ones((), np.float32), np.zeros((), np.float32)
    # 403 rows: the last batch of 16 has 3, of which a team of 4 leaves one worker none
    return Arrays(Split(x[:403], None), Split(x[403:500], None), Split(x[500:], None), zero, one)


def spec(variant: Any, **network: Any) -> PretrainSpec:
    layer: LayerSpec = layer_specs(Dense(widths=(5,), **network), Data(), FACTS)[0]
    return PretrainSpec(
        number=1, layer=layer, variant=variant, fit=Fit(epochs=3, batch_size=16, lr=1e-2), seed=0, numerics=Numerics()
    )


def work(rank: int, size: int, folder: str, given: PretrainSpec, data: Arrays | Stream, parts: int) -> None:
    torch.set_num_threads(1)
    # whoever waits for a worker that does not answer gives up
    store, patience = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=patience)
    result = pretrain_layer(given, Context(team=Team(rank, size), parts=parts), data=data)
    save_weights(Path(folder) / str(rank), result.config, result.weights)
    dist.destroy_process_group()


def trained(
    folder: Path, size: int, given: PretrainSpec, data: Arrays | Stream | None = None, parts: int = 1
) -> list[Result]:
    folder.mkdir()
    arguments = (size, str(folder), given, data or arrays(), parts)
    start_processes(work, args=arguments, nprocs=size, start_method="fork")
    return [Result(*load_weights(folder / str(rank)), {}) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
def test_a_team_trains_what_one_worker_trains(size: int, tmp_path: Path) -> None:
    alone = pretrain_layer(spec(Plain()), Context(), data=arrays())
    for together in trained(tmp_path / "team", size, spec(Plain())):
        for before, after in zip(alone.config["history"], together.config["history"], strict=True):
            for name in ("train/loss", "val/loss"):
                assert after[name] == pytest.approx(before[name], rel=1e-5)
        for name, weight in alone.weights.items():
            assert np.allclose(together.weights[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "given", [spec(Denoising(noise="gaussian", level=0.5)), spec(Plain(), normalization="batch", dropout=0.2)]
)
def test_all_of_a_team_end_with_the_same_weights(given: PretrainSpec, tmp_path: Path) -> None:
    first, second = trained(tmp_path / "team", 2, given)
    for name, weight in first.weights.items():
        assert np.array_equal(weight, second.weights[name])
    assert first.config["history"][-1]["val/loss"] == second.config["history"][-1]["val/loss"]
    assert first.config["history"][-1]["val/loss"] < first.config["history"][0]["val/loss"]


@pytest.mark.parametrize(("rows", "parts"), [(1, 1), (2, 2), (97, 2)])
def test_a_worker_without_validation_rows_and_batches_in_halves_change_nothing(
    rows: int, parts: int, tmp_path: Path
) -> None:
    data = arrays()
    data = data._replace(validation=Split(data.validation.x[:rows], None))
    alone = pretrain_layer(spec(Plain()), Context(), data=data)
    for together in trained(tmp_path / "team", 2, spec(Plain()), data, parts):
        for before, after in zip(alone.config["history"], together.config["history"], strict=True):
            for name in ("train/loss", "val/loss"):
                assert after[name] == pytest.approx(before[name], rel=1e-5)


@pytest.mark.parametrize("normalization", ["none", "batch"])
def test_a_streamed_worker_without_rows_takes_part(normalization: str, tmp_path: Path) -> None:
    """The whole set is one piece, which the first worker reads."""
    stream = open_data(write(tmp_path / "set", rows=300, files=1))
    assert len(stream.pieces) == 1
    first, second = trained(tmp_path / "team", 2, spec(Plain(), normalization=normalization), stream)
    for name, weight in first.weights.items():
        assert np.array_equal(weight, second.weights[name]) or name.endswith("num_batches_tracked")
    history = first.config["history"]
    assert np.isfinite([epoch["train/loss"] for epoch in history]).all()
    assert history[-1]["val/loss"] == second.config["history"][-1]["val/loss"] < history[0]["val/loss"]
    if normalization == "batch":  # the running mean is that of the worker that has rows, not half of it
        assert abs(first.weights["encoder.norm.running_mean"]).max() > 0
