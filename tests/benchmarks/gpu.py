"""python -m tests.benchmarks.gpu [--root FOLDER] [--epochs 10 15] [--seeds 32]

What a CUDA GPU makes of it: seconds of the textbook's pipeline (784-256-128-64, batch 64, 10 epochs a layer, 15 of
finetuning) with steps replayed as graphs and without, against the floors of arithmetic and of memory; and seeds trained
as one against one after another. Torch alone: neither Ray nor MLflow is imported. FOLDER holds MNIST/raw; without it,
rows are random.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aecore.config.experiment import Data, Dense, Experiment, Fit
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.config.specs import FinetuneSpec, Numerics, PretrainSpec
from aecore.data.dataset import inspect, load
from aecore.data.splits import Arrays, Split
from aecore.models.spec import LayerSpec
from aecore.models.storage import Result
from aecore.stages.context import Context
from aecore.stages.finetune import finetune
from aecore.stages.pretrain import prepare, pretrain_layer
from aecore.stages.training import train, train_as_one
from aecore.training import graphs
from aecore.variants import Plain
from tests.benchmarks.tables import last, show

ROWS, HELD, CLASSES, BATCH = 50_000, 10_000, tuple("0123456789"), 64


def rows(root: Path | None) -> Arrays:
    """MNIST, or random rows of its shape."""
    if root is not None:
        data = Experiment(data=Data(name="mnist", root=root, validation=HELD)).data
        return load(data, inspect(data))
    draw = np.random.default_rng(0)

    def split(count: int) -> Split:
        return Split(draw.integers(0, 256, (count, 1, 28, 28), np.uint8), draw.integers(0, 10, count))

    scale = np.array(1 / 255, np.float32)
    return Arrays(split(ROWS), split(HELD), split(HELD), np.zeros((), np.float32), scale)


def layers(widths: Sequence[int]) -> list[LayerSpec]:
    facts = Facts(digest="", shape=(1, 28, 28), levels=256, classes=CLASSES, rows=ROWS + 2 * HELD)
    return layer_specs(Dense(widths=tuple(widths), activation="relu"), Data(likelihood="gaussian"), facts)


def pretrain(data: Arrays, specs: Sequence[LayerSpec], epochs: int, seed: int, device: str = "cuda") -> list[Result]:
    """Train layer upon layer."""
    below: list[Result] = []
    for number, layer in enumerate(specs, 1):
        context = Context(device=torch.device(device))
        below.append(train(prepare(pretraining(layer, number, epochs, seed), context, data=data, below=below)))
    return below


def pretraining(layer: LayerSpec, number: int, epochs: int, seed: int) -> PretrainSpec:
    return PretrainSpec(
        number=number, layer=layer, variant=Plain(), fit=Fit(epochs=epochs, batch_size=BATCH), seed=seed,
        numerics=Numerics(),
    )  # fmt: skip


def pipeline(data: Arrays, epochs: tuple[int, int], device: str = "cuda") -> float:
    """Seconds of training of the whole stack, as `fit` counts them."""
    specs = layers((256, 128, 64))
    below = pretrain(data, specs, epochs[0], 0, device=device)
    spec = FinetuneSpec(
        layers=tuple(specs), task="classify", classes=CLASSES, variant=None,
        fit=Fit(epochs=epochs[1], batch_size=BATCH, lr=5e-4), seed=0, numerics=Numerics(), served=False,
    )  # fmt: skip
    tuned = finetune(spec, Context(device=torch.device(device)), data=data, layers=below)
    return sum(epoch["seconds"] for result in (*below, tuned) for epoch in result.config["history"])


def floors(data: Arrays, epochs: tuple[int, int]) -> dict[str, float]:
    """Seconds that the pipeline's products take at this GPU's measured rate of large ones, and that its weights and
    their optimiser's state take to be read and written once a step at its measured rate of copying."""
    side, big = 8192, 2**28
    x, source = torch.rand(side, side, device="cuda"), torch.rand(big, device="cuda")
    rate = 2 * side**3 / timed(lambda: x @ x)  # floating-point operations a second
    bandwidth = 2 * source.nbytes / timed(source.clone)  # bytes a second
    sizes = (784, 256, 128, 64)
    # a layer: two products forward, three backward, since what it reads needs no gradient; finetuning: three, but two
    # where the data come in
    products = [5 * i * o for i, o in itertools.pairwise(sizes)]
    tuning = 2 * sizes[0] * sizes[1] + 3 * (sizes[1] * sizes[2] + sizes[2] * sizes[3] + sizes[3] * 10)
    count = len(data.train.x)
    operations = 2 * count * (epochs[0] * sum(products) + epochs[1] * tuning)
    weights = [2 * i * o for i, o in itertools.pairwise(sizes)]
    tuned = sum(weights) / 2 + sizes[3] * 10
    # AdamW reads weight, gradient and two means, and writes all but the gradient
    moved = 4 * 7 * -(-count // BATCH) * (epochs[0] * sum(weights) + epochs[1] * tuned)
    return {"arithmetic": operations / rate, "memory": moved / bandwidth}


def timed(act: Callable[[], Any], times: int = 10) -> float:
    """Seconds of one call on the device."""
    act()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        act()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def wall(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(root: Path | None, epochs: tuple[int, int] = (10, 15), seeds: int = 32) -> dict[str, Any]:
    """Print the tables; what stands in them."""
    data, device = rows(root), torch.device("cuda")
    pipeline(data, (1, 1))  # libraries load, memory is taken
    replayed = pipeline(data, epochs)
    captured = graphs.can_be_captured
    graphs.can_be_captured = lambda job: False
    try:
        eager = pipeline(data, epochs)
    finally:
        graphs.can_be_captured = captured
    least = floors(data, epochs)
    found = [{"45 epochs": "replayed", "s": replayed}, {"45 epochs": "step by step", "s": eager}] + [
        {"45 epochs": f"floor of {name}", "s": s, "share of replayed": s / replayed} for name, s in least.items()
    ]
    show(torch.cuda.get_device_name(), found)
    specs = [pretraining(layers((64,))[0], 1, 2, seed) for seed in range(seeds)]
    one_by_one = wall(lambda: [pretrain_layer(spec, Context(device=device), data=data) for spec in specs])
    as_one_of(specs[:2], data, device)  # torch.func imports a second's worth at its first use
    as_one = wall(lambda: as_one_of(specs, data, device))
    fits = [
        {f"{seeds} seeds of 784-64": "one after another", "s": one_by_one},
        {f"{seeds} seeds of 784-64": "as one", "s": as_one, "times quicker": one_by_one / as_one},
    ]
    show("Seeds trained as one", fits)
    return {"device": torch.cuda.get_device_name(), "pipeline": found, "fused": fits}


def as_one_of(specs: Sequence[PretrainSpec], data: Arrays, device: torch.device) -> None:
    """Train stages as one; raise what one of them raises, which would be quick, and no training."""
    context = Context(device=device)
    for result in train_as_one(prepare(spec, context, data=data) for spec in specs):
        if isinstance(result, Exception):
            raise result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--epochs", type=int, nargs=2, default=(10, 15))
    parser.add_argument("--seeds", type=int, default=32)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA GPU here; run this where there is one", file=sys.stderr)
        raise SystemExit(2)
    last(measure(args.root, tuple(args.epochs), args.seeds))


if __name__ == "__main__":
    main()
