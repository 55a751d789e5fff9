"""A stage: a function, its spec, and the stages whose results it needs. Building a stage runs nothing."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
    "anomalies.detect": "anomalies:detect",
    "anomalies.measure": "anomalies:measure_detection",
    "contest.contest": "contest:contest",
    "drift.drift": "drift:drift",
}
"""Where the function of each stage lives below `aecore.stages`, by the name that is hashed into the stage's key.

The names on the left never change, so that results of earlier versions are found; a function may move.
"""

PREPARATIONS = {"stages.pretrain_layer": "pretrain:prepare", "stages.finetune": "finetune:prepare"}
"""For stages that train: the first half of their function, which returns a `Training`, ready to be fitted."""


@dataclass(frozen=True)
class Stage:
    """One node of the graph, identified by `key`."""

    name: str
    """Name for people; not part of the key."""
    fn: str
    """A name in `FUNCTIONS`. The function is named and not imported, so that the driver needs no torch."""
    spec: BaseModel
    inputs: Inputs = field(default_factory=dict)
    """The stages whose results the function takes, by parameter."""
    kept: bool = True
    """Whether MLflow keeps the result. The rows of the data are not kept: each job that needs them reads them again."""
    revision: int = REVISION

    @cached_property
    def key(self) -> str:
        """The identity of the result: a hash of function, revision and spec, and of the keys of the inputs."""
        keys = {name: [s.key for s in i] if isinstance(i, tuple) else i.key for name, i in self.inputs.items()}
        return fingerprint(self.fn, self.revision, self.spec, keys)

    @property
    def kind(self) -> str:
        """What the stage does, in a word: `layer`, `finetune`, `evaluate`. Tasks are called by it: Ray counts tasks by
        their names, and a study has thousands of stages."""
        return self.fn.rpartition(".")[2].removeprefix("pretrain_")

    @property
    def trains(self) -> bool:
        """Whether the stage trains a model."""
        return self.fn in PREPARATIONS

    def named_for(self, data: str) -> "Stage":
        """Return the stage with a name that begins with that of a data set, and with inputs of such names."""
        inputs: Inputs = {
            name: tuple(one.named_for(data) for one in each) if isinstance(each, tuple) else each.named_for(data)
            for name, each in self.inputs.items()
        }
        return replace(self, name=f"{data}: {self.name}", inputs=inputs)

    def function(self) -> Callable[..., Result]:
        """Import and return the function that `fn` names, `(spec, context, **inputs) -> Result`; imports torch."""
        return _imported(FUNCTIONS[self.fn])

    def preparation(self) -> Callable[..., Any]:
        """Import and return `(spec, context, **inputs) -> Training` of a stage that trains; imports torch."""
        return _imported(PREPARATIONS[self.fn])

    def parents(self) -> tuple["Stage", ...]:
        """Return the stages whose results this stage takes, in the order of `inputs`."""
        return tuple(s for i in self.inputs.values() for s in (i if isinstance(i, tuple) else (i,)))


class Known(BaseModel):
    """The spec of a stage that was finished on another day: only its key."""

    key: str


class Finished(Stage):
    """A finished stage that serves as an input of others; only its key is known."""

    @cached_property
    def key(self) -> str:
        assert isinstance(self.spec, Known)
        return self.spec.key


def _imported(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"aecore.stages.{module}"), name)
