"""Which fits are trained as one, in all precisions and variants; what happens where memory or its estimate fails."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import stack_module_state

from aecore.config.experiment import Conv, Dense, Fit, Network
from aecore.config.facts import Facts
from aecore.core.types import Precision
from aecore.data.splits import Arrays
from aecore.models.storage import Result
from aecore.stages.context import Context
from aecore.stages.finetune import finetune
from aecore.stages.training import train_as_one
from aecore.training import fused, graphs, groups
from aecore.training.job import Job
from aecore.training.optimizer import AdamW
from aecore.variants import Contractive, Denoising, Plain, Sparse, Variant, Variational
from tests.test_checkpoint import KilledError, until
from tests.test_fused import FITS, SAME, differ, few, fusions, prepared, tuning

__all__ = ["fusions"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
NETWORKS: dict[str, Network] = {
    "dense": Dense(widths=(12, 8, 6), activation="sigmoid"), "conv": Conv(widths=(4, 6), activation="sigmoid"),
    "conv, dense": Conv(widths=(4,), dense=(5,), activation="sigmoid"),
}  # fmt: skip
VARIANTS: dict[str, Variant] = {
    "plain": Plain(), "l1": Sparse(), "kl": Sparse(penalty="kl"), "topk": Sparse(penalty="topk", k=0.5),
    "denoising": Denoising(), "contractive": Contractive(), "exactly contractive": Contractive(probes=None),
    "variational": Variational(),
}  # fmt: skip


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each estimate."""
    needed: list[int] = []
    memory_of_one = groups.memory_of_one

    def counted(jobs: Any) -> int:
        needed.append(memory_of_one(jobs))
        return needed[-1]

    monkeypatch.setattr(groups, "memory_of_one", counted)
    return needed


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_estimated_and_trained_as_one(
    name: str, network: str, precision: Precision, digits: tuple[Facts, Arrays], fusions: list[int],
    estimates: list[int],
) -> None:  # fmt: skip
    facts, arrays = few(digits, 80)
    fits = Fit(epochs=1, batch_size=32), Fit(epochs=1, batch_size=32, lr=3e-3)
    specs = [
        tuning(facts, VARIANTS[name], fit, n, NETWORKS[network], precision=precision) for n, fit in enumerate(fits)
    ]
    ended = train_as_one(prepared(specs, arrays), everywhere=True)
    assert fusions == [2] and len(estimates) == 1
    for result in ended:
        assert isinstance(result, Result) and result.config["precision"] == precision
        assert all(np.isfinite(list(epoch.values())).all() for epoch in result.config["history"])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("variant", [Plain(), Sparse(), Contractive(probes=None)], ids=lambda v: v.kind)
def test_in_bf16_as_one_they_are_what_they_are_alone(
    variant: Variant, network: str, digits: tuple[Facts, Arrays], fusions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, arrays = few(digits)
    specs = [tuning(facts, variant, fit, n, NETWORKS[network], precision="bf16") for n, fit in enumerate(FITS)]
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]
    multiplied: list[torch.dtype] = []
    call = fused._StackedFits._call

    def watched(self: Any, scored: bool, *arguments: Any) -> Any:
        multiplied.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return call(self, scored, *arguments)

    monkeypatch.setattr(fused._StackedFits, "_call", watched)
    ended = train_as_one(prepared(specs, arrays), everywhere=True)
    assert fusions == [3] and set(multiplied) == {torch.bfloat16}
    exact = [finetune(tuning(facts, variant, fit, n, NETWORKS[network]), Context(), data=arrays)
             for n, fit in enumerate(FITS)]  # fmt: skip
    for one, two, three in zip(alone, ended, exact, strict=True):
        assert 0 < differ(one, two) < 0.05 and differ(one, three) > 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_what_a_gpu_would_capture_and_train_as_one(
    network: str, precision: Precision, digits: tuple[Facts, Arrays]
) -> None:
    """Device and rows decide nothing but where: on `meta`, a device that holds no numbers, all is as on a GPU."""
    facts, arrays = few(digits, 100)
    specs = [tuning(facts, Contractive(), fit, n, NETWORKS[network], precision=precision) for n, fit in enumerate(FITS)]

    def moved(job: Job, device: torch.device) -> Job:
        job.model.to(device)
        train, held = (tuple(t.to(device) for t in rows) for rows in (job.in_memory, job.validation))
        return replace(job, train=train, validation=held, device=device)

    here = [training.job for training in prepared(specs, arrays)]
    assert all(graphs.can_be_captured(replace(job, device=torch.device("cuda"))) for job in here)
    keys = {groups.group_key(job, everywhere=True) for job in here}
    there = [moved(job, torch.device("meta")) for job in here]
    assert {key.replace("'cpu'", "'meta'") for key in keys} == {groups.group_key(job, everywhere=True) for job in there}
    (key,) = keys
    assert key and precision in key
    assert groups.group_key(replace(there[0], device=torch.device("cuda"))) == ""  # rows that lie elsewhere


