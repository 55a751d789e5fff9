"""Connecting to a Ray cluster, or starting an embedded one."""

import importlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit

from aecore.core.errors import InputError
from aecore.core.imports import fast_imports
from pipelines.cluster.nodes import Node, possible_nodes
from pipelines.cluster.share import has_cluster, this_machine

_ADDRESS_SECONDS = 10.0


def start_ray(warm_up: tuple[Callable[..., None], *tuple[Any, ...]] | None = None) -> None:
    """Connect to the cluster that RAY_ADDRESS names, else start an embedded Ray; do nothing if Ray runs already.

    Args:
        warm_up: A function and its arguments, to import modules for the first stage; another argument says whether
            the worker has a GPU. On a single idle machine with at most one GPU a worker calls it while the driver does
            other things. Useless for Ray Tune, which starts its own workers.

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
    with nullcontext() if address else _without_idle_servers():
        ray.init(logging_level=logging.WARNING, **options)
    signal.signal(signal.SIGTERM, handler)  # Ray installs a handler that exits without closing the job's runs
    if warm_up and len(nodes := possible_nodes()) == 1:
        cpus, gpus = nodes[0].cpus, nodes[0].gpus
        if gpus <= 1 and (not address or ray.available_resources().get("CPU") == cpus):
            # one CPU stays free for the task that reads the data; the first stage takes a GPU, or else all CPUs, so
            # that it waits for the warm-up and then finds a worker with its imports done
            function, *arguments = warm_up
            ray.remote(num_cpus=max(1, cpus - 1), num_gpus=gpus, max_calls=0)(function).remote(*arguments, gpus > 0)


def nodes_at_hand() -> list[Node]:
    """Return the nodes of the cluster that is named; without one, this machine, for which no Ray is started."""
    if not has_cluster():
        return [this_machine()]
    start_ray()
    return possible_nodes()


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
    # by default Ray prints the errors of tasks that nobody waits for any more, as of those behind a stage that was lost
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    with fast_imports():
        importlib.import_module("ray")


@contextmanager
def _without_idle_servers() -> Iterator[None]:
    """Let Ray start without the autoscaler's monitor and the dashboard's server while the block runs.

    Both have nothing to do on one machine, and each imports Ray. Without them the README's first command takes 2.4 s
    less (2 cores, Ray 2.60). Ray has no public option for this; `ray.init(include_dashboard=False)` starts both all the
    same. A public option would replace this function. If a later Ray lacks the methods, both servers start.
    """
    # private: saves 2.4 s per command (Ray 2.60); an option of `ray.init` to leave both servers out would replace it
    node: Any = importlib.import_module("ray._private.node").Node
    # private, for the same reason: the two methods of a node that start these servers
    methods = {name: getattr(node, name) for name in ("start_monitor", "start_api_server") if hasattr(node, name)}
    for name in methods:
        setattr(node, name, lambda self, **options: None)
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(node, name, method)


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
