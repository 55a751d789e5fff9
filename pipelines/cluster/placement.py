"""On which nodes a stage's task may run, as options of a Ray task."""

from typing import Any

from pipelines.cluster.nodes import ACCELERATOR, possible_nodes
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share

_SPOT = {"ray.io/market-type": "spot"}
_SEES_ALL_GPUS = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


def options_of(share: Share, resources: Resources) -> dict[str, Any]:
    """Return the options of a Ray task that computes a stage: its share, and on which nodes it may run.

    On a cluster of several nodes, spot nodes come first and others are the fallback. Where a node has several GPUs,
    workers see all of them and use the given one (see `device_of`), so that a worker can go on with another GPU than
    it had before: what CUDA sees of the environment is fixed once a process has used it.
    """
    nodes = possible_nodes()
    options: dict[str, Any] = {"num_cpus": share.cpus, "num_gpus": share.gpus}
    labels = resources.labels if share.gpus else {}
    if share.gpus and resources.accelerator:
        options["accelerator_type"] = resources.accelerator
    if labels:
        options["label_selector"] = labels
    if len(nodes) > 1 and not labels.keys() & _SPOT.keys():
        options |= {"label_selector": labels | _SPOT, "fallback_strategy": [{"label_selector": labels}]}
    if any(node.get("GPU", 0) > 1 for node in nodes):
        options["runtime_env"] = {"env_vars": {_SEES_ALL_GPUS: "1"}}
    return options


def bundle_of(share: Share, resources: Resources) -> tuple[dict[str, float], dict[str, Any]]:
    """Return a trial's bundle of resources for a placement group of Ray, and further arguments of the group."""
    bundle: dict[str, float] = {"CPU": share.cpus, "GPU": share.gpus}
    if share.gpus and resources.accelerator:
        bundle[f"{ACCELERATOR}{resources.accelerator}"] = 0.001  # as Ray does for the option accelerator_type
    return bundle, {"bundle_label_selector": [resources.labels]} if share.gpus and resources.labels else {}


def options_of_a_controller() -> dict[str, Any]:
    """Return the options of a Ray task that computes nothing itself but leads others: no CPU, and no spot node if there
    is another, since all that it leads is lost with it."""
    return {
        "num_cpus": 0, "label_selector": {name: f"!{value}" for name, value in _SPOT.items()},
        "fallback_strategy": [{"label_selector": {}}],
    }  # fmt: skip
