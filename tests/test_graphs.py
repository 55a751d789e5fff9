"""Steps that are captured once and replayed. Without a GPU what is captured is called instead: the same bits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from aecore.config.experiment import Fit
from aecore.config.specs import Numerics
from aecore.core.types import Precision, Terms
from aecore.data.splits import Arrays
from aecore.stages.context import Context
from aecore.stages.pretrain import pretrain_layer
from aecore.training import graphs
from aecore.training.checkpoint import Checkpoints
from aecore.training.graphs import Replayed
from aecore.training.team import Team
from tests.fits import CPU, fit_model, job
from tests.test_checkpoint import KilledError, same, spec, until

# CPU tests have `captures` in place of the driver's graphs; that a real one gives the same, only a GPU shows
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a real CUDA graph, and there is no GPU")
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
FITS = [{}, {"schedule": "cosine", "clip": 0.5, "weight_decay": 0.1}, {"schedule": "plateau", "patience": 2}]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What was captured; each is called in place of its replay."""
    found: list[Callable[[], None]] = []

    def capture(step: Callable[[], None], stream: Any) -> Callable[[], None]:
        found.append(step)
        return step

    monkeypatch.setattr(graphs, "can_be_captured", lambda job: True)
    monkeypatch.setattr(graphs, "capture", capture)
    return found


@pytest.mark.parametrize("fit", FITS)
def test_a_replayed_step_is_the_step(
    fit: dict[str, Any], vectors: Arrays, monkeypatch: pytest.MonkeyPatch, captures: list[Callable[[], None]]
) -> None:
    replayed = pretrain_layer(spec(**fit), Context(), data=vectors)
    assert len(captures) == 1
    monkeypatch.setattr(graphs, "can_be_captured", lambda job: False)
    assert same(replayed, pretrain_layer(spec(**fit), Context(), data=vectors))


def test_a_replayed_fit_goes_on_from_its_checkpoint(
    vectors: Arrays, tmp_path: Path, captures: list[Callable[[], None]]
) -> None:
    unbroken = pretrain_layer(spec(), Context(), data=vectors)
    place = Checkpoints(str(tmp_path), seconds=0)
    with pytest.raises(KilledError):
        pretrain_layer(spec(), Context(report=until(5, []), checkpoints=place), data=vectors)
    assert same(unbroken, pretrain_layer(spec(), Context(checkpoints=place), data=vectors))
    assert len(captures) == 3


def test_a_short_batch_is_not_replayed(monkeypatch: pytest.MonkeyPatch, captures: list[Callable[[], None]]) -> None:
    sizes: list[int] = []
    call = Replayed.__call__

    def counted(self: Replayed, *batch: torch.Tensor) -> None:
        sizes.append(len(batch[0]))
        call(self, *batch)

    monkeypatch.setattr(Replayed, "__call__", counted)
    model = torch.nn.Linear(2, 2)
    rows = (torch.randn(70, 2),)
    fit_model(model, lambda x: {"r": (model(x) - x).square().mean()}, rows, rows, Fit(epochs=2, batch_size=16))
    assert sizes == [16] * 8 and len(captures) == 1


def test_inputs_are_read_anew_at_every_replay(captures: list[Callable[[], None]]) -> None:
    seen: list[float] = []
    step = Replayed(lambda x: seen.append(float(x)))
    for value in range(6):
        step(torch.tensor(float(value)))
    assert seen == [0, 1, 2, 3, 4, 5] and len(captures) == 1


