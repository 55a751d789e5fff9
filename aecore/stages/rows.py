"""The rows that a stage trains on, and where they lie while it does."""

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from aecore.data.splits import Arrays, Split
from aecore.data.stream import Shuffled, Stream
from aecore.evaluation.scoring import over_batches
from aecore.models.layers import Encoder
from aecore.models.prepare import Prepare
from aecore.stages.context import Run, held

_RESIDENT_BYTES = 2**30
"""Largest set kept on the device as the floats that a layer reads."""
_PREPARED_BYTES = 2**26
"""The same on a CPU where only the preprocessing is spared, which costs a step next to nothing."""


def prepared(data: Arrays | Stream, device: torch.device) -> Prepare:
    """The preprocessing of a data set, on `device`."""
    return Prepare(torch.tensor(data.shift), torch.tensor(data.scale)).to(device)


def _rows(
    data: Arrays | Stream, read: nn.Module, run: Run, features: int, labelled: bool
) -> tuple[tuple[Tensor, ...] | Shuffled, tuple[Tensor, ...], nn.Module]:
    """Training and validation rows to cut batches from, and what makes of a batch what the trained layer reads.

    A small set lies on the device as `read` makes it, `features` floats a row, once for all epochs. A larger one lies
    there as it came (uint8 stays uint8; on a CPU, where it came) and is read batch by batch; one that takes more than
    half of the device's free memory stays in pinned host memory; one that is larger than memory is streamed, but for
    the validation rows.
    """
    read.eval()
    coded = any(isinstance(module, Encoder) for module in read.modules())
    here = held(data)

    def beside(x: Tensor, split: Split) -> tuple[Tensor, ...]:
        """The labels, where they are used, beside the rows, so that one index cuts both."""
        return (x, torch.tensor(split.y, device=x.device)) if labelled else (x,)

    needed = 4 * features * (len(here.train.x) + len(here.validation.x))
    if run.device.type == "cuda":
        room = torch.cuda.mem_get_info(run.device)[0] // 2
    else:
        room = _RESIDENT_BYTES if coded else _PREPARED_BYTES
    if isinstance(data, Stream):
        validation = torch.tensor(here.validation.x).to(run.device)
        return Shuffled(data, labelled, run.spread), beside(validation, here.validation), read
    if needed <= min(room, _RESIDENT_BYTES):
        train, validation = (over_batches(read, split.x, run.device) for split in (here.train, here.validation))
        read = nn.Identity()
    else:
        train, validation = _in_place(here.train.x), _in_place(here.validation.x)
        if run.device.type == "cuda" and train.nbytes + validation.nbytes > room:
            train, validation = train.pin_memory(), validation.pin_memory()
        else:
            train, validation = train.to(run.device), validation.to(run.device)
    return beside(train, here.train), beside(validation, here.validation), read


def _in_place(rows: np.ndarray) -> Tensor:
    """A tensor of the same memory, which may be the object store's, read by others: nothing may write to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an array that cannot be written to
        return torch.from_numpy(rows)
