"""Which nodes the cluster has or may get, and whether all of them reach the store and the folder of checkpoints."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aecore.core.errors import InputError
from pipelines.host.scratch import scratch

Node = dict[str, float]
"""Resources of a node by Ray's names (CPU, GPU, accelerator_type:A10G, ...); CPU is always there."""

ACCELERATOR = "accelerator_type:"
"""Prefix of the resource by which Ray names the type of a node's GPUs."""
_GIBIBYTES = {
    "A10": 22, "A10G": 22, "A100": 39, "A100-40G": 39, "A100-80G": 79, "B200": 178, "GB200": 184, "H20": 95, "H100": 79,
    "H200": 139, "L4": 22, "L40S": 44, "P4": 7, "P100": 16, "T4": 14, "V100": 16,
}  # fmt: skip
"""Memory of a GPU by Ray's name of its type, the smallest where a type is sold with several."""
_UNKNOWN_GIBIBYTES = 14
"""Memory that is assumed of a GPU of a type that is not in the table."""


def possible_nodes() -> list[Node]:
    """Return the nodes that are up, or the nodes that the autoscaler may start if there are more of those."""
    import ray

    up = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    planned = [dict(group.resources) for group in _node_groups() for _ in range(group.max_count)]
    return [{"CPU": 0, **node} for node in max(up, planned, key=len)]


def _node_groups() -> Sequence[Any]:
    """Return the groups of nodes that the autoscaler may start; none without an autoscaler."""
    import ray

    # Ray has no public way to ask for the autoscaler's node groups (2.60); without them, a cluster whose GPU nodes
    # have not started yet would look like one without GPUs. A public call in `ray.autoscaler.sdk` would replace this.
    config = ray._private.state.state.get_cluster_config()
    return config.node_group_configs if config else ()


def accelerator_of(node: Node) -> str | None:
    """Return Ray's name of the type of a node's GPUs; None where the node does not say."""
    return next((name.removeprefix(ACCELERATOR) for name in node if name.startswith(ACCELERATOR)), None)


def gpu_memory(node: Node) -> int:
    """Return the bytes of memory of one of a node's GPUs, by a table of types."""
    return _GIBIBYTES.get(accelerator_of(node) or "", _UNKNOWN_GIBIBYTES) * 2**30


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise an InputError where no node has these labels and none will come: Ray would wait for one for ever.

    Args:
        labels: Ray's label selector, each value as in VALUE, !VALUE, in(A, B) or !in(A, B).
    """
    if not labels or "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return
    import ray

    if _node_groups():
        return  # the autoscaler does not tell the labels of nodes that it may start
    for name, wanted in labels.items():
        values = {node["Labels"].get(name) for node in ray.nodes() if node["Alive"]}
        if not any(_matches(wanted, value) for value in values):
            there = ", ".join(sorted(filter(None, values))) or "none has this label"
            raise InputError(f"resources.labels: no node has {name} {wanted} ({there}); name a label that nodes have")


def _matches(wanted: str, value: str | None) -> bool:
    """Return whether a node whose label has `value`, or None if it lacks the label, fulfils a selector's value."""
    negated, listed = re.fullmatch(r"(!?)(.*)", wanted, re.DOTALL).groups()  # type: ignore[union-attr]
    several = re.fullmatch(r"in\((.*)\)", listed)
    choices = [choice.strip() for choice in several[1].split(",")] if several else [listed]
    return (value in choices) != bool(negated)


def check_reach(store: str, storage_path: str | None, field: str = "resources.storage_path") -> None:
    """Check that all nodes of the cluster can write to the MLflow store and to the folder of checkpoints.

    Args:
        store: Tracking URI of the MLflow store.
        storage_path: Folder or URI that the nodes write to, if there is one.
        field: The setting that names `storage_path`, for the message.

    Raises:
        InputError: The store or the folder lies on a single machine, and the cluster has several nodes.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    if max(len(alive), len(possible_nodes())) == 1:
        return
    if store.startswith(("sqlite:", "file:", "/")):
        raise InputError(
            f"MLFLOW_TRACKING_URI: {store} is a file of one machine and the cluster has several nodes; start "
            "`mlflow server` where all of them reach it and name that, http://HOST:5000"
        )
    if storage_path is None or "://" in storage_path:
        return
    folder = Path(storage_path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch(folder) as mark:
            blind = _nodes_that_do_not_see(mark, alive)
    except OSError as error:
        raise InputError(f"{field}: cannot write to {folder} ({error.strerror}); name another folder") from None
    if blind:
        raise InputError(
            f"{field}: {folder} is another folder on {', '.join(sorted(blind))}; name one on a "
            "file system that all nodes mount, or a URI such as s3://BUCKET/diabolo"
        )


def _nodes_that_do_not_see(path: Path, nodes: list[dict]) -> set[str]:
    """Return the host names of the nodes on which `path` does not exist."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    exists = ray.remote(num_cpus=0, max_retries=0)(os.path.exists)
    there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    answers = ray.get([exists.options(scheduling_strategy=strategy).remote(path) for strategy in there])
    return {node["NodeManagerHostname"] for node, answer in zip(nodes, answers, strict=True) if not answer}
