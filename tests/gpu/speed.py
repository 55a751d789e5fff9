"""Seconds of training: the textbook's pipeline, single steps, and seeds that are trained as one."""

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aecore.config.experiment import Data, Dense, Fit
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.config.specs import FinetuneSpec, Numerics, PretrainSpec
from aecore.core.types import Precision
from aecore.data.dataset import inspect, load
from aecore.data.splits import Arrays, Split
from aecore.models.spec import LayerSpec
from aecore.models.storage import Result
from aecore.stages.finetune import finetune
from aecore.stages.pretrain import prepare
from aecore.stages.training import train, train_as_one
from aecore.variants import Plain
from tests.benchmarks.tables import show
from tests.gpu.report import Report
from tests.gpu.scale import Scale
from tests.gpu.watch import step_by_step, watched

BATCH, CLASSES, SIZES = 64, tuple("0123456789"), (784, 256, 128, 64)
STEPS_ROWS = 10_000
"""Training rows of the steps that are launched one by one, each of which takes a millisecond."""
SAME = {"fp32": 0.02, "tf32": 0.06}
"""Largest relative difference of the last epoch's validation loss of seeds as one from that of the same seeds alone.
Rounding, which is a thousand times coarser in tf32, moves the weights a little more with every step. On an H200 the
losses differed by 0.015 and 0.030."""
PIPELINE_SECONDS, TIMES_QUICKER = 5.5, 12.0
"""Targets, on an H100 in fp32."""


def mnist(root: Path) -> Arrays:
    """Return MNIST with 10,000 validation rows."""
    data = Data(name="mnist", root=root, validation=10_000)
    return load(data, inspect(data))


def random_rows(train: int, held: int) -> Arrays:
    """Return random rows of MNIST's shape."""
    draw = np.random.default_rng(0)

    def split(count: int) -> Split:
        return Split(draw.integers(0, 256, (count, 1, 28, 28), np.uint8), draw.integers(0, 10, count))

    scale = np.array(1 / 255, np.float32)
    return Arrays(split(train), split(held), split(held), np.zeros((), np.float32), scale)


def first(data: Arrays, train: int, held: int) -> Arrays:
    """Return the first training and validation rows."""
    x, y = data.train
    few = Split(data.validation.x[:held], None if data.validation.y is None else data.validation.y[:held])
    return data._replace(train=Split(x[:train], None if y is None else y[:train]), validation=few)


def layers(widths: Sequence[int]) -> list[LayerSpec]:
    """Return dense layers for rows of MNIST's shape."""
    facts = Facts(digest="", shape=(1, 28, 28), levels=256, classes=CLASSES, rows=70_000)
    return layer_specs(Dense(widths=tuple(widths), activation="relu"), Data(likelihood="gaussian"), facts)


def pretraining(
    layer: LayerSpec, number: int = 1, epochs: int = 1, seed: int = 0, precision: Precision = "fp32"
) -> PretrainSpec:
    """Return the spec of a plain layer."""
    return PretrainSpec(
        number=number, layer=layer, variant=Plain(), fit=Fit(epochs=epochs, batch_size=BATCH), seed=seed,
        numerics=Numerics(precision=precision),
    )  # fmt: skip


def pipeline(data: Arrays, epochs: tuple[int, int], scale: Scale) -> float:
    """Return the seconds of training of the whole stack, as the fits count them.

    Args:
        epochs: those of each layer, and those of finetuning.
    """
    specs, below = layers(SIZES[1:]), list[Result]()
    for number, layer in enumerate(specs, 1):
        spec = pretraining(layer, number, epochs[0])
        below.append(train(prepare(spec, scale.context, data=data, below=below)))
    tuning = FinetuneSpec(
        layers=tuple(specs), task="classify", classes=CLASSES, variant=None,
        fit=Fit(epochs=epochs[1], batch_size=BATCH, lr=5e-4), seed=0, numerics=Numerics(), served=False,
    )  # fmt: skip
    tuned = finetune(tuning, scale.context, data=data, layers=below)
    return sum(epoch["seconds"] for result in (*below, tuned) for epoch in result.config["history"])


def measure_pipeline(data: Arrays, scale: Scale, report: Report) -> list[dict[str, Any]]:
    """Measure the pipeline and, on a GPU, its floors; print a table and return its rows."""
    pipeline(data, (1, 1), scale)  # libraries load, memory is taken
    with watched() as seen:
        seconds = pipeline(data, scale.epochs, scale)
    if scale.captures and seen.captured != len(SIZES):
        report.fail(f"the textbook's pipeline: {seen.captured} of {len(SIZES)} stages were captured{seen.reason}")
    count = scale.epochs[0] * (len(SIZES) - 1) + scale.epochs[1]
    report.target(f"textbook's pipeline, {count} epochs, fp32: s of training", seconds, PIPELINE_SECONDS)
    rows: list[dict[str, Any]] = [{"784-256-128-64": f"{count} epochs", "s": seconds}]
    if scale.device.type == "cuda":
        for name, least in floors(len(data.train.x), scale.epochs).items():
            rows.append({"784-256-128-64": f"floor of {name}", "s": least, "share": least / seconds})
    show("The textbook's pipeline", rows)
    return rows


