"""The result of a stage, and results on disk, never as a pickle: one in two files, or several in one file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save, save_file

Weights = dict[str, np.ndarray]
"""Arrays by name."""
RESULT_FILES = ("config.json", "weights.safetensors")
"""The files that `save_weights` writes."""
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


def save_results(file: Path, results: Mapping[str, Result]) -> None:
    """Write config, weights and metrics of several results, by name, into one safetensors file.

    The weights of a result are the tensors `NAME/...`; the rest is JSON in the file's metadata, with a checksum of all.
    """
    rest = {name: {"config": result.config, "metrics": result.metrics} for name, result in results.items()}
    tensors = {
        f"{name}/{weight}": np.asarray(value, order="C")
        for name, result in results.items()
        for weight, value in result.weights.items()
    }
    text = json.dumps(rest, sort_keys=True)
    save_file(tensors, file, {"results": text, _CHECKSUM: _checksum(text, tensors)})


def load_results(file: Path) -> dict[str, Result]:
    """Read the results that `save_results` wrote, by name.

    Raises:
        ValueError: the file was cut short or altered.
    """
    try:
        with safe_open(file, "np") as opened:
            metadata = opened.metadata() or {}
            names = opened.keys()  # an open file is no mapping, and cannot be iterated over itself
            tensors = {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
    text = metadata.get("results", "")
    if metadata.get(_CHECKSUM) != _checksum(text, tensors):
        raise ValueError(f"{file}: checksum differs; the file was altered")
    results = {name: Result(rest["config"], {}, rest["metrics"]) for name, rest in json.loads(text).items()}
    for name, value in tensors.items():
        owner, _, weight = name.partition("/")
        results[owner].weights[weight] = value
    return results


def _checksum(text: str, tensors: Weights) -> str:
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return digest.hexdigest()


def _config_bytes(config: dict[str, Any], weights: bytes) -> bytes:
    """Return the content of `config.json`: the config, and the checksum of the config and the weights' file."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + weights).hexdigest()
    return (json.dumps({**config, _CHECKSUM: digest}, indent=2, sort_keys=True) + "\n").encode()
