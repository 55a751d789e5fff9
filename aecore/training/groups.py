"""Chooses which fits are trained together as one, and how many at once."""

import gc
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aecore.config.needs import STATES
from aecore.core.errors import without_frames
from aecore.data.files import short_reason
from aecore.data.stream import Shuffled
from aecore.training.fit import fit
from aecore.training.fused import ObjectiveModules, Outcome, fit_as_one, real_fields
from aecore.training.job import Job
from aecore.training.memory import free_memory, is_out_of_memory, peak_memory
from aecore.training.numerics import numerics, own_random_state

_MEMORY_SHARE = 0.5
"""Share of the device's free memory that fits trained as one may take by estimate."""


def fit_all(jobs: Iterable[Job], everywhere: bool = False) -> list[Outcome]:
    """Fit all jobs; return for each job its `Fitted`, or the exception that it ended in.

    Jobs that differ only in numbers are trained together as one (see `fused`) or, where that fails, one by one after a
    warning. `jobs` may be an iterator that makes each job when it is needed; rows that jobs share are then held once.

    Args:
        everywhere: train several fits as one on a CPU as well, where that gains nothing; for tests.
    """
    shared: list[Job] = []
    for job in jobs:
        shared.append(_share_rows(job, shared[0]) if shared else job)
    groups: dict[str, list[int]] = {}
    for number, job in enumerate(shared):
        groups.setdefault(group_key(job, everywhere) or f"{number}", []).append(number)
    outcomes: dict[int, Outcome] = {}
    for numbers in groups.values():
        outcomes |= dict(zip(numbers, _fit_group([shared[number] for number in numbers]), strict=True))
    return [outcomes[number] for number in range(len(shared))]


def group_key(job: Job, everywhere: bool = False) -> str:
    """Return a key that is equal for fits that can be trained as one; it is empty for a fit that is trained alone."""
    if not job.is_simple or job.parts > 1 or (job.device.type != "cuda" and not everywhere):
        return ""
    rows, variant = (*job.in_memory, *job.validation), job.objective.variant
    if any(tensor.device.type != job.device.type for tensor in rows):
        return ""
    fields = {} if variant is None else variant.model_dump()
    # a weight of 0 leaves its term out
    fields |= {name: bool(fields[name]) for name in real_fields(variant)}
    modules = [
        (name, type(module), {key: value for key, value in vars(module).items() if key[0] != "_" and key != "training"})
        for name, module in ObjectiveModules(job.objective).named_modules()
    ]
    shapes = [(tensor.shape, tensor.dtype) for tensor in rows]
    spec = job.spec
    parts = spec.steps and (spec.steps, spec.epochs)  # epochs of the same number of steps
    chosen = job.monitor, job.precision, job.scoring_rows, spec.batch_size, parts
    # the optimiser's kernel counts the steps of all fits as one
    checkpoint = job.checkpoints.load() if job.checkpoints is not None else None
    epochs = len(checkpoint[0]["history"]) if checkpoint else 0
    return repr((job.device, type(variant), fields, modules, shapes, chosen, epochs))


def _fit_group(jobs: Sequence[Job]) -> list[Outcome]:
    """Train the jobs of one group, as many together as memory holds, and return their outcomes."""
    if len(jobs) == 1:
        try:
            return [fit(jobs[0])]
        except Exception as error:
            return [without_frames(error)]
    most = how_many_fit(jobs)
    if most >= len(jobs):
        try:
            return fit_as_one(jobs)
        except Exception as error:
            most = len(jobs) // 2
            if not is_out_of_memory(error):
                most = 1
                _warn(jobs, error)
    # here, since inside `except` the error still holds what did not fit; afterwards a cycle of frames may
    gc.collect()
    if jobs[0].device.type == "cuda":
        torch.cuda.empty_cache()
    return [one for start in range(0, len(jobs), most) for one in _fit_group(jobs[start : start + most])]


def _warn(jobs: Sequence[Job], error: Exception) -> None:
    """Warn that jobs are trained one after the other because of `error`."""
    message = f"{len(jobs)} fits cannot be trained as one ({short_reason(error)}): one after the other"
    warnings.warn(message, stacklevel=3)


def _share_rows(job: Job, other: Job) -> Job:
    """Return `job` with the tensors of `other` in place of its own where these are equal, so that one copy is kept."""
    if isinstance(job.train, Shuffled) or isinstance(other.train, Shuffled):
        return job
    known = (*other.train, *other.validation)

    def shared(mine: Tensor) -> Tensor:
        alike = (x for x in known if (x.shape, x.dtype, x.device) == (mine.shape, mine.dtype, mine.device))
        return next((x for x in alike if torch.equal(_bits(x), _bits(mine))), mine)

    return replace(job, train=tuple(map(shared, job.train)), validation=tuple(map(shared, job.validation)))


def _bits(x: Tensor) -> Tensor:
    """Return floats as the integers of the same bits: NaN, a missing value, is not equal to itself."""
    return x.view(torch.int32) if x.dtype == torch.float32 else x


def how_many_fit(jobs: Sequence[Job]) -> int:
    """Return how many of these fits the GPU's free memory holds by estimate; on a CPU, all.

    If the estimate fails, it is one at a time, after a warning.
    """
    device = jobs[0].device
    try:
        needed = memory_of_one(jobs)
    except Exception as error:
        _warn(jobs, error)
        return 1
    if device.type != "cuda":
        return len(jobs)
    return max(1, int(_MEMORY_SHARE * free_memory(device, jobs[0].device_share) / needed))


def memory_of_one(jobs: Sequence[Job]) -> int:
    """Return the bytes that each of these fits takes where they are trained as one.

    The memory of a step and of a batch of validation is measured on the GPU with the first fit's model, in eval mode,
    so that the model does not change. On a CPU, where it is not measured, the result is less.
    """
    first, device = jobs[0], jobs[0].device
    batch = [tensor[: first.spec.batch_size] for tensor in first.in_memory]
    held = [tensor[: first.scoring_rows] for tensor in first.validation]

    def step() -> None:
        with autocast():
            losses = first.objective(*batch)
        torch.stack(list(losses.values())).sum().backward()

    def score() -> None:
        with torch.no_grad(), autocast():
            first.objective.scored(*held)

    first.model.eval()
    try:
        with own_random_state(device), numerics(first.precision, device) as autocast:
            # a captured step has its memory for itself, beside what the steps before it took
            needed = 2 * peak_memory(step, device) + peak_memory(score, device)
    finally:
        first.model.zero_grad()
    modules = ObjectiveModules(first.objective)
    needed += STATES * sum(tensor.nbytes for tensor in (*modules.parameters(), *modules.buffers()))
    for same in zip(*((*job.in_memory, *job.validation) for job in jobs), strict=True):
        if any(other is not same[0] for other in same):
            needed += same[0].nbytes  # the stack, beside each fit's own rows
    return needed
