"""Fits that train as one: the numbers of separate ones, up to rounding; here on CPU, where studies never do so."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor

from aecore.config.experiment import Conv, Data, Dense, Fit, Network
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.config.specs import FinetuneSpec, LoadSpec, Numerics, PretrainSpec
from aecore.core.errors import DivergenceError
from aecore.core.types import Precision, Terms
from aecore.data.splits import Arrays, Split
from aecore.data.stream import Shuffled
from aecore.models.storage import Result
from aecore.stages import finetune as finetuning
from aecore.stages import pretrain as pretraining
from aecore.stages.context import Context
from aecore.stages.finetune import finetune
from aecore.stages.training import Training, train, train_as_one
from aecore.training import fused, graphs, groups
from aecore.training.checkpoint import Checkpoints
from aecore.training.memory import peak_memory
from aecore.variants import Contractive, Denoising, Plain, Sparse, Variant, Variational
from pipelines.cluster.share import Share
from pipelines.execution.assignment import Assignment
from pipelines.execution.compute import load_rows
from pipelines.execution.journal import Computed
from pipelines.execution.trial import compute_trials
from pipelines.store.connection import connect
from pipelines.store.runs import Tracker
from pipelines.study.groups import alike, groups_of
from pipelines.study.plan import TrialPlan, plan_trials
from pipelines.study.schema import Study
from tests.test_checkpoint import KilledError, until

FITS = (
    Fit(epochs=3), Fit(epochs=3, lr=3e-3, weight_decay=0.1, schedule="cosine"),
    Fit(epochs=3, lr=5e-3, clip=2.0, schedule="plateau"),
)  # fmt: skip
SAME = 1e-4
"""Largest relative difference, of what isn't random, after some epochs."""


