"""python -m tests.benchmarks.study --root FOLDER [--settings 16] [--quick]

A study of MNIST by `jobs.compare` against the same as a user would write it: Ray Tune, a function with a DataLoader,
ToTensor and torch.optim.Adam of its own, which reports the validation loss and nothing else. As many learning rates
with two seeds each, the same rows, network, epochs and trials side by side. Ours also keeps each stage in MLflow,
measures every trial (probe, neighbours, clusters, finetuning with few labels and all, robustness, contraction) and
writes the report. FOLDER holds MNIST/raw.
"""

import argparse
import os
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import yaml

from tests.benchmarks.jobs import cold
from tests.benchmarks.tables import last, show
from tests.benchmarks.timeline import PARTS, Done, split

ROWS, VALIDATION, WIDTH, BATCH, SEEDS = 20_000, 1_500, 64, 64, (0, 1)
EPOCHS = 40  # what a study spends by default; the fewer, and the fewer the rows, the more its measuring weighs


def rates(count: int) -> list[float]:
    return [float(rate) for rate in np.geomspace(1e-4, 1e-2, count)]


def ours(root: Path, count: int) -> dict[str, Any]:
    """The study as `jobs.compare` reads it."""
    return {
        "name": "Learning rates",
        "base": {
            "data": {
                "name": "mnist", "root": str(root), "limit": ROWS, "validation": VALIDATION, "likelihood": "gaussian",
            },
            "network": {"widths": [WIDTH], "activation": "relu"},
            "finetune": {"batch_size": BATCH},
        },
        "variants": {"plain": {}},
        "seeds": list(SEEDS),
        "settings": {"finetune.lr": rates(count)},
        "budget": {"epochs": EPOCHS},
        "labels": {"counts": [100], "fit": {"epochs": 1, "batch_size": 256}},
    }  # fmt: skip


def trial(config: dict[str, Any]) -> None:
    """One trial as tutorials write it."""
    import torch
    from ray import tune
    from torch import nn
    from torch.utils.data import DataLoader, Subset
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    torch.manual_seed(config["seed"])
    images = MNIST(config["root"], train=True, transform=ToTensor())
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    train: Any = DataLoader(Subset(images, rows[:ROWS]), batch_size=BATCH, shuffle=True)
    validation: Any = DataLoader(Subset(images, rows[ROWS : ROWS + VALIDATION]), batch_size=BATCH)
    model = nn.Sequential(nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 784), nn.Sigmoid())
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    for _ in range(EPOCHS):
        for batch, _ in train:
            x = batch.flatten(1)
            loss = nn.functional.mse_loss(model(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses = [nn.functional.mse_loss(model(b.flatten(1)), b.flatten(1)).item() for b, _ in validation]
        tune.report({"loss": mean(losses)})


def handwritten(root: Path, count: int) -> dict[str, Any]:
    """The study as a user would write it; its best learning rate."""
    import ray
    from ray import tune

    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    space = {"lr": tune.grid_search(rates(count)), "seed": tune.grid_search(list(SEEDS)), "root": str(root)}
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"CPU": 1}), param_space=space,
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        )  # fmt: skip
        best = tuner.fit().get_best_result("loss", "min")
    assert best.config is not None and best.metrics is not None
    ray.shutdown()
    return {"lr": best.config["lr"], "loss": best.metrics["loss"]}


def trials(done: Done) -> dict[str, float]:
    """Mean seconds of a worker that a trial of a study costs, by part; a stage that trials share counts with them."""
    workers = {note.process for note in done.notes if note.kind == "fit"}
    found = dict.fromkeys(PARTS, 0.0)
    for worker in workers:
        own = [note for note in done.notes if note.process == worker]
        parts = split(own, done.driver, min(n.began for n in own), max(n.ended for n in own))
        found = {part: found[part] + seconds for part, seconds in parts.items()}
    count = done.report["trials"]["finished"]
    return {part: seconds / count for part, seconds in found.items() if seconds}


def measure(root: Path, count: int = 16) -> dict[str, Any]:
    """Print the tables; what stands in them."""
    with tempfile.TemporaryDirectory(prefix="diabolo_study") as temporary:
        folder = Path(temporary)
        (folder / "study.yaml").write_text(yaml.safe_dump(ours(root, count)))
        compared = cold(["jobs.compare", str(folder / "study.yaml")], folder / "ours")
        same = ["--root", str(root), "--settings", str(count), "--handwritten"]
        written = cold(["tests.benchmarks.study", *same], folder / "theirs")
    each = trials(compared)
    rows = [
        {"study": "hand-written", "s": written.seconds, "s a trial": written.seconds / (count * len(SEEDS))},
        {"study": "jobs.compare", "s": compared.seconds, "s a trial": compared.seconds / (count * len(SEEDS)),
         "times quicker": written.seconds / compared.seconds},
    ]  # fmt: skip
    show(f"{count * len(SEEDS)} trials", rows)
    parts = [{"a worker's seconds a trial": part, "s": seconds} for part, seconds in each.items()]
    show("Where a trial's time goes", parts)
    return {"study": rows, "trial": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--settings", type=int, default=16, help="learning rates, with two seeds each")
    parser.add_argument("--handwritten", action="store_true", help="only the one that a user would write")
    args = parser.parse_args()
    last((handwritten if args.handwritten else measure)(args.root.resolve(), args.settings))


if __name__ == "__main__":
    main()
