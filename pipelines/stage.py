"""A stage: a function, its spec, and the stages it stands on, and where results are kept. Building one runs nothing."""

import importlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel

from aecore.fingerprint import fingerprint
from aecore.specs import REVISION
from aecore.storage import Result

Inputs = Mapping[str, "Stage | tuple[Stage, ...]"]


@dataclass(frozen=True)
class Stage:
    """One node of the graph, identified by `key`."""

    name: str
    """For people; not part of the key."""
    fn: str
    """Module of `aecore` and function in it: named, not imported, so that the driver needs no torch."""
    spec: BaseModel
    inputs: Inputs = field(default_factory=dict)
    """By parameter of the function."""
    kept: bool = True
    """Whether the result is kept in MLflow, or made again by each job that needs it (the data)."""
    revision: int = REVISION

    @cached_property
    def key(self) -> str:
        """The identity of the result: the hash of what computes it, from what."""
        keys = {name: [s.key for s in i] if isinstance(i, tuple) else i.key for name, i in self.inputs.items()}
        return fingerprint(self.fn, self.revision, self.spec, keys)

    def function(self) -> Callable[..., Result]:
        """What `fn` names; imports torch."""
        module, _, name = self.fn.partition(".")
        return getattr(importlib.import_module(f"aecore.{module}"), name)

    def parents(self) -> tuple["Stage", ...]:
        """The stages this one stands on, in order."""
        return tuple(s for i in self.inputs.values() for s in (i if isinstance(i, tuple) else (i,)))


class Known(BaseModel):
    """In place of the spec of a stage that was finished another day: all there is to know of it."""

    key: str


class Finished(Stage):
    """A stage that is finished, to stand on; what it was made of does not matter any more."""

    @cached_property
    def key(self) -> str:
        assert isinstance(self.spec, Known)
        return self.spec.key


def submission_id() -> str | None:
    """Of the `ray job submit` that this process is the driver of; None where it is none."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return config.get("metadata", {}).get("job_submission_id")


def store_uri() -> str:
    """The MLflow store: MLFLOW_TRACKING_URI, else SQLite in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def store_is_empty() -> bool:
    """Whether nothing can be finished yet, as far as can be told without importing MLflow, which takes seconds."""
    scheme, _, path = store_uri().partition(":///")
    return scheme == "sqlite" and not Path(path).exists()
