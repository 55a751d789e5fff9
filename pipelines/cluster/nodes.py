"""Which nodes the cluster has or may get, and whether all of them reach the store and the folder of checkpoints."""

import os
from pathlib import Path

from aecore.core.errors import InputError
from pipelines.host.scratch import scratch

Node = dict[str, float]
"""Resources of a node by Ray's names (CPU, GPU, ...); CPU is always there."""


def possible_nodes() -> list[Node]:
    """Return the nodes that are up, or the nodes that the autoscaler may start if there are more of those."""
    import ray

    up = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # Ray has no public way to ask for the autoscaler's node groups (2.60); without them, a cluster whose GPU nodes
    # have not started yet would look like one without GPUs. A public call in `ray.autoscaler.sdk` would replace this.
    config = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config else ()
    planned = [dict(group.resources) for group in groups for _ in range(group.max_count)]
    return [{"CPU": 0, **node} for node in max(up, planned, key=len)]


def most_gpus_of_a_node() -> float:
    """Return the number of GPUs of the node that has or will have the most."""
    return max(node.get("GPU", 0) for node in possible_nodes())


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
