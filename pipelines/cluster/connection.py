"""Connecting to a cluster, or starting an embedded one."""

import contextlib
import importlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from aecore.core.errors import InputError
from aecore.core.imports import fast_imports
from pipelines.cluster.nodes import _nodes

_ADDRESS_SECONDS = 10.0


def start_ray(warm: bool = False) -> None:
    """Connect to the cluster that RAY_ADDRESS names, else start an embedded one; does nothing the second time.

    Args:
        warm: let one worker of a single, idle machine load torch, for the first stage; which gains something if
            the driver has other things to do before. Ray Tune has workers of its own.

    Raises:
        InputError: no cluster answers there.
    """
    _import_ray()
    import ray

    embedded = not os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        options: dict[str, Any] = (
            {"address": "local", "include_dashboard": False, "num_cpus": os.cpu_count()} if embedded else {}
        )
        handler = signal.getsignal(signal.SIGTERM)
        _check_address(os.environ.get("RAY_ADDRESS", ""))
        with _alone() if embedded else contextlib.nullcontext():
            ray.init(logging_level=logging.WARNING, **options)
        signal.signal(signal.SIGTERM, handler)  # Ray sets one that exits without a word
        if warm and len(nodes := _nodes()) == 1:
            cpus = nodes[0]["CPU"]
            if embedded or ray.available_resources().get("CPU") == cpus:
                # takes all CPUs, so that the first stage waits for it and then finds a worker that has torch
                ray.remote(num_cpus=cpus)(_warm).remote()


def _import_ray() -> None:
    """With the settings that it reads when it is imported."""
    if not os.environ.get("RAY_ADDRESS"):
        # the embedded cluster shares this environment; Ray would build each worker another one
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's workers yield to everything else by default, which costs threads that wait for each other a third
        os.environ.setdefault("RAY_worker_niceness", "0")
        # nor workers that nobody asked for, which import Ray beside all that has to
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # where a node runs out of memory, Ray would try the same again for ever
    os.environ.setdefault("RAY_task_oom_retries", "0")
    with fast_imports():
        importlib.import_module("ray")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Ray starts without the autoscaler's monitor and the dashboard's server, which have nothing to do on one machine.
    They cost two imports of Ray at the start, beside all that has to be imported, and a second at the end."""
    node: Any = importlib.import_module("ray._private.node").Node  # Any: its hints know of nothing that is left out
    started = node.start_monitor, node.start_api_server
    node.start_monitor = node.start_api_server = lambda self, **options: None
    try:
        yield
    finally:
        node.start_monitor, node.start_api_server = started


def _check_address(address: str) -> None:
    """Whether anyone listens where a cluster is said to be: Ray itself would ask for minutes and then say little."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        if parts.port and parts.hostname:
            socket.create_connection((parts.hostname, parts.port), timeout=_ADDRESS_SECONDS).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"RAY_ADDRESS: no answer from {address} ({error}); name HOST:PORT of a Ray head, or unset it for a Ray of "
            "this job's own"
        ) from error


def _warm() -> None:
    """Import in a worker what every stage needs, while the driver does other things."""
    with fast_imports():
        importlib.import_module("aecore.stages.pretrain")
