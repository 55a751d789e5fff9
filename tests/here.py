"""Stages computed in the test's own process, without Ray."""

from collections.abc import Callable
from typing import Any

import pytest

from aecore.config.specs import LoadSpec
from aecore.models.storage import Result
from pipelines.cluster.share import Share
from pipelines.execution.assignment import Assignment
from pipelines.execution.compute import Work, compute_stage, inputs_of, load_rows, restored, stages_below
from pipelines.execution.journal import Computed
from pipelines.graph.stage import Stage
from pipelines.store.runs import Tracker


def encode_here(monkeypatch: pytest.MonkeyPatch, tracker: Tracker, each: Callable[..., Any]) -> None:
    """Let `jobs.encode` run in this process, with the store of `tracker`.

    Args:
        each: takes the place of `pipelines.cluster.reading.each`, which starts workers.
    """
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "test")
    monkeypatch.setattr("pipelines.encoding.encode.start_ray", lambda: None)
    monkeypatch.setattr("pipelines.encoding.encode.check_reach", lambda *_: None)
    monkeypatch.setattr("pipelines.encoding.encode.each", each)


def run_here(
    stage: Stage, tracker: Tracker, parent: str, done: dict[str, Any] | None = None, folder: str | None = None
) -> Result:  # fmt: skip
    """The result of a stage; it and all that it stands on are restored or computed, as chained tasks would.

    Args:
        done: results by key; those made here are added.
        folder: where checkpoints go.
    """
    done = {} if done is None else done
    assignment = Assignment(store=tuple(tracker), parent=parent, share=Share(0, 1), checkpoint_folder=folder)
    if not tracker.find(stage.key):
        for below in stages_below(stage):
            _compute(below, assignment, done)
    return _compute(stage, assignment, done)


def _compute(stage: Stage, assignment: Assignment, done: dict[str, Any]) -> Any:
    if stage.key not in done:
        if isinstance(stage.spec, LoadSpec):
            done[stage.key] = load_rows(stage.spec)
        else:
            done[stage.key] = restored(stage, assignment) or compute_stage(
                Work(stage, assignment, inputs_of(stage, [done[parent.key] for parent in stage.parents()]))
            )
    value = done[stage.key]
    return value.result if isinstance(value, Computed) else value
