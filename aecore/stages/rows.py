"""The rows that a stage trains on, and the memory in which they lie."""

import warnings
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from aecore.core.types import Precision
from aecore.data.splits import Arrays, Split
from aecore.data.stream import Shuffled, Stream
from aecore.evaluation.scoring import over_batches
from aecore.models.layers import Encoder
from aecore.models.prepare import Prepare
from aecore.models.rebuild import get_weights
from aecore.stages.context import Context, rows_in_memory
from aecore.training.memory import free_memory
from aecore.training.numerics import numerics

_RESIDENT_BYTES = 2**30
"""On a CPU, the largest set that is kept as the floats that a layer reads."""
_PREPARED_BYTES = 2**26
"""The same limit for the layer that reads the data. There, kept floats save only the preprocessing, which is cheap."""
_known_floats: dict[tuple[Any, ...], tuple[weakref.ref[np.ndarray], weakref.ref[Tensor]]] = {}
"""Rows of stages of this process and the floats that their preprocessing makes of them; it keeps neither alive."""


class TrainingRows(NamedTuple):
    """Training and validation rows to cut batches from."""

    train: tuple[Tensor, ...] | Shuffled
    validation: tuple[Tensor, ...]
    read: nn.Module
    """Turns the rows of a batch into what the trained layer reads."""


def preprocessing(data: Arrays | Stream, device: torch.device) -> Prepare:
    """Return the preprocessing of a data set, on `device`."""
    return Prepare(torch.tensor(data.shift), torch.tensor(data.scale)).to(device)


def set_fill(encoder: Encoder, data: Arrays | Stream) -> None:
    """Give the encoder that reads the data the values that it reads in place of missing ones, if there may be any."""
    if encoder.spec.missing:
        encoder.fill.copy_(fill_of(data, encoder.fill.device))


def filled(x: Tensor, data: Arrays | Stream) -> Tensor:
    """Return preprocessed rows with what the first layer reads in place of missing values, for methods that cannot
    leave them out."""
    if rows_in_memory(data).fill is None:
        return x
    return torch.where(x.isnan(), fill_of(data, x.device), x)


def fill_of(data: Arrays | Stream, device: torch.device) -> Tensor:
    """Return what the first layer reads in place of missing values, (*in_shape)."""
    fill = rows_in_memory(data).fill
    assert fill is not None, "values may be missing, so that the data say what to read instead"
    return preprocessing(data, device)(torch.tensor(fill, device=device))


def training_rows(
    data: Arrays | Stream, read: nn.Module, context: Context, features: int, labelled: bool, precision: Precision
) -> TrainingRows:
    """Put the training and validation rows where batches can be cut from them.

    A small set is turned by `read` into `features` floats per row, once for all epochs and with the arithmetic of
    `precision`, and lies on the device. A larger set lies there as it came (uint8 stays uint8, and a CPU copies
    nothing), and `read` is applied to each batch. If it takes more than half of the free memory that the stage plans
    with on a GPU, it stays in the host's memory. A set that is larger than memory is streamed, except for the
    validation rows.
    """
    device, arrays = context.device, rows_in_memory(data)
    read.eval()

    def with_labels(x: Tensor, split: Split) -> tuple[Tensor, ...]:
        """Return the rows, with their labels where these are used, so that one index cuts both."""
        return (x, torch.tensor(split.y, device=x.device)) if labelled else (x,)

    if isinstance(data, Stream):
        validation = torch.tensor(arrays.validation.x).to(device)
        return TrainingRows(
            Shuffled(data, labelled, context.spread), with_labels(validation, arrays.validation), read
        )  # fmt: skip
    splits, room = (arrays.train, arrays.validation), resident_bytes(device, read, context.device_share)
    # rows that another fit of this process has laid there take no further memory
    known = all(_known(read, split.x, device) is not None for split in splits)
    if known or 4 * features * sum(len(split.x) for split in splits) <= room:
        train, validation = (_shared_floats(read, split.x, device, precision) for split in splits)
        read = nn.Identity()
    else:
        train, validation = (_in_place(split.x) for split in splits)
        if device.type != "cuda" or train.nbytes + validation.nbytes <= room:
            train, validation = train.to(device), validation.to(device)
    return TrainingRows(with_labels(train, arrays.train), with_labels(validation, arrays.validation), read)


def resident_bytes(device: torch.device, read: nn.Module, share: float = 1.0) -> int:
    """Return the most bytes that a set may take on the device as the floats that `read` makes of it.

    Args:
        share: the share of a GPU's memory that the stage plans with.
    """
    if device.type == "cuda":
        return free_memory(device, share) // 2
    return _RESIDENT_BYTES if _encodes(read) else _PREPARED_BYTES


def _encodes(read: nn.Module) -> bool:
    """Return whether `read` has layers; otherwise it is the preprocessing alone."""
    return any(isinstance(module, Encoder) for module in read.modules())


def _shared_floats(read: nn.Module, rows: np.ndarray, device: torch.device, precision: Precision) -> Tensor:
    """Return `_read_once` of these arguments, or what another stage of this process made of them and still holds.

    So stages that are trained together as one read and move their rows once. Only preprocessed rows are looked for:
    codes come from layers that each stage has for itself.
    """
    floats = _known(read, rows, device)
    if floats is None:
        floats = _read_once(read, rows, device, precision)
        alive = {key: known for key, known in _known_floats.items() if known[1]() is not None}
        _known_floats.clear()
        _known_floats.update(alive | {_key(read, rows, device): (weakref.ref(rows), weakref.ref(floats))})
    return floats


def _known(read: nn.Module, rows: np.ndarray, device: torch.device) -> Tensor | None:
    """Return what another stage of this process has made of rows by the same preprocessing, if it still holds it."""
    known = None if _encodes(read) else _known_floats.get(_key(read, rows, device))
    return known[1]() if known is not None and known[0]() is rows else None


def _key(read: nn.Module, rows: np.ndarray, device: torch.device) -> tuple[Any, ...]:
    return id(rows), str(device), *(value.tobytes() for value in get_weights(read).values())


def _read_once(read: nn.Module, rows: np.ndarray, device: torch.device, precision: Precision) -> Tensor:
    """Return the floats that `read` makes of all rows, with the arithmetic of a fit of this precision."""
    with numerics(precision, device) as autocast:

        def floats(x: Tensor) -> Tensor:
            with autocast():
                return read(x).float()

        return over_batches(floats, rows, device)


def _in_place(rows: np.ndarray) -> Tensor:
    """Return a tensor that shares the rows' memory. It may lie in an object store, so nothing may write to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of an array that cannot be written to
        return torch.from_numpy(rows)
