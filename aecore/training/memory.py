"""Memory of a device: how much is free, how much some work takes, and what to do when it runs out."""

import gc
import warnings
from collections.abc import Callable

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error`, or an error that it arose from, says that memory was not enough.

    A CUDA graph whose capture runs out of memory ends in an error of its own, which hides the first error.
    """
    cause: BaseException | None = error
    while cause is not None:
        # torch reports a CPU's lack of memory as a plain RuntimeError
        if isinstance(cause, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def halve(error: Exception, parts: int, rows: int, kind: str, advice: str, can_be_cut: bool = True) -> int:
    """Return the number of parts into which batches are cut after `error`: two, after a warning.

    Args:
        error: the error that a batch ended in; it is raised again if it is no lack of memory.
        parts: the number of parts into which the batch was cut.
        rows: the rows of the whole batch.
        kind: what the rows are called in messages.
        advice: what to do where even halves do not fit.
        can_be_cut: whether halves have enough rows.

    Raises:
        MemoryError: the batch was cut already, or cannot be cut.
    """
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if capturing or not is_out_of_memory(error):
        raise error
    if parts > 1 or not can_be_cut:
        raise MemoryError(f"out of memory with {rows // parts} {kind} at once; {advice}") from error
    torch.cuda.empty_cache()
    warnings.warn(f"out of memory with batches of {rows} {kind}: cut in two from here on", stacklevel=3)
    return 2


def free_device_memory() -> None:
    """Free the GPU memory that nothing refers to any more, CUDA graphs in reference cycles included."""
    gc.collect()
    torch.cuda.empty_cache()


def free_memory(device: torch.device, share: float = 1.0) -> int:
    """Return the bytes of a GPU that a process may still plan with.

    These are the bytes that are free, including those that torch holds in reserve, but no more than are left of the
    process's share of the whole memory.
    """
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    return max(0, min(free + torch.cuda.memory_reserved(device) - allocated, int(share * total) - allocated))


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Do some work and return the bytes of a GPU that it needs at most beside what is allocated before it.

    A CPU does the same work, but its memory is not measured: the result is 0.
    """
    if device.type != "cuda":
        work()
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before
