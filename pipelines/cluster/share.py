"""What share of the cluster each stage gets."""

import os
import sys

from aecore.core.errors import InputError
from pipelines.cluster.nodes import _nodes
from pipelines.cluster.resources import Resources, Share

_MOST_DEFAULT_CPUS = 8
"""Layers of usual size gain nothing from more threads."""


def refuse_what_is_not_here(resources: Resources) -> None:
    """Where Ray would be an embedded one, raise what `share_of` would once it had started."""
    if os.environ.get("RAY_ADDRESS") or ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        return
    import pynvml

    try:
        pynvml.nvmlInit()
        gpus = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        gpus = 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len(list(filter(None, visible.split(",")))))
    share_of(resources, nodes=[{"CPU": os.cpu_count() or 1, "GPU": gpus}])


def share_of(resources: Resources, streamed: bool = False, nodes: list[dict[str, float]] | None = None) -> Share:
    """What each stage gets of the cluster that Ray is connected to, or of these nodes.

    Args:
        streamed: a CPU is left, where there is more than one, for those who read the data.

    Raises:
        InputError: no node has what was asked for.
    """
    nodes = nodes or _nodes()
    gpus = resources.gpus if resources.gpus is not None else min(1.0, max(node.get("GPU", 0) for node in nodes))
    fitting = [node for node in nodes if node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= 1]
    if not fitting:
        most = max(node.get("GPU", 0) for node in nodes)
        raise InputError(f"resources.gpus: {gpus:g} asked for a stage, the largest node has {most:g}; ask for less")
    free = sum(node["CPU"] for node in fitting) // resources.workers
    most = min(_MOST_DEFAULT_CPUS, free, *(node["CPU"] for node in fitting))
    cpus = resources.cpus or max(1, int(most) - streamed)
    most = max(node["CPU"] for node in fitting)
    if cpus > most:
        beside = f" beside {gpus:g} GPUs" if gpus else ""
        raise InputError(
            f"resources.cpus: {cpus} asked for a stage, the largest node has {most:g}{beside}; ask for less"
        )
    share = Share(
        gpus, cpus, resources.retries, resources.workers, resources.min_workers, resources.storage_path,
        resources.checkpoint_every, resources.folder,
    )  # fmt: skip
    fewest = share.min_workers or share.workers
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        total = sum(node.get(name, 0) for node in nodes)
        if each * fewest > total:
            raise InputError(
                f"resources.workers: {fewest} with {each:g} {name}s each asked for, the cluster has {total:g}; "
                "ask for fewer or for less"
            )
    return share
