"""Fits that differ only in numbers (seeds, learning rates, weights of loss terms, noise levels), trained as one.

Their weights are stacked and their losses vmapped, so that a GPU trains many in the time of a few: a single small
model's step keeps the GPU busy with launches alone. Each fit keeps its own order of rows, learning rates, best epoch,
checkpoints and end. Its numbers are those of `fit` up to rounding, except that noise, dropout and samples are drawn for
all fits at once, from the same distribution.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from aecore.core.errors import DivergenceError
from aecore.core.types import Terms
from aecore.training import graphs
from aecore.training.batches import permutation
from aecore.training.fit import train
from aecore.training.job import Fitted, Job
from aecore.training.memory import is_out_of_memory
from aecore.training.numerics import Autocast, numerics, own_random_state, set_random_state
from aecore.training.objective import Objective
from aecore.training.optimizer import AdamW, trained_parameters
from aecore.training.progress import Progress, schedule
from aecore.training.team import ALONE
from aecore.training.totals import Totals, check_finite
from aecore.training.validation import Validation

Outcome = Fitted | Exception
_MODEL = "model."
"""Prefix of the trained model's tensors among the names of an objective's tensors."""


def fit_as_one(jobs: Sequence[Job]) -> list[Outcome]:
    """Train several jobs as one; return for each job its `Fitted`, or the exception that it ended in. The jobs must
    have the same `group_key`.

    A fit that ends before the others is still computed, but its numbers are ignored. Seconds in the histories are each
    fit's share. An error that concerns all fits, such as a lack of memory, is raised; no model is changed then, except
    by the checkpoint that it went on from.
    """
    device = jobs[0].device
    outcomes: dict[int, Outcome] = {}
    with own_random_state(device), numerics(jobs[0].precision, device) as autocast:
        if jobs[0].random is not None:
            set_random_state(jobs[0].random, device)
        progresses: dict[int, Progress] = {}
        for number, job in enumerate(jobs):
            try:
                progresses[number] = Progress(job, AdamW(trained_parameters(job.model), job.spec.weight_decay))
            except Exception as error:  # raised by a report of earlier epochs, for example: it concerns this fit alone
                outcomes[number] = error
        if progresses:
            stack = _StackedFits(list(progresses.values()), autocast)
            try:
                train(stack, device)
                outcomes |= dict(zip(progresses, stack.end(), strict=True))
            finally:
                stack.release()
    return [outcomes[number] for number in range(len(jobs))]


class ObjectiveModules(nn.Module):
    """The modules of an objective, as one module that is called with any function of a batch that uses them.

    `torch.func.functional_call` can then call the function with other tensors in place of the modules' own.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.model, self.read = objective.model, objective.read

    def forward(self, fn: Callable[..., Any], *batch: Tensor) -> Any:
        return fn(*batch)


