"""Ray Data, which reads what is larger than memory; nothing else imports it."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from aecore.data import Split
from aecore.parquet import Piece
from aecore.stream import Read

_BLOCK_BYTES, _BUFFER_BYTES = 2**24, 2**26
"""Of one block, and of all that are read ahead of training."""


def spread(read: Read, pieces: Sequence[Piece]) -> Iterator[Split]:
    """The rows of the pieces, in their order, read and decoded by Ray Data's tasks ahead of who takes them.

    The tasks reserve no CPU: a stage that waited for rows while it holds the CPUs that could read them would wait for
    ever. A stage leaves a CPU free for them instead, where the node has more than one.
    """
    import ray
    from ray.data import DataContext, ExecutionOptions, ExecutionResources, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns of there being no bars
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = _BLOCK_BYTES
    context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources(object_store_memory=_BUFFER_BYTES)
    )

    def rows(numbers: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for number in numbers["id"]:
            for chunk in read(pieces[number]):
                yield {"x": chunk.x} if chunk.y is None else {"x": chunk.x, "y": chunk.y}

    if not pieces:
        return
    numbers = ray.data.range(len(pieces), override_num_blocks=len(pieces))
    readers = max(1, int(ray.cluster_resources().get("CPU", 1)) // 2)
    chunks: Any = numbers.map_batches(rows, batch_size=1, num_cpus=0, compute=TaskPoolStrategy(readers))
    for chunk in chunks.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
        yield Split(chunk["x"], chunk.get("y"))
