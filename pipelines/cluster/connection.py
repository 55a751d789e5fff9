"""Connecting to a Ray cluster, or starting an embedded one."""

import importlib
import inspect
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from aecore.core.errors import InputError
from aecore.core.imports import fast_imports
from pipelines.cluster.nodes import Node, possible_nodes
from pipelines.cluster.share import has_cluster, this_machine
from pipelines.host.addresses import RAY_REMEDY
from pipelines.host.environment import has_embedded_ray, ray_address
from pipelines.host.messages import one_line

_ADDRESS_SECONDS = 10.0
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""Request that every Ray head answers, and only to those who know its token."""
_TOKEN_REMEDY = "export RAY_AUTH_MODE=token and put the cluster's token into ~/.ray/auth_token"


def start_ray(warm_up: tuple[Callable[..., None], *tuple[Any, ...]] | None = None) -> None:
    """Connect to the cluster that RAY_ADDRESS names, else start an embedded Ray; do nothing if Ray runs already.

    Args:
        warm_up: A function and its arguments, to import modules for the first stage; another argument says whether
            the worker has a GPU. On a single idle machine with at most one GPU a worker calls it while the driver does
            other things. Useless for Ray Tune, which starts its own workers.

    Raises:
        InputError: No cluster answers at RAY_ADDRESS, or it does not let this job in.
    """
    address = ray_address()
    import_ray()
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"address": "local", "include_dashboard": False, "num_cpus": os.cpu_count()}
    if address:
        options = {"address": address}
        os.environ["RAY_ADDRESS"] = address  # Ray reads it, too, but not with blanks or capitals
        _check_head(_find_head() if address == "auto" else address)
    handler = signal.getsignal(signal.SIGTERM)
    with nullcontext() if address else _embedding():
        try:
            ray.init(logging_level=logging.WARNING, **options)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            if not address:
                raise
            remedy = _TOKEN_REMEDY if isinstance(error, ray.exceptions.AuthenticationError) else RAY_REMEDY
            raise InputError(f"RAY_ADDRESS: cannot join {address} ({one_line(error)}); {remedy}") from error
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
    if has_embedded_ray():
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
def _embedding() -> Iterator[None]:
    """Let Ray start as a guest of this machine while the block runs: without idle servers, and on free ports only.

    The autoscaler's monitor and the dashboard's server have nothing to do on one machine, and each imports Ray. Without
    them the README's first command takes 2.4 s less (2 cores, Ray 2.60). Ray has no public option for this;
    `ray.init(include_dashboard=False)` starts both all the same. If a later Ray lacks the methods, both servers start.

    All ports of `ray.init` are free ones but that of the agent, 52365, which `ray start` can change and `ray.init`
    cannot: the agent of a head that starts meanwhile on this machine would not get it, and without its agent the head
    takes no jobs. If a later Ray lacks the parameter, the agent has its fixed port.
    """
    # private: an option of `ray.init` for the agent's port would replace it
    parameter: Any = importlib.import_module("ray._private.parameter")
    parameters = parameter.RayParams
    if "dashboard_agent_listen_port" in inspect.signature(parameters).parameters:
        parameter.RayParams = partial(parameters, dashboard_agent_listen_port=0)
    # private: saves 2.4 s per command (Ray 2.60); an option of `ray.init` to leave both servers out would replace it
    node: Any = importlib.import_module("ray._private.node").Node
    # private, for the same reason: the two methods of a node that start these servers
    methods = {name: getattr(node, name) for name in ("start_monitor", "start_api_server") if hasattr(node, name)}
    for name in methods:
        setattr(node, name, lambda self, **options: None)
    try:
        yield
    finally:
        parameter.RayParams = parameters
        for name, method in methods.items():
            setattr(node, name, method)


def _find_head() -> str:
    """Return HOST:PORT of the Ray that runs on this machine, as RAY_ADDRESS=auto means it."""
    # private: `ray.init` finds it the same way, but where nothing listens any more it would try for minutes, and then
    # end this process
    services: Any = importlib.import_module("ray._private.services")
    try:
        return str(services.canonicalize_bootstrap_address("auto"))
    except ConnectionError as error:
        raise InputError(f"RAY_ADDRESS: auto, but no Ray runs on this machine; {RAY_REMEDY}") from error


def _check_head(address: str) -> None:
    """Raise an InputError unless a Ray head answers at HOST:PORT and lets this process in.

    Ray itself would try for minutes, say little, and end the process where another server has the port.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ADDRESS_SECONDS).close()
    except OSError as error:
        raise InputError(f"RAY_ADDRESS: no answer from {address} ({error}); {RAY_REMEDY}") from error
    if os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true"):
        return  # the request below would have to know the certificates
    import grpc

    token = _token()
    headers = [("authorization", f"Bearer {token}")] if token else None
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_ALIVE)(b"", timeout=_ADDRESS_SECONDS, metadata=headers)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                refusal = "does not know this token" if token else "asks for a token"
                raise InputError(f"RAY_ADDRESS: {address} {refusal}; {_TOKEN_REMEDY}") from None
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise InputError(
                    f"RAY_ADDRESS: what answers at {address} is not a Ray head, whose port is 6379 where no other was "
                    f"chosen; {RAY_REMEDY}"
                ) from None


def _token() -> str | None:
    """Return the token that Ray will show to the cluster, from the places in which Ray looks for it; None without one.

    Ray shows one where RAY_AUTH_MODE is token, and to a Ray of this machine that it was told to find.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode != "token" and (mode or ray_address() != "auto"):
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return file.read_text().strip()
    except OSError:
        return None
