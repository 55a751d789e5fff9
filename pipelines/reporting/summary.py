"""What the report says at a glance: how the study ended, a matrix of study rows by measures, and which row to use."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from aecore.evaluation.statistics import BOOTSTRAPPED_POINTS, BOOTSTRAPPED_ROWS, resolution
from aecore.evaluation.trial import Trial, study_status
from aecore.evaluation.verdicts import listed
from pipelines.reporting.measures import SHOWN_ROWS, Comparison

_TESTED_BY = {
    "val/reconstruction_mse": "test/reconstruction_mse",
    "val/probe_accuracy": "probe/accuracy",
    "val/finetuned_accuracy": "finetuned/accuracy",
}
"""The measure on test rows for each validation metric by which settings are chosen."""
_DETECTION = "test/auroc"
"""The measure that answers in a study of anomalies, whatever settings were chosen by."""
_LISTED = 20
"""The most failed trials, and the most reasons, that the page lists."""
_NAMED = 4
"""The most rows that the answer names as tied."""


class Cell(NamedTuple):
    """A study row's mean of a measure, as the matrix shows it; empty where the row has no value."""

    value: float
    text: str
    spread: str
    """Mean and spread over seeds."""
    rank: str
    """`best`: it wins alone; `tied`: among the best; `worse`; or empty."""
    leads: bool
    """Whether the mean is the best one."""
    above: bool
    """Whether the row is better than every reference."""


class Answer(NamedTuple):
    """Which study row to use, and why."""

    row: str
    """Empty where there is nothing to choose from."""
    why: str

    def words(self) -> str:
        """Say both in a sentence."""
        return f"{self.row}: {self.why}" if self.row else self.why


class Failures(NamedTuple):
    """The trials that failed."""

    total: int
    reasons: list[tuple[int, str]]
    """How many trials failed alike, and the first one's error; the most frequent first."""
    listed: list[Trial]


def describe_status(trials: Sequence[Trial]) -> str:
    """Say in a sentence how the study ended."""
    status, failed = study_status(trials), sum(trial.status == "failed" for trial in trials)
    some = f"{failed} of {len(trials)} trials failed"
    return {
        "finished": f"Finished: no trial of {len(trials)} failed.",
        "partial": f"Partial: {some}. The same command again takes up just those.",
        "failed": f"Failed: {some}, and no trial of a variant finished.",
    }[status]


def failures(trials: Sequence[Trial]) -> Failures:
    """Group the failed trials by their errors, in which numbers may differ."""
    failed = [trial for trial in trials if trial.status == "failed"]
    groups: dict[str, list[Trial]] = {}
    for trial in failed:
        groups.setdefault(re.sub(r"\d[\d.e+-]*", "0", trial.error), []).append(trial)
    reasons = sorted(((len(group), group[0].error) for group in groups.values()), key=lambda one: -one[0])
    return Failures(len(failed), reasons[:_LISTED], failed[:_LISTED])


def leading_names(choose: str) -> tuple[str, ...]:
    """Return the measures that answer which study row to use, the first one that there is: how well anomalies are
    found, else what settings were chosen by, on test rows."""
    return _DETECTION, _TESTED_BY.get(choose, choose)


def leading(comparisons: Sequence[Comparison], choose: str) -> Comparison | None:
    """Return the comparison that answers which study row to use: by the measure that settings were chosen by, else the
    first one."""
    compared = [one for one in comparisons if one.verdict]
    wanted = [one for name in leading_names(choose) for one in compared if one.measure.name == name]
    return next(iter(wanted or compared), None)


def matrix(comparisons: Sequence[Comparison], rows: Sequence[str]) -> dict[str, list[Cell]]:
    """Return for each study row a cell per measure that is compared."""
    return {row: [_cell(one, row) for one in comparisons if one.verdict] for row in rows}


def _cell(one: Comparison, row: str) -> Cell:
    if row not in one.means or one.verdict is None:
        return Cell(np.nan, "", "", "", False, False)
    best, mean = one.verdict.best, one.means[row]
    rank = "worse" if row not in best else "best" if len(best) == 1 else "tied"
    return Cell(mean, one.measure.show(mean, 3), one.cells[row], rank, row == best[0], row in one.verdict.above)


