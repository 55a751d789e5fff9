"""The sizes of what `python -m tests.gpu` runs: whole on a GPU, tiny on a CPU, where only the harness is tested."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from aecore.core.types import Precision
from aecore.stages.context import Context


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The device and the sizes of all parts."""

    device: torch.device
    captures: bool
    """Whether every step has to be captured as a CUDA graph."""
    precisions: tuple[Precision, ...]
    check_rows: int
    """Training rows of a check; not a multiple of the batch size, so that the last batch of an epoch is short."""
    check_epochs: int
    rows: int
    """Training rows of the parts that measure seconds."""
    held: int
    """Their validation rows."""
    epochs: tuple[int, int]
    """Epochs of each layer of the textbook's pipeline, and of its finetuning."""
    seeds: int
    """Number of fits that are trained as one."""
    seed_epochs: int
    seeds_alone: Mapping[Precision, int] = field(default_factory=dict)
    """Precisions in which seeds are trained as one, and how many seeds are trained one after another as well. Their
    mean is taken for all seeds, since 32 of them take half a minute."""
    stages: int
    """Number of stages that run one after another in this process."""
    tiny_jobs: bool
    """Whether jobs run for an epoch or two with few rows."""

    @property
    def context(self) -> Context:
        """The context of a stage on the device."""
        return Context(device=self.device)

    @property
    def everywhere(self) -> bool:
        """Whether fits have to be asked to train as one, which only a GPU gains by."""
        return self.device.type != "cuda"

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


GPU = Scale(
    device=torch.device("cuda"), captures=True, precisions=("fp32", "tf32", "bf16"), check_rows=416, check_epochs=3,
    rows=50_000, held=10_000, epochs=(10, 15), seeds=32, seed_epochs=10, seeds_alone={"fp32": 8, "tf32": 4},
    stages=100, tiny_jobs=False,
)  # fmt: skip
CPU = Scale(
    device=torch.device("cpu"), captures=False, precisions=("fp32", "bf16"), check_rows=148, check_epochs=2, rows=200,
    held=100, epochs=(1, 1), seeds=3, seed_epochs=1, seeds_alone={"fp32": 2}, stages=12, tiny_jobs=True,
)  # fmt: skip
