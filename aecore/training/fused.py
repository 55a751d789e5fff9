"""Fits that differ only in numbers (seeds, learning rates, weights of loss terms, noise levels), trained as one.

Their weights are stacked and their losses vmapped, so that a GPU trains many in the time of a few: a single small
model's step keeps the GPU busy with launches alone. Each fit keeps its own order of rows, learning rates, best epoch,
checkpoints and end. Its numbers are those of `fit` up to rounding, except that noise, dropout and samples are drawn for
all fits at once, from the same distribution.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from aecore.config.experiment import Fit
from aecore.core.errors import without_frames
from aecore.training import graphs
from aecore.training.batches import row_order
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
                outcomes[number] = without_frames(error)
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
        self.progresses, self.autocast = progresses, autocast
        self.jobs = [progress.job for progress in progresses]
        self.first = self.jobs[0]
        self.modules = ObjectiveModules(self.first.objective)
        parameters, buffers = stack_module_state([ObjectiveModules(job.objective) for job in self.jobs])
        self.trained = {name: _by_columns(value) for name, value in parameters.items() if value.requires_grad}
        self.rest = {name: value for name, value in (parameters | buffers).items() if name not in self.trained}
        self.optimizer = StackedAdamW(self.jobs, list(self.trained.values()))
        self.weights = {
            name.removeprefix(_MODEL): value.detach()
            for name, value in (self.trained | self.rest).items()
            if name.startswith(_MODEL)
        }
        self.best = {name: value.clone() for name, value in self.weights.items()}
        self._lead_progresses()
        self.numbers = _different_numbers(self.jobs)
        self.train_rows = [_stack_rows(same, 0) for same in zip(*(job.in_memory for job in self.jobs), strict=True)]
        held = [_stack_rows(same, 1) for same in zip(*(job.validation for job in self.jobs), strict=True)]
        self.validation = Validation(replace(self.first, validation=tuple(x for x, _ in held)), autocast)
        self.validation_dims = [dim for _, dim in held]
        self.fits = torch.arange(len(self.jobs), device=self.first.device)[:, None]
        self.steps = 0
        """Number of steps of the present epoch."""
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
        device, live = self.first.device, self.live()
        epoch = self.progresses[live[0]].epoch
        self.steps = self.first.steps_in(epoch)
        orders = {i: row_order(self.jobs[i], epoch, self.progresses[i].shuffle) for i in live}
        ended = orders[live[0]]  # a fit that has ended may read any rows
        self.order = torch.stack([orders.get(i, ended) for i in range(len(self.jobs))]).to(device)
        leading = [self.progresses[live[0]]] if self.optimizer.one_rate else self.progresses
        self.rates = _learning_rates(leading, self.steps).to(device)
        return self.order.split(self.first.batch_rows, 1)

    def learn(self, step: int, index: Tensor) -> None:
        whole = index.shape[1] == self.first.batch_rows
        (self.whole_step if whole else self.step)(index, self.rates[step])

    def step(self, index: Tensor, rates: Tensor) -> None:
        """Take one step of all fits.

        Args:
            index: row numbers of each fit's batch, (fits, batch).
            rates: learning rates, (fits,), or the one rate of all fits, (1,).
        """
        batch = (rows[index] if dim is None else rows[self.fits, index] for rows, dim in self.train_rows)
        self.optimizer.zero_grad()
        with self.autocast():
            losses = vmap(partial(self._call, False), randomness="different")(
                self.trained, self.rest, self.numbers, *batch
            )  # fmt: skip
        # a fit's weights have no part in the other fits' losses, so the sum gives each its own gradient
        reduce(add, losses.values()).sum().backward()
        self.totals.add(losses, index.shape[1])
        self.optimizer.step(rates)

    def check(self, step: int) -> None:
        sums = {name: total.tolist() for name, total in self.totals.sums.items()}

        def check_one(number: int, progress: Progress) -> None:
            own = {name: values[number] for name, values in sums.items()}
            check_finite(own, f"in epoch {progress.epoch}, batch {step + 1}", progress.saved)

        self._for_each(self.live(), check_one)

    def end_epoch(self, started_at: float) -> None:
        live = self.live()
        means = self.totals.means(self.order.shape[1], ALONE)
        dims = (0, 0, 0, *self.validation_dims)
        scored = vmap(partial(self._call, True), in_dims=dims, randomness="different")
        scores, sums = self.validation.score(lambda *batch: scored(self.trained, self.rest, self.numbers, *batch))
        seconds = (time.perf_counter() - started_at) / max(len(live), 1)

        def record(number: int, progress: Progress) -> None:
            losses, held, beside = ({n: values[number] for n, values in each.items()} for each in (means, scores, sums))
            progress.record(losses, held, beside, progress.rate((self.steps - 1) / self.steps), seconds)

        self._for_each(live, record)
        live = [number for number in live if number not in self.failures]
        self._keep_best([number for number in live if self.progresses[number].improved])
        self._for_each(live, lambda _, progress: progress.save_if_due())

    def end(self) -> list[Outcome]:
        """Leave each model with its best weights, and return the outcome of each fit."""
        return [self.failures.get(i) or progress.end() for i, progress in enumerate(self.progresses)]

    def release(self) -> None:
        """Drop the gradients and the graph, which refers to this object, so that a GPU's memory is freed at once."""
        self.optimizer.zero_grad()
        del self.whole_step

    def _for_each(self, numbers: Iterable[int], act: Callable[[int, Progress], None]) -> None:
        """Do something for each of these fits; a fit for which it fails, other than for memory, ends by itself."""
        for number in numbers:
            try:
                act(number, self.progresses[number])
            except Exception as error:  # a report's, for example
                if is_out_of_memory(error):
                    raise
                self.failures[number] = without_frames(error)

    def _lead_progresses(self) -> None:
        """Take over what the fits went on from, and let each progress read its slices of the stacks from now on."""
        self.optimizer.load_states([progress.snapshot()[1] for progress in self.progresses])
        slices = zip(_unstack(self.weights), _unstack(self.best), self.optimizer.state_dicts(), strict=True)
        for progress, (weights, best, state) in zip(self.progresses, slices, strict=True):
            for name, value in progress.best_weights.items():  # of a checkpoint
                best[name].copy_(value)
            progress.best_weights = best
            progress.snapshot = partial(_pair, weights, state)

    def _keep_best(self, numbers: list[int]) -> None:
        """Keep the present weights of these fits as their best ones."""
        chosen = torch.tensor(numbers, dtype=torch.long, device=self.first.device)
        for name, best in self.best.items() if numbers else ():
            best.index_copy_(0, chosen, self.weights[name].index_select(0, chosen))

    def _call(self, scored: bool, trained: Any, rest: Any, numbers: Any, *batch: Tensor) -> Any:
        """Call the objective of one fit, or its `scored`, with the fit's tensors and numbers."""
        objective = self.first.objective
        if numbers:
            assert objective.variant is not None
            objective = replace(objective, variant=objective.variant.model_copy(update=numbers))
        return functional_call(self.modules, trained | rest, (objective.scored if scored else objective, *batch))


