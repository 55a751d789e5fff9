"""What a stage gets of a cluster, with the cluster's answers made up."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from pydantic import ValidationError

from aecore.config.experiment import Data, Dense, Experiment, Fit, overlay
from aecore.config.facts import Facts
from aecore.config.specs import Numerics
from aecore.core.errors import InputError
from pipelines.cluster import nodes as nodes_module
from pipelines.cluster.device import position_of
from pipelines.cluster.nodes import check_reach, possible_nodes
from pipelines.cluster.placement import bundle_of, most_trials, options_of, options_of_a_controller
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share, count_gpus, share_of
from pipelines.execution.assignment import checkpoint_folder, checkpoints_of
from pipelines.graph.needs import device_memory
from pipelines.graph.recipe import build
from pipelines.graph.stage import Stage

HEAD = {"CPU": 0, "node:__internal_head__": 1}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Make up the nodes that are up, their labels, and what `ray up` has left on the head."""

    def make(
        *up: dict[str, float], labels: Sequence[dict[str, str]] = (), may: dict[str, dict[str, Any]] | None = None,
        most: int = 4,
    ) -> None:  # fmt: skip
        own = [*labels, *[{}] * (len(up) - len(labels))]
        nodes = [{"Alive": True, "Resources": node, "Labels": mine} for node, mine in zip(up, own, strict=True)]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        file = tmp_path / "ray_bootstrap_config.yaml"
        if may is not None:
            kinds = {"head": {"resources": {"CPU": 0}, "max_workers": 0}, **may}
            file.write_text(
                yaml.safe_dump({"head_node_type": "head", "max_workers": most, "available_node_types": kinds})
            )
            monkeypatch.setenv("RAY_ADDRESS", "auto")
        monkeypatch.setattr(nodes_module, "_BOOTSTRAP", file)

    return make


def share(memory: float | None = 12.0, **resources: Any) -> Share:
    """The share of a stage that needs so many GiB of a GPU; None needs no GPU."""
    return share_of(Resources.model_validate(resources), None if memory is None else int(memory * 2**30))


def test_a_machine_without_gpu_gives_its_cpus(cluster: Any) -> None:
    cluster({"CPU": 2})
    assert share() == share(None) == (0, 2)
    assert share(workers=2) == (0, 1)


def test_a_stage_gets_the_share_of_a_gpu_that_it_needs_and_cpus_in_proportion(cluster: Any) -> None:
    cluster({"CPU": 0}, {"CPU": 16, "GPU": 2, "accelerator_type:A10G": 1})
    # half of what belongs to the share; the rest is for stages without a GPU
    assert share(15) == (1, 4) and share(9) == (0.5, 2) and share(4) == (0.25, 1) and share(1) == (0.125, 1)
    assert share(40) == (1, 4)  # more than a GPU has; rows may lie elsewhere, and batches may be cut
    assert share(1, gpus=1) == (1, 4) and share(15, gpus=0.25) == (0.25, 1)
    assert share(None) == (0, 8) and share(None, cpus=3) == (0, 3)
    assert share(1, gpus=0) == share(None, gpus=0) == (0, 8)
    assert share(1, workers=2) == (1, 4)  # NCCL wants a GPU for each worker


def test_a_head_alone_has_no_place_for_stages(cluster: Any) -> None:
    cluster({"CPU": 0})
    with pytest.raises(InputError, match="no node with a CPU for stages"):
        share()


def test_a_small_node_holds_four_trials(cluster: Any) -> None:
    """As CLUSTER.md says of a g5.xlarge."""
    cluster({"CPU": 4, "GPU": 1, "accelerator_type:A10G": 1})
    assert share(4) == (0.25, 1) and share(15) == (1, 2)


