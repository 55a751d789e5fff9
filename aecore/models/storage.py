"""The result of a stage, and its weights on disk: `config.json` beside `weights.safetensors`, never a pickle."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

Weights = dict[str, np.ndarray]
"""Arrays by name."""
_CHECKSUM = "sha256"


@dataclass(frozen=True)
class Result:
    """The result of a stage: `config` and `weights` rebuild its model; metrics and figures are for people."""

    config: dict[str, Any]
    weights: Weights
    metrics: dict[str, float]
    figures: dict[str, bytes] = field(default_factory=dict)
    """PNG files by name."""
    example: np.ndarray | None = None
    """A few raw rows, where the result is a model to be served."""


def save_weights(folder: Path, config: dict[str, Any], weights: Weights) -> None:
    """Write `config.json` and `weights.safetensors` into `folder`; `config.json` carries the checksum of both."""
    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: np.asarray(value, order="C") for name, value in weights.items()})
    (folder / "weights.safetensors").write_bytes(data)
    (folder / "config.json").write_bytes(_config_bytes(json.loads(json.dumps(config)), data))


def load_weights(folder: Path) -> tuple[dict[str, Any], Weights]:
    """Read the config and the weights that `save_weights` wrote into `folder`.

    Raises:
        ValueError: a byte differs from what was saved.
    """
    config_bytes = (folder / "config.json").read_bytes()
    data = (folder / "weights.safetensors").read_bytes()
    config = json.loads(config_bytes)
    # an unaltered config gives the same bytes when it is written again
    if not isinstance(config, dict) or not config.pop(_CHECKSUM, None) or _config_bytes(config, data) != config_bytes:
        raise ValueError(f"{folder}: checksum differs; config.json or weights.safetensors was altered")
    return config, load(data)


def _config_bytes(config: dict[str, Any], weights: bytes) -> bytes:
    """Return the content of `config.json`: the config, and the checksum of the config and the weights' file."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + weights).hexdigest()
    return (json.dumps({**config, _CHECKSUM: digest}, indent=2, sort_keys=True) + "\n").encode()