class _StackedFits:
    """Several fits whose tensors lie in stacks, (fits, ...); `train` takes them through their epochs as one."""

    def __init__(self, progresses: Sequence[Progress], autocast: Autocast) -> None:
        self.progresses = progresses
        self.jobs = [progress.job for progress in progresses]
        self.first = self.jobs[0]
        self.modules = ObjectiveModules(self.first.objective)
        parameters, buffers = stack_module_state([ObjectiveModules(job.objective) for job in self.jobs])
        self.trained = {name: value.detach() for name, value in parameters.items() if value.requires_grad}
        frozen = {name: value for name, value in parameters.items() if not value.requires_grad}
        self.rest = frozen | buffers
        self.optimizer = StackedAdamW(self.jobs, list(self.trained.values()))
        self.optimizer.load_states([progress.snapshot()[1] for progress in progresses])
        for number, progress in enumerate(progresses):
            progress.snapshot = partial(self._snapshot, number)
        self.numbers = _different_numbers(self.jobs)
        self.train_rows = [_stack_rows(same, 0) for same in zip(*(job.in_memory for job in self.jobs), strict=True)]
        held = [_stack_rows(same, 1) for same in zip(*(job.validation for job in self.jobs), strict=True)]
        self.validation = Validation(replace(self.first, validation=tuple(x for x, _ in held)), autocast)
        self.validation_dims = [dim for _, dim in held]
        self.fits = torch.arange(len(self.jobs), device=self.first.device)[:, None]
        self.gradients = vmap(grad(self._loss, has_aux=True), randomness="different")
        self.steps = -(-self.first.rows // self.first.spec.batch_size)
        self.totals, self.failures = Totals(), dict[int, Exception]()
        self.order, self.rates = torch.zeros(0), torch.zeros(0)
        self.whole_step = graphs.Replayed(self.step) if graphs.can_be_captured(self.first) else self.step

    def live(self) -> list[int]:
        """Return the numbers of the fits that have not ended."""
        return [i for i, progress in enumerate(self.progresses) if i not in self.failures and not progress.is_over]

    @property
    def is_over(self) -> bool:
        return not self.live()

    def begin_epoch(self) -> Iterable[Tensor]:
        """Return the batches of an epoch, each as the row numbers of every fit's batch, (fits, batch)."""
        self.first.model.train()
        self.totals.clear()
        spec, device, live = self.first.spec, self.first.device, self.live()
        orders = {i: permutation(self.first.rows, spec.batch_size, self.progresses[i].shuffle) for i in live}
        ended = orders[live[0]]  # a fit that has ended may read any rows
        self.order = torch.stack([orders.get(i, ended) for i in range(len(self.jobs))]).to(device)
        self.rates = _learning_rates(self.progresses, self.steps).to(device)
        return self.order.split(spec.batch_size, 1)

    def learn(self, step: int, index: Tensor) -> None:
        whole = index.shape[1] == self.first.spec.batch_size
        (self.whole_step if whole else self.step)(index, self.rates[step])

    def step(self, index: Tensor, rates: Tensor) -> None:
        """Take one step of all fits.

        Args:
            index: row numbers of each fit's batch, (fits, batch).
            rates: learning rates, (fits,).
        """
        batch = (rows[index] if dim is None else rows[self.fits, index] for rows, dim in self.train_rows)
        gradients, losses = self.gradients(self.trained, self.rest, self.numbers, *batch)
        self.totals.add(losses, index.shape[1])
        self.optimizer.step(list(gradients.values()), rates)

    def check(self, step: int) -> None:
        sums = {name: total.tolist() for name, total in self.totals.sums.items()}
        for i in self.live():
            progress = self.progresses[i]
            try:
                own = {name: values[i] for name, values in sums.items()}
                check_finite(own, f"in epoch {progress.epoch}, batch {step + 1}", progress.saved)
            except DivergenceError as error:
                self.failures[i] = error

    def end_epoch(self, started_at: float) -> None:
        live = self.live()
        means = self.totals.means(self.order.shape[1], ALONE)
        dims = (0, 0, 0, *self.validation_dims)
        scored = vmap(partial(self._call, True), in_dims=dims, randomness="different")
        scores, sums = self.validation.score(lambda *batch: scored(self.trained, self.rest, self.numbers, *batch))
        seconds = (time.perf_counter() - started_at) / max(len(live), 1)
        for i in live:
            progress = self.progresses[i]
            losses, held, beside = ({n: values[i] for n, values in each.items()} for each in (means, scores, sums))
            rate = progress.rate((self.steps - 1) / self.steps)
            try:
                progress.end_epoch(losses, held, beside, rate, seconds)
            except Exception as error:  # raised by a report, for example: it concerns this fit alone
                if is_out_of_memory(error):
                    raise
                self.failures[i] = error

    def end(self) -> list[Outcome]:
        """Leave each model with its best weights, and return the outcome of each fit."""
        return [self.failures.get(i) or progress.end() for i, progress in enumerate(self.progresses)]

    def release(self) -> None:
        """Drop the functions that refer to this object, so that a GPU's memory is freed at once."""
        del self.gradients, self.whole_step
        for progress in self.progresses:
            del progress.snapshot

    def _snapshot(self, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return one fit's weights and its optimiser's state, which are slices of the stacks."""
        state = {name: value[number] for name, value in (self.trained | self.rest).items()}
        weights = {name.removeprefix(_MODEL): value for name, value in state.items() if name.startswith(_MODEL)}
        return weights, self.optimizer.state_dict(number)

    def _call(self, scored: bool, trained: Any, rest: Any, numbers: Any, *batch: Tensor) -> Any:
        """Call the objective of one fit, or its `scored`, with the fit's tensors and numbers."""
        objective = self.first.objective
        if numbers:
            assert objective.variant is not None
            objective = replace(objective, variant=objective.variant.model_copy(update=numbers))
        return functional_call(self.modules, trained | rest, (objective.scored if scored else objective, *batch))

    def _loss(self, trained: Any, rest: Any, numbers: Any, *batch: Tensor) -> tuple[Tensor, Terms]:
        losses = self._call(False, trained, rest, numbers, *batch)
        return reduce(add, losses.values()), losses


class StackedAdamW:
    """AdamW for stacked weights: each fit has its own learning rate, decay and clipping.

    The kernel knows a single learning rate. So it updates zeros at a rate of 1, and the result times each fit's rate is
    the update of the weights.
    """

    def __init__(self, jobs: Sequence[Job], weights: list[Tensor]) -> None:
        self.weights, device = weights, weights[0].device
        self.kernel = AdamW([torch.zeros_like(value) for value in weights], 0.0)
        decays, clips = ([getattr(job.spec, name) for job in jobs] for name in ("weight_decay", "clip"))
        self.decays = torch.tensor(decays, device=device) if any(decays) else None
        limits = [float("inf") if clip is None else clip for clip in clips]
        self.limits = torch.tensor(limits, device=device) if any(clips) else None

    @torch.no_grad()
    def step(self, gradients: list[Tensor], rates: Tensor) -> None:
        """Update the weights by gradients, (fits, ...) each, at the learning rates (fits,)."""
        if self.limits is not None:  # as torch.nn.utils.clip_grad_norm_ does
            norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
            scales = (self.limits / (norms + 1e-6)).clamp(max=1)
            gradients = [g * _along(scales, g) for g in gradients]
        for update, gradient in zip(self.kernel.parameters, gradients, strict=True):
            update.zero_()
            update.grad = gradient.contiguous()  # the kernel goes by addresses; vmap may leave dimensions permuted
        self.kernel.step(1.0)
        for weight, update in zip(self.weights, self.kernel.parameters, strict=True):
            if self.decays is not None:
                weight.mul_(_along(1 - rates * self.decays, weight))
            weight.addcmul_(update, _along(rates, weight))

    def state_dict(self, number: int) -> dict[str, Tensor]:
        """Return the state of one fit's optimiser; the count of steps is the same for all."""
        return {name: x if name == "steps" else x[number] for name, x in self.kernel.state_dict().items()}

    def load_states(self, states: Sequence[Any]) -> None:
        """Go on from each fit's state; all fits have taken the same number of steps."""
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        self.kernel.load_state_dict(stacked | {"steps": states[0]["steps"]})


def _stack_rows(each: Sequence[Tensor], dim: int) -> tuple[Tensor, int | None]:
    """Return the rows of several fits, stacked along `dim`; or the rows and None, if all fits read the same rows."""
    return (each[0], None) if all(other is each[0] for other in each) else (torch.stack(list(each), dim), dim)


def _along(values: Tensor, other: Tensor) -> Tensor:
    """Reshape `values` (fits,) to be multiplied with `other` (fits, ...)."""
    return values.view(-1, *[1] * (other.dim() - 1))


def _learning_rates(progresses: Sequence[Progress], steps: int) -> Tensor:
    """Return the learning rates of an epoch, (steps, fits)."""
    columns: dict[Any, Tensor] = {}
    rates = []
    for progress in progresses:
        spec = progress.job.spec
        key = spec.schedule, spec.warmup, spec.epochs, progress.epoch
        if key not in columns:
            columns[key] = torch.tensor([schedule(spec, progress.epoch - 1 + step / steps) for step in range(steps)])
        rates.append(columns[key] * (spec.lr * progress.plateau.scale))
    return torch.stack(rates, 1)


def _different_numbers(jobs: Sequence[Job]) -> dict[str, Tensor]:
    """Return the real hyperparameters of the variants that are not the same in all jobs, (fits,) each."""
    variants = [job.objective.variant for job in jobs]
    values = {name: [getattr(variant, name) for variant in variants] for name in real_fields(variants[0])}
    device = jobs[0].device
    return {name: torch.tensor(v, device=device, dtype=torch.float32) for name, v in values.items() if len(set(v)) > 1}


def real_fields(variant: Any) -> list[str]:
    """Return the names of a variant's fields that are real numbers; none without a variant."""
    return [name for name, value in (variant or ()) if isinstance(value, float)]