def test_what_cannot_be_captured_is_called_after_one_warning(
    vectors: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    eager = pretrain_layer(spec(), Context(), data=vectors)
    monkeypatch.setattr(graphs, "can_be_captured", lambda job: True)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph") as warned:
        assert same(eager, pretrain_layer(spec(), Context(), data=vectors))
    assert len(warned) == 1


def test_only_what_gains_by_it_is_captured() -> None:
    rows, model = (torch.zeros(1),), torch.nn.Linear(1, 1)
    captured = job(model, lambda x: {"r": model(x).sum()}, rows, rows, Fit(), device=torch.device("cuda"))
    assert all(graphs.can_be_captured(replace(captured, precision=precision)) for precision in PRECISIONS)
    others: list[dict[str, Any]] = [{"device": CPU}, {"compile": True}, {"team": Team(0, 2)}]
    assert not any(graphs.can_be_captured(replace(captured, **other)) for other in others)


@pytest.mark.parametrize("hidden", [False, True])
def test_out_of_memory_in_a_capture_cuts_batches_in_two(
    hidden: bool, vectors: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        lacking = torch.OutOfMemoryError("CUDA out of memory")
        if not hidden:
            raise lacking
        try:
            raise lacking
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")  # as torch's own end does

    monkeypatch.setattr(graphs, "can_be_captured", lambda job: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.warns(UserWarning, match="out of memory with batches of 64 rows: cut in two") as warned:
        result = pretrain_layer(spec(), Context(), data=vectors)
    assert len(warned) == 1 and result.config["history"][0]["parts"] == 2


@cuda
@pytest.mark.parametrize("fit", FITS)
def test_on_a_gpu_the_graph_gives_the_losses_of_eager_steps(
    fit: dict[str, Any], vectors: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Context(device=torch.device("cuda"))
    replayed = pretrain_layer(spec(**fit), run, data=vectors)
    monkeypatch.setattr(graphs, "can_be_captured", lambda job: False)
    eager = pretrain_layer(spec(**fit), run, data=vectors)
    for one, two in zip(replayed.config["history"], eager.config["history"], strict=True):
        assert one["train/loss"] == pytest.approx(two["train/loss"], rel=1e-6)
        assert one["val/loss"] == pytest.approx(two["val/loss"], rel=1e-6)


@cuda
@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_a_gpu_every_precision_is_captured_and_gives_the_losses_of_eager_steps(
    precision: Precision, vectors: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lower = Context(device=torch.device("cuda")), pretrain_layer(spec(), Context(), data=vectors)
    upper = spec().model_copy(update={"number": 2, "numerics": Numerics(precision=precision)})
    upper = upper.model_copy(update={"layer": upper.layer.model_copy(update={"in_shape": upper.layer.code_shape})})
    captured: list[Any] = []
    rounding = 1e-5 if precision == "fp32" else 1e-2  # kernels of other products may be chosen
    capture = graphs.capture

    def counted(*arguments: Any) -> Any:
        captured.append(capture(*arguments))
        return captured[-1]

    monkeypatch.setattr(graphs, "capture", counted)
    replayed = pretrain_layer(upper, run, data=vectors, below=[lower])  # a failed capture would warn, an error here
    assert len(captured) == 1
    monkeypatch.setattr(graphs, "can_be_captured", lambda job: False)
    eager = pretrain_layer(upper, run, data=vectors, below=[lower])
    for one, two in zip(replayed.config["history"], eager.config["history"], strict=True):
        assert one["train/loss"] == pytest.approx(two["train/loss"], rel=rounding)
        assert one["val/loss"] == pytest.approx(two["val/loss"], rel=rounding)


@cuda
def test_on_a_gpu_noise_differs_from_replay_to_replay() -> None:
    kept = torch.zeros(10, 4, device="cuda")
    at = torch.zeros((), dtype=torch.long, device="cuda")

    def step(x: Tensor) -> None:
        kept.index_copy_(0, at[None], (x + torch.randn(4, device="cuda"))[None])
        at.add_(1)

    replayed = Replayed(step)
    for _ in range(10):
        replayed(torch.zeros(4, device="cuda"))
    assert len(np.unique(kept[:, 0].cpu().numpy())) == 10


# torch warns of streams after the capture that fails
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
@cuda
def test_on_a_gpu_a_fit_goes_on_after_a_capture_that_fails() -> None:
    model, rows = torch.nn.Linear(4, 4).cuda(), (torch.randn(256, 4, device="cuda"),)

    def terms(x: Tensor) -> Terms:
        noise = torch.randn_like(x)
        error = (model(x + noise) - x).square().mean()
        return {"r": error if float(error.detach()) > 0 else 2 * error}  # waits for the device, as no capture may

    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph"):
        spec = Fit(epochs=3, batch_size=32)
        history = fit_model(model, terms, rows, rows, spec, device=torch.device("cuda")).history
    assert history[-1]["val/loss"] < history[0]["val/loss"]
    # what comes after it in the same process is as good as new: the stream, the allocator, and the next capture
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    later = torch.nn.Linear(4, 4).cuda()

    def others(x: Tensor) -> Terms:
        return {"r": (later(x + torch.randn_like(x)) - x).square().mean()}

    fit_model(later, others, rows, rows, spec, device=torch.device("cuda"))  # a failed capture would warn, an error


# torch warns of the capture that ends before it holds anything
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@cuda
def test_on_a_gpu_out_of_memory_in_a_capture_cuts_batches_in_two() -> None:
    model, rows = torch.nn.Linear(4, 4).cuda(), (torch.randn(256, 4, device="cuda"),)

    def terms(x: Tensor) -> Terms:
        if torch.cuda.is_current_stream_capturing():
            torch.empty(2**50, device="cuda")
        return {"r": (model(x) - x).square().mean()}

    with pytest.warns(UserWarning, match="out of memory with batches of 32 rows: cut in two") as warned:
        spec = Fit(epochs=3, batch_size=32)
        history = fit_model(model, terms, rows, rows, spec, device=torch.device("cuda")).history
    assert sum("cut in two" in str(one.message) for one in warned) == 1 and history[0]["parts"] == 2
    torch.cuda.empty_cache()


@cuda
def test_on_a_gpu_a_fit_goes_on_from_from_its_checkpoint(vectors: Arrays, tmp_path: Path) -> None:
    run = Context(device=torch.device("cuda"))
    unbroken = pretrain_layer(spec(), run, data=vectors)
    place = Checkpoints(str(tmp_path), seconds=0)
    with pytest.raises(KilledError):
        pretrain_layer(spec(), replace(run, report=until(5, []), checkpoints=place), data=vectors)
    resumed = pretrain_layer(spec(), replace(run, checkpoints=place), data=vectors)
    for one, two in zip(unbroken.config["history"], resumed.config["history"], strict=True):
        assert one["val/loss"] == pytest.approx(two["val/loss"], rel=1e-6)
