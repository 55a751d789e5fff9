"""The share of the cluster, CPUs and GPUs, that each stage gets."""

import os
import sys
from typing import NamedTuple

from aecore.core.errors import InputError
from pipelines.cluster.nodes import Node, possible_nodes
from pipelines.cluster.resources import Resources

_MOST_DEFAULT_CPUS = 8
"""Most CPUs of a stage by default; layers of usual size gain nothing from more threads."""


class Share(NamedTuple):
    """The GPUs and CPUs of a node that a stage gets, or each worker of a team that trains the stage."""

    gpus: float
    cpus: int


def share_of(resources: Resources, streamed: bool = False, nodes: list[Node] | None = None) -> Share:
    """Return the GPUs and CPUs that each stage gets of the cluster that Ray is connected to, or of the given nodes.

    Args:
        streamed: The stages read their data from disk; one CPU of the default share is left to the tasks that read.

    Raises:
        InputError: No node has what was asked for, or the cluster has too little for all workers of a team.
    """
    nodes = nodes or possible_nodes()
    most_gpus = max(node.get("GPU", 0) for node in nodes)
    gpus = min(1.0, most_gpus) if resources.gpus is None else resources.gpus
    fitting = [node for node in nodes if node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= 1]
    if not fitting:
        raise InputError(
            f"resources.gpus: {gpus:g} asked for a stage, the largest node has {most_gpus:g}; ask for less"
        )
    per_worker = sum(node["CPU"] for node in fitting) // resources.workers
    default = int(min(_MOST_DEFAULT_CPUS, per_worker, *(node["CPU"] for node in fitting))) - streamed
    cpus = resources.cpus or max(1, default)
    most_cpus = max(node["CPU"] for node in fitting)
    if cpus > most_cpus:
        beside = f" beside {gpus:g} GPUs" if gpus else ""
        raise InputError(
            f"resources.cpus: {cpus} asked for a stage, the largest node has {most_cpus:g}{beside}; ask for less"
        )
    fewest = resources.min_workers or resources.workers
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        total = sum(node.get(name, 0) for node in nodes)
        if each * fewest > total:
            raise InputError(
                f"resources.workers: {fewest} with {each:g} {name}s each asked for, the cluster has {total:g}; "
                "ask for fewer or for less"
            )
    return Share(gpus, cpus)


def check_this_machine(resources: Resources) -> None:
    """Raise an InputError where this machine lacks what `resources` ask for, before an embedded Ray is started.

    Does nothing where a cluster is named or Ray runs already.
    """
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