def answer(one: Comparison | None, trials: Sequence[Trial]) -> Answer:
    """Say which study row to use by a measure; of rows that tie, the one that took least training."""
    if one is None or one.verdict is None:
        return Answer("", "Nothing to choose from: fewer than two rows finished.")
    best, ranked = one.verdict.best, one.verdict.ranked
    values = {row: one.measure.show(one.means[row], 3) for row in ranked}
    by = f"by {one.measure.in_words}"
    if len(best) == 1:
        return Answer(best[0], f"{by} it wins with {values[best[0]]}; {ranked[1]}, the next, has {values[ranked[1]]}.")
    seconds = {row: _mean_seconds(trials, row) for row in best}
    cheapest = min(best, key=lambda row: seconds[row])
    others = [row for row in best if row != cheapest]
    others = others if len(others) <= _NAMED else [*others[: _NAMED - 1], f"{len(others) - _NAMED + 1} more"]
    is_reference = any(trial.row == cheapest and trial.is_reference for trial in trials)
    reference = "a reference; " if is_reference else ""
    least = f"of these {len(best)} it took least training, {seconds[cheapest]:.2g} s per trial"
    return Answer(cheapest, f"{reference}{by} it ties with {listed(others)}, and {least}.")


def _mean_seconds(trials: Sequence[Trial], row: str) -> float:
    return float(np.mean([trial.seconds for trial in trials if trial.row == row and trial.status == "finished"]))


def describe_settings(settings: dict[str, Any]) -> str:
    """Write settings in one line."""
    return ", ".join(
        f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}" for name, value in settings.items()
    )


def describe_seeds(trials: Sequence[Trial]) -> str:
    """Say over how many seeds the means are taken."""
    finished: dict[str, list[int]] = {trial.row: [] for trial in trials}
    for trial in trials:
        if trial.status == "finished":
            finished[trial.row].append(trial.seed)
    sets = {tuple(sorted(seeds)) for seeds in finished.values()}
    if len(sets) > 1:
        counts = [len(seeds) for seeds in finished.values()]
        each = ", ".join(f"{row} {len(seeds)}" for row, seeds in finished.items())
        if len(finished) > SHOWN_ROWS:
            each = ", ".join(f"{seeds} in {counts.count(seeds)} rows" for seeds in sorted({*counts}, reverse=True))
        return f"Finished seeds: {each}. Rows are compared in pairs, on the seeds that both have."
    (seeds,) = sets
    if len(seeds) == 1:
        return "One seed per row: the verdicts speak of these weights; with another seed they may differ."
    text = f"{len(seeds)} seeds in every row, the same in each."
    pairs = len(finished) * (len(finished) - 1) // 2
    if len(seeds) > 1 and pairs:
        least = f"{resolution(len(seeds), len(finished)):.2g} times their standard deviation over seeds"
        text += f" Differences of less than about {least} are ties (pairs: {pairs})."
    return text


def describe_notes(trials: Sequence[Trial]) -> list[str]:
    """Return a line for each note on measures, such as why one is left out; the note names study rows that are fewer
    than all."""
    rows = list(dict.fromkeys(trial.row for trial in trials if trial.status == "finished"))
    noted: dict[str, list[str]] = {}
    for trial in trials:
        for line in trial.notes:
            noted.setdefault(line, []).append(trial.row)
    lines = []
    for line, owners in noted.items():
        named = list(dict.fromkeys(owners))
        lines.append(line if len(named) == len(rows) else f"{line} (rows: {listed(named)})")
    return lines[:_LISTED]


def describe_tests(rows: int, points: int = 0) -> str:
    """Say which tests were made, and how.

    Args:
        rows: number of study rows.
        points: number of test rows.
    """
    how = "a paired bootstrap over test rows, to which the spread over seeds is added as Student's t"
    if rows > BOOTSTRAPPED_ROWS or points > BOOTSTRAPPED_POINTS:
        many = f"{BOOTSTRAPPED_ROWS} rows are too many pairs"
        if rows <= BOOTSTRAPPED_ROWS:
            many = f"{BOOTSTRAPPED_POINTS:,} test rows are too many"
        how = (
            "a t-test whose squared standard error is the sum of that over test rows and that over seeds, since more "
            f"than {many} for a bootstrap"
        )
    return (
        f"Every row was tested against every other. Measures with a value for each test row are compared by {how}; "
        "others by a t-test over seeds. The spread over seeds is pooled over all rows; where the pair's own is larger, "
        "that is taken. p is two-sided and corrected for all pairs of a measure (Holm 1979). A difference is said to "
        "hold where p is below 0.05."
    )
