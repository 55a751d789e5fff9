"""python -m tests.benchmarks.training --root FOLDER [--repeats 5] [--batch 64 256 1024] [--network dense wide conv]

Samples a second of `fit` against what a user would write instead, and against floors: the matrix products (or
convolutions) of its steps alone, and these with AdamW's updates. All run in one process, one after the other, so that
ratios hold on a machine that others use too; peak memory (RSS) is measured in a process for each. FOLDER holds
MNIST/raw. Lightning and Pythae take part where they are installed:

    uv run --extra benchmarks python -m tests.benchmarks.training --root FOLDER
"""

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# what only `fit` needs is imported by it: the others' memory is theirs
ROWS, VALIDATION = 60_000, 1_000


class Network(NamedTuple):
    widths: tuple[int, ...]
    conv: bool = False


NETWORKS = {
    "dense": Network((256,)),
    "wide": Network((1000, 1000, 1000)),
    "conv": Network((16, 32), conv=True),
}
"""784-256, 784-1000-1000-1000, and two convolutions of 3 x 3, stride 2; each unrolled and trained as a whole."""


def ours(root: Path, network: Network, batch: int, rows: int) -> float:
    """Seconds of an epoch of `fit`, with the validation that belongs to it."""
    from aecore.config.experiment import Conv, Data, Dense, Experiment, Fit
    from aecore.config.resolve import layer_specs
    from aecore.data.dataset import inspect, load
    from aecore.data.splits import Split
    from aecore.models.layers import Layer
    from aecore.models.prepare import Prepare
    from aecore.models.stack import Stack
    from tests.fits import fit_model

    data = Experiment(data=Data(name="mnist", root=root)).data.model_copy(update={"likelihood": "bernoulli"})
    facts = inspect(data)
    arrays = load(data, facts)
    # of all 60,000, as the others take them
    train = Split(np.concatenate([arrays.train.x, arrays.validation.x])[:rows], None)
    kind = Conv if network.conv else Dense
    specs = layer_specs(kind(widths=network.widths, activation="relu"), data, facts, None)
    torch.manual_seed(0)
    net = Stack([Layer(spec) for spec in specs])
    prepare = Prepare(torch.tensor(arrays.shift), torch.tensor(arrays.scale))
    x, seen = torch.from_numpy(train.x), torch.from_numpy(arrays.test.x[:VALIDATION])  # bytes, as stages keep them
    del arrays  # of whose training rows stages have no second copy

    def terms(raw: Tensor) -> dict[str, Tensor]:
        x = prepare(raw)
        return {"reconstruction": F.mse_loss(net.reconstruct(x), x)}

    return fit_model(net, terms, (x,), (seen,), Fit(epochs=1, batch_size=batch)).history[0]["seconds"]


def halves(network: Network) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder of the same network as tutorials write them."""
    up: list[nn.Module] = []
    down: list[nn.Module] = []
    for i, o in pairwise((1 if network.conv else 784, *network.widths)):
        up += [nn.Conv2d(i, o, 3, 2, 1) if network.conv else nn.Linear(i, o), nn.ReLU()]
        back = nn.ConvTranspose2d(o, i, 3, 2, 1, output_padding=1) if network.conv else nn.Linear(o, i)
        down = [back, nn.ReLU(), *down]
    return nn.Sequential(*up), nn.Sequential(*down[:-1], nn.Sigmoid())


def loader(root: Path, batch: int, rows: int) -> Any:
    from torch.utils.data import DataLoader, Subset
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    images: Any = MNIST(str(root), train=True, transform=ToTensor())
    return DataLoader(images if rows == ROWS else Subset(images, range(rows)), batch_size=batch, shuffle=True)


def tutorial(root: Path, network: Network, batch: int, rows: int) -> float:
    """DataLoader, ToTensor, torch.optim.Adam, loss.item()."""
    batches, model = loader(root, batch, rows), nn.Sequential(*halves(network))
    optimizer, total, began = torch.optim.Adam(model.parameters(), lr=1e-3), 0.0, time.perf_counter()
    for images, _ in batches:
        x = images if network.conv else images.view(len(images), -1)
        loss = F.mse_loss(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(x)
    return time.perf_counter() - began


def lightning(root: Path, network: Network, batch: int, rows: int) -> float:
    """The same in a LightningModule; the trainer's own start is not counted."""
    pl: Any = importlib.import_module("lightning.pytorch")
    logging.disable(logging.WARNING)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.seconds = nn.Sequential(*halves(network)), 0.0

        def training_step(self, batch: Any, index: int) -> Tensor:
            x = batch[0] if network.conv else batch[0].view(len(batch[0]), -1)
            loss = F.mse_loss(self.model(x), x)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

        def on_train_epoch_start(self) -> None:
            self.seconds = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            self.seconds = time.perf_counter() - self.seconds

    module = Module()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader(root, batch, rows))
    return module.seconds


