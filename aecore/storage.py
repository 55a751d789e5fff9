"""Weights on disk: `config.json` beside `weights.safetensors`, never a pickle."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Result:
    """What a stage returns: `config` and `weights` rebuild its model, the rest is for people to look at."""

    config: dict[str, Any]
    weights: Weights
    metrics: dict[str, float]
    figures: dict[str, bytes] = field(default_factory=dict)
    """PNG by name."""
    example: np.ndarray | None = None
    """A few raw rows, where the result is a model to be served."""


def save_weights(folder: Path, config: dict[str, Any], weights: Weights) -> None:
    """Write both files into `folder`; the config carries the checksum of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: np.asarray(value, order="C") for name, value in weights.items()})
    (folder / "weights.safetensors").write_bytes(data)
    config = {**config, "weights_sha256": hashlib.sha256(data).hexdigest()}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_weights(folder: Path) -> tuple[dict[str, Any], Weights]:
    """The exact inverse of `save_weights`.

    Raises:
        ValueError: the weights are not the bytes that were saved.
    """
    config = json.loads((folder / "config.json").read_text())
    data = (folder / "weights.safetensors").read_bytes()
    if hashlib.sha256(data).hexdigest() != config.pop("weights_sha256", None):
        raise ValueError(f"{folder / 'weights.safetensors'}: checksum differs from config.json; the file was altered")
    return config, load(data)
