"""Steps that are recorded once and replayed on CPU, to the bits of steps that are not."""

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aecore.config.experiment import Data, Dense, Fit
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.core.errors import DivergenceError
from aecore.core.types import Terms
from aecore.data.splits import Arrays
from aecore.models.storage import Result
from aecore.stages.context import Run
from aecore.stages.finetune import finetune
from aecore.stages.pretrain import pretrain_layer
from aecore.training import fit as loop
from aecore.training import tape
from aecore.training.tape import Taped
from tests.test_checkpoint import same, spec
from tests.test_stages import PROBLEMS, VARIANTS, pretrain, problem_layers, tuning

CPU = torch.device("cpu")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Taped]:
    """Those of all fits."""
    found: list[Taped] = []

    def taped(step: Any) -> Taped:
        found.append(Taped(step))
        return found[-1]

    monkeypatch.setattr(loop, "Taped", taped)
    return found


def replayed(step: Taped) -> bool:
    return step.replay is not None


def without(monkeypatch: pytest.MonkeyPatch, work: Any) -> Any:
    """What `work` returns where no step is recorded."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Taped", lambda step: step)
        return work()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.__name__)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_variant_is_replayed_to_the_bit(
    problem: str, variant: Any, digits: tuple[Facts, Arrays], steps: list[Taped], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, arrays = digits
    specs = problem_layers(problem, facts)
    tuned = tuning([*specs[:-1], variant().build(specs[-1], len(specs))], "reconstruct", epochs=2)
    tuned = tuned.model_copy(update={"variant": variant()})

    def work() -> list[Result]:
        layers = pretrain(arrays, specs, variant(), epochs=2)
        return [*layers, finetune(tuned, Run(), data=arrays, layers=layers)]

    found = work()
    assert len(steps) == len(specs) + 1 and all(map(replayed, steps))
    assert all(map(same, found, without(monkeypatch, work)))


@pytest.mark.parametrize(
    "fit",
    [{}, {"schedule": "cosine", "warmup": 1, "clip": 0.5, "weight_decay": 0.1}, {"schedule": "plateau", "patience": 2}],
)
def test_dropout_normalisation_and_schedules_are_replayed_to_the_bit(
    fit: dict[str, Any], vectors: Arrays, steps: list[Taped], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> Result:
        return pretrain_layer(spec(**fit), Run(), data=vectors)

    found = work()
    assert list(map(replayed, steps)) == [True]
    assert same(found, without(monkeypatch, work))


@pytest.mark.parametrize("task", ["classify", "reconstruct"])
def test_finetuning_is_replayed_to_the_bit(
    task: str, digits: tuple[Facts, Arrays], steps: list[Taped], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, arrays = digits
    spec = tuning(layer_specs(Dense(widths=(300, 12), tied=True), Data(), facts), task)

    def work() -> Result:
        return finetune(spec, Run(), data=arrays)

    found = work()
    assert list(map(replayed, steps)) == [True]
    assert same(found, without(monkeypatch, work))


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("tied", [False, True])
def test_a_large_tensor_is_updated_as_soon_as_its_gradient_is_there_to_the_bit(
    tied: bool, clip: float | None, digits: tuple[Facts, Arrays], steps: list[Taped], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tape, "_LARGE", 1000)
    spec = tuning(layer_specs(Dense(widths=(300, 30), tied=tied), Data(), digits[0]), "reconstruct", clip=clip)
    orders: list[list[bool]] = []
    ordered = tape._ordered

    def watched(calls: Any) -> Any:
        found = ordered(calls)
        orders.append([bool(call.changes) and call.early for call in found])
        return found

    monkeypatch.setattr(tape, "_ordered", watched)

    def work() -> Result:
        return finetune(spec, Run(), data=digits[1])

    found = work()
    assert list(map(replayed, steps)) == [True]
    assert same(found, without(monkeypatch, work))
    (order,) = orders
    updates = 3 if tied else 5  # a product's weight each, and one of all biases
    assert sum(order) == 1 + updates  # with the count of steps
    behind = len(order) - order.index(False) - order[order.index(False) :].index(True)
    assert behind == updates if clip else behind > 2 * updates  # a gradient that is clipped waits for all others


def trained(terms: Any, model: nn.Module, rows: int = 80) -> list[dict[str, float]]:
    x = (torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)),)
    return loop.fit(model, terms, x, x, Fit(epochs=2, batch_size=16), seed=0, device=CPU).history


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def test_a_step_that_reads_a_number_is_not_recorded(
    steps: list[Taped], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def losses() -> list[float]:
        model = linear()

        def terms(x: Tensor) -> Terms:
            error = (model(x) - x).square().mean()
            return {"r": error if float(error.detach()) > 1 else 2 * error}

        return [epoch["val/r"] for epoch in trained(terms, model)]

    found = losses()
    assert not replayed(steps[0])
    assert found == without(monkeypatch, losses)


def test_a_step_whose_shapes_depend_on_values_is_not_recorded(steps: list[Taped]) -> None:
    model = linear()

    def terms(x: Tensor) -> Terms:
        some = x[x[:, 0] > 0]
        return {"r": (model(some) - some).square().sum() / len(some)}

    trained(terms, model)
    assert not replayed(steps[0])


def test_a_step_that_cannot_be_replayed_is_trained_all_the_same(
    steps: list[Taped], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def losses() -> list[float]:
        model = linear()
        return [epoch["val/r"] for epoch in trained(lambda x: {"r": (model(x) - x).square().mean()}, model)]

    def half(self: Any) -> Any:
        def replay(*inputs: Tensor) -> None:
            self.constants[0].detach().mul_(2)  # gone wrong half-way
            raise MemoryError("no room")

        return replay

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=r"a recorded step fails \(no room\)"):
        patch.setattr(tape._Recorder, "compiled", half)
        found = losses()
    assert not replayed(steps[0])
    assert found == without(monkeypatch, losses)


def test_a_step_that_python_changes_is_found_out(steps: list[Taped], monkeypatch: pytest.MonkeyPatch) -> None:
    def losses() -> list[float]:
        model, calls = linear(), [0]

        def terms(x: Tensor) -> Terms:
            calls[0] += 1
            return {"r": (model(x) - x).square().mean() * calls[0]}

        return [epoch["val/r"] for epoch in trained(terms, model)]

    with pytest.warns(UserWarning, match="a recorded step gives other numbers: trained without it"):
        found = losses()
    assert not replayed(steps[0])
    assert found == without(monkeypatch, losses)


def test_noise_is_drawn_anew_at_every_replay_and_short_batches_are_not_replayed(steps: list[Taped]) -> None:
    model, seen, at = linear(), torch.zeros(200), torch.zeros((), dtype=torch.long)

    def terms(x: Tensor) -> Terms:
        noise = torch.randn(len(x))
        if model.training:
            seen.index_copy_(0, at + torch.arange(len(x)), noise)
            at.add_(len(x))
        return {"r": (model(x) + noise[:, None] - x).square().mean()}

    trained(terms, model, rows=90)
    assert replayed(steps[0]) and int(at) == 180
    assert len(seen[:180].unique()) == 180


def test_what_an_operation_writes_to_and_what_it_makes_are_told_apart(steps: list[Taped]) -> None:
    model, mean, spread = linear(), torch.zeros(3), torch.ones(3)
    normalise = torch.ops.aten._native_batch_norm_legit.default

    def terms(x: Tensor) -> Terms:
        made, *_ = normalise(model(x), None, None, mean, spread, model.training, 0.1, 1e-5)
        low, high = made.split([1, 2], dim=1)
        return {"low": low.square().mean(), "high": (high - 1).square().clamp(max=math.inf).mean()}

    trained(terms, model)
    assert replayed(steps[0])


def test_where_memory_lacks_in_a_replay_batches_are_cut_in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    def taped(step: Any) -> Taped:
        def lacking(*inputs: Tensor) -> None:
            torch.empty(2**50)  # "DefaultCPUAllocator: can't allocate memory"

        found = Taped(step)
        found.replay = lacking
        return found

    model = linear()
    whole = trained(lambda x: {"r": (model(x) - x).square().mean()}, model)
    monkeypatch.setattr(loop, "Taped", taped)
    model = linear()
    with pytest.warns(UserWarning, match="out of memory with batches of 16 rows: cut in two"):
        halves = trained(lambda x: {"r": (model(x) - x).square().mean()}, model)
    assert [epoch["parts"] for epoch in halves] == [2, 2]
    assert halves[-1]["val/r"] == pytest.approx(whole[-1]["val/r"], rel=1e-5)


def test_a_number_that_is_not_finite_is_found_at_its_step() -> None:
    model, steps = linear(), torch.zeros(())

    def terms(x: Tensor) -> Terms:
        if model.training:
            steps.add_(1)
        return {"r": (model(x) - x).square().mean() * torch.where(steps == 8, math.nan, 1.0)}

    with pytest.raises(DivergenceError, match="train/r is nan in epoch 2, batch 3"):
        trained(terms, model)


def test_what_was_trained_is_let_go_at_once() -> None:
    def once() -> weakref.ref[Tensor]:
        model = linear()
        trained(lambda x: {"r": (model(x) - x).square().mean()}, model)
        return weakref.ref(model.weight)

    gc.disable()
    try:
        assert once()() is None
    finally:
        gc.enable()