class StackedAdamW:
    """AdamW for stacked weights, of which each fit has its own learning rate, decay and clipping.

    The kernel knows a single learning rate and decay. Where these are the same for all fits, as for seeds, it updates
    the weights. Otherwise it updates zeros at a rate of 1, and the result times each fit's rate is the update.
    """

    def __init__(self, jobs: Sequence[Job], weights: list[Tensor]) -> None:
        self.weights, device = weights, weights[0].device
        specs = [job.spec for job in jobs]
        self.one_rate = specs[0].schedule != "plateau" and all(
            _rate_settings(spec) == _rate_settings(specs[0]) for spec in specs
        )
        """Whether all fits have the same learning rate at every step, and the same decay."""
        updated = weights if self.one_rate else [torch.zeros_like(value) for value in weights]
        self.kernel = AdamW(updated, specs[0].weight_decay if self.one_rate else 0.0)
        decays, clips = ([getattr(spec, name) for spec in specs] for name in ("weight_decay", "clip"))
        self.decays = torch.tensor(decays, device=device) if any(decays) else None
        limits = [float("inf") if clip is None else clip for clip in clips]
        self.limits = torch.tensor(limits, device=device) if any(clips) else None

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for tensor in (*self.weights, *self.kernel.parameters):
            tensor.grad = None

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        """Update the weights by their gradients at the learning rates (fits,), or at the one rate of all fits (1,)."""
        for weight in self.weights:  # the kernel wants equal strides, even of a dimension of size 1
            assert weight.grad is not None, "every trained parameter takes part in the loss"
            if weight.grad.stride() != weight.stride():
                weight.grad = torch.empty_like(weight).copy_(weight.grad)
        if self.limits is not None:
            self._clip(self.limits)
        if self.one_rate:
            return self.kernel.step(rates[0])
        for update, weight in zip(self.kernel.parameters, self.weights, strict=True):
            update.zero_()
            update.grad = weight.grad
        self.kernel.step(1.0)
        for weight, update in zip(self.weights, self.kernel.parameters, strict=True):
            if self.decays is not None:
                weight.mul_(_along(1 - rates * self.decays, weight))
            weight.addcmul_(update, _along(rates, weight))

    def state_dicts(self) -> list[dict[str, Tensor]]:
        """Return the state of each fit's optimiser, which shares memory with the stacks; all count the same steps."""
        state = self.kernel.state_dict()
        steps = {"steps": state.pop("steps")}
        return [steps | moments for moments in _unstack(state)]

    def load_states(self, states: Sequence[Any]) -> None:
        """Go on from each fit's state; all fits have taken the same number of steps."""
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        self.kernel.load_state_dict(stacked | {"steps": states[0]["steps"]})

    def _clip(self, limits: Tensor) -> None:
        """Scale each fit's gradients down to its limit, as torch.nn.utils.clip_grad_norm_ does."""
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        scales = (limits / (norms + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(_along(scales, gradient))


def _rate_settings(spec: Fit) -> tuple[Any, ...]:
    """Return the settings of a fit that decide its learning rate at every step, and its decay."""
    return spec.lr, spec.schedule, spec.warmup, spec.epochs, spec.weight_decay


def _by_columns(stack: Tensor) -> Tensor:
    """Return a stack of weights as a leaf of autograd, of which each matrix lies in memory column by column.

    The gradients of a stack of products come in this order. In another order, each would be copied at every step.
    """
    matrices = stack.detach().mT.contiguous().mT if stack.dim() == 3 else stack.detach()
    return matrices.requires_grad_()


def _unstack(stacks: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return each fit's slices of the stacks, which share memory with them."""
    slices = zip(*(stack.unbind() for stack in stacks.values()), strict=True)
    return [dict(zip(stacks, own, strict=True)) for own in slices]


def _pair(weights: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return weights, state


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
