"""python -m tests.benchmarks.training --root FOLDER [--repeats 5] [--batch 64 256 1024]

Samples a second of `fit` against what a user would write instead, and against the floor: the matrix products alone.
All in one process, one after the other, so that ratios hold on a machine that others use too. FOLDER holds MNIST/raw.
Lightning and Pythae take part where they are installed.
"""

import argparse
import importlib
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from aecore.config import Data, Dense, Experiment, Fit
from aecore.data import Arrays, Split, inspect, load
from aecore.fit import fit
from aecore.kernels import linear
from aecore.networks import Layer, Prepare, Stack
from aecore.specs import LayerSpec, layer_specs

VALIDATION = 1_000


def specs(facts: Any, data: Data, widths: Sequence[int]) -> tuple[LayerSpec, ...]:
    return tuple(layer_specs(Dense(widths=tuple(widths), activation="relu"), data, facts, None))


def ours(data: Arrays, built: Sequence[LayerSpec], batch: int) -> float:
    """Seconds of an epoch of `fit`, with the validation that belongs to it."""
    torch.manual_seed(0)
    net = Stack([Layer(spec) for spec in built])
    prepare = Prepare(torch.tensor(data.shift), torch.tensor(data.scale))
    train, validation = (prepare(torch.tensor(x)) for x in (data.train.x, data.validation.x))

    def terms(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"reconstruction": nn.functional.mse_loss(net.reconstruct(x), x)}

    fitted = fit(
        net, terms, (train,), (validation,), Fit(epochs=1, batch_size=batch), seed=0, device=torch.device("cpu")
    )
    return fitted.history[0]["seconds"]


def plain(built: Sequence[LayerSpec]) -> nn.Sequential:
    """The same network as tutorials write it."""
    sizes = [np.prod(spec.in_shape) for spec in built] + [np.prod(built[-1].code_shape)]
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(int(i), int(o)), nn.ReLU()]
    for i, o in zip(sizes[:0:-1], sizes[-2::-1], strict=True):
        layers += [nn.Linear(int(i), int(o)), nn.ReLU()]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())


def tutorial(root: Path, built: Sequence[LayerSpec], batch: int) -> float:
    """DataLoader, ToTensor, torch.optim.Adam, loss.item()."""
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    loader: Any = DataLoader(MNIST(str(root), train=True, transform=ToTensor()), batch_size=batch, shuffle=True)
    model = plain(built)
    optimizer, total, began = torch.optim.Adam(model.parameters(), lr=1e-3), 0.0, time.perf_counter()
    for images, _ in loader:
        x = images.view(len(images), -1)
        loss = nn.functional.mse_loss(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(x)
    return time.perf_counter() - began


def lightning(root: Path, built: Sequence[LayerSpec], batch: int) -> float:
    """The same in a LightningModule; the trainer's own start is not counted."""
    pl: Any = importlib.import_module("lightning.pytorch")
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.seconds = plain(built), 0.0

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            x = batch[0].view(len(batch[0]), -1)
            loss = nn.functional.mse_loss(self.model(x), x)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

        def on_train_epoch_start(self) -> None:
            self.seconds = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            self.seconds = time.perf_counter() - self.seconds

    loader: Any = DataLoader(MNIST(str(root), train=True, transform=ToTensor()), batch_size=batch, shuffle=True)
    module = Module()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module.seconds


def floor(rows: int, built: Sequence[LayerSpec], batch: int) -> float:
    """The matrix products of an epoch's steps alone, by the kernels that `fit` uses."""
    sizes = [int(np.prod(spec.in_shape)) for spec in built] + [int(np.prod(built[-1].code_shape))]
    pairs = [*pairwise(sizes), *zip(sizes[:0:-1], sizes[-2::-1], strict=True)]
    weights = [(torch.rand(o, i), torch.zeros(o), torch.rand(batch, i), torch.rand(batch, o)) for i, o in pairs]
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(-(-rows // batch)):
            for number, (weight, bias, x, grad) in enumerate(weights):
                linear(x, weight, bias)
                linear(grad.t(), x.t(), torch.zeros(()).expand(x.shape[1]))
                if number:
                    linear(grad, weight.t(), torch.zeros(()).expand(x.shape[1]))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", nargs="+", type=int, default=[64])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # advice of the peers
    data = Experiment(data=Data(name="mnist", root=args.root)).data.model_copy(update={"likelihood": "bernoulli"})
    facts = inspect(data)
    arrays = load(data, facts)
    x = np.concatenate([arrays.train.x, arrays.validation.x])  # all 60,000, as the tutorial takes them
    arrays = arrays._replace(train=Split(x, None), validation=Split(arrays.test.x[:VALIDATION], None))
    results = []
    print(f"{'network':18} {'batch':>5} {'fit, s':>7}   times quicker than (median of {args.repeats})")
    for widths in ((256,), (1000, 1000, 1000)):
        for batch in args.batch:
            built = specs(facts, data, widths)
            found: dict[str, list[float]] = {}
            contestants: dict[str, Callable[[], float]] = {
                "fit": partial(ours, arrays, built, batch),
                "floor": partial(floor, len(x), built, batch),
                "tutorial": partial(tutorial, args.root, built, batch),
                "lightning": partial(lightning, args.root, built, batch),
            }
            for _ in range(args.repeats):
                for name, run in contestants.items():
                    with suppress(ImportError):
                        found.setdefault(name, []).append(run())
            ratios = {
                name: median(s / f for s, f in zip(seconds, found["fit"], strict=True))
                for name, seconds in found.items()
                if name != "fit" and seconds
            }
            name = "-".join(map(str, (784, *widths)))
            shown = "  ".join(f"{peer} {ratio:.2f}" for peer, ratio in ratios.items())
            print(f"{name:18} {batch:5} {median(found['fit']):7.2f}   {shown}", flush=True)
            results.append({"network": name, "batch": batch, "seconds": median(found["fit"]), "ratios": ratios})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
