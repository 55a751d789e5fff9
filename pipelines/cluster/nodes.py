"""Which nodes the cluster has or may get, and whether all of them reach the store and the folder of checkpoints."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from aecore.core.errors import InputError
from aecore.data.files import filesystem_of, scheme_of
from pipelines.host.environment import has_embedded_ray
from pipelines.host.scratch import scratch

ACCELERATOR = "accelerator_type:"
"""Prefix of the resource by which Ray names the type of a node's GPUs."""
_GIBIBYTES = {
    "A10": 22, "A10G": 22, "A100": 39, "A100-40G": 39, "A100-80G": 79, "B200": 178, "GB200": 184, "H20": 95, "H100": 79,
    "H200": 139, "L4": 22, "L40S": 44, "P4": 7, "P100": 16, "T4": 14, "V100": 16,
}  # fmt: skip
"""Memory of a GPU by Ray's name of its type, the smallest where a type is sold with several."""
_UNKNOWN_GIBIBYTES = 14
"""Memory that is assumed of a GPU of a type that is not in the table."""
_BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""File on the head in which `ray up` leaves the description of the cluster; `ray start` reads it there, too."""
_MOST_OF_A_KIND = 1024
"""Most nodes of a kind that are counted, whatever the most is that the autoscaler may start."""


@dataclass(frozen=True)
class Node:
    """A node that is up, or several alike that the autoscaler may start."""

    resources: Mapping[str, float]
    """Amount of each resource of the node by Ray's name for it: CPU, GPU, accelerator_type:A10G and others."""
    labels: Mapping[str, str] = field(default_factory=dict)
    count: int = 1
    """How many such nodes there are."""

    @property
    def cpus(self) -> float:
        """The number of CPUs that Ray gives to tasks."""
        return self.resources.get("CPU", 0)

    @property
    def gpus(self) -> float:
        """The number of GPUs."""
        return self.resources.get("GPU", 0)

    @property
    def accelerator(self) -> str | None:
        """Ray's name of the type of the node's GPUs; None where the node does not say."""
        names = (name.removeprefix(ACCELERATOR) for name in self.resources if name.startswith(ACCELERATOR))
        return next(names, None)

    @property
    def gpu_memory(self) -> int:
        """The bytes of memory of one of the node's GPUs, by a table of types."""
        return _GIBIBYTES.get(self.accelerator or "", _UNKNOWN_GIBIBYTES) * 2**30

    def has(self, labels: Mapping[str, str]) -> bool:
        """Return whether the node has these labels.

        Args:
            labels: Ray's label selector, each value as in VALUE, !VALUE, in(A, B) or !in(A, B).
        """
        return all(_matches(wanted, self.labels.get(name)) for name, wanted in labels.items())


def possible_nodes() -> list[Node]:
    """Return the nodes that are up and, on the head of a cluster that `ray up` has made, the kinds of nodes that the
    autoscaler may start, each once with their number; nodes of these kinds that are up are among them."""
    import ray

    up = [Node(node["Resources"], node.get("Labels", {})) for node in ray.nodes() if node["Alive"]]
    planned = [] if has_embedded_ray() else list(_planned_nodes())
    kinds = {_kind_of(node) for node in planned}
    return [node for node in up if _kind_of(node) not in kinds or _is_head(node)] + planned


def _kind_of(node: Node) -> tuple[float, float, str | None]:
    return node.cpus, node.gpus, node.accelerator


def _is_head(node: Node) -> bool:
    return "node:__internal_head__" in node.resources


def _planned_nodes() -> Iterator[Node]:
    """Yield the kinds of nodes that the autoscaler may start, those that it prefers first.

    Ray itself does not tell (2.60: `get_cluster_config` is never filled). Without this, a cluster whose GPU nodes have
    not started yet would look like one without GPUs.
    """
    file = _BOOTSTRAP.expanduser()
    if not file.is_file():
        return
    config = yaml.safe_load(file.read_text())
    kinds = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    left = config.get("max_workers", 2)
    for kind in sorted(kinds.values(), key=lambda kind: -kind.get("priority", 0)):
        count = max(0, min(kind.get("max_workers", left), left, _MOST_OF_A_KIND))
        left -= count
        if count:
            yield Node(kind["resources"], kind.get("labels", {}), count)


def _matches(wanted: str, value: str | None) -> bool:
    """Return whether a node whose label has `value`, or None if it lacks the label, fulfils a selector's value."""
    several = re.fullmatch(r"!?in\((.*)\)", wanted)
    choices = [choice.strip() for choice in several[1].split(",")] if several else [wanted.removeprefix("!")]
    return (value in choices) != wanted.startswith("!")


def check_reach(store: str, storage_path: str | None, field: str = "resources.storage_path") -> None:
    """Check that all nodes of the cluster can write to the MLflow store and to the folder of checkpoints.

    Args:
        store: Tracking URI of the MLflow store.
        storage_path: Folder or URI that the nodes write to, if there is one.
        field: The setting that names `storage_path`, for the message.

    Raises:
        InputError: The store or the folder lies on a single machine, and the cluster has several nodes; or the folder
            cannot be reached.
    """
    import ray

    if storage_path is not None:
        filesystem_of(storage_path, field)
    alive = [node for node in ray.nodes() if node["Alive"]]
    if max(len(alive), sum(node.count for node in possible_nodes())) == 1:
        return
    if store.startswith(("sqlite:", "file:", "/")):
        raise InputError(
            f"MLFLOW_TRACKING_URI: {store} is a file of one machine and the cluster has several nodes; start "
            "`mlflow server` where all of them reach it and name that, http://HOST:5000"
        )
    if storage_path is None or scheme_of(storage_path):
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