def pythae(root: Path, network: Network, batch: int, rows: int) -> float:
    """Pythae's AE, given the same encoder and decoder, by its BaseTrainer on images held as floats; its train step
    alone, without copies and files of the model."""
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    models: Any = importlib.import_module("pythae.models")
    nets: Any = importlib.import_module("pythae.models.nn")
    outputs: Any = importlib.import_module("pythae.models.base.base_utils")
    data: Any = importlib.import_module("pythae.data.datasets")
    trainers: Any = importlib.import_module("pythae.trainers")
    from torchvision.datasets import MNIST

    up, down = halves(network)

    class Encoder(nets.BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = up

        def forward(self, x: Tensor) -> Any:
            return outputs.ModelOutput(embedding=self.net(x if network.conv else x.flatten(1)))

    class Decoder(nets.BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = down

        def forward(self, code: Tensor) -> Any:
            return outputs.ModelOutput(reconstruction=self.net(code).view(len(code), 1, 28, 28))

    images = MNIST(str(root), train=True).data[:rows, None] / 255
    config = models.AEConfig(input_dim=(1, 28, 28), latent_dim=network.widths[-1])
    with tempfile.TemporaryDirectory(prefix="diabolo_pythae") as folder:
        trainer = trainers.BaseTrainer(
            model=models.AE(config, Encoder(), Decoder()),
            train_dataset=data.BaseDataset(images, torch.zeros(len(images))),
            training_config=trainers.BaseTrainerConfig(
                output_dir=folder, num_epochs=1, learning_rate=1e-3, per_device_train_batch_size=batch, no_cuda=True
            ),
        )
        trainer.prepare_training()
        began = time.perf_counter()
        trainer.train_step(1)
        return time.perf_counter() - began


def floor(root: Path, network: Network, batch: int, rows: int, update: bool = False) -> float:
    """The products of an epoch's steps alone, in the order of a step: all of the way up, then all of the way back.

    Args:
        update: and AdamW's update of each weight, right after its gradient, which no such training is spared.
    """
    modules = nn.ModuleList(module for half in halves(network) for module in half if hasattr(module, "weight"))
    x = torch.rand(batch, 1, 28, 28) if network.conv else torch.rand(batch, 784)
    up: list[Callable[[], object]] = []
    back: list[Callable[[], object]] = []
    for number, module in enumerate(cast(Sequence[Any], modules)):
        out = module(x).detach()
        timed = _convolutions if network.conv else _products
        forward, gradient = timed(module, x, out, number > 0)
        up.append(forward)
        back.append(_updated(module.weight.detach(), gradient) if update else gradient)
        x = out
    step = [*up, *reversed(back)]
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(-(-rows // batch)):
            for products in step:
                products()
    return time.perf_counter() - began


def _products(module: Any, x: Tensor, grad: Tensor, deep: bool) -> tuple[Callable[[], object], Callable[[], Tensor]]:
    """A dense layer's one way up and, of its weight's gradient and its input's, the other."""
    weight, bias = module.weight.detach(), module.bias.detach()

    def gradient() -> Tensor:
        if deep:
            torch.mm(grad, weight)
        return torch.mm(grad.t(), x)

    return partial(F.linear, x, weight, bias), gradient


def _convolutions(
    module: Any, x: Tensor, grad: Tensor, deep: bool
) -> tuple[Callable[[], object], Callable[[], Tensor]]:
    bias, transposed = list(module.bias.shape), isinstance(module, nn.ConvTranspose2d)
    rest = module.stride, module.padding, module.dilation, transposed, module.output_padding, 1

    def gradient() -> Tensor:
        found: Any = torch.ops.aten.convolution_backward(grad, x, module.weight, bias, *rest, [deep, True, True])
        return found[1]

    return partial(module, x), gradient


def _updated(weight: Tensor, gradient: Callable[[], Tensor]) -> Callable[[], None]:
    from aecore.training.optimizer import AdamW

    optimizer = AdamW([weight], 0.0)

    def both() -> None:
        weight.grad = gradient()
        optimizer.step(1e-3)

    return both


CONTESTANTS: dict[str, Callable[[Path, Network, int, int], float]] = {
    "fit": ours, "products": floor,
    "and AdamW": partial(floor, update=True), "tutorial": tutorial, "lightning": lightning, "pythae": pythae,
}  # fmt: skip
FLOORS = ("products", "and AdamW")


def peak(root: Path, contestant: str, network: str, batch: int, rows: int) -> float:
    """Peak RSS, bytes, of a process in which one contestant trains an epoch; NaN where /proc does not say."""
    command = [sys.executable, "-m", "tests.benchmarks.training", "--root", str(root), "--batch", str(batch)]
    command += ["--rows", str(rows), "--network", network, "--alone", contestant]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    return float(done.stdout.splitlines()[-1])


def measure(
    root: Path,
    repeats: int = 5,
    batches: Sequence[int] = (64,),
    networks: Sequence[str] = tuple(NETWORKS),
    rows: int = ROWS,
    memory: bool = True,
) -> list[dict[str, Any]]:
    """A row a network and batch size: medians of `seconds` an epoch, `samples` a second, times that `fit` is quicker
    (`ratios`, of the same round) and peak `bytes`, by contestant. Those that are not installed are missing."""
    found = []
    for name in networks:
        for batch in batches:
            seconds: dict[str, list[float]] = {}
            for _ in range(repeats):
                for contestant, run in CONTESTANTS.items():
                    with suppress(ImportError):
                        seconds.setdefault(contestant, []).append(run(root, NETWORKS[name], batch, rows))
            seconds = {contestant: all_ for contestant, all_ in seconds.items() if all_}
            row: dict[str, Any] = {"network": name, "batch": batch, "rows": rows, "repeats": repeats}
            row["seconds"] = {contestant: median(all_) for contestant, all_ in seconds.items()}
            row["samples"] = {contestant: rows / value for contestant, value in row["seconds"].items()}
            row["ratios"] = {
                contestant: median(s / f for s, f in zip(all_, seconds["fit"], strict=True))
                for contestant, all_ in seconds.items()
                if contestant != "fit"
            }
            row["bytes"] = {c: peak(root, c, name, batch, rows) for c in seconds if c not in FLOORS} if memory else {}
            found.append(row)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = ["network  batch  contestant        s an epoch  samples/s  fit is quicker  peak RSS, MB"]
    for row in found:
        for name, seconds in row["seconds"].items():
            ratio, size = row["ratios"].get(name), row["bytes"].get(name)
            lines.append(
                f"{row['network']:7}  {row['batch']:5}  {name:16}  {seconds:10.2f}  {row['samples'][name]:9,.0f}  "
                f"{f'{ratio:.2f} x' if ratio else '':>14}  {f'{size / 1e6:.0f}' if size else '':>12}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", nargs="+", type=int, default=[64])
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rows", type=int, default=ROWS, help="fewer of MNIST's 60,000 training rows")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, an epoch more for each")
    parser.add_argument("--alone", choices=CONTESTANTS, help="one epoch of this one; print its process's peak RSS")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # advice of the peers
    if args.alone:
        CONTESTANTS[args.alone](args.root, NETWORKS[args.network[0]], args.batch[0], args.rows)
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        print(next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")), float("nan")))
        return
    found = measure(args.root, args.repeats, args.batch, args.network, args.rows, not args.no_memory)
    print(table(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
