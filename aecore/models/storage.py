"""Weights on disk: `config.json` beside `weights.safetensors`, never a pickle."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

Weights = dict[str, np.ndarray]
_CHECKSUM = "sha256"


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
    """Write both files into `folder`; the config carries the checksum of both."""
    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: np.asarray(value, order="C") for name, value in weights.items()})
    (folder / "weights.safetensors").write_bytes(data)
    (folder / "config.json").write_bytes(_text(json.loads(json.dumps(config)), data))


def load_weights(folder: Path) -> tuple[dict[str, Any], Weights]:
    """The exact inverse of `save_weights`.

    Raises:
        ValueError: some byte is not as it was saved.
    """
    text = (folder / "config.json").read_bytes()
    data = (folder / "weights.safetensors").read_bytes()
    config = json.loads(text)
    # written again, the config has the same bytes, or something was altered
    if not isinstance(config, dict) or not config.pop(_CHECKSUM, None) or _text(config, data) != text:
        raise ValueError(f"{folder}: checksum differs; config.json or weights.safetensors was altered")
    return config, load(data)


def _text(config: dict[str, Any], weights: bytes) -> bytes:
    """`config.json`, with the checksum of what else it says and of the weights."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + weights).hexdigest()
    return (json.dumps({**config, _CHECKSUM: digest}, indent=2, sort_keys=True) + "\n").encode()