@pytest.fixture
def fusions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many fits each fused one consists of."""
    sizes: list[int] = []
    fit_as_one = fused.fit_as_one

    def counted(jobs: Any) -> Any:
        sizes.append(len(jobs))
        return fit_as_one(jobs)

    monkeypatch.setattr(groups, "fit_as_one", counted)
    return sizes


NETWORK, DATA = Dense(widths=(12, 6)), Data()


def tuning(
    facts: Facts, variant: Variant, fit: Fit, seed: int, network: Network = NETWORK, data: Data = DATA,
    precision: Precision = "fp32",
) -> FinetuneSpec:  # fmt: skip
    layers = layer_specs(network, data, facts, variant.code_activation)
    built = (*layers[:-1], variant.build(layers[-1], len(layers)))
    return FinetuneSpec(
        layers=built, task="reconstruct", classes=(), variant=variant, fit=fit, seed=seed,
        numerics=Numerics(precision=precision), served=False,
    )  # fmt: skip


def prepared(specs: list[FinetuneSpec], data: Arrays, **context: Any) -> Iterator[Training]:
    return (finetuning.prepare(spec, Context(**context), data=data) for spec in specs)


def few(digits: tuple[Facts, Arrays], rows: int = 300) -> tuple[Facts, Arrays]:
    facts, arrays = digits
    assert arrays.train.y is not None
    return facts, arrays._replace(train=Split(arrays.train.x[:rows], arrays.train.y[:rows]))


def differ(one: Result, two: Any, but: tuple[str, ...] = ("seconds", "time")) -> float:
    """The largest relative difference of their curves."""
    assert isinstance(two, Result), two
    assert len(one.config["history"]) == len(two.config["history"])
    pairs = [
        (before[name], after[name])
        for before, after in zip(one.config["history"], two.config["history"], strict=True)
        for name in before.keys() | after.keys()
        if name not in but
    ]
    return max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)


NETWORKS: dict[str, tuple[Network, list[Variant], Data]] = {
    "plain": (Dense(widths=(12, 6)), [Plain()] * 3, Data()),
    "gaussian": (Dense(widths=(12,), tied=True, normalization="layer"), [Plain()] * 3, Data(likelihood="gaussian")),
    "l1": (Dense(widths=(12,)), [Sparse(weight=w) for w in (0.1, 0.2, 0.3)], Data()),
    "kl": (Dense(widths=(12,)), [Sparse(penalty="kl", rate=r) for r in (0.1, 0.2, 0.3)], Data()),
    "topk": (Dense(widths=(12,)), [Sparse(penalty="topk")] * 3, Data(likelihood="continuous_bernoulli")),
    "contractive": (Dense(widths=(12, 6)), [Contractive(weight=w, probes=None) for w in (0.1, 0.2, 0.3)], Data()),
    "conv": (
        Conv(widths=(4, 6), dense=(5,)), [Contractive(weight=0.1, probes=None)] * 3, Data(likelihood="categorical")
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NETWORKS)
def test_as_one_they_are_what_they_are_alone(
    case: str, digits: tuple[Facts, Arrays], fusions: list[int]
) -> None:  # fmt: skip
    network, variants, data = NETWORKS[case]
    facts, arrays = few(digits, 200 if case == "conv" else 300)
    specs = [tuning(facts, v, fit, n, network, data) for n, (v, fit) in enumerate(zip(variants, FITS, strict=True))]
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]
    state = torch.get_rng_state()
    ended = train_as_one(prepared(specs, arrays), everywhere=True)
    assert fusions == [3] and torch.equal(state, torch.get_rng_state())
    for one, two in zip(alone, ended, strict=True):
        assert differ(one, two) < SAME
        assert isinstance(two, Result) and one.config["best_epoch"] == two.config["best_epoch"]
        assert all(np.allclose(one.weights[name], two.weights[name], atol=1e-3) for name in one.weights)


def test_batch_statistics_are_each_ones_own(digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = few(digits)
    network = Dense(widths=(12, 6), normalization="batch")
    specs = [tuning(facts, Plain(), fit, n, network) for n, fit in enumerate(FITS)]
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]
    for one, two in zip(alone, train_as_one(prepared(specs, arrays), everywhere=True), strict=True):
        # a bias before the normalisation has no gradient but rounding, which Adam scales up; running means follow it
        assert differ(one, two, ("seconds", "time", "val/reconstruction", "val/loss")) < SAME
        assert isinstance(two, Result) and differ(one, two) < 0.05
        counted = next(name for name in one.weights if name.endswith("num_batches_tracked"))
        assert one.weights[counted] == two.weights[counted]


@pytest.mark.parametrize(
    "variants",
    [
        [Denoising(level=level) for level in (0.1, 0.2, 0.3)],
        [Denoising(noise="gaussian", level=level) for level in (0.1, 0.2, 0.3)],
        [Variational(beta=beta) for beta in (0.5, 1.0, 2.0)],
        [Contractive(weight=weight) for weight in (0.1, 0.2, 0.3)],
    ],
)
def test_what_is_random_agrees_on_average(
    variants: list[Variant], digits: tuple[Facts, Arrays], fusions: list[int]
) -> None:
    facts, arrays = digits
    specs = [tuning(facts, variant, Fit(epochs=3), n) for n, variant in enumerate(variants)]
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]
    ended = train_as_one(prepared(specs, arrays), everywhere=True)
    assert fusions == [3]
    for one, two in zip(alone, ended, strict=True):
        assert isinstance(two, Result)
        last, other = one.config["history"][-1], two.config["history"][-1]
        assert other["train/reconstruction"] == pytest.approx(last["train/reconstruction"], rel=0.03)
        assert other["val/loss"] == pytest.approx(last["val/loss"], rel=0.05)
        assert other["train/reconstruction"] != last["train/reconstruction"]


def test_each_draws_noise_of_its_own_and_the_same_at_every_validation(
    digits: tuple[Facts, Arrays], fusions: list[int]
) -> None:
    facts, arrays = few(digits)
    twins = [tuning(facts, Denoising(level=0.3), Fit(epochs=3, lr=1e-12), 0)] * 2
    one, two = train_as_one(prepared(twins, arrays), everywhere=True)
    assert isinstance(one, Result) and isinstance(two, Result) and fusions == [2]
    first, second = one.config["history"], two.config["history"]
    assert first[0]["train/loss"] != second[0]["train/loss"] != second[1]["train/loss"]
    assert first[0]["val/loss"] == pytest.approx(first[2]["val/loss"], rel=1e-6)


def test_layers_on_layers_and_classifiers_train_as_one(digits: tuple[Facts, Arrays], fusions: list[int]) -> None:
    """Rows that each has for itself: codes of its own lower layer, and its own labelled rows."""
    facts, arrays = few(digits)
    built = layer_specs(Dense(widths=(12, 6)), Data(), facts)

    def prepare(seed: int, number: int, below: list[Result]) -> Training:
        if number <= len(built):
            spec = PretrainSpec(
                number=number, layer=built[number - 1], variant=Plain(), fit=FITS[seed], seed=seed, numerics=Numerics()
            )
            return pretraining.prepare(spec, Context(), data=arrays, below=below)
        tuned = FinetuneSpec(
            layers=tuple(built), task="classify", classes=facts.classes, variant=None, fit=FITS[seed], seed=seed,
            numerics=Numerics(), labels=100, served=False,
        )  # fmt: skip
        return finetuning.prepare(tuned, Context(), data=arrays, layers=below)

    alone: list[list[Result]] = [[], [], []]
    ended: list[list[Result]] = [[], [], []]
    for number in (1, 2, 3):
        for seed, results in enumerate(alone):
            results.append(train(prepare(seed, number, results)))
        as_one = train_as_one([prepare(seed, number, ended[seed]) for seed in range(3)], everywhere=True)
        for results, result in zip(ended, as_one, strict=True):
            assert isinstance(result, Result)
            results.append(result)
    assert fusions == [3, 3, 3]
    for one, two in zip(alone, ended, strict=True):
        assert all(differ(*pair) < SAME for pair in zip(one, two, strict=True))


def test_rows_that_need_preparing_at_each_step(
    digits: tuple[Facts, Arrays], monkeypatch: pytest.MonkeyPatch, fusions: list[int]
) -> None:
    facts, arrays = few(digits)
    monkeypatch.setattr("aecore.stages.rows._RESIDENT_BYTES", 0)
    specs = [tuning(facts, Plain(), fit, n) for n, fit in enumerate(FITS)]
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]
    ended = train_as_one(prepared(specs, arrays), everywhere=True)
    assert fusions == [3] and all(differ(one, two) < SAME for one, two in zip(alone, ended, strict=True))


def test_one_that_diverges_or_stops_leaves_the_others_alone(digits: tuple[Facts, Arrays], fusions: list[int]) -> None:
    facts, arrays = few(digits)
    specs = [
        tuning(facts, Plain(), Fit(epochs=6), 0), tuning(facts, Plain(), Fit(epochs=6, lr=1e30), 1),
        tuning(facts, Plain(), Fit(epochs=6, lr=0.2, patience=1), 2),
    ]  # fmt: skip
    alone = [finetune(specs[n], Context(), data=arrays) for n in (0, 2)]
    assert len(alone[1].config["history"]) < 6
    ended = train_as_one(prepared(specs, arrays), everywhere=True)
    assert fusions == [3]
    assert isinstance(ended[1], DivergenceError)
    assert "train/reconstruction is" in str(ended[1]) and "in epoch 1, batch 2" in str(ended[1])
    assert differ(alone[0], ended[0]) < SAME and differ(alone[1], ended[2]) < 1e-2  # so large a rate is chaos


def test_on_cpu_and_where_more_than_numbers_differ_each_is_trained_alone_to_the_bit(
    digits: tuple[Facts, Arrays], fusions: list[int]
) -> None:
    facts, arrays = few(digits)
    alike = [tuning(facts, Denoising(), FITS[0], n) for n in range(2)]
    other = [alike[0], tuning(facts, Denoising(), FITS[0].model_copy(update={"batch_size": 32}), 1)]
    another = [alike[0], tuning(facts, Denoising(level=0.0), FITS[0], 1)]
    wider = [alike[0], tuning(facts, Denoising(), FITS[0], 0, Dense(widths=(13, 6)))]
    for specs, everywhere in ((alike, False), (other, True), (another, True), (wider, True)):
        alone = [finetune(spec, Context(), data=arrays) for spec in specs]
        ended = train_as_one(prepared(specs, arrays), everywhere)
        for one, two in zip(alone, ended, strict=True):
            assert isinstance(two, Result) and differ(one, two) == 0
            assert all(np.array_equal(one.weights[name], two.weights[name]) for name in one.weights)
    assert fusions == []


def test_each_goes_on_from_its_own_checkpoint_and_alone_if_need_be(
    digits: tuple[Facts, Arrays], tmp_path: Path, fusions: list[int]
) -> None:
    facts, arrays = few(digits)
    specs = [tuning(facts, Plain(), Fit(epochs=5, lr=lr, schedule="cosine"), n) for n, lr in enumerate((1e-3, 2e-3))]
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]
    places = [Checkpoints(str(tmp_path / str(n)), seconds=0) for n in range(2)]

    def killable(n: int, epoch: int = 0) -> Training:
        context = Context(checkpoints=places[n], report=until(epoch, []))
        return finetuning.prepare(specs[n], context, data=arrays)

    # both are killed in their third epoch, then one of them, which goes on by itself, in its fourth
    ended = train_as_one([killable(n, 3) for n in range(2)], everywhere=True)
    assert all(isinstance(one, KilledError) for one in ended)
    with pytest.raises(KilledError):
        train(killable(1, 4))
    one, two = train_as_one([killable(n) for n in range(2)], everywhere=True)
    assert fusions == [2]
    assert differ(alone[0], one) < SAME and differ(alone[1], two) < SAME


def test_what_cannot_be_vmapped_is_trained_in_turn(digits: tuple[Facts, Arrays], fusions: list[int]) -> None:
    facts, arrays = few(digits)

    class Stubborn(Plain):
        def loss(self, model: Any, x: Tensor) -> Terms:
            terms = super().loss(model, x)
            return terms if float(terms["reconstruction"].detach()) > 0 else {}

    specs = [
        tuning(facts, Plain(), FITS[0], n).model_copy(update={"variant": Stubborn()}) for n in range(2)
    ]  # fmt: skip
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]
    with pytest.warns(UserWarning, match="2 fits cannot be trained as one"):
        ended = train_as_one(prepared(specs, arrays), everywhere=True)
    assert fusions == [2] and [differ(one, two) for one, two in zip(alone, ended, strict=True)] == [0, 0]


def test_where_memory_lacks_fewer_are_trained_at_once(
    digits: tuple[Facts, Arrays], fusions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, arrays = few(digits)
    step = fused._StackedFits.step

    def tight(self: Any, index: Tensor, rates: Tensor) -> None:
        if len(index) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self, index, rates)

    monkeypatch.setattr(fused._StackedFits, "step", tight)
    specs = [tuning(facts, Plain(), FITS[0], n) for n in range(4)]
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]
    ended = train_as_one(prepared(specs, arrays), everywhere=True)
    assert fusions == [4, 2, 2] and all(differ(one, two) < SAME for one, two in zip(alone, ended, strict=True))


def test_the_step_of_all_is_captured_as_one(
    digits: tuple[Facts, Arrays], fusions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU what is captured is called instead: the same bits."""
    facts, arrays = few(digits)
    specs = [tuning(facts, Denoising(level=0.1 * (n + 1)), fit, n) for n, fit in enumerate(FITS)]
    captures: list[Callable[[], None]] = []

    def capture(step: Callable[[], None], stream: Any) -> Callable[[], None]:
        captures.append(step)
        return step

    called = train_as_one(prepared(specs, arrays), everywhere=True)
    monkeypatch.setattr(graphs, "can_be_captured", lambda job: True)
    monkeypatch.setattr(graphs, "capture", capture)
    replayed = train_as_one(prepared(specs, arrays), everywhere=True)
    assert fusions == [3, 3] and len(captures) == 1
    for one, two in zip(called, replayed, strict=True):
        assert isinstance(one, Result) and differ(one, two) == 0


