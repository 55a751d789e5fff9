"""Fits that differ only in numbers (seeds, learning rates, weights of terms, levels of noise), trained as one.

Their weights are stacked and their losses vmapped, so that a GPU, on which one small model's step is all launches and
no work, trains many in the time of a few. Each keeps its own order of rows, rates, best epoch, checkpoints and end, and
what is not random has the numbers of its own `fit`, up to rounding. Noise, dropout and samples are drawn for all at
once: the same in distribution. On CPU nothing is gained, and nothing is fused.
"""

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from aecore.config.experiment import Fit
from aecore.core.errors import DivergenceError
from aecore.core.types import Terms
from aecore.data.stream import Shuffled
from aecore.training.fit import (
    _CHECK_STEPS,
    Fitted,
    _AdamW,
    _add,
    _can_be_captured,
    _check,
    _Course,
    _is_normalised,
    _mean,
    _numerics,
    _permutation,
    _schedule,
    evaluate,
    fit,
)
from aecore.training.graphs import Replayed
from aecore.training.objective import Objective
from aecore.training.team import ALONE

T = TypeVar("T")
Fitter = Callable[..., Fitted]
_MEMORY_SHARE = 0.5
"""Of the device's free memory, what fits trained as one may take by estimate."""
_STATES = 8
"""Copies of the weights in the course of a fit: gradients, means, squares, updates, the best ones, some to spare."""


class Job(NamedTuple):
    """The arguments of one `fit`, and the random state in which it was called."""

    model: nn.Module
    terms: Any
    train: tuple[Tensor, ...] | Shuffled
    validation: tuple[Tensor, ...]
    spec: Fit
    options: dict[str, Any]
    random: list[Tensor]

    def fit(self) -> Fitted:
        """Alone."""
        _set_random(self.random)
        return fit(self.model, self.terms, self.train, self.validation, self.spec, **self.options)


def together(works: Sequence[Callable[[Fitter], T]], everywhere: bool = False) -> list[T | Exception]:
    """What each of several computations returns, or raises; where they train, they train as one if they can.

    Each runs in a thread of its own, but one at a time, and is given the `fit` to call. There it waits until all others
    wait or have ended; then the most that fit each other are trained.

    Args:
        everywhere: as one on CPU, too.
    """
    outcomes: list[Any] = [None] * len(works)
    waiting: dict[int, Job] = {}
    said: SimpleQueue[tuple[int, Job | None]] = SimpleQueue()
    answers: list[SimpleQueue[Fitted | BaseException]] = [SimpleQueue() for _ in works]

    def wait(
        number: int, model: nn.Module, terms: Any, train: Any, validation: Any, spec: Fit, **options: Any
    ) -> Fitted:  # fmt: skip
        job = Job(model, terms, train, validation, spec, options, _random())
        said.put((number, job))
        answer = answers[number].get()
        _set_random(job.random)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def work(number: int) -> None:
        try:
            outcomes[number] = works[number](partial(wait, number))
        except BaseException as error:  # is the outcome; others go on
            outcomes[number] = error
        said.put((number, None))

    def listen() -> None:
        """Until the one that runs waits or has ended."""
        number, job = said.get()
        if job is not None:
            if waiting and _kind(job, everywhere):
                _share_rows(job, next(iter(waiting.values())))
            waiting[number] = job

    with torch.random.fork_rng():
        for number in range(len(works)):
            threading.Thread(target=work, args=[number], daemon=True).start()
            listen()
        while waiting:
            kinds: dict[str, list[int]] = {}
            for number, job in waiting.items():
                kinds.setdefault(_kind(job, everywhere) or f"{number}", []).append(number)
            group = max(kinds.values(), key=len)
            try:
                fits: Sequence[Fitted | BaseException] = _fit_all([waiting[number] for number in group])
            except BaseException as interrupt:  # ends them all
                group, fits = list(waiting), [interrupt] * len(waiting)
            for number in group:
                del waiting[number]
            for number, fitted in zip(group, fits, strict=True):
                answers[number].put(fitted)
                listen()
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
            raise outcome
    return outcomes


