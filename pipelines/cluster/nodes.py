"""Which nodes there are, and whether they reach what a job writes to."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from aecore.core.errors import InputError
from pipelines.host.scratch import scratch

if TYPE_CHECKING:
    pass


def _nodes() -> list[dict[str, float]]:
    """Resources of each node that is up or, if these are more, that the autoscaler may bring up."""
    import ray

    up = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    config = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config else ()
    may = [dict(group.resources) for group in groups for _ in range(group.max_count)]
    return [{"CPU": 0, **node} for node in max(up, may, key=len)]


def check_reach(store: str, storage_path: str | None, field: str = "resources.storage_path") -> None:
    """Whether all nodes of the cluster can write to the store and to where checkpoints go.

    Args:
        field: the setting that names the second, for the message.

    Raises:
        InputError: one of them is a file of a single machine.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if max(len(nodes), len(_nodes())) == 1:
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
            sees = ray.remote(num_cpus=0, max_retries=0)(os.path.exists)
            seen = [
                sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                    mark
                )
                for node in nodes
            ]
            blind = [n["NodeManagerHostname"] for n, found in zip(nodes, ray.get(seen), strict=True) if not found]
    except OSError as error:
        raise InputError(f"{field}: cannot write to {folder} ({error.strerror}); move it") from None
    if blind:
        raise InputError(
            f"{field}: {folder} is another folder on {', '.join(sorted(set(blind)))}; name one on a "
            "file system that all nodes mount, or a URI such as s3://BUCKET/diabolo"
        )