# on a CPU the tests above ask for it (`everywhere`); that it comes unasked, and what its kernels give, only a GPU shows
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="fits are trained as one by default on a GPU only; there is none",
)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("case", ["plain", "kl", "topk", "contractive", "conv"])
def test_on_a_gpu_as_one_they_are_what_they_are_alone(
    case: str, precision: Precision, digits: tuple[Facts, Arrays], fusions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one graph: a capture that fails would warn, which is an error here, as would a group that falls apart."""
    network, variants, data = NETWORKS[case]
    facts, arrays = few(digits)
    device, captures, capture = torch.device("cuda"), list[Any](), graphs.capture
    each = enumerate(zip(variants, FITS, strict=True))
    specs = [tuning(facts, variant, fit, n, network, data, precision) for n, (variant, fit) in each]
    alone = [finetune(spec, Context(device=device), data=arrays) for spec in specs]

    def counted(*arguments: Any) -> Any:
        captures.append(capture(*arguments))
        return captures[-1]

    monkeypatch.setattr(graphs, "capture", counted)
    ended = train_as_one(prepared(specs, arrays, device=device))
    close = {"fp32": SAME, "tf32": 0.02, "bf16": 0.05}[precision]
    assert fusions == [3] and len(captures) == 1
    assert all(differ(one, two) < close for one, two in zip(alone, ended, strict=True))


def test_an_interrupt_ends_all(digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = few(digits)

    def report(epoch: int, metrics: dict[str, float]) -> NoReturn:
        raise KeyboardInterrupt

    specs = [tuning(facts, Plain(), FITS[0], n) for n in range(3)]
    with pytest.raises(KeyboardInterrupt):
        train_as_one(prepared(specs, arrays, report=report), everywhere=True)


def test_an_exception_of_one_is_its_result_alone(digits: tuple[Facts, Arrays], fusions: list[int]) -> None:
    facts, arrays = few(digits)
    specs = [tuning(facts, Plain(), fit, n) for n, fit in enumerate(FITS)]
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]

    def fail(*args: Any) -> NoReturn:
        raise KilledError

    first, second, third = prepared(specs, arrays)
    told = replace(second.job, report=until(2, []))
    ended = train_as_one([first, second._replace(job=told), third._replace(finish=fail)], everywhere=True)
    assert fusions == [3] and differ(alone[0], ended[0]) < SAME
    assert isinstance(ended[1], KilledError) and isinstance(ended[2], KilledError)


@pytest.mark.parametrize("epoch", [1, 2])
def test_what_fails_as_one_is_trained_one_by_one(
    epoch: int, digits: tuple[Facts, Arrays], fusions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, arrays = few(digits)
    specs = [tuning(facts, Denoising(), fit, n) for n, fit in enumerate(FITS)]
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]
    begin = fused._StackedFits.begin_epoch

    def failing(self: Any) -> Any:
        if self.progresses[0].epoch == epoch:
            raise RuntimeError("no kernel for this")
        return begin(self)

    monkeypatch.setattr(fused._StackedFits, "begin_epoch", failing)
    with pytest.warns(UserWarning, match=r"3 fits cannot be trained as one \(no kernel for this\): one"):
        ended = train_as_one(prepared(specs, arrays), everywhere=True)
    assert fusions == [3] and [differ(one, two) for one, two in zip(alone, ended, strict=True)] == [0, 0, 0]


@pytest.mark.parametrize("case", NETWORKS)
def test_the_memory_of_every_network_can_be_estimated(
    case: str, digits: tuple[Facts, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is that which a GPU is measured by; here it is done, and what it takes is made up."""
    network, variants, data = NETWORKS[case]
    facts, arrays = few(digits, 100)
    monkeypatch.setattr(groups, "peak_memory", lambda work, device: peak_memory(work, device) + 1000)
    specs = [tuning(facts, v, fit, n, network, data) for n, (v, fit) in enumerate(zip(variants, FITS, strict=True))]
    jobs = [
        replace(job, train=tuple(x.clone() for x in job.in_memory), validation=tuple(x.clone() for x in job.validation))
        for job in (training.job for training in prepared(specs, arrays))
    ]
    weights = sum(p.nbytes for p in jobs[0].model.parameters())
    before = [p.clone() for p in jobs[0].model.parameters()]
    assert not isinstance(jobs[0].train, Shuffled)
    rows = sum(tensor.nbytes for tensor in (*jobs[0].train, *jobs[0].validation))
    # three measured parts, eight copies of the weights (and of what is not trained), and each fit's rows, stacked
    assert 3000 + 8 * weights + rows <= groups.memory_of_one(jobs) < 3000 + 9 * weights + rows
    assert all(map(torch.equal, before, jobs[0].model.parameters()))
    assert len({groups.group_key(job, everywhere=True) for job in jobs} - {""}) == 1
    assert {groups.group_key(job) for job in jobs} == {""}  # a CPU gains nothing


def test_rows_that_several_read_are_held_once(digits: tuple[Facts, Arrays], monkeypatch: pytest.MonkeyPatch) -> None:
    facts, arrays = few(digits)
    seen: list[Any] = []
    fit_as_one = fused.fit_as_one

    def watched(jobs: Any) -> Any:
        seen.extend(jobs)
        return fit_as_one(jobs)

    monkeypatch.setattr(groups, "fit_as_one", watched)
    specs = [tuning(facts, Plain(), FITS[0], n) for n in range(3)]
    train_as_one(prepared(specs, arrays), everywhere=True)
    assert len({id(job.train[0]) for job in seen}) == len({id(job.validation[0]) for job in seen}) == 1


@pytest.mark.parametrize("rate", [1e-3, 1e30])
def test_what_was_trained_as_one_is_let_go_at_once(
    rate: float, digits: tuple[Facts, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for Python's collector of cycles, so that a GPU's memory comes back; also where a fit diverges
    and its error is kept."""
    facts, arrays = few(digits)
    stacks: list[weakref.ref[Any]] = []
    end = fused._StackedFits.end

    def watched(self: Any) -> Any:
        stacks.append(weakref.ref(self))
        return end(self)

    monkeypatch.setattr(fused._StackedFits, "end", watched)
    specs = [tuning(facts, Plain(), fit, n) for n, fit in enumerate((FITS[0], Fit(epochs=3, lr=rate)))]
    gc.disable()
    try:
        results = train_as_one(prepared(specs, arrays), everywhere=True)
        assert [isinstance(result, DivergenceError) for result in results] == [False, rate > 1]
        assert [stack() for stack in stacks] == [None]
    finally:
        gc.enable()


STUDY = Study.model_validate({
    "base": {"data": {"limit": 300}, "network": {"kind": "dense", "widths": [12, 6]}, "pretrain": None},
    "variants": {
        "plain": {"settings": {"finetune.lr": [1e-3, 1e30]}}, "stacked": {"pretrain": {}},
        "sparse": {"variant": {"kind": "sparse"}, "settings": {"variant.weight": [0.0, 0.1, 0.2]}},
    },
    "seeds": [0, 1],
    "budget": {"epochs": 3},
    "labels": {"counts": [], "fit": {"epochs": 1}},
})  # fmt: skip


def trials(digits: tuple[Facts, Arrays]) -> list[TrialPlan]:
    return [m for m in plan_trials(STUDY, digits[0], Numerics()) if m.kind not in ("pca", "random")]


def test_a_study_groups_what_differs_in_numbers(digits: tuple[Facts, Arrays]) -> None:
    found = alike(trials(digits))
    named = [[m.name for m in group] for group in found]
    assert named == [
        [f"plain finetune.lr={lr} seed={seed}" for lr in ("0.001", "1e+30") for seed in (0, 1)],
        ["stacked seed=0", "stacked seed=1"],
        ["sparse variant.weight=0 seed=0", "sparse variant.weight=0 seed=1"],
        [f"sparse variant.weight={weight} seed={seed}" for weight in ("0.1", "0.2") for seed in (0, 1)],
    ]
    # as many groups as GPUs, if there are fewer kinds, and of sizes that differ by one at most
    assert [len(group) for group in groups_of(trials(digits), 1)] == [4, 2, 2, 4]
    assert [len(group) for group in groups_of(trials(digits), 6)] == [2, 2, 2, 2, 2, 2]
    assert [len(group) for group in groups_of(trials(digits)[:4], 3)] == [1, 1, 2]
    assert [len(group) for group in groups_of(trials(digits), None)] == [1] * 12


def test_trials_as_one_are_those_of_a_study(
    digits: tuple[Facts, Arrays], tracker: Tracker, tmp_path_factory: pytest.TempPathFactory, fusions: list[int]
) -> None:
    """Keys, runs and, up to rounding, numbers; what was finished is restored, and what fails fails alone."""
    facts = digits[0]
    group = [m for m in trials(digits) if m.row == "plain"][:3]  # the third diverges
    other = connect(f"sqlite:///{tmp_path_factory.mktemp('alone')}/mlflow.db", "test")
    assert other is not None
    loaded = next(s for s in group[0].stages().values() if not s.kept)
    assert isinstance(loaded.spec, LoadSpec) and loaded.spec.facts == facts
    rows = load_rows(loaded.spec)
    told: list[str] = []

    def tell(stage: Any, epoch: int, metrics: dict[str, float]) -> None:
        told.append(stage.name)

    def compute(store: Tracker, top: str, plans: list[TrialPlan], everywhere: bool = False) -> list[Any]:
        common = Assignment(store=tuple(store), parent=top, share=Share(0, 1), tell=tell, reads_alone=True)
        assignments = [replace(common, tags=plan.tags()) for plan in plans]
        return compute_trials([plan.stage for plan in plans], assignments, {loaded.key: rows}, everywhere)

    with other.job_run("test", "alone", {}, {}) as top:
        alone = [compute(other, top, [plan])[0].result for plan in group[:2]]
    with tracker.job_run("test", "as one", {}, {}) as top:
        outcomes = compute(tracker, top, group, everywhere=True)
        ended = {plan.stage.key: outcome for plan, outcome in zip(group, outcomes, strict=True)}
        assert isinstance(ended[group[2].stage.key], DivergenceError)
        assert fusions == [3, 2]  # the whole, then the classifiers of those that are left
        found = {run.data.tags["stage.key"]: run for run in tracker.search("tags.`stage.fn` LIKE '%'", 100)}
        for m, before in zip(group, alone, strict=False):
            assert isinstance(ended[m.stage.key], Computed)
            after = ended[m.stage.key].result
            for name, value in before.metrics.items():
                if not name.endswith("_seconds"):
                    assert after.metrics[name] == pytest.approx(value, rel=0.02, abs=0.02), name
            assert after.metrics["test/reconstruction_mse"] == pytest.approx(
                before.metrics["test/reconstruction_mse"], rel=SAME
            )
            run = found[m.stage.key]
            assert run.data.tags["row"] == "plain" and run.info.run_name == m.name
            for key, stage in m.stages().items():
                if stage.kept and stage.trains:
                    assert tracker.find(key) == run.info.run_id
                    mine, theirs = tracker.restore(run.info.run_id, key), other.restore(other.find(key) or "", key)
                    curves = [one.config["history"][-1]["val/loss"] for one in (mine, theirs)]
                    assert curves[0] == pytest.approx(curves[1], rel=SAME)
        bad = found[group[2].stage.key]
        assert bad.info.status == "FAILED" and "DivergenceError" in bad.data.tags["error"]
        told.clear()
        fusions.clear()
        again = compute(tracker, top, group[:2], everywhere=True)
        assert not told and not fusions and all(isinstance(one, Computed) for one in again)
