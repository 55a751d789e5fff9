"""Trials: graphs of stages that are computed in one process and kept in one MLflow run each.

What a trial costs MLflow is the same whatever the number of its stages: a search, a new run, its epochs and measures at
the end, a file with all trained stages, a file with the measures, a look at the lease, and the commit.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any

from aecore.models.storage import Result
from pipelines.execution.assignment import Assignment, Opened
from pipelines.execution.compute import (
    Report,
    Work,
    end_if_unusable,
    import_functions,
    inputs_of,
    leave_device,
    outcomes_of,
    stages_below,
)
from pipelines.execution.journal import Computed
from pipelines.execution.trial_journal import Results, TrialJournal
from pipelines.graph.stage import Stage


def compute_trials(
    stages: Sequence[Stage],
    assignments: Sequence[Assignment],
    results: Results,
    everywhere: bool = False,
    up_to_last: bool = False,
) -> list[Computed | Opened | Exception]:
    """Compute trials in this process, all of them step by step side by side.

    A stage that several trials share is computed once. Training stages at the same step are trained together as one
    where `outcomes_of` can do so.

    Args:
        stages: The last stage of each trial.
        assignments: One for each trial.
        results: Results that exist already, the data among them; the results that are computed here are added.
        everywhere: See `outcomes_of`.
        up_to_last: Leave the last stages to be computed elsewhere; the runs of the trials stay open.

    Returns:
        The last stage of each trial, finished, or the exception with which this stage or a stage before it failed. With
        `up_to_last` the trial's open run stands for a stage that is left.
    """
    share = assignments[0].share
    with redirect_stdout(sys.stderr), ExitStack() as stack:
        import_functions([one for last in stages for one in (*stages_below(last), last) if one.kept], share)
        pairs = zip(stages, assignments, strict=True)
        trials = [stack.enter_context(TrialJournal(*pair, results, len(stages))) for pair in pairs]
        wanted = [trial for trial in trials if trial.finished is None]
        failures: dict[str, Exception] = {}
        for step in zip_longest(*(stages_below(trial.stage) for trial in wanted)):
            _compute_step([pair for pair in zip(wanted, step, strict=True) if pair[1]], results, failures, everywhere)
        return [trial.finished or _end(trial, results, failures, up_to_last) for trial in trials]


def _compute_step(
    pairs: Sequence[tuple[TrialJournal, Stage]], results: Results, failures: dict[str, Exception], everywhere: bool
) -> None:
    """Compute one stage of each trial, unless it exists already; add it to `results`, or its error to `failures`."""
    works: dict[str, Work] = {}
    reports: dict[str, Report] = {}
    for trial, stage in pairs:
        if stage.key not in trial.missing or stage.key in results or stage.key in failures:
            continue
        if failure := _failure_below(stage, failures):
            failures[stage.key] = failure
        elif stage.key not in works:
            works[stage.key] = Work(stage, trial.assignment, _inputs(stage, results))
            reports[stage.key] = partial(trial.report, stage, trial.epochs_before(stage))
    keys = list(works)
    together = all(work.stage.trains for work in works.values())
    for group in [keys] if together and keys else [[key] for key in keys]:
        try:
            ended = outcomes_of([works[key] for key in group], [reports[key] for key in group], everywhere)
        finally:
            leave_device(works[group[0]].assignment.share)
        for key, outcome in zip(group, ended, strict=True):
            if isinstance(outcome, Exception):
                failures[key] = outcome
            else:
                results[key] = Computed("", replace(outcome, figures={}, example=None))
        end_if_unusable(ended)


def _end(
    trial: TrialJournal, results: Results, failures: Mapping[str, Exception], up_to_last: bool
) -> Computed | Opened | Exception:
    """Compute the last stage of a trial and commit the trial, or hand the trial over to whoever does so."""
    failure = _failure_below(trial.stage, failures)
    if failure is None and up_to_last:
        return trial.hand_over()
    outcome: Result | Exception | None = failure
    if outcome is None:
        work = Work(trial.stage, trial.assignment, _inputs(trial.stage, results))
        (outcome,) = outcomes_of([work], [partial(trial.report, trial.stage, 0)])
    return trial.close(outcome)


def _inputs(stage: Stage, results: Results) -> dict[str, Any]:
    return inputs_of(stage, [results[parent.key] for parent in stage.parents()])


def _failure_below(stage: Stage, failures: Mapping[str, Exception]) -> Exception | None:
    return next((failures[parent.key] for parent in stage.parents() if parent.key in failures), None)
