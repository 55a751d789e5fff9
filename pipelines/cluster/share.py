"""The share of the cluster, CPUs and GPUs, that each stage gets."""

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from aecore.core.errors import InputError, join_names
from pipelines.cluster.nodes import Node, possible_nodes
from pipelines.cluster.resources import Resources
from pipelines.host.environment import has_embedded_ray

_MOST_DEFAULT_CPUS = 8
"""Most CPUs of a stage by default; layers of usual size gain nothing from more threads."""
_SHARES = (0.125, 0.25, 0.5, 1.0)
"""The shares of a GPU that a stage may get by default."""
_USABLE = 0.9
"""Share of a GPU's memory that is planned with."""


class Share(NamedTuple):
    """The GPUs and CPUs of a node that a stage gets, or each worker of a team that trains the stage."""

    gpus: float
    cpus: int


def share_of(
    resources: Resources, memory: int | None, streamed: bool = False, nodes: Sequence[Node] | None = None
) -> Share:
    """Return the GPUs and CPUs that a stage gets of the cluster that Ray is connected to, or of the given nodes.

    A stage that uses a GPU gets an eighth, a quarter, a half or all of one, as its memory needs, and at most the same
    share of the node's CPUs. By default it gets half of that, so that CPUs are left for the stages without a GPU, which
    run beside it.

    Args:
        memory: Bytes of a GPU's memory that the stage takes by estimate; None for a stage that uses no GPU.
        streamed: The stage reads its data from disk; one CPU of the default share is left to the tasks that read.

    Raises:
        InputError: No node has what was asked for, or the cluster has too little for all workers of a team.
    """
    nodes = [node for node in nodes or possible_nodes() if node.cpus >= 1]
    if not nodes:
        raise InputError("the cluster has no node with a CPU for stages; add one to it")
    devices = _nodes_with_devices(resources, nodes) if resources.gpus != 0 else []
    gpus = 0.0
    if memory is not None:
        gpus = resources.gpus or (_default_gpus(resources, memory, devices) if devices else 0.0)
    fitting = [node for node in (devices if gpus else nodes) if node.gpus >= gpus]
    if not fitting:
        most_gpus = max(node.gpus for node in nodes)
        raise InputError(
            f"resources.gpus: {gpus:g} asked for a stage, the largest node has {most_gpus:g}; ask for less"
        )
    most_cpus = max(node.cpus for node in fitting)
    if resources.cpus is not None and resources.cpus > most_cpus:
        beside = f" beside {gpus:g} GPUs" if gpus else ""
        raise InputError(
            f"resources.cpus: {resources.cpus} asked for a stage, the largest node has {most_cpus:g}{beside}; "
            "ask for less"
        )
    if gpus:
        default = min(node.cpus * gpus / node.gpus / 2 for node in fitting)
    elif devices:
        default = min(node.cpus / 2 for node in fitting)
    else:
        per_worker = sum(node.cpus * node.count for node in fitting) // resources.workers
        default = min(_MOST_DEFAULT_CPUS, per_worker, *(node.cpus for node in fitting)) - streamed
    share = Share(gpus, resources.cpus or max(1, int(min(_MOST_DEFAULT_CPUS, default))))
    if memory is not None or not devices:
        _check_team(resources, share, nodes)
    return share


def count_gpus(resources: Resources) -> int:
    """Return the number of GPUs of the type asked for on all nodes that are up or may come, a fraction as one."""
    total = sum(node.gpus * node.count for node in _nodes_with_devices(resources, possible_nodes()))
    return max(1, int(total)) if total else 0


def _nodes_with_devices(resources: Resources, nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes with GPUs that have the labels and the type of GPU that `resources` name.

    Raises:
        InputError: There are none; Ray would wait for one for ever.
    """
    devices = [node for node in nodes if node.gpus > 0]
    alike = [node for node in devices or nodes if node.has(resources.labels)]
    if not alike:
        labels = {label for node in nodes for label in node.labels.items() if label[0] != "ray.io/node-id"}
        known = [f"{name} {value}" for name, value in sorted(labels)]
        asked = ", ".join(f"{name} {wanted}" for name, wanted in resources.labels.items())
        what = "node with a GPU" if devices else "node"
        raise InputError(f"resources.labels: no {what} has {asked}; the nodes have {join_names(known)}")
    devices = [node for node in alike if node.gpus > 0]
    if resources.accelerator is None:
        return devices
    # a node that the autoscaler has not started may not say which type it has
    chosen = [node for node in devices if node.accelerator in (resources.accelerator, None)]
    if not chosen:
        types = sorted({node.accelerator or "" for node in devices})
        there = f"its GPUs are {join_names(types)}; name one of these" if types else "it has no GPUs; leave this out"
        raise InputError(f"resources.accelerator: {resources.accelerator} is not in the cluster, {there}")
    return chosen


def _default_gpus(resources: Resources, memory: int, devices: Sequence[Node]) -> float:
    """Return the smallest of the usual shares that holds `memory` on each of these nodes. A member of a team gets a
    whole GPU, since NCCL wants one for each."""
    if resources.workers > 1:
        return 1.0
    smallest = min(node.gpu_memory for node in devices)
    share = next((share for share in _SHARES if memory <= share * _USABLE * smallest), 1.0)
    return min(share, max(node.gpus for node in devices))


def _check_team(resources: Resources, share: Share, nodes: Sequence[Node]) -> None:
    fewest = resources.min_workers or resources.workers
    totals = {
        "CPU": sum(node.cpus * node.count for node in nodes), "GPU": sum(node.gpus * node.count for node in nodes)
    }  # fmt: skip
    for (name, total), each in zip(totals.items(), (share.cpus, share.gpus), strict=True):
        if each * fewest > total:
            raise InputError(
                f"resources.workers: {fewest} with {each:g} {name}s each asked for, the cluster has {total:g}; "
                "ask for fewer or for less"
            )


def check_this_machine(resources: Resources) -> None:
    """Raise an InputError where this machine lacks what `resources` ask for, before an embedded Ray is started.

    Does nothing where a cluster is named or Ray runs already.
    """
    if not has_cluster():
        share_of(resources, memory=0, nodes=[this_machine()])


def has_cluster() -> bool:
    """Return whether a cluster is named or Ray runs already."""
    return not has_embedded_ray() or ("ray" in sys.modules and sys.modules["ray"].is_initialized())


def this_machine() -> Node:
    """Return this machine as the one node of an embedded Ray, which need not run."""
    import pynvml

    try:
        pynvml.nvmlInit()
        gpus = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        gpus = 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len(list(filter(None, visible.split(",")))))
    return Node({"CPU": os.cpu_count() or 1, "GPU": gpus})
