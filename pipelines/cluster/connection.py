"""Connecting to a Ray cluster, or starting an embedded one."""

import importlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from aecore.core.errors import InputError
from aecore.core.imports import fast_imports
from pipelines.cluster.nodes import possible_nodes

_ADDRESS_SECONDS = 10.0


def start_ray(warm_up: Callable[[], None] | None = None) -> None:
    """Connect to the cluster that RAY_ADDRESS names, else start an embedded Ray; do nothing if Ray runs already.

    Args:
        warm_up: Called in a worker of a single idle machine while the driver does other things: imports what the first
            stage needs. Useless for Ray Tune, which has workers of its own.

    Raises:
        InputError: No cluster answers at RAY_ADDRESS.
    """
    import_ray()
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    options: dict[str, Any] = {}
    if address:
        _check_address(address)
    else:
        options = {"address": "local", "include_dashboard": False, "num_cpus": os.cpu_count()}
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(logging_level=logging.WARNING, **options)
    signal.signal(signal.SIGTERM, handler)  # Ray installs a handler that exits without closing the job's runs
    if warm_up and len(nodes := possible_nodes()) == 1:
        cpus = nodes[0]["CPU"]
        if not address or ray.available_resources().get("CPU") == cpus:
            # takes all CPUs, so that the first stage waits for it and then finds a worker with its imports done
            ray.remote(num_cpus=cpus)(warm_up).remote()


def import_ray() -> None:
    """Import Ray with the settings that it reads from the environment at its import."""
    if not os.environ.get("RAY_ADDRESS"):
        # an embedded Ray shares this environment; by default each worker would get a new one built for it
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # by default workers yield to all other processes, which costs threads that wait for each other a third
        os.environ.setdefault("RAY_worker_niceness", "0")
        # by default workers start before a task needs them, and their imports compete with the driver's
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # by default a task that runs its node out of memory is tried again and again without an end
    os.environ.setdefault("RAY_task_oom_retries", "0")
    with fast_imports():
        importlib.import_module("ray")


def _check_address(address: str) -> None:
    """Raise an InputError where nobody listens at `address`; Ray itself would try for minutes and then say little."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        if parts.port and parts.hostname:
            socket.create_connection((parts.hostname, parts.port), timeout=_ADDRESS_SECONDS).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"RAY_ADDRESS: no answer from {address} ({error}); name HOST:PORT of a Ray head, or unset it for a Ray of "
            "this job's own"
        ) from error
