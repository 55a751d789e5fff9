"""A stage: a function, its spec, and the stages that it stands on. Building one runs nothing."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import BaseModel

from aecore.config.specs import REVISION
from aecore.core.fingerprint import fingerprint
from aecore.models.storage import Result

Inputs = Mapping[str, "Stage | tuple[Stage, ...]"]

FUNCTIONS = {
    "stages.pretrain_layer": "pretrain:pretrain_layer",
    "stages.finetune": "finetune:finetune",
    "stages.reference": "reference:reference",
    "evaluation.evaluate": "evaluate:evaluate",
    "evaluation.measure": "measure:measure",
    "contest.contest": "contest:contest",
    "drift.drift": "drift:drift",
}
"""Where the function of each stage lives below `aecore.stages`, by the name that is hashed into the stage's key.

The names on the left never change, so that results of earlier versions are found; a function may move.
"""

PREPARATIONS = {"stages.pretrain_layer": "pretrain:prepare", "stages.finetune": "finetune:prepare"}
"""Of the stages that train: the first half of their function, which returns what is to be trained."""


@dataclass(frozen=True)
class Stage:
    """One node of the graph, identified by `key`."""

    name: str
    """For people; not part of the key."""
    fn: str
    """A name in `FUNCTIONS`. The function is named and not imported, so that the driver needs no torch."""
    spec: BaseModel
    inputs: Inputs = field(default_factory=dict)
    """The stages whose results the function takes, by parameter."""
    kept: bool = True
    """Whether the result is kept in MLflow. That of reading the data is not: each job that needs it reads again."""
    revision: int = REVISION

    @cached_property
    def key(self) -> str:
        """The identity of the result: the hash of what computes it and of what it is computed from."""
        keys = {name: [s.key for s in i] if isinstance(i, tuple) else i.key for name, i in self.inputs.items()}
        return fingerprint(self.fn, self.revision, self.spec, keys)

    @property
    def trains(self) -> bool:
        """Whether the stage trains a model."""
        return self.fn in PREPARATIONS

    def function(self) -> Callable[..., Result]:
        """Import and return the function that `fn` names, `(spec, context, **inputs) -> Result`; imports torch."""
        return _imported(FUNCTIONS[self.fn])

    def preparation(self) -> Callable[..., Any]:
        """Import and return `(spec, context, **inputs) -> Training` of a stage that trains; imports torch."""
        return _imported(PREPARATIONS[self.fn])

    def parents(self) -> tuple["Stage", ...]:
        """Return the stages that this one stands on, in the order of its inputs."""
        return tuple(s for i in self.inputs.values() for s in (i if isinstance(i, tuple) else (i,)))


class Known(BaseModel):
    """The spec of a stage that was finished another day, of which the key is all that is known."""

    key: str


class Finished(Stage):
    """A stage that is finished, for others to stand on; what it was made of does not matter any more."""

    @cached_property
    def key(self) -> str:
        assert isinstance(self.spec, Known)
        return self.spec.key


def _imported(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"aecore.stages.{module}"), name)