CLASSES = tuple("0123456789")
MNIST = Facts(digest="", shape=(1, 28, 28), levels=256, classes=CLASSES, rows=70_000)
CIFAR = Facts(digest="", shape=(3, 32, 32), levels=256, classes=CLASSES, rows=60_000)
WIDE = Facts(digest="", shape=(50_000,), levels=0, classes=(), rows=10_000)
DENOISING = {"kind": "denoising"}
MODELS: dict[str, tuple[Facts, dict[str, Any], dict[str, list[float]]]] = {
    # the shares of the layers and of finetuning
    "784-256-128-64": (
        MNIST, {"network": {"kind": "dense", "widths": (256, 128, 64)}},
        {"T4": [1 / 8] * 4, "A10G": [1 / 8] * 4, "H100": [1 / 8] * 4},
    ),
    "784-1000-1000-1000": (
        MNIST, {"network": {"kind": "dense", "widths": (1000, 1000, 1000)}, "variant": DENOISING},
        {"T4": [1 / 8, 1 / 4, 1 / 4, 1 / 4], "A10G": [1 / 8] * 4, "H100": [1 / 8] * 4},
    ),
    "conv of 256 levels": (
        CIFAR, {"network": {"kind": "conv", "widths": (32, 64, 128)}, "variant": DENOISING},
        {"T4": [1 / 4, 1 / 2, 1 / 2, 1 / 4], "A10G": [1 / 4, 1 / 2, 1 / 4, 1 / 4], "H100": [1 / 8] * 4},
    ),
    "50000-4096-256": (
        WIDE, {"network": {"kind": "dense", "widths": (4096, 256)}},
        {"T4": [1, 1 / 2, 1], "A10G": [1, 1 / 4, 1], "H100": [1 / 4, 1 / 8, 1 / 2]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("gpu", ["T4", "A10G", "H100"])
@pytest.mark.parametrize("name", MODELS)
def test_shares_of_models_on_gpus(name: str, gpu: str, cluster: Any) -> None:
    facts, fields, wanted = MODELS[name]
    cluster({"CPU": 16, "GPU": 1, f"accelerator_type:{gpu}": 1})
    values = overlay(Experiment(data=Data(name="mnist"), control=False).model_dump(), fields)
    graph = build(Experiment.model_validate(values), facts, Numerics())
    *trained, evaluated = [share_of(Resources(), device_memory(stage)).gpus for stage in graph.kept()]
    assert trained == wanted[gpu] and evaluated == 0


def test_fits_that_are_trained_as_one_need_more(cluster: Any) -> None:
    graph = build(Experiment(data=Data(name="mnist"), network=Dense(widths=(500, 250))), MNIST, Numerics())
    one, many = (device_memory(graph.layers[0], fits) for fits in (1, 64))
    assert one and many and one < many < 64 * one  # the rows lie on the device once


def test_a_gpu_of_an_unknown_type_is_taken_for_a_small_one(cluster: Any) -> None:
    cluster({"CPU": 16, "GPU": 1})
    assert share(4).gpus == 0.5
    cluster({"CPU": 16, "GPU": 1, "accelerator_type:H200": 1})
    assert share(4).gpus == 0.125


def test_gpus_of_a_type_are_chosen(cluster: Any) -> None:
    nodes = [{"CPU": 4, "GPU": 1, "accelerator_type:T4": 1}, {"CPU": 16, "GPU": 1, "accelerator_type:H100": 1}]
    cluster(*nodes)
    assert share(4) == (0.5, 1) and share(4, accelerator="H100") == (0.125, 1)
    assert count_gpus(Resources()) == 2 and count_gpus(Resources(accelerator="H100")) == 1
    with pytest.raises(InputError, match=r"resources\.accelerator: A100 is not in .* its GPUs are H100, T4; name one"):
        share(accelerator="A100")
    share_with, options = Share(0.5, 1), options_of(Share(0.5, 1), Resources(accelerator="H100"))
    assert options["accelerator_type"] == "H100" and "accelerator_type" not in options_of(Share(0, 1), Resources())
    assert bundle_of(share_with, Resources(accelerator="H100"))[0]["accelerator_type:H100"] > 0


def test_labels_choose_nodes_and_controllers_sit_on_no_spot_node(cluster: Any) -> None:
    cluster({"CPU": 4, "GPU": 1})
    assert options_of(Share(1, 2), Resources()) == {"num_cpus": 2, "num_gpus": 1}
    west = {"region": "west"}
    assert options_of(Share(1, 2), Resources(labels=west))["label_selector"] == west
    assert "label_selector" not in options_of(Share(0, 2), Resources(labels=west))
    assert bundle_of(Share(1, 2), Resources(labels=west))[1] == {"bundle_label_selector": [west]}
    assert options_of_a_controller()["label_selector"] == {"ray.io/market-type": "!spot"}


def test_trials_on_gpus_leave_some_of_their_cpus_to_those_that_measure(cluster: Any) -> None:
    assert bundle_of(Share(0.25, 1), Resources())[0] == {"CPU": 0.75, "GPU": 0.25}
    assert bundle_of(Share(0, 1), Resources())[0] == {"CPU": 1, "GPU": 0}
    cluster({"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1})
    assert most_trials(Share(0.25, 1)) == 8 and most_trials(Share(0.125, 1)) == 8  # four on each leave it a CPU
    assert most_trials(Share(1, 2)) == 2 and most_trials(Share(0, 1)) == 8
    cluster({"CPU": 2, "GPU": 1})
    assert most_trials(Share(0.125, 1)) == 2  # too few CPUs to leave one


def test_workers_see_all_gpus_where_a_node_has_several(cluster: Any) -> None:
    cluster({"CPU": 4, "GPU": 2})
    environment = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
    assert options_of(Share(1, 2), Resources())["runtime_env"] == environment
    assert options_of(Share(0, 2), Resources())["runtime_env"] == environment  # so that they share their workers


@pytest.mark.parametrize(
    ("given", "visible", "position"),
    [(["0"], "0", 0), (["1"], "1", 0), (["1"], None, 1), (["1"], "0,1", 1), (["3"], "2,3", 1), (["3"], None, 3)],
)
def test_a_worker_computes_on_the_gpu_that_it_was_given(given: list[str], visible: str | None, position: int) -> None:
    assert position_of(given, visible) == position


@pytest.mark.parametrize(
    ("labels", "there"),
    [({"zone": "b"}, False), ({"zone": "a"}, True), ({"zone": "in(b, a)"}, True), ({"zone": "!in(a)"}, False),
     ({"zone": "!b"}, True), ({"rack": "1"}, False)],
)  # fmt: skip
def test_labels_that_no_node_has_are_refused(labels: dict[str, str], there: bool, cluster: Any) -> None:
    cluster({"CPU": 4, "GPU": 1}, labels=[{"zone": "a"}])
    if there:
        assert share(1, labels=labels).gpus
    else:
        with pytest.raises(
            InputError, match=r"resources\.labels: no node with a GPU has (zone|rack) .*; the nodes have zone a"
        ):
            share(1, labels=labels)


def test_labels_choose_among_types_of_gpus(cluster: Any) -> None:
    kinds = [{"CPU": 4, "GPU": 1, "accelerator_type:T4": 1}, {"CPU": 4, "GPU": 1, "accelerator_type:H100": 1}]
    cluster(*kinds, labels=[{"zone": "a"}, {"zone": "b"}])
    assert share(4).gpus == 0.5 and share(4, labels={"zone": "b"}).gpus == 0.125


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (
            {"gpus": 2},
            "resources.gpus: 2 asked for a stage, but a worker computes on one GPU .*use resources.workers 2 with",
        ),
        ({"gpus": 0.5, "workers": 2}, "resources.gpus: 0.5 for each of 2 workers, but NCCL refuses workers that share"),
    ],
)
def test_gpus_that_would_idle_or_cannot_be_shared_are_refused_at_once(resources: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Resources.model_validate(resources)


GPU_NODE = {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 3, "labels": {"kind": "gpu"}}


def test_nodes_that_the_autoscaler_may_start_count(cluster: Any) -> None:
    """Though none is up, as on an idle cluster of cluster.yaml."""
    cluster(HEAD, may={"gpu": GPU_NODE})
    assert share() == (1, 4) and share(None) == (0, 4) and count_gpus(Resources()) == 3
    assert share(workers=3) == (1, 4) and share(labels={"kind": "gpu"}) == (1, 4)
    with pytest.raises(InputError, match="4 with 1 GPUs each asked for, the cluster has 3"):
        share(workers=4, cpus=1)
    # two are up: they are among those that may come
    cluster(HEAD, {"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}, may={"gpu": GPU_NODE})
    assert count_gpus(Resources()) == 3


def test_the_autoscaler_starts_no_more_than_all_kinds_may_have(cluster: Any) -> None:
    unlimited = {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2**31 - 1}
    cluster(HEAD, may={"gpu": GPU_NODE, "more": unlimited})
    assert count_gpus(Resources()) == 4  # max_workers of the cluster


def test_kinds_without_a_limit_are_counted_and_not_listed(cluster: Any) -> None:
    """KubeRay's largest maxReplicas: a list of so many nodes would take all memory."""
    unlimited = {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2**31 - 1}
    cluster(HEAD, may={"gpu": unlimited}, most=2**31 - 1)
    assert 1000 <= count_gpus(Resources()) <= 2**31 - 1 and len(possible_nodes()) == 2


def test_nodes_beside_the_planned_ones_count_as_well(cluster: Any) -> None:
    cluster(HEAD, {"CPU": 4, "GPU": 2, "accelerator_type:T4": 1}, may={"gpu": GPU_NODE})
    assert count_gpus(Resources()) == 5 and count_gpus(Resources(accelerator="T4")) == 5


def test_what_cluster_yaml_promises_is_planned_with(cluster: Any, tmp_path: Path) -> None:
    cluster(HEAD, may={})
    (tmp_path / "ray_bootstrap_config.yaml").write_text((Path(__file__).parents[1] / "cluster.yaml").read_text())
    assert count_gpus(Resources()) == 4 and share(4).gpus > 0
    assert share(4, labels={"ray.io/market-type": "spot"}).gpus > 0


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"gpus": 1}, r"resources\.gpus: 1 asked for a stage, the largest node has 0"),
        ({"cpus": 3}, r"resources\.cpus: 3 asked for a stage, the largest node has 2"),
        ({"workers": 5}, r"resources\.workers: 5 with 1 CPUs each asked for, the cluster has 2"),
    ],
)
def test_what_no_node_has_is_refused(resources: dict[str, Any], message: str, cluster: Any) -> None:
    cluster({"CPU": 2})
    with pytest.raises(InputError, match=message):
        share(**resources)


def test_where_checkpoints_are_kept(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster({"CPU": 2})
    monkeypatch.chdir(tmp_path)
    stage, server = Stage("a", "stages.a", Fit()), "http://mlflow:5000"

    def place(store: str, storage_path: str | None = None) -> str | None:
        return checkpoint_folder(store, storage_path)

    assert place("sqlite:////there/mlflow.db") == "/there/checkpoints"
    assert place(server) == f"{tmp_path}/checkpoints"
    assert place(server, "s3://bucket/x") == "s3://bucket/x"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert place(server) is None
    assert place("sqlite:////there/mlflow.db") == "/there/checkpoints"
    assert checkpoints_of(stage, "/there/checkpoints").place == f"/there/checkpoints/{stage.key}"


def test_a_folder_that_another_node_does_not_see_is_named(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a mount hid it there; tests/test_nodes.py has a real one, which takes root."""
    cluster({"CPU": 4}, {"CPU": 4})
    nodes = [{**node, "NodeID": f"{n:056}", "NodeManagerHostname": f"host{n}"} for n, node in enumerate(ray.nodes())]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)

    blind = {nodes[1]["NodeID"]}

    def seen_from(exists: Callable[[Path], bool], scheduling_strategy: Any) -> Any:
        return SimpleNamespace(remote=lambda mark: scheduling_strategy.node_id not in blind and exists(mark))

    def remote(**_: Any) -> Any:
        return lambda exists: SimpleNamespace(options=partial(seen_from, exists))

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", lambda seen: seen)
    with pytest.raises(InputError, match=r"resources\.storage_path: .*checkpoints is another folder on host1; name"):
        check_reach("http://store:5000", str(tmp_path / "checkpoints"))
    blind.clear()
    check_reach("http://store:5000", str(tmp_path / "checkpoints"))


def test_an_embedded_ray_has_no_idle_servers_and_takes_free_ports() -> None:
    code = """
import json, psutil
from ray._private.node import Node
from ray._private import parameter
from pipelines.cluster.connection import start_ray

before = Node.start_monitor, Node.start_api_server, parameter.RayParams
start_ray()
lines = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
print(json.dumps([lines, before == (Node.start_monitor, Node.start_api_server, parameter.RayParams)]))
"""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    lines, put_back = json.loads(done.stdout.splitlines()[-1])
    assert put_back and any("log_monitor.py" in line for line in lines)  # which brings what workers print
    assert not any("/monitor.py" in line or "dashboard/dashboard.py" in line for line in lines), lines
    # the agent of a head on this machine needs its port, 52365
    (raylet,) = [line for line in lines if "/raylet " in line]
    assert "--listen-port=0" in raylet and "52365" not in raylet
