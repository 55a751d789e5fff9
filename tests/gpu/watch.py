"""What really happened in a training: which steps were captured as CUDA graphs, and which fits were trained as one."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from aecore.training import fused, graphs, groups


@dataclass
class Seen:
    """The captures, fusions and warnings within a `watched` block."""

    captured: int = 0
    """Number of steps that were captured; one whose capture failed is not counted."""
    fused: list[int] = field(default_factory=list)
    """How many fits each training of several as one consisted of; one that failed is not counted."""
    warnings: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """The warnings in brackets, for a message."""
        return f" ({'; '.join(dict.fromkeys(self.warnings))})" if self.warnings else ""


@contextmanager
def watched() -> Iterator[Seen]:
    """Watch the captures, fusions and warnings of the block."""
    seen = Seen()
    capture, fit_as_one = graphs.capture, fused.fit_as_one

    def counted_capture(step: Any, *arguments: Any, **options: Any) -> Any:
        replay = capture(step, *arguments, **options)
        seen.captured += replay is not step  # a step that cannot be captured comes back as it is
        return replay

    def counted_fit_as_one(jobs: Any) -> Any:
        outcomes = fit_as_one(jobs)
        seen.fused.append(len(jobs))
        return outcomes

    with (
        patch.object(graphs, "capture", counted_capture),
        patch.object(groups, "fit_as_one", counted_fit_as_one),
        warnings.catch_warnings(record=True) as raised,
    ):
        warnings.simplefilter("always", UserWarning)
        try:
            yield seen
        finally:
            seen.warnings = [str(warning.message) for warning in raised]


def step_by_step() -> AbstractContextManager[Any]:
    """Return a block in which no step is captured: torch launches every kernel of every step."""
    return patch.object(graphs, "can_be_captured", lambda job: False)
