"""On which nodes a stage's task or a trial may run, as options for Ray."""

from collections.abc import Sequence
from typing import Any

from pipelines.cluster.nodes import ACCELERATOR, Node, possible_nodes
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share

_SEES_ALL_GPUS = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
_TRIAL_CPU = 0.75
"""Share of a CPU that a trial on a GPU reserves for each of its CPUs. So four trials leave a CPU of four to the tasks
that measure trials; trials keep what they have reserved until the study ends."""
_FEW_CPUS = 4
"""A node with fewer CPUs leaves none: there all trials are measured at the end."""


def options_of(share: Share, resources: Resources) -> dict[str, Any]:
    """Return the options of a Ray task that computes a stage: its share, and on which nodes it may run.

    Where a node has several GPUs, workers see all of them and use the one that they are given (see `device_of`). So a
    worker can go on with another GPU than it had before: CUDA reads the variable that hides the others only once.
    """
    options: dict[str, Any] = {"num_cpus": share.cpus, "num_gpus": share.gpus}
    if share.gpus and resources.accelerator:
        options["accelerator_type"] = resources.accelerator
    if share.gpus and resources.labels:
        options["label_selector"] = resources.labels
    if any(node.gpus > 1 for node in possible_nodes()):
        options["runtime_env"] = {"env_vars": {_SEES_ALL_GPUS: "1"}}
    return options


def bundle_of(share: Share, resources: Resources) -> tuple[dict[str, float], dict[str, Any]]:
    """Return what a trial reserves, as a bundle of a placement group of Ray, and further arguments of the group."""
    bundle: dict[str, float] = {"CPU": share.cpus * (_TRIAL_CPU if share.gpus else 1), "GPU": share.gpus}
    if share.gpus and resources.accelerator:
        bundle[f"{ACCELERATOR}{resources.accelerator}"] = 0.001  # as Ray does for the option accelerator_type
    return bundle, {"bundle_label_selector": [resources.labels]} if share.gpus and resources.labels else {}


def options_of_measuring(resources: Resources) -> dict[str, Any]:
    """Return the options of a Ray task that measures a trial while others train: a CPU, or what a trial leaves of one
    where no node has more to spare, since Ray Tune keeps the place of a trial until the study ends."""
    few = all(node.cpus < _FEW_CPUS for node in possible_nodes())
    return options_of(Share(0, 1), resources) | ({"num_cpus": 1 - _TRIAL_CPU} if few else {})


def most_trials(share: Share, nodes: Sequence[Node] | None = None) -> int:
    """Return how many trials with this share of the cluster, or of the given nodes, may run at once; on GPUs so many
    that each node of four CPUs or more has one left to measure trials."""
    nodes = nodes or possible_nodes()
    if not share.gpus:
        return max(1, sum(int(node.cpus // share.cpus) * node.count for node in nodes))
    counts = [
        node.count
        * int(min(node.gpus / share.gpus, (node.cpus - (node.cpus >= _FEW_CPUS)) / (_TRIAL_CPU * share.cpus)))
        for node in nodes
    ]
    return max(1, sum(counts))


def options_of_a_controller() -> dict[str, Any]:
    """Return the options of a Ray task that computes nothing itself but leads others: no CPU, and no spot node if there
    is another, since all that it leads is lost with it."""
    return {
        "num_cpus": 0, "label_selector": {"ray.io/market-type": "!spot"}, "fallback_strategy": [{"label_selector": {}}]
    }  # fmt: skip