def test_precisions_are_not_mixed(digits: tuple[Facts, Arrays], fusions: list[int]) -> None:
    facts, arrays = few(digits, 100)
    specs = [tuning(facts, Plain(), FITS[0], n // 3, precision=p) for n, p in enumerate([*PRECISIONS] * 2)]
    ended = train_as_one(prepared(specs, arrays), everywhere=True)
    assert fusions == [2, 2, 2]
    assert [isinstance(one, Result) and one.config["precision"] for one in ended] == [*PRECISIONS] * 2


@pytest.mark.parametrize("error", [RuntimeError("no kernel for this"), torch.OutOfMemoryError("out of memory")])
def test_an_estimate_that_fails_has_each_trained_alone(
    error: Exception, digits: tuple[Facts, Arrays], fusions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, arrays = few(digits)
    specs = [tuning(facts, Denoising(), fit, n) for n, fit in enumerate(FITS)]
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]

    def failing(work: Callable[[], object], device: torch.device) -> NoReturn:
        work()
        raise error

    monkeypatch.setattr(groups, "peak_memory", failing)
    with pytest.warns(UserWarning, match=r"3 fits cannot be trained as one \(.*\): one after the other") as warned:
        ended = train_as_one(prepared(specs, arrays), everywhere=True)
    assert len(warned) == 1 and fusions == []
    assert [differ(one, two) for one, two in zip(alone, ended, strict=True)] == [0, 0, 0]


@pytest.mark.parametrize("place", ["stack_module_state", "StackedAdamW", "Validation", "vmap"])
def test_halves_of_a_group_that_does_not_fit_start_from_free_memory(
    place: str, digits: tuple[Facts, Arrays], fusions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever memory runs out, in stacking or at a step, nothing of the attempt is left when the halves begin."""
    facts, arrays = few(digits)
    specs = [tuning(facts, Plain(), FITS[0], n) for n in range(4)]
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]
    attempts: list[list[weakref.ref[Tensor]]] = []
    stacked, real, began = stack_module_state, getattr(fused, place), fused.fit_as_one

    def stacks(modules: Any) -> Any:
        state = stacked(modules)
        attempts[-1].extend(weakref.ref(tensor) for each in state for tensor in each.values())
        return state

    def lacking(*arguments: Any, **options: Any) -> Any:
        result = stacks(*arguments) if place == "stack_module_state" else real(*arguments, **options)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    def begin(jobs: Any) -> Any:
        assert not any(ref() is not None for attempt in attempts[:1] for ref in attempt)
        attempts.append([])
        fusions.append(len(jobs))
        return began(jobs)

    monkeypatch.setattr(fused, "stack_module_state", stacks)
    monkeypatch.setattr(fused, place, lacking)
    monkeypatch.setattr(groups, "fit_as_one", begin)
    gc.disable()
    try:
        ended = train_as_one(prepared(specs, arrays), everywhere=True)
    finally:
        gc.enable()
    assert fusions == [4, 2, 2] and attempts[0]
    assert all(differ(one, two) < SAME for one, two in zip(alone, ended, strict=True))


def test_a_gpu_trains_as_many_at_once_as_its_share_holds(
    digits: tuple[Facts, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, arrays = few(digits, 100)
    job = replace(next(prepared([tuning(facts, Plain(), FITS[0], 0)], arrays)).job, device=torch.device("cuda"))
    monkeypatch.setattr(groups, "memory_of_one", lambda jobs: 1000)
    monkeypatch.setattr(groups, "free_memory", lambda device, share: int(share * 64_000))
    jobs = [replace(job, device_share=share) for share in (1.0, 0.25, 0.001)]
    assert [groups.how_many_fit([each] * 9) for each in jobs] == [32, 8, 1]


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_a_fit_that_has_ended_does_not_hold_back_the_rate_of_the_others(
    schedule: Any, digits: tuple[Facts, Arrays], fusions: list[int]
) -> None:
    """Fits with the same settings share a kernel with one rate, which follows those that go on."""
    facts, arrays = few(digits)
    fit = Fit(epochs=6, lr=5e-3, schedule=schedule, warmup=2, weight_decay=0.1, clip=2.0)
    specs = [tuning(facts, Plain(), fit, n) for n in range(3)]
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]
    first, *others = prepared(specs, arrays)
    ended = train_as_one([first._replace(job=replace(first.job, report=until(2, []))), *others], everywhere=True)
    assert fusions == [3] and isinstance(ended[0], KilledError)
    assert all(differ(one, two) < SAME for one, two in zip(alone[1:], ended[1:], strict=True))


@pytest.mark.parametrize("fits", [(FITS[0], FITS[0]), FITS[:2]])
@pytest.mark.parametrize("network", [Dense(widths=(12, 1)), Dense(widths=(1,), tied=True), Conv(widths=(4, 1))])
def test_the_optimisers_kernel_gets_tensors_of_equal_strides(
    network: Network, fits: tuple[Fit, ...], digits: tuple[Facts, Arrays], fusions: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A GPU's kernel refuses others; a CPU's mixes up their numbers."""
    facts, arrays = few(digits)
    step, calls = AdamW.step, list[int]()

    def checked(self: AdamW, rate: float | Tensor) -> None:
        for p, mean, square in zip(self.parameters, self.means, self.squares, strict=True):
            assert p.grad is not None and p.stride() == p.grad.stride() == mean.stride() == square.stride()
        calls.append(1)
        step(self, rate)

    specs = [tuning(facts, Plain(), fit, n, network) for n, fit in enumerate(fits)]
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]
    monkeypatch.setattr(AdamW, "step", checked)
    ended = train_as_one(prepared(specs, arrays), everywhere=True)
    assert calls and fusions == [2]
    assert all(differ(one, two) < SAME for one, two in zip(alone, ended, strict=True))
