"""The training loop; every stage uses it."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial, reduce
from itertools import repeat
from operator import add
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from aecore.config.experiment import Fit
from aecore.core.errors import DivergenceError
from aecore.core.types import Precision, Terms
from aecore.data.stream import Shuffled
from aecore.models.products import arrange, map_constants
from aecore.training.checkpoint import Checkpoints
from aecore.training.graphs import Replayed
from aecore.training.tape import Taped
from aecore.training.team import ALONE, Team

Report = Callable[[int, dict[str, float]], None]
"""Called once an epoch with its number, from 1, and its metrics."""
_PLATEAU_EPOCHS, _PLATEAU_FACTOR = 3, 0.5
_CHECK_STEPS = 100
"""Between two looks at the terms where looking waits for the device."""
_FLUSH_STEPS, _NEGLIGIBLE = 100, 1e-30
"""In so many steps a first moment without gradients falls to 3e-5 of itself, which from here on is no denormal yet."""


class Fitted(NamedTuple):
    """What `fit` leaves beside the trained model."""

    history: list[dict[str, float]]
    """One dict of metrics an epoch."""
    best_epoch: int
    """The epoch, from 1, whose weights the model carries."""


def fit(
    model: nn.Module,
    terms: Callable[..., Terms],
    train: tuple[Tensor, ...] | Shuffled,
    validation: tuple[Tensor, ...],
    spec: Fit,
    *,
    seed: int,
    device: torch.device,
    scored: Callable[..., tuple[Terms, Terms]] | None = None,
    monitor: str = "loss",
    precision: Precision = "fp32",
    compile: bool = False,
    report: Report = lambda epoch, metrics: None,
    scoring_rows: int = 2048,
    team: Team = ALONE,
    checkpoints: Checkpoints | None = None,
    parts: int = 1,
) -> Fitted:
    """Train `model` in place and leave it with the weights of its best epoch on validation, in eval mode.

    The tensors stay where they are, as they are (uint8 stays uint8); batches are cut there by an index permutation
    and only batches travel, if anything does. Nothing in a step waits for the device. A last batch of a single row
    is left out, since batch statistics need two.

    Args:
        terms: (*batch) -> weighted terms of the objective, whose sum is minimised. Steps are recorded and repeated:
            all that it does has to be done by operations on tensors, and none of their values to reach Python
            (`.tolist()`, `.numpy()`).
        train: tensors of equal length, cut into batches together.
        validation: the same for the validation rows, scored in eval mode with the same noise at every epoch.
        scored: (*batch) of validation -> its terms and, found on the way, further sums over its rows (counts of errors,
            say); `terms` alone without it.
        monitor: the validation metric, the name of a term or sum or `loss`, to choose the best epoch by; the loss
            breaks ties. Smaller is better.
        scoring_rows: rows of a batch of validation.
        team: the workers that train this model together, each with all rows; `report` is for the first to give.
        checkpoints: where to go on from, and to write to, at the end of an epoch and of the last one in any case; the
            numbers are those of an unbroken run, to the bit on one CPU worker. Epochs of before are reported again.
        parts: into how many a batch is cut from the start.

    Raises:
        DivergenceError: a term was not finite; on CPU at that very step, on other devices some steps later.
        MemoryError: not even half a batch fits. One that does not fit is cut in two, whose gradients are added up, for
            the rest of the fit; `parts` in the history says so.
    """
    normalised = _is_normalised(model)
    n = len(train) if isinstance(train, Shuffled) else len(train[0])
    steps = math.ceil(n / spec.batch_size)
    alone = device.type == "cpu" and team.size == 1 and not compile
    if alone and precision == "fp32":
        arrange(model, spec.batch_size)
    optimizer = _AdamW(model, spec.weight_decay)
    step_terms = torch.compile(terms) if compile else terms
    course = _Course(model, optimizer, spec, seed, monitor, report, checkpoints, team.rank, parts)
    parts = course.parts
    totals: dict[str, Tensor] = {}
    if team.rank:
        torch.manual_seed(seed + team.rank + len(course.history))  # other noise for other rows
    with _numerics(precision, device) as autocast:
        validate = partial(
            evaluate, model, scored or (lambda *batch: (terms(*batch), {})), rows=validation, device=device, seed=seed,
            autocast=autocast, batch_size=scoring_rows, team=team,
        )  # fmt: skip

        def learn(rate: float | Tensor, batch: tuple[Tensor, ...], share: float) -> None:
            """One step; the terms are added to the totals."""
            nonlocal parts
            optimizer.zero_grad()
            if share:
                weight = share if team.size > 1 else 1.0
                losses: Terms = {}
                while not losses:
                    try:
                        losses = _backward(step_terms, batch, weight, autocast, parts)
                    except (MemoryError, RuntimeError) as error:
                        parts = _fewer_rows(error, parts, len(batch[0]))
                        optimizer.zero_grad()
                _add(totals, losses, len(batch[0]))
            optimizer.gather(team)
            if spec.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), spec.clip)
            optimizer.step(rate)

        # what a repeated step reads lies on the device, in single precision for AdamW's kernel on a GPU
        rate_there = torch.zeros((), device=device, dtype=None if device.type == "cuda" else torch.float64)
        repeated: Callable[..., None] | None = None
        if _can_be_captured(train, device, precision, compile, team):
            repeated = Replayed(lambda *batch: learn(rate_there, batch, 1.0))
        elif alone:
            repeated = Taped(lambda *batch: learn(rate_there, batch, 1.0))

        def learn_quickly(rate: float, batch: tuple[Tensor, ...], share: float) -> None:
            """`learn`, repeated where it can be."""
            nonlocal parts
            if repeated is None or parts > 1 or len(batch[0]) != spec.batch_size:
                return learn(rate, batch, share)
            rate_there.fill_(rate)
            try:
                return repeated(*batch)
            except (MemoryError, RuntimeError) as error:
                parts = _fewer_rows(error, parts, len(batch[0]))
            learn(rate, batch, share)  # when nothing holds what did not fit

        while not course.over:
            epoch, began = course.epoch, time.perf_counter()
            model.train()
            for total in totals.values():
                total.zero_()
            rows = 0
            batches = _shuffled(train, spec.batch_size, course.shuffle, device, team, normalised)
            for step, (batch, share) in enumerate(batches):
                if device.type == "cpu" and ((epoch - 1) * steps + step) % _FLUSH_STEPS == 0:
                    optimizer.flush()
                    map_constants()
                rate = course.rate(step / steps)
                learn_quickly(rate, batch, share)
                if share:
                    rows += len(batch[0])
                    if device.type == "cpu" or step % _CHECK_STEPS == 0:
                        _check(totals, f"in epoch {epoch}, batch {step + 1}", course.saved)
            _agree(model, team)
            losses = {name: _mean(total, rows, team) for name, total in totals.items()}
            scores, sums = validate()
            course.end_epoch(losses, scores, sums, rate, time.perf_counter() - began, parts)
    optimizer.zero_grad()
    fitted = course.end()
    arrange(model, 0)
    return fitted


class _Course:
    """How far a fit has come, and what follows from it: the rate of a step, the best weights, when to stop.

    It goes on from the newest checkpoint, whose epochs it reports again.
    """

    def __init__(
        self, model: nn.Module, optimizer: "_AdamW", spec: Fit, seed: int, monitor: str,
        report: Report = lambda epoch, metrics: None, checkpoints: Checkpoints | None = None, rank: int = 0,
        parts: int = 1,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.spec, self.monitor, self.report = model, optimizer, spec, monitor, report
        self.checkpoints, self.rank, self.parts = checkpoints, rank, parts
        self.shuffle = torch.Generator().manual_seed(seed)
        self.history: list[dict[str, float]] = []
        self.best: tuple[float, float] | None = None
        self.best_epoch, self.best_weights, self.plateau = 0, dict[str, Tensor](), _Plateau()
        self.saved = ""
        """For messages: what is kept."""
        kept = checkpoints.load() if checkpoints is not None else None
        if checkpoints is not None and kept is not None:
            state, tensors = kept
            self.history, self.best_epoch = state["history"], state["best_epoch"]
            self.best, self.plateau = (state["best"][0], state["best"][1]), _Plateau(*state["plateau"])
            self.best_weights = _unpack(tensors, model, optimizer, self.shuffle)
            self.parts = max(parts, state["parts"])
            self.saved = f"; epoch {len(self.history)} is kept in {checkpoints.place}"
            for number, past in enumerate(self.history, 1):
                report(number, past)
        self.due = checkpoints.clock() if checkpoints is not None and rank == 0 else repeat(False)

    @property
    def epoch(self) -> int:
        """The one to come, from 1."""
        return len(self.history) + 1

    @property
    def over(self) -> bool:
        done, patience = len(self.history), self.spec.patience
        return done >= self.spec.epochs or (patience is not None and done - self.best_epoch >= patience)

    def rate(self, share: float) -> float:
        """The learning rate after a share of the epoch to come."""
        return self.spec.lr * _schedule(self.spec, self.epoch - 1 + min(share, 1)) * self.plateau.scale

    def end_epoch(
        self, losses: Mapping[str, float], scores: Mapping[str, float], sums: Mapping[str, float], rate: float,
        seconds: float, parts: int = 1,
    ) -> None:  # fmt: skip
        """Report an epoch, keep its weights if they are the best, and write a checkpoint if one is due.

        Args:
            losses: terms of the objective, means over the training rows.
            scores, sums: terms and further measures of the validation rows.
            rate: of the last step.

        Raises:
            DivergenceError: a number is not finite.
        """
        epoch = self.epoch
        metrics = {f"train/{name}": value for name, value in losses.items()}
        metrics["train/loss"] = sum(metrics.values())
        scores = {**scores, "loss": sum(scores.values()), **sums}
        metrics |= {f"val/{name}": value for name, value in scores.items()}
        _check(metrics, f"in epoch {epoch}", self.saved)
        if parts > 1:
            metrics["parts"] = parts
        metrics["lr"], metrics["seconds"], metrics["time"] = rate, seconds, time.time()
        self.history.append(metrics)
        self.report(epoch, metrics)

        score = (scores[self.monitor], scores["loss"])
        if self.best is None or score < self.best:
            self.best, self.best_epoch = score, epoch
            self.best_weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        if self.spec.schedule == "plateau":
            self.plateau = self.plateau.after(scores["loss"])
        # the last one serves a result that is lost on its way to where results are kept
        if self.checkpoints is not None and (next(self.due) or (self.over and self.rank == 0)):
            state = {
                "history": self.history, "best": self.best, "best_epoch": self.best_epoch, "plateau": self.plateau,
                "parts": parts,
            }  # fmt: skip
            self.checkpoints.save(epoch, state, _pack(self.model, self.optimizer, self.shuffle, self.best_weights))
            self.saved = f"; epoch {epoch} is kept in {self.checkpoints.place}"

    def end(self) -> Fitted:
        """Leave the model with its best weights."""
        self.model.load_state_dict(self.best_weights)
        self.model.eval()
        return Fitted(self.history, self.best_epoch)


def _can_be_captured(
    train: tuple[Tensor, ...] | Shuffled, device: torch.device, precision: Precision, compile: bool, team: Team
) -> bool:
    """Whether steps are replayed as a CUDA graph; a streamed set is bound by its reading, bf16 is untried."""
    small = not isinstance(train, Shuffled) and team.size == 1
    return device.type == "cuda" and small and not compile and precision != "bf16"


class _AdamW:
    """AdamW (Loshchilov & Hutter 2019), which without weight decay is Adam (Kingma & Ba 2015), in one fused kernel.

    The kernel is `torch.optim.AdamW(fused=True)`'s. That class imports torch's compiler, which takes as long as
    training a layer, and spends more time around the kernel than a small layer's step takes.
    """

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self.weight_decay = weight_decay
        self.params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.means = [torch.zeros_like(p) for p in self.params]
        self.squares = [torch.zeros_like(p) for p in self.params]
        self.steps = torch.zeros((), device=self.params[0].device)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def flush(self) -> None:
        """Set moments to zero that are too small to move a weight, before they are denormal numbers, with which a CPU
        takes several times as long: those of a unit that died become so after some 600 steps."""
        for moment in (*self.means, *self.squares):
            torch.ops.aten.hardshrink.out(moment, _NEGLIGIBLE, out=moment)

    def gather(self, team: Team) -> None:
        """Add up the gradients of the team's parts of a batch; a worker whose part is empty adds nothing."""
        if team.size > 1:
            for p in self.params:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            team.sum(p.grad for p in self.params if p.grad is not None)

    @torch.no_grad()
    def step(self, lr: float | Tensor) -> None:
        grads = [p.grad for p in self.params if p.grad is not None]
        assert len(grads) == len(self.params), "every trained parameter takes part in the loss"
        self.steps += 1
        # what `arrange` has turned is turned back, on which the kernel is twice as quick
        turned = [p.ndim == 2 and not p.is_contiguous() for p in self.params]
        params, grads, means, squares = (
            [tensor.t() if back else tensor for tensor, back in zip(each, turned, strict=True)]
            for each in (self.params, grads, self.means, self.squares)
        )
        torch._fused_adamw_(
            params, grads, means, squares, [], [self.steps] * len(grads),
            lr=lr, beta1=0.9, beta2=0.999, weight_decay=self.weight_decay, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip


def evaluate(
    model: nn.Module,
    scored: Callable[..., tuple[Terms, Terms]],
    rows: tuple[Tensor, ...],
    *,
    device: torch.device,
    seed: int = 0,
    autocast: Callable = nullcontext,
    batch_size: int = 2048,
    team: Team = ALONE,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Means over all rows, in eval mode, with the same noise at every call with the same seed.

    Args:
        scored: as `fit` takes it or, of several fits at once, with a vector each; then the means are lists.

    Returns:
        The means of the terms, and those of what was summed up over a batch.
    """
    terms: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    count = 0
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed + team.rank)
        for batch, share in _batches(rows, torch.arange(len(rows[0])), batch_size, device, team):
            if not share:
                continue
            with autocast():
                means, summed = scored(*batch)
            count += len(batch[0])
            _add(terms, means, len(batch[0]))
            _add(sums, summed, 1)
        found = [{name: _mean(total, count, team) for name, total in totals.items()} for totals in (terms, sums)]
        return found[0], found[1]


def _pack(
    model: nn.Module, optimizer: _AdamW, shuffle: torch.Generator, best: dict[str, Tensor]
) -> dict[str, np.ndarray]:  # fmt: skip
    """All that the next epoch depends on, as arrays."""
    tensors = {"rng.shuffle": shuffle.get_state(), "rng.torch": torch.get_rng_state(), "adam.steps": optimizer.steps}
    if optimizer.steps.is_cuda:
        tensors["rng.cuda"] = torch.cuda.get_rng_state(optimizer.steps.device)
    tensors |= {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for number, (mean, square) in enumerate(zip(optimizer.means, optimizer.squares, strict=True)):
        tensors |= {f"adam.mean.{number}": mean, f"adam.square.{number}": square}
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}


def _unpack(
    arrays: Mapping[str, np.ndarray], model: nn.Module, optimizer: _AdamW, shuffle: torch.Generator
) -> dict[str, Tensor]:  # fmt: skip
    """The inverse of `_pack`, in place; the best weights."""
    tensors = {name: torch.tensor(value) for name, value in arrays.items()}
    device = optimizer.steps.device
    model.load_state_dict({n.removeprefix("model."): value for n, value in tensors.items() if n.startswith("model.")})
    optimizer.steps.copy_(tensors["adam.steps"])
    for number, (mean, square) in enumerate(zip(optimizer.means, optimizer.squares, strict=True)):
        mean.copy_(tensors[f"adam.mean.{number}"])
        square.copy_(tensors[f"adam.square.{number}"])
    shuffle.set_state(tensors["rng.shuffle"])
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors and optimizer.steps.is_cuda:
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
    return {n.removeprefix("best."): value.to(device) for n, value in tensors.items() if n.startswith("best.")}


def _backward(
    terms: Callable[..., Terms], batch: tuple[Tensor, ...], weight: float, autocast: Callable, parts: int
) -> Terms:
    """Add the gradients of a batch, taken in so many parts, times `weight`; the terms of the whole batch."""
    found: Terms = {}
    for part in zip(*(tensor.tensor_split(parts) for tensor in batch), strict=True) if parts > 1 else (batch,):
        with autocast():
            losses = terms(*part)
        share = len(part[0]) / len(batch[0])
        loss = reduce(add, losses.values())
        (loss * (weight * share) if weight * share != 1 else loss).backward()
        found = {n: value.detach() * share + found.get(n, 0) for n, value in losses.items()} if parts > 1 else losses
    return found


def _fewer_rows(error: Exception, parts: int, rows: int) -> int:
    """Into how many parts batches are cut after `error`, which is raised again where it is not memory that lacks."""
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        raise error
    if parts > 1 or rows < 2:
        raise MemoryError(f"out of memory with {rows // parts} rows at once; lower batch_size or the widths") from error
    torch.cuda.empty_cache()
    warnings.warn(f"out of memory with batches of {rows} rows: cut in two from here on", stacklevel=3)
    return 2


def _check(values: Mapping[str, Tensor | float], where: str, saved: str) -> None:
    """Raise for the first value that is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            name = name if "/" in name else f"train/{name}"
            raise DivergenceError(f"{name} is {float(value)} {where}: lower the learning rate or set clip{saved}")


def _add(totals: dict[str, Tensor], values: Terms, weight: int) -> None:
    """Add a batch's values to what they sum up to, in double precision, without waiting for the device.

    In place: thousands of small tensors, kept between the large ones that come and go, would leave the heap in shreds.
    """
    for name, value in values.items():
        if name not in totals:
            totals[name] = torch.zeros_like(value, dtype=torch.float64)
        totals[name].add_(value.detach(), alpha=weight)


def _mean(total: Tensor, rows: int, team: Team) -> Any:
    """Mean over all rows, a number or, of several fits at once, a list; the one place that waits for the device."""
    count = torch.tensor(rows, dtype=torch.float64, device=total.device)
    team.sum([total, count])
    return (total / count).tolist()


def _is_normalised(model: nn.Module) -> bool:
    """Whether it computes statistics of a batch."""
    return any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules())


def _agree(model: nn.Module, team: Team) -> None:
    """Average what each worker has seen of the rows besides gradients: the running statistics of normalisations."""
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    team.sum(statistics)
    for buffer in statistics if team.size > 1 else ():
        buffer /= team.size


def _shuffled(
    train: tuple[Tensor, ...] | Shuffled, size: int, shuffle: torch.Generator, device: torch.device, team: Team,
    normalised: bool,
) -> Iterator[tuple[tuple[Tensor, ...], float]]:  # fmt: skip
    """An epoch's batches, as `_batches` gives them, in an order drawn from `shuffle`.

    Args:
        normalised: each worker needs two rows, for the statistics of its part.
    """
    if isinstance(train, Shuffled):
        seed = int(torch.randint(2**62, (), generator=shuffle))
        for part, share in train.batches(size, seed, team.rank, team.size, least=2 if normalised else 0):
            yield tuple(torch.from_numpy(values).to(device) for values in part), share
        return
    yield from _batches(train, _permutation(len(train[0]), size, shuffle, normalised, team), size, device, team)


def _permutation(n: int, size: int, shuffle: torch.Generator, normalised: bool, team: Team = ALONE) -> Tensor:
    """The order of `n` rows in an epoch, without a last batch that has too few."""
    few = 2 * (team.size if normalised else 1)
    dropped = n % size if n % size < few < n else 0
    return torch.randperm(n, generator=shuffle)[: n - dropped]


def _batches(
    tensors: tuple[Tensor, ...], order: Tensor, batch_size: int, device: torch.device, team: Team
) -> Iterator[tuple[tuple[Tensor, ...], float]]:
    """This worker's parts of the batches, on `device`, cut from tensors that lie there or in host memory, and their
    shares of the rows."""
    order = order.to(tensors[0].device)
    for index in order.split(batch_size):
        own = team.part(index)
        yield tuple(t.index_select(0, own).to(device, non_blocking=True) for t in tensors), len(own) / len(index)


def _schedule(spec: Fit, epochs: float) -> float:
    """Share of the peak learning rate after so many epochs, fractions of one included."""
    if epochs < spec.warmup:
        # the first step already moves: half a step ahead of the ramp's foot
        return max(epochs, 1e-3) / spec.warmup
    if spec.schedule != "cosine":
        return 1.0
    done = (epochs - spec.warmup) / max(spec.epochs - spec.warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


class _Plateau(NamedTuple):
    scale: float = 1.0
    best: float = float("inf")
    bad: int = 0

    def after(self, loss: float) -> "_Plateau":
        if loss < self.best:
            return _Plateau(self.scale, loss)
        if self.bad + 1 < _PLATEAU_EPOCHS:
            return _Plateau(self.scale, self.best, self.bad + 1)
        return _Plateau(self.scale * _PLATEAU_FACTOR, self.best)


@contextmanager
def _numerics(precision: Precision, device: torch.device) -> Iterator[Callable]:
    """Sets the float32 matrix precision for the block and yields the autocast to wrap forward passes in."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield (lambda: torch.autocast(device.type, torch.bfloat16)) if precision == "bf16" else nullcontext
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions
