"""Reading data and working on their pieces in parallel with Ray Data, which only this module imports."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from aecore.core.errors import DeviceError, InputError
from aecore.data.sets import Piece
from aecore.data.splits import Split
from aecore.data.stream import ReadPiece
from pipelines.cluster.device import are_fake, device_of
from pipelines.cluster.nodes import possible_nodes
from pipelines.cluster.share import Share

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_BLOCK_BYTES, _BUFFER_BYTES = 2**24, 2**26
"""Size of one block, and of all blocks that are read ahead of training."""


def spread(read: ReadPiece, pieces: Sequence[Piece]) -> Iterator[Split]:
    """Yield the rows of the pieces in order; tasks of Ray Data read and decode them ahead of the consumer.

    The tasks reserve no CPU: a stage that holds all CPUs would wait for ever for tasks that wait for a CPU. Instead the
    stage leaves one CPU free for the tasks, where the node has more than one (see `share_of`).
    """
    import ray
    from ray.data import TaskPoolStrategy

    _set_up(preserve_order=True)

    def rows(numbers: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for number in numbers["item"]:
            for chunk in read(pieces[number]):
                yield {"x": chunk.x} if chunk.y is None else {"x": chunk.x, "y": chunk.y}

    if not pieces:
        return
    # blocks in memory: tasks that read blocks reserve a CPU each
    numbers = ray.data.from_items(list(range(len(pieces))), override_num_blocks=len(pieces))
    readers = max(1, int(ray.cluster_resources().get("CPU", 1)) // 2)
    chunks: Any = numbers.map_batches(rows, batch_size=1, num_cpus=0, compute=TaskPoolStrategy(readers))
    for chunk in chunks.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
        yield Split(chunk["x"], chunk.get("y"))


class Done(NamedTuple):
    """The number of a finished piece of work, the count of its rows, and when the work began and ended."""

    number: int
    rows: int
    began: float
    ended: float
    """Unix time, seconds."""


def each(
    make: Callable[[T, "torch.device"], Callable[[int], int]],
    given: T,
    numbers: Sequence[int],
    workers: int | None,
    gpus: float | None,
) -> Iterator[Done]:
    """Let workers with one CPU and one thread each process the numbers; yield a `Done` for each finished number.

    Args:
        make: called once in each worker with `given` and the worker's device; returns a function from a number to the
            count of its rows.
        workers: most workers; None takes as many as the cluster holds, also when nodes join it later.
        gpus: GPUs per worker; None takes 1 where the cluster has GPUs, else 0.

    Raises:
        InputError: a worker raised it, or the cluster has too few GPUs.
        DeviceError: a worker cannot use its GPU.
    """
    import ray
    from ray.data import ActorPoolStrategy

    _set_up(preserve_order=False)
    gpus, most = _workers_with(gpus)
    shared, share, fake = ray.put(given), Share(gpus, 1), are_fake()

    class Worker:
        def __init__(self) -> None:
            import torch

            torch.set_num_threads(1)
            self.unusable = ""
            try:
                self.work = make(ray.get(shared), device_of(share, fake))
            except DeviceError as error:
                self.unusable = str(error)

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
            # errors are values: for an exception, Ray Data prints several pages
            number, began, error, rows = int(batch["item"][0]), time.time(), "", 0
            try:
                rows = 0 if self.unusable else self.work(number)
            except InputError as wrong:
                error = str(wrong)
            return {"done": [[number, rows, began, time.time()]], "error": [error], "unusable": [self.unusable]}

    # blocks in memory: tasks that read blocks would wait for a CPU, and the workers may have all
    jobs = ray.data.from_items(list(numbers), override_num_blocks=len(numbers))
    limit = min(workers or len(numbers), len(numbers))
    # only one number waits at each worker: a number cannot move to another worker that is free
    pool = ActorPoolStrategy(min_size=min(most, limit), max_size=limit, max_tasks_in_flight_per_actor=2)
    done: Any = jobs.map_batches(Worker, batch_size=1, num_cpus=1, num_gpus=gpus, compute=pool)
    for batch in done.iter_batches(batch_size=None, batch_format="numpy"):
        columns = batch["done"], batch["error"], batch["unusable"]
        for (number, rows, began, ended), error, unusable in zip(*columns, strict=True):
            if unusable:
                raise DeviceError(str(unusable))
            if error:
                raise InputError(str(error))
            yield Done(int(number), int(rows), began, ended)


def _workers_with(gpus: float | None) -> tuple[float, int]:
    """Return the GPUs that each worker gets, and the most workers that the cluster holds or may hold with these."""
    nodes = possible_nodes()
    all_gpus = sum(node.gpus * node.count for node in nodes)
    gpus = min(1.0, all_gpus) if gpus is None else gpus
    if gpus > 1:
        raise InputError(f"gpus: {gpus:g} asked for a worker, which computes on one GPU; use 1 and more workers")
    if gpus > all_gpus:
        raise InputError(f"gpus: {gpus:g} asked for a worker, the cluster has {all_gpus:g}; ask for less")
    return gpus, max(1, int(all_gpus / gpus if gpus else sum(node.cpus * node.count for node in nodes)))


def _set_up(preserve_order: bool) -> None:
    """Set Ray Data to small buffers, without progress bars and log lines."""
    from ray.data import DataContext, ExecutionOptions, ExecutionResources

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it would warn that there are no bars
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = _BLOCK_BYTES
    context.execution_options = ExecutionOptions(
        preserve_order=preserve_order, resource_limits=ExecutionResources(object_store_memory=_BUFFER_BYTES)
    )