def floors(count: int, epochs: tuple[int, int]) -> dict[str, float]:
    """Return the seconds that the pipeline's products take at this GPU's measured rate of large ones, and that its
    weights and their optimiser's state take to be read and written once per step at its measured rate of copying."""
    side, big = 8192, 2**28
    x, source = torch.rand(side, side, device="cuda"), torch.rand(big, device="cuda")
    rate = 2 * side**3 / timed(lambda: x @ x)  # floating-point operations per second
    bandwidth = 2 * source.nbytes / timed(source.clone)  # bytes per second
    # a layer: two products forward, three backward, since what it reads needs no gradient; finetuning: three, but two
    # where the data come in
    products = [5 * i * o for i, o in itertools.pairwise(SIZES)]
    tuning = 2 * SIZES[0] * SIZES[1] + 3 * (SIZES[1] * SIZES[2] + SIZES[2] * SIZES[3] + SIZES[3] * 10)
    operations = 2 * count * (epochs[0] * sum(products) + epochs[1] * tuning)
    weights = [2 * i * o for i, o in itertools.pairwise(SIZES)]
    tuned = sum(weights) / 2 + SIZES[3] * 10
    # AdamW reads weight, gradient and two means, and writes all but the gradient
    moved = 4 * 7 * -(-count // BATCH) * (epochs[0] * sum(weights) + epochs[1] * tuned)
    return {"arithmetic": operations / rate, "memory": moved / bandwidth}


def timed(act: Callable[[], Any], times: int = 10) -> float:
    """Return the seconds of one call on the GPU."""
    act()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        act()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def measure_steps(data: Arrays, scale: Scale) -> list[dict[str, Any]]:
    """Measure a step of 784-256 in each precision; print a table and return its rows."""
    rows: list[dict[str, Any]] = []
    for precision in scale.precisions:
        replayed = microseconds(data, precision, 4, scale)
        with step_by_step():
            eager = microseconds(first(data, STEPS_ROWS, STEPS_ROWS // 5), precision, 3, scale)
        rows.append({"784-256, batch 64": precision, "us, replayed": replayed, "us, one by one": eager})
    show("A step, with its share of validation", rows)
    return rows


def microseconds(data: Arrays, precision: Precision, epochs: int, scale: Scale) -> float:
    """Return the microseconds of a step in the quickest epoch after the first, with the epoch's validation."""
    spec = pretraining(layers((256,))[0], epochs=epochs, precision=precision)
    history = train(prepare(spec, scale.context, data=data)).config["history"]
    return 1e6 * min(epoch["seconds"] for epoch in history[1:]) / -(-len(data.train.x) // BATCH)


def measure_seeds(data: Arrays, scale: Scale, report: Report) -> list[dict[str, Any]]:
    """Measure seeds that are trained as one against seeds one after another; print a table and return its rows."""
    rows: list[dict[str, Any]] = []
    for precision, alone in scale.seeds_alone.items():
        layer = layers((64,))[0]
        specs = [pretraining(layer, 1, scale.seed_epochs, seed, precision) for seed in range(scale.seeds)]
        warm = [spec.model_copy(update={"fit": Fit(epochs=1, batch_size=BATCH)}) for spec in specs[:2]]
        as_one_of(warm, first(data, STEPS_ROWS, STEPS_ROWS // 5), scale)  # torch.func takes a second at its first use
        began = time.perf_counter()
        results = [train(prepare(spec, scale.context, data=data)) for spec in specs[:alone]]
        scale.synchronize()
        in_turn = (time.perf_counter() - began) * scale.seeds / alone
        began = time.perf_counter()
        with watched() as seen:
            fused = as_one_of(specs, data, scale)
            scale.synchronize()
        as_one = time.perf_counter() - began
        what = f"{scale.seeds} seeds of 784-64, {scale.seed_epochs} epochs, {precision}"
        if seen.fused != [scale.seeds]:
            report.fail(f"{what}: trained as one were {seen.fused or 'none'}{seen.reason}")
        losses = [[r.config["history"][-1]["val/loss"] for r in each] for each in (results, fused)]
        worst = max(abs(a - b) / a for a, b in zip(*losses, strict=False))
        if not worst <= SAME[precision]:
            report.fail(f"{what}: losses as one differ by {worst:.2g} from those alone, more than {SAME[precision]:g}")
        if precision == "fp32":
            report.target(f"{what}: times quicker as one", in_turn / as_one, TIMES_QUICKER, at_least=True)
        rows.append({
            what.split(",")[0]: precision, "s, in turn": in_turn, "of them measured": alone, "s, as one": as_one,
            "times quicker": in_turn / as_one, "losses differ by": worst,
        })  # fmt: skip
    show("Seeds trained as one, set-up included", rows)
    return rows


def as_one_of(specs: Sequence[PretrainSpec], data: Arrays, scale: Scale) -> list[Result]:
    """Train stages as one; raise what one of them raises, which would be quick, and no training."""
    results: list[Result] = []
    for outcome in train_as_one((prepare(spec, scale.context, data=data) for spec in specs), scale.everywhere):
        if isinstance(outcome, Exception):
            raise outcome
        results.append(outcome)
    return results