def _fit_all(jobs: Sequence[Job]) -> list[Fitted | Exception]:
    """The fits of jobs of one kind, as many as one as memory holds."""
    try:
        if len(jobs) == 1:
            return [jobs[0].fit()]
        most = _most(jobs)
        if most >= len(jobs):
            return fit_as_one(jobs)
    except _NotFusedError as error:
        reason = " ".join(str(error.__cause__).split())[:160]
        if not isinstance(error.__cause__, torch.OutOfMemoryError | MemoryError):
            warnings.warn(f"{len(jobs)} fits cannot be trained as one ({reason}): one after the other", stacklevel=2)
            return [one for job in jobs for one in _fit_all([job])]
        torch.cuda.empty_cache()
        most = len(jobs) // 2
    except Exception as error:
        return [error] * len(jobs)
    return [one for start in range(0, len(jobs), most) for one in _fit_all(jobs[start : start + most])]


def fit_as_one(jobs: Sequence[Job]) -> list[Fitted | Exception]:
    """The `fit` of each job, or what it raised; who ends early is carried along and no more looked at.

    Seconds in the histories are each fit's share.
    """
    first = jobs[0]
    device, size = first.options["device"], first.spec.batch_size
    precision, normalised = first.options.get("precision", "fp32"), _is_normalised(first.model)
    failed: dict[int, Exception] = {}
    with _Fits(jobs) as fits, _numerics(precision, device):
        courses, rows = fits.courses, fits.rows
        steps = -(-rows // size)
        orders = [torch.arange(rows)] * len(jobs)
        captured = _can_be_captured(cast(Any, first.train), device, precision, False, ALONE)
        whole_step = Replayed(fits.step) if captured else fits.step
        while live := [i for i, course in enumerate(courses) if i not in failed and not course.over]:
            began = time.perf_counter()
            first.model.train()
            for total in fits.totals.values():
                total.zero_()
            for i in live:
                orders[i] = _permutation(rows, size, courses[i].shuffle, normalised)
            order = torch.stack([one[: len(orders[live[0]])] for one in orders]).to(device)
            rates = _rates(courses, steps).to(device)
            for step, index in enumerate(order.split(size, 1)):
                (whole_step if index.shape[1] == size else fits.step)(index, rates[step])
                if device.type == "cpu" or step % _CHECK_STEPS == 0:
                    for i, values in zip(live, _each(fits.totals, live), strict=True):
                        try:
                            _check(values, f"in epoch {courses[i].epoch}, batch {step + 1}", courses[i].saved)
                        except DivergenceError as error:
                            failed.setdefault(i, error)
            means = {name: _mean(total, order.shape[1], ALONE) for name, total in fits.totals.items()}
            scores, sums = fits.score()
            seconds = (time.perf_counter() - began) / len(live)
            for i in live:
                if i not in failed:
                    own = [{name: values[i] for name, values in found.items()} for found in (means, scores, sums)]
                    try:
                        courses[i].end_epoch(own[0], own[1], own[2], courses[i].rate((steps - 1) / steps), seconds)
                    except Exception as error:  # of a report, say: it is this fit's alone
                        failed[i] = error
        return [failed[i] if i in failed else course.end() for i, course in enumerate(courses)]


class _NotFusedError(Exception):
    """Something failed before an epoch was over; the models are as they were."""


class _Fits:
    """What several fits are made of, together, for as long as they are trained.

    All tensors of the models, and of AdamW, lie in stacks, of which the models' own become slices: what looks at a
    model finds its weights there at any time.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.first, self.jobs = jobs[0], jobs
        self.called = _Called(self.first.terms)
        self.tensors = [_state(job.terms) for job in jobs]
        self.state = {
            name: torch.stack([own[name].detach() for own in self.tensors]) for name in self.tensors[0]
        }  # fmt: skip
        self.before = {name: value.clone() for name, value in self.state.items()}
        for number, own in enumerate(self.tensors):
            for name, tensor in own.items():
                tensor.data = self.state[name][number]
        names = [f"model.{name}" for name, p in self.first.model.named_parameters() if p.requires_grad]
        self.trained = {name: self.state[name] for name in names}
        self.rest = {name: value for name, value in self.state.items() if name not in self.trained}
        self.optimizer = _AdamWs(jobs, list(self.trained.values()))
        self.numbers = _numbers(jobs)
        train = [cast("tuple[Tensor, ...]", job.train) for job in jobs]
        self.rows, self.train = len(train[0][0]), [_Rows(same) for same in zip(*train, strict=True)]
        beside = [_beside(same) for same in zip(*(job.validation for job in jobs), strict=True)]
        self.validation, self.dims = tuple(x for x, _ in beside), tuple(dim for _, dim in beside)
        self.totals: dict[str, Tensor] = {}
        self.gradients = vmap(grad(self._loss, has_aux=True), randomness="different")
        self.courses: list[_Course] = []

    def __enter__(self) -> "_Fits":
        for job, own in zip(self.jobs, self.optimizer.each, strict=True):
            told = {name: job.options[name] for name in ("report", "checkpoints") if name in job.options}
            self.courses.append(
                _Course(job.model, own, job.spec, job.options["seed"], job.options.get("monitor", "loss"), **told)
            )
        self.begun = [course.epoch for course in self.courses]
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        lost = isinstance(error, Exception) and [course.epoch for course in self.courses] == self.begun
        for number, own in enumerate(self.tensors):
            for name, tensor in own.items():
                tensor.data = (self.before if lost else self.state)[name][number].clone()
        if lost:
            raise _NotFusedError from error

    def step(self, index: Tensor, rates: Tensor) -> None:
        """One step of all fits.

        Args:
            index: rows of each fit's batch, (fits, batch).
            rates: learning rates, (fits,).
        """
        batch = (part.take(index) for part in self.train)
        gradients, losses = self.gradients(self.trained, self.rest, self.numbers, *batch)
        _add(self.totals, losses, index.shape[1])
        self.optimizer.step(list(gradients.values()), rates)

    def score(self) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Each fit's means over the validation rows, of its terms and of what is summed up beside."""
        options = self.first.options
        each = vmap(partial(self._call, True), in_dims=(0, 0, 0, *self.dims), randomness="different")
        return evaluate(
            self.called, lambda *batch: each(self.trained, self.rest, self.numbers, *batch), self.validation,
            device=options["device"], seed=options["seed"], batch_size=options.get("scoring_rows", 2048),
        )  # fmt: skip

    def _call(self, scored: bool, trained: Any, rest: Any, numbers: Any, *batch: Tensor) -> Any:
        objective: Objective = self.first.terms
        if numbers:
            assert objective.variant is not None
            objective = replace(objective, variant=objective.variant.model_copy(update=numbers))
        return functional_call(self.called, trained | rest, (objective.scored if scored else objective, *batch))

    def _loss(self, trained: Any, rest: Any, numbers: Any, *batch: Tensor) -> tuple[Tensor, Terms]:
        losses = self._call(False, trained, rest, numbers, *batch)
        return reduce(add, losses.values()), losses


class _Called(nn.Module):
    """Any function of a batch that uses an objective's modules, with their weights to be put in its place."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.model, self.read = objective.model, objective.read

    def forward(self, fn: Callable[..., Any], *batch: Tensor) -> Any:
        return fn(*batch)


class _AdamWs:
    """AdamW for stacked weights: each fit has its own learning rate, decay and clipping.

    The kernel, which knows one rate, is let to update zeros at a rate of 1; what they become is what each fit's rate is
    multiplied by.
    """

    def __init__(self, jobs: Sequence[Job], weights: list[Tensor]) -> None:
        self.weights, device = weights, weights[0].device
        self.kernel = _AdamW(nn.ParameterList([torch.zeros_like(value) for value in weights]), 0.0)
        self.each = [_AdamW(job.model, job.spec.weight_decay) for job in jobs]
        """Each fit's own; the state is a slice of the kernel's."""
        for number, own in enumerate(self.each):
            own.steps = self.kernel.steps
            own.means = [mean[number] for mean in self.kernel.means]
            own.squares = [square[number] for square in self.kernel.squares]
        decays, clips = ([getattr(job.spec, name) for job in jobs] for name in ("weight_decay", "clip"))
        self.decays = torch.tensor(decays, device=device) if any(decays) else None
        limits = [float("inf") if clip is None else clip for clip in clips]
        self.limits = torch.tensor(limits, device=device) if any(clips) else None

    @torch.no_grad()
    def step(self, gradients: list[Tensor], rates: Tensor) -> None:
        if self.limits is not None:  # as torch.nn.utils.clip_grad_norm_ does
            norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
            scales = (self.limits / (norms + 1e-6)).clamp(max=1)
            gradients = [g * _along(scales, g) for g in gradients]
        for update, gradient in zip(self.kernel.params, gradients, strict=True):
            update.zero_()
            update.grad = gradient.contiguous()  # the kernel goes by addresses; vmap may leave dimensions permuted
        self.kernel.step(1.0)
        for weight, update in zip(self.weights, self.kernel.params, strict=True):
            if self.decays is not None:
                weight.mul_(_along(1 - rates * self.decays, weight))
            weight.addcmul_(update, _along(rates, weight))


class _Rows:
    """The training rows of several fits, which all read the same or each their own."""

    def __init__(self, each: Sequence[Tensor]) -> None:
        self.rows, self.offsets = each[0], torch.zeros(len(each), 1, dtype=torch.long, device=each[0].device)
        if any(other.data_ptr() != each[0].data_ptr() for other in each):
            stack = torch.stack(list(each))
            for number, own in enumerate(each):
                own.data = stack[number]  # so that they don't lie there twice
            self.rows = stack.flatten(0, 1)
            self.offsets += len(each[0]) * torch.arange(len(each), device=stack.device)[:, None]

    def take(self, index: Tensor) -> Tensor:
        """Rows (fits, batch, ...) by their numbers (fits, batch)."""
        return self.rows.index_select(0, (index + self.offsets).flatten()).unflatten(0, index.shape)


def _beside(each: Sequence[Tensor]) -> tuple[Tensor, int | None]:
    """The validation rows of several fits, and along which dimension they have their own; None where all read the
    same."""
    if all(other.data_ptr() == each[0].data_ptr() for other in each):
        return each[0], None
    stack = torch.stack(list(each), 1)
    for number, own in enumerate(each):
        own.data = stack[:, number]
    return stack, 1


def _along(values: Tensor, other: Tensor) -> Tensor:
    """(fits,) to be multiplied with (fits, ...)."""
    return values.view(-1, *[1] * (other.dim() - 1))


def _each(totals: dict[str, Tensor], live: Sequence[int]) -> list[dict[str, float]]:
    """The sums of each fit, by name; waits for the device."""
    values = {name: total.tolist() for name, total in totals.items()}
    return [{name: found[i] for name, found in values.items()} for i in live]


def _rates(courses: Sequence[_Course], steps: int) -> Tensor:
    """Learning rates of an epoch, (steps, fits)."""
    columns: dict[Any, Tensor] = {}
    rates = []
    for course in courses:
        spec = course.spec
        key = spec.schedule, spec.warmup, spec.epochs, course.epoch
        if key not in columns:
            columns[key] = torch.tensor([_schedule(spec, course.epoch - 1 + step / steps) for step in range(steps)])
        rates.append(columns[key] * (spec.lr * course.plateau.scale))
    return torch.stack(rates, 1)


def _state(objective: Objective) -> dict[str, Tensor]:
    """All tensors of an objective's modules, by name."""
    called = _Called(objective)
    return {**dict(called.named_parameters()), **dict(called.named_buffers())}


def _numbers(jobs: Sequence[Job]) -> dict[str, Tensor]:
    """The numbers of the variants that are not the same in all, (fits,) each."""
    variants = [job.terms.variant for job in jobs]
    found = {name: [getattr(variant, name) for variant in variants] for name in _real(variants[0])}
    device = jobs[0].options["device"]
    return {name: torch.tensor(v, device=device, dtype=torch.float32) for name, v in found.items() if len(set(v)) > 1}


def _real(variant: Any) -> list[str]:
    """Names of the fields that are real numbers."""
    return [name for name, value in (variant or ()) if isinstance(value, float)]


def _kind(job: Job, everywhere: bool) -> str:
    """What jobs must have in common to be trained as one; nothing if this one cannot be."""
    options, rows = job.options, job.train
    device = options["device"]
    if isinstance(rows, Shuffled):
        return ""
    fusible = (
        isinstance(job.terms, Objective)
        and (everywhere or device.type == "cuda")
        and all(tensor.device.type == device.type for tensor in (*rows, *job.validation))
        and options.get("team", ALONE).size == 1
        and options.get("parts", 1) == 1
        and not options.get("compile")
        and options.get("precision") != "bf16"
    )
    if not fusible:
        return ""
    kept = options["checkpoints"].load() if options.get("checkpoints") is not None else None
    variant = {} if job.terms.variant is None else job.terms.variant.model_dump()
    # a weight of 0 leaves its term out
    variant |= {name: bool(variant[name]) for name in _real(job.terms.variant)}
    made = [
        (name, type(module), {key: value for key, value in vars(module).items() if key[0] != "_" and key != "training"})
        for name, module in _Called(job.terms).named_modules()
    ]
    shapes = [(tensor.shape, tensor.dtype) for tensor in (*rows, *job.validation)]
    chosen = [options.get(name) for name in ("monitor", "precision", "scoring_rows")]
    # AdamW's kernel counts the steps for all
    done = len(kept[0]["history"]) if kept else 0
    return repr((device, variant, made, shapes, chosen, job.spec.batch_size, done))


def _share_rows(job: Job, other: Job) -> None:
    """Let two fits that read the same rows read them from the same memory."""
    if isinstance(job.train, Shuffled) or isinstance(other.train, Shuffled):
        return
    for mine, theirs in zip((*job.train, *job.validation), (*other.train, *other.validation), strict=False):
        if mine.shape == theirs.shape and mine.device == theirs.device and torch.equal(mine, theirs):
            mine.data = theirs


def _most(jobs: Sequence[Job]) -> int:
    """How many of these fits the device's free memory holds, by estimate."""
    first = jobs[0]
    device = first.options["device"]
    if device.type != "cuda":
        return len(jobs)
    batch = [tensor[: first.spec.batch_size] for tensor in cast("tuple[Tensor, ...]", first.train)]
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    first.model.eval()  # which draws nothing and counts nothing
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        first.terms(*batch)
    scored = first.options.get("scoring_rows", 2048) / first.spec.batch_size
    each = _STATES * sum(t.nbytes for t in _state(first.terms).values()) + round(saved * (2 + scored))
    rows = [(job.train[0], *job.validation) for job in jobs if not isinstance(job.train, Shuffled)]
    if len({mine[0].data_ptr() for mine in rows}) > 1:
        each += sum(tensor.nbytes for tensor in rows[0])  # stacked, while the single ones are still there
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, int(_MEMORY_SHARE * free / each))


def _random() -> list[Tensor]:
    """The state of torch's global generators."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def _set_random(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
