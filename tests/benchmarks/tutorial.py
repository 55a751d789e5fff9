"""python -m tests.benchmarks.tutorial --root FOLDER [--epochs 10 15] [--seed 0]

The stacked autoencoder of `jobs/recipes/mnist.yaml` as tutorials write it, whole: what a user would run instead. FOLDER
holds MNIST/raw. Prints its accuracy and seconds as JSON.

784-256-128-64, batches of 64, Adam at 1e-3 for ten epochs a layer and at 5e-4 for fifteen of finetuning; images from a
DataLoader with ToTensor, each layer's codes kept for the next, the test rows scored after each epoch.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

SIZES, BATCH = (784, 256, 128, 64), 64


class Autoencoder(nn.Module):
    """One layer there and back."""

    def __init__(self, inputs: int, codes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, codes), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(codes, inputs), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def pretrain(model: Autoencoder, loader: Any, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(1, epochs + 1):
        losses = []
        for images, _ in loader:
            x = images.flatten(1)
            loss = F.mse_loss(model(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}", flush=True)


@torch.no_grad()
def features(encoder: nn.Module, loader: Any) -> TensorDataset:
    found = [(encoder(images.flatten(1)), labels) for images, labels in loader]
    return TensorDataset(torch.cat([x for x, _ in found]), torch.cat([y for _, y in found]))


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any) -> float:
    right = [(model(images.flatten(1)).argmax(1) == labels).float() for images, labels in loader]
    return torch.cat(right).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--epochs", nargs=2, type=int, default=(10, 15), help="of each layer, and of finetuning")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    train, test = (
        DataLoader(MNIST(str(args.root), train=part, transform=ToTensor()), batch_size=BATCH, shuffle=part)
        for part in (True, False)
    )
    encoders: list[nn.Module] = []
    loader: Any = train
    for inputs, codes in pairwise(SIZES):
        layer = Autoencoder(inputs, codes)
        pretrain(layer, loader, args.epochs[0])
        encoders.append(layer.encoder)
        loader = DataLoader(features(nn.Sequential(*encoders), train), batch_size=BATCH, shuffle=True)
    model = nn.Sequential(*encoders, nn.Linear(SIZES[-1], 10))
    optimizer, best = torch.optim.Adam(model.parameters(), lr=5e-4), 0.0
    for epoch in range(1, args.epochs[1] + 1):
        for images, labels in train:
            loss = F.cross_entropy(model(images.flatten(1)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        best = max(best, accuracy(model, test))
        print(f"finetuning, epoch {epoch}: best accuracy {best:.4f}", flush=True)
    print(json.dumps({"accuracy": best, "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
