"""The device of a process: the GPU that Ray has given it, or the CPU."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aecore.core.errors import DeviceError
from pipelines.cluster.share import Share
from pipelines.host.messages import one_line, say

if TYPE_CHECKING:
    import torch

FAKE_GPUS = "DIABOLO_FAKE_GPUS"
"""Environment variable of the driver; 1 says that the cluster's GPUs are only pretended, as by `ray start --num-gpus`
on a machine without any, so that stages compute on the CPU. For tests of how stages are placed."""


def are_fake() -> bool:
    """Return whether the environment says that the cluster's GPUs are only pretended."""
    return os.environ.get(FAKE_GPUS) == "1"


def device_of(share: Share, fake: bool) -> "torch.device":
    """Return the device on which this process computes: its GPU, which becomes torch's current one, or the CPU.

    Args:
        fake: Whether the cluster's GPUs are only pretended.

    Raises:
        DeviceError: the GPU cannot be used. Training on the CPU instead would be slow without anybody knowing why.
    """
    import torch

    if not share.gpus or fake:
        return torch.device("cpu")
    import ray

    given = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    try:
        device = torch.device("cuda", position_of(given, os.environ.get("CUDA_VISIBLE_DEVICES")))
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
        free, total = torch.cuda.mem_get_info(device)
    except torch.OutOfMemoryError as error:
        # a ConnectionError is tried again after a pause, when whoever fills the GPU may have ended
        where = f"GPU {', '.join(given)} of {os.uname().nodename}"
        raise ConnectionError(f"{where} is full: {one_line(error, 200)}") from None
    except (AssertionError, RuntimeError, ValueError) as error:  # torch without CUDA asserts
        raise DeviceError(
            f"a stage was given GPU {', '.join(given) or '?'} of {os.uname().nodename} and cannot use it: "
            f"{one_line(error, 300)}; mend the driver, or ask for no GPU (gpus 0) to compute on CPUs; where the GPUs "
            f"are only pretended, set {FAKE_GPUS}=1"
        ) from None
    own = torch.cuda.memory_reserved(device)
    if free + own < share.gpus * total / 2:
        say(
            f"warning: {free / 2**30:.1f} GiB of the GPU's {total / 2**30:.0f} are free, less than half of what a "
            f"share of {share.gpus:g} stands for; other programs use it, or resources.gpus is too small elsewhere"
        )
    return device


def position_of(given: Sequence[str], visible: str | None) -> int:
    """Return the place of the given GPU among those that this process sees.

    Args:
        given: Ray's ids of the GPUs that the process was given; the first is used.
        visible: The value of CUDA_VISIBLE_DEVICES, which Ray sets to what it gives unless it is told not to.

    Raises:
        ValueError: The process does not see the GPU.
    """
    seen = [one for one in (visible or "").split(",") if one]
    return seen.index(given[0]) if seen else int(given[0])
