"""Opening the store of results at the start of a command, and starting Ray at the same time where that is faster."""

import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from aecore.core.errors import InputError
from aecore.core.imports import fast_imports
from pipelines.cluster.connection import import_ray, start_ray
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import check_this_machine
from pipelines.host.addresses import bare
from pipelines.host.environment import has_embedded_ray, store_is_empty, store_uri, submission_id

if TYPE_CHECKING:
    from pipelines.store.runs import Tracker


def open_store(
    resources: Resources, create: bool = True, ready: bool = True, warm: bool = True
) -> "Tracker | None":  # fmt: skip
    """Open the store of results that MLFLOW_TRACKING_URI names, else SQLite in the working directory.

    Args:
        create: Make the store where there is none yet.
        ready: Also get Ray ready. A cluster is connected to before MLflow is imported. An embedded Ray starts during
            the import, but only if the store is new: then nothing can be restored, and Ray is certainly needed.
        warm: Meanwhile let a worker import the modules that the first stage needs.

    Returns:
        The tracker, or None where there is no store yet and `create` is false.

    Raises:
        InputError: The store cannot be reached, or lies in a folder that is thrown away; or an embedded Ray is about to
            start on a machine without what `resources` ask for.
    """
    uri = bare(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if submission_id() and (not uri or (uri.startswith("sqlite:") and not uri.startswith("sqlite:////"))):
        raise InputError(
            f"MLFLOW_TRACKING_URI: {uri or 'not set'}, so the results would be thrown away with the submitted job's "
            "folder; name a server in the job's env_vars, http://HOST:5000"
        )
    warm_up = (_warm_up, store_uri()) if warm else None
    new = store_is_empty()
    connecting = None
    if create and ready and not has_embedded_ray():
        try:
            start_ray(warm_up)  # takes no time, and a worker does its imports while MLflow is imported here
        except Exception:
            if new:
                raise  # otherwise all stages may be restored without Ray; if not, this error comes again
    elif create and ready and new:
        check_this_machine(resources)
        import_ray()  # not during MLflow's import: a module that both need might be half imported
        connecting = ThreadPoolExecutor(1).submit(_connect, create)
        start_ray(warm_up)
    tracker = connecting.result() if connecting else _connect(create)
    return tracker and tracker._replace(patience=resources.mlflow_patience)


def _warm_up(uri: str, has_gpu: bool) -> None:
    """Import the modules of stages in a worker, and let CUDA start and MLflow make its first connection, which takes
    seconds."""
    with fast_imports():
        for module in ("aecore.stages.pretrain", "aecore.stages.finetune", "pipelines.store.runs"):
            importlib.import_module(module)
    from pipelines.store.connection import connect

    if has_gpu:
        import torch

        with suppress(AssertionError, RuntimeError):  # the first stage raises the same error
            rows = torch.ones(8, 8, device="cuda")
            rows @ rows  # loads the library of products
    with suppress(InputError):  # the driver raises the same error
        connect(uri, create=False)


def _connect(create: bool) -> "Tracker | None":
    with fast_imports():
        from pipelines.store.connection import connect  # imports MLflow, which takes seconds

        return connect(create=create)
