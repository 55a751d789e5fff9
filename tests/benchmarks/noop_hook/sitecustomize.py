"""Imported by each Python process that has this folder on its PYTHONPATH, for `tests.benchmarks.scale`.

Where NOOP_NOTES is set (workers of the fake cluster), the modules of `aecore.stages` that compute are replaced by
`tests.benchmarks.noop`, and torch by a stand-in, which spares each worker 300 MB and two seconds. Where NOOP_REQUESTS
is set (the MLflow server), each request is noted in the file of that name.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from abc import ABCMeta
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

STAGES = "aecore.stages."
REAL = {"aecore.stages.context"}
"""Modules of `aecore.stages` that stay, since they compute nothing."""
SERVER = "mlflow.server.fastapi_app"


class AnyClass(ABCMeta):
    """The type of stand-ins: what is asked of them is a stand-in again."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(name)

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __getitem__(cls, item: Any) -> Any:
        return cls


def stand_in(name: str) -> Any:
    """A class that may be a base, an annotation, a decorator or be called, whatever torch has of that name."""

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        decorates = len(args) == 1 and callable(args[0]) and not kwargs and cls.__module__ == "torch"
        return args[0] if decorates else object.__new__(cls)

    def of_instance(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(name)

    members = {"__module__": "torch", "__new__": new, "__init__": lambda self, *args, **kwargs: None}
    return AnyClass(name, (), {**members, "__getattr__": of_instance, "__call__": new})


class StandIn(ModuleType):
    """A module of torch that has whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = stand_in(name)
        setattr(self, name, value)
        return value


class NoStage(ModuleType):
    """A module of `aecore.stages` whose functions compute nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        from tests.benchmarks import noop

        return noop.function(self.__name__.removeprefix(STAGES), name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules that are replaced."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        torch = name.split(".")[0] in ("torch", "torchvision")
        if torch or (name.startswith(STAGES) and name not in REAL):
            return importlib.machinery.ModuleSpec(name, self, is_package=torch)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return (NoStage if spec.name.startswith(STAGES) else StandIn)(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "torch":
            vars(module)["__version__"] = "0.0"


Asgi = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


def noted(app: Asgi, file: str) -> Asgi:
    """An ASGI application that appends a line of JSON for each request: method, path, began, seconds, status."""

    async def wrapped(scope: dict[str, Any], receive: Any, send: Any) -> None:
        began, status = time.time(), 0

        async def told(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        await app(scope, receive, told)
        if scope["type"] == "http":
            with open(file, "a") as notes:
                line = [scope["method"], scope["path"], began, time.time() - began, status]
                notes.write(json.dumps(line) + "\n")

    return wrapped


class Server(importlib.abc.MetaPathFinder):
    """Finds the module of MLflow's server and wraps its application."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == SERVER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def wrapped(module: Any) -> None:
            execute(module)
            module.app = noted(module.app, os.environ["NOOP_REQUESTS"])

        vars(spec.loader)["exec_module"] = wrapped
        return spec


if os.environ.get("NOOP_NOTES"):
    sys.meta_path.insert(0, Finder())
if os.environ.get("NOOP_REQUESTS"):
    sys.meta_path.insert(0, Server())
