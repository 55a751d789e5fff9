"""How far a fit has come: its history, best weights, learning rate and end, and its checkpoints."""

import math
import time
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aecore.config.experiment import Fit
from aecore.training.job import Fitted, Job
from aecore.training.numerics import RandomState, get_random_state, set_random_state
from aecore.training.optimizer import AdamW
from aecore.training.totals import check_finite

_PLATEAU_EPOCHS, _PLATEAU_FACTOR = 3, 0.5
"""After this number of epochs without a better loss, `plateau` multiplies the learning rate by the factor."""


def schedule(spec: Fit, epochs: float) -> float:
    """Return the learning rate after `epochs` epochs, which may be a fraction, as a share of the peak learning rate."""
    if epochs < spec.warmup:
        # the very first step already moves: it is taken a thousandth of an epoch after the foot of the ramp
        return max(epochs, 1e-3) / spec.warmup
    if spec.schedule != "cosine":
        return 1.0
    done = (epochs - spec.warmup) / max(spec.epochs - spec.warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


Snapshot = Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
"""Returns a fit's weights, by the names of the model's `state_dict`, and its optimiser's state, both not as copies."""


class Plateau(NamedTuple):
    """The state of the schedule `plateau`."""

    scale: float = 1.0
    """Factor on the learning rate."""
    best: float = float("inf")
    """The lowest validation loss."""
    bad: int = 0
    """Number of epochs since the lowest loss, or since the learning rate was lowered."""

    def after(self, loss: float) -> "Plateau":
        """Return the state after an epoch with this validation loss."""
        if loss < self.best:
            return Plateau(self.scale, loss)
        if self.bad + 1 < _PLATEAU_EPOCHS:
            return Plateau(self.scale, self.best, self.bad + 1)
        return Plateau(self.scale * _PLATEAU_FACTOR, self.best)


class Progress:
    """The state of one fit, which decides the learning rate of a step, the best weights and the end.

    A fit goes on from its newest checkpoint, if there is one, and reports the epochs before the checkpoint again.

    Args:
        optimizer: the optimiser of the job's model, which goes on from the checkpoint as well.
    """

    def __init__(self, job: Job, optimizer: AdamW) -> None:
        self.job = job
        model = job.model  # the function below must not keep this object alive
        self.snapshot: Snapshot = lambda: (model.state_dict(), optimizer.state_dict())
        self.shuffle = torch.Generator().manual_seed(job.seed)
        self.history: list[dict[str, float]] = []
        self.best: tuple[float, float] | None = None
        self.best_epoch, self.best_weights, self.plateau = 0, dict[str, Tensor](), Plateau()
        self.parts = job.parts
        self.saved = ""
        """Text about the newest checkpoint, for error messages."""
        self._resume(optimizer)
        writes = job.checkpoints is not None and job.team.rank == 0
        self._due = job.checkpoints.clock() if job.checkpoints is not None and writes else repeat(False)

    @property
    def epoch(self) -> int:
        """The number of the epoch to come, from 1."""
        return len(self.history) + 1

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done, or the validation score has not improved for `patience` epochs."""
        done, patience = len(self.history), self.job.spec.patience
        return done >= self.job.spec.epochs or (patience is not None and done - self.best_epoch >= patience)

    def rate(self, share: float) -> float:
        """Return the learning rate at the fraction `share` of the next epoch."""
        spec = self.job.spec
        return spec.lr * schedule(spec, self.epoch - 1 + min(share, 1)) * self.plateau.scale

    def end_epoch(
        self, losses: Mapping[str, float], scores: Mapping[str, float], sums: Mapping[str, float], rate: float,
        seconds: float, parts: int = 1,
    ) -> None:  # fmt: skip
        """Report an epoch, keep its weights if they are the best, and write a checkpoint if one is due.

        The arguments and errors are those of `record`.
        """
        self.record(losses, scores, sums, rate, seconds, parts)
        if self.improved:
            self.best_weights = {name: value.detach().clone() for name, value in self.snapshot()[0].items()}
        self.save_if_due(parts)

    def record(
        self, losses: Mapping[str, float], scores: Mapping[str, float], sums: Mapping[str, float], rate: float,
        seconds: float, parts: int = 1,
    ) -> None:  # fmt: skip
        """Report an epoch and decide by its scores whether it is the best, and how the learning rate goes on.

        Args:
            losses: terms of the loss, means over the training rows.
            scores, sums: terms of the loss and further measures, means over the validation rows.
            rate: learning rate of the last step.

        Raises:
            DivergenceError: a number is not finite.
        """
        epoch = self.epoch
        metrics = {f"train/{name}": value for name, value in losses.items()}
        metrics["train/loss"] = sum(metrics.values())
        scores = {**scores, "loss": sum(scores.values()), **sums}
        metrics |= {f"val/{name}": value for name, value in scores.items()}
        check_finite(metrics, f"in epoch {epoch}", self.saved)
        if parts > 1:
            metrics["parts"] = parts
        metrics["lr"], metrics["seconds"], metrics["time"] = rate, seconds, time.time()
        self.history.append(metrics)
        self.job.report(epoch, metrics)

        score = (scores[self.job.monitor], scores["loss"])
        if self.best is None or score < self.best:
            self.best, self.best_epoch = score, epoch
        if self.job.spec.schedule == "plateau":
            self.plateau = self.plateau.after(scores["loss"])

    @property
    def improved(self) -> bool:
        """Whether the last epoch is the best so far."""
        return self.best_epoch == len(self.history)

    def save_if_due(self, parts: int = 1) -> None:
        """Write a checkpoint if one is due after the last epoch."""
        # the checkpoint after the last epoch serves if the result is lost before it is stored
        if next(self._due) or (self.is_over and self.job.team.rank == 0):
            self._save(parts)

    def end(self) -> Fitted:
        """Leave the model with its best weights, in eval mode."""
        self.job.model.load_state_dict(self.best_weights)
        self.job.model.eval()
        return Fitted(self.history, self.best_epoch)

    def _save(self, parts: int) -> None:
        """Write a checkpoint: everything that the next epoch depends on."""
        checkpoints, epoch = self.job.checkpoints, len(self.history)
        if checkpoints is None:
            return
        weights, optimizer = self.snapshot()
        random = get_random_state(self.job.device)
        tensors = {"rng.shuffle": self.shuffle.get_state(), "rng.torch": random.cpu}
        if random.gpu is not None:
            tensors["rng.cuda"] = random.gpu
        tensors |= _prefixed("model.", weights) | _prefixed("best.", self.best_weights) | _prefixed("adam.", optimizer)
        state = {
            "history": self.history, "best": self.best, "best_epoch": self.best_epoch, "plateau": self.plateau,
            "parts": parts,
        }  # fmt: skip
        arrays: dict[str, np.ndarray] = {name: value.detach().cpu().numpy() for name, value in tensors.items()}
        checkpoints.save(epoch, state, arrays)
        self.saved = f"; epoch {epoch} is kept in {checkpoints.place}"

    def _resume(self, optimizer: AdamW) -> None:
        """Go on from the newest checkpoint and report its epochs; do nothing without one."""
        checkpoints = self.job.checkpoints
        checkpoint = checkpoints.load() if checkpoints is not None else None
        if checkpoints is None or checkpoint is None:
            return
        (state, arrays), device = checkpoint, self.job.device
        self.history, self.best_epoch = state["history"], state["best_epoch"]
        self.best, self.plateau = (state["best"][0], state["best"][1]), Plateau(*state["plateau"])
        self.parts = max(self.parts, state["parts"])
        tensors = {name: torch.tensor(value) for name, value in arrays.items()}
        self.job.model.load_state_dict(_without("model.", tensors))
        optimizer.load_state_dict(_without("adam.", tensors))
        self.best_weights = {name: value.to(device) for name, value in _without("best.", tensors).items()}
        self.shuffle.set_state(tensors["rng.shuffle"])
        gpu = tensors.get("rng.cuda") if device.type == "cuda" else None
        set_random_state(RandomState(tensors["rng.torch"], gpu), device)
        self.saved = f"; epoch {len(self.history)} is kept in {checkpoints.place}"
        for number, metrics in enumerate(self.history, 1):
            self.job.report(number, metrics)


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
