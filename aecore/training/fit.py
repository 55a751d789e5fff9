"""The training loop; every training stage uses it."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aecore.core.types import Terms
from aecore.training import graphs
from aecore.training.batches import Part, check_batch_size, epoch_of, fewest_rows
from aecore.training.job import Fitted, Job
from aecore.training.memory import halve
from aecore.training.numerics import Autocast, numerics, own_random_state, set_random_state
from aecore.training.optimizer import AdamW, trained_parameters
from aecore.training.progress import Progress
from aecore.training.team import ALONE
from aecore.training.totals import Totals, check_finite
from aecore.training.validation import Validation

_CHECK_STEPS = 100
"""Steps between two checks for numbers that are not finite, on a GPU, where a check waits for the device."""
_FLUSH_STEPS = 100
"""Steps between two calls of `AdamW.flush`."""


def fit(job: Job) -> Fitted:
    """Train the job's model in place and leave it with the weights of its best epoch on validation, in eval mode.

    Nothing in a step waits for the device. A last batch of a single row is left out, since batch statistics need two. A
    fit that goes on from a checkpoint ends with the numbers of an unbroken fit, to the bit on one CPU worker.
    Afterwards torch's random generators are as before.

    Raises:
        DivergenceError: a term of the loss was not finite; a CPU raises it at that very step, others some steps later.
        MemoryError: not even half a batch fits. When a whole batch does not fit, batches are cut in two from then on
            and the gradients of the halves are added up; `parts` in the history says so.
        InputError: batches are too small for batch normalisation.
    """
    check_batch_size(job)
    with own_random_state(job.device), numerics(job.precision, job.device) as autocast:
        if job.random is not None:
            set_random_state(job.random, job.device)
        single = _SingleFit(job, autocast)
        try:
            train(single, job.device)
            return single.progress.end()
        finally:
            single.release()


class Trainee(Protocol):
    """One fit, or several fits that are trained together as one; `train` takes them through their epochs.

    `begin_epoch` returns the batches of an epoch, `learn` takes a step, `check` looks for numbers that are not finite
    (and waits for the device), `end_epoch` scores the validation rows and reports the epoch.
    """

    @property
    def is_over(self) -> bool: ...
    def begin_epoch(self) -> Iterable[Any]: ...
    def learn(self, step: int, batch: Any) -> None: ...
    def check(self, step: int) -> None: ...
    def end_epoch(self, started_at: float) -> None: ...


def train(trainee: Trainee, device: torch.device) -> None:
    """Train epoch by epoch until the trainee is over."""
    while not trainee.is_over:
        started_at = time.perf_counter()
        for step, batch in enumerate(trainee.begin_epoch()):
            trainee.learn(step, batch)
            if device.type == "cpu" or step % _CHECK_STEPS == 0:
                trainee.check(step)
        trainee.end_epoch(started_at)


class _SingleFit:
    """One fit, with its optimiser, progress, validation and sums, which `train` takes through its epochs."""

    def __init__(self, job: Job, autocast: Autocast) -> None:
        self.job, self.autocast = job, autocast
        self.optimizer = AdamW(trained_parameters(job.model), job.spec.weight_decay)
        self.progress = Progress(job, self.optimizer)
        self.validation = Validation(job, autocast)
        self.objective: Callable[..., Terms] = job.objective
        if job.compile:
            self.objective = torch.compile(job.objective.__call__)
        self.parts, self.fewest_rows = self.progress.parts, fewest_rows(job.model)
        self.steps, self.steps_before, self.batch_rows = 0, 0, job.batch_rows
        """Number of steps of the present epoch, and of those before it, and of rows of a whole batch."""
        self.totals, self.rows, self.rate = Totals(), 0, 0.0
        if job.team.size > 1:
            self._join_team()
        # a replayed step reads the learning rate from this tensor; a GPU's kernel of AdamW wants single precision
        dtype = torch.float32 if job.device.type == "cuda" else torch.float64
        self.rate_on_device = torch.zeros((), device=job.device, dtype=dtype)
        self.replayed: Callable[..., None] | None = None
        if graphs.can_be_captured(job):
            self.replayed = graphs.Replayed(lambda *batch: self.step(self.rate_on_device, Part(batch, 1.0)))

    @property
    def is_over(self) -> bool:
        return self.progress.is_over

    def begin_epoch(self) -> Iterable[Part]:
        self.job.model.train()
        self.totals.clear()
        self.rows, epoch = 0, self.progress.epoch
        self.steps, self.steps_before = self.job.steps_in(epoch), self.job.steps_before(epoch)
        return epoch_of(self.job, epoch, self.progress.shuffle)

    def learn(self, step: int, part: Part) -> None:
        """Take a step, replayed as a CUDA graph where possible."""
        if self.job.device.type == "cpu" and (self.steps_before + step) % _FLUSH_STEPS == 0:
            self.optimizer.flush()
        self.rate = self.progress.rate(step / self.steps)
        self.rows += part.rows
        if self.replayed is not None and self.parts == 1 and part.rows == self.batch_rows:
            self.rate_on_device.fill_(self.rate)
            try:
                return self.replayed(*part.tensors)
            except (MemoryError, RuntimeError) as error:
                self.parts = self._fewer_rows(error, part.rows)
        self.step(self.rate, part)

    def step(self, rate: float | Tensor, part: Part) -> None:
        """Compute the loss and its gradients, update the weights, and add the loss terms to the epoch's totals."""
        self.optimizer.zero_grad()
        if part.rows:
            self.totals.add(self._backward(part), part.rows)
        self.optimizer.sum_gradients(self.job.team)
        if self.job.spec.clip is not None:
            nn.utils.clip_grad_norm_(self.optimizer.parameters, self.job.spec.clip)
        self.optimizer.step(rate)

    def check(self, step: int) -> None:
        check_finite(self.totals.sums, f"in epoch {self.progress.epoch}, batch {step + 1}", self.progress.saved)

    def end_epoch(self, started_at: float) -> None:
        job = self.job
        job.team.average_statistics(job.model, self.rows)
        losses = self.totals.means(self.rows, job.team)
        scores, sums = self.validation.score(job.objective.scored)
        seconds = time.perf_counter() - started_at
        self.progress.end_epoch(losses, scores, sums, self.rate, seconds, self.parts)

    def release(self) -> None:
        """Drop the gradients and the graph, which refers to this object, so that a GPU's memory is freed at once."""
        self.optimizer.zero_grad()
        self.replayed = None

    def _backward(self, part: Part) -> Terms:
        """Add the gradients of a batch and return its loss terms; if memory runs out, batches are cut from then on."""
        weight = part.share if self.job.team.size > 1 else 1.0
        while True:
            parts = max(1, min(self.parts, part.rows // self.fewest_rows))
            try:
                return _gradients(self.objective, part.tensors, weight, self.autocast, parts)
            except (MemoryError, RuntimeError) as error:
                self.parts = self._fewer_rows(error, part.rows)
            self.optimizer.zero_grad()  # here, since inside `except` the error still holds the tensors that did not fit

    def _fewer_rows(self, error: Exception, rows: int) -> int:
        """Return the number of parts into which batches are cut after `error`, which is a lack of memory."""
        advice = "lower batch_size or the widths"
        return halve(error, self.parts, rows, "rows", advice, can_be_cut=rows >= 2 * self.fewest_rows)

    def _join_team(self) -> None:
        """Seed this worker's noise differently from the other workers', and learn the names of the loss terms, which a
        worker needs even if its parts of the batches are empty."""
        job = self.job
        if job.team.rank:
            torch.manual_seed(job.seed + job.team.rank + len(self.progress.history))
        row = replace(job, validation=tuple(tensor[:1] for tensor in job.validation), team=ALONE)
        names, _ = Validation(row, self.autocast).score(job.objective.scored)
        self.totals.add({name: torch.zeros((), device=job.device) for name in names}, 0)


def _gradients(
    objective: Callable[..., Terms], batch: tuple[Tensor, ...], weight: float, autocast: Autocast, parts: int
) -> Terms:
    """Add the gradients of a batch, cut into `parts` and times `weight`, to `.grad`; return the batch's loss terms."""
    terms: Terms = {}
    for part in zip(*(tensor.tensor_split(parts) for tensor in batch), strict=True) if parts > 1 else (batch,):
        with autocast():
            losses = objective(*part)
        share = len(part[0]) / len(batch[0])
        loss = reduce(add, losses.values())
        (loss * (weight * share) if weight * share != 1 else loss).backward()
        terms = {n: value.detach() * share + terms.get(n, 0) for n, value in losses.items()} if parts > 1 else losses
    return terms
