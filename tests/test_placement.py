"""What a stage gets of a cluster, with the cluster's answers made up."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.core.generated import autoscaler_pb2

from aecore.config.experiment import Fit
from aecore.core.errors import InputError
from pipelines.cluster.nodes import check_reach
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share, share_of
from pipelines.execution.assignment import checkpoint_folder, checkpoints_of
from pipelines.graph.stage import Stage

PROTO: Any = autoscaler_pb2  # generated, without hints


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*up: dict[str, float], may: dict[str, tuple[int, dict[str, int]]] | None = None) -> None:
        groups = [
            PROTO.NodeGroupConfig(name=name, max_count=count, resources=resources)
            for name, (count, resources) in (may or {}).items()
        ]
        config = PROTO.ClusterConfig(node_group_configs=groups) if may else None
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in up])
        monkeypatch.setattr(ray._private.state, "state", SimpleNamespace(get_cluster_config=lambda: config))

    return make


def share(**resources: Any) -> Share:
    return share_of(Resources.model_validate(resources))


def test_a_machine_without_gpu_gives_its_cpus(cluster: Any) -> None:
    cluster({"CPU": 2})
    assert share()[:2] == (0, 2)
    assert share(workers=2)[:2] == (0, 1)


def test_where_there_are_gpus_a_stage_gets_one(cluster: Any) -> None:
    cluster({"CPU": 4}, {"CPU": 16, "GPU": 2})
    assert share()[:2] == (1, 8) and share(gpus=0.25)[:2] == (0.25, 8)


def test_nodes_that_the_autoscaler_may_start_count(cluster: Any) -> None:
    head = {"head": (1, {"CPU": 4})}
    cluster({"CPU": 4}, may={**head, "gpu": (3, {"CPU": 8, "GPU": 1})})
    assert share()[:2] == (1, 8)
    assert share(workers=3)[:2] == (1, 8)
    with pytest.raises(InputError, match="4 with 1 GPUs each asked for, the cluster has 3"):
        share(workers=4, cpus=1)


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


def test_an_embedded_ray_has_no_idle_servers() -> None:
    code = """
import json, psutil
from ray._private.node import Node
from pipelines.cluster.connection import start_ray

before = Node.start_monitor, Node.start_api_server
start_ray()
lines = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
print(json.dumps([lines, before == (Node.start_monitor, Node.start_api_server)]))
"""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    lines, put_back = json.loads(done.stdout.splitlines()[-1])
    assert put_back and any("log_monitor.py" in line for line in lines)  # which brings what workers print
    assert not any("/monitor.py" in line or "dashboard/dashboard.py" in line for line in lines), lines
