"""Looks at a cluster and at processes while a benchmark runs; `python -m tests.benchmarks.sampler HOST:PORT FILE`.

The command appends a line of JSON twice a second until it is ended: GPUs and GPUs in use, nodes, and how many tasks and
placement groups wait. It asks the GCS as `ray status` does, so it is no driver and has no worker.
"""

import json
import sys
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil

PAUSE = 0.5


def look(address: str) -> dict[str, float]:
    """The cluster now."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(address)
    nodes = [*status.active_nodes, *status.idle_nodes]
    demands = status.resource_demands
    usages = [node.resource_usage.usage for node in nodes if node.resource_usage]
    gpus = [one for usage in usages for one in usage if one.resource_name == "GPU"]
    return {
        "at": time.time(),
        "nodes": len(nodes),
        "gpus": sum(one.total for one in gpus),
        "used": sum(one.used for one in gpus),
        "tasks": sum(b.count for demand in demands.ray_task_actor_demand for b in demand.bundles_by_count),
        "groups": len(demands.placement_group_demand),
    }


class Point(NamedTuple):
    """The processes at a moment."""

    at: float
    driver: int
    """Resident bytes of the driver."""
    server: int
    """Memory of the MLflow server's process and of all processes that it has started, in bytes."""
    machine: int
    """Bytes in use on the machine."""


class Processes(threading.Thread):
    """Notes memory and CPU seconds of the driver, the server and the cluster twice a second while a block runs."""

    def __init__(self, driver: int, server: int, ray: list[int]) -> None:
        super().__init__(daemon=True)
        self.roots = {"driver": [driver], "MLflow server": [server], "Ray": ray}
        self.points: list[Point] = []
        self.ended = threading.Event()
        self._cpu: dict[str, dict[int, float]] = defaultdict(dict)
        self._before: dict[int, float] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        self.join()

    def run(self) -> None:
        while not self.ended.wait(PAUSE):
            memory = {name: 0 for name in self.roots}
            for name, roots in self.roots.items():
                for process in (one for root in list(roots) for one in family(root)):
                    with suppress(psutil.Error):
                        memory[name] += process.memory_info().rss if name != "Ray" else 0
                        spent = process.cpu_times()
                        seconds = spent.user + spent.system
                        self._before.setdefault(process.pid, 0.0 if self.points else seconds)
                        self._cpu[part_of(name, process)][process.pid] = seconds - self._before[process.pid]
            used = psutil.virtual_memory().total - psutil.virtual_memory().available
            self.points.append(Point(time.time(), memory["driver"], memory["MLflow server"], used))

    @property
    def cpu(self) -> dict[str, float]:
        """CPU seconds by part, since the block began."""
        return {part: sum(of.values()) for part, of in sorted(self._cpu.items(), key=lambda one: -sum(one[1].values()))}


def family(root: int) -> list[psutil.Process]:
    """A process and all below it; none where it has ended."""
    try:
        process = psutil.Process(root)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def part_of(root: str, process: psutil.Process) -> str:
    """What a process below a root is."""
    if root != "Ray":
        return root
    line = " ".join(process.cmdline()[:6])
    parts = {
        "gcs_server": "Ray: GCS", "dashboard/agent": "Ray: agents", "runtime_env/agent": "Ray: agents",
        "raylet/raylet": "Ray: raylets", "dashboard": "Ray: dashboard", "ray::": "workers", "default_worker": "workers",
    }  # fmt: skip
    return next((part for word, part in parts.items() if word in line), "Ray: other")


def main() -> None:
    address, file = sys.argv[1:]
    with Path(file).open("a") as lines:
        while True:
            with suppress(Exception):  # the head is busy
                lines.write(json.dumps(look(address)) + "\n")
                lines.flush()
            time.sleep(PAUSE)


if __name__ == "__main__":
    main()
