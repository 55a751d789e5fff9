"""A stage: a function, its spec, and the stages it stands on, and where results are kept. Building one runs nothing."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

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
"""Where each stage's function lives below `aecore.stages`, by the name that is hashed into the keys of its stages.

The names on the left never change, so that results of earlier versions are found; a function may move.
"""


@dataclass(frozen=True)
class Stage:
    """One node of the graph, identified by `key`."""

    name: str
    """For people; not part of the key."""
    fn: str
    """A name in `FUNCTIONS`. The function is named and not imported, so that the driver needs no torch."""
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
        module, _, name = FUNCTIONS[self.fn].partition(":")
        return getattr(importlib.import_module(f"aecore.stages.{module}"), name)

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
