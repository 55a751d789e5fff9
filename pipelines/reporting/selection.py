"""Which trials the report compares and draws, and what of their arrays it keeps in memory."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from aecore.evaluation.trial import Trial
from pipelines.reporting.measures import MEASURES, SHOWN_ROWS

Read = Callable[[Trial], Trial]
"""Returns a trial with `history`, `curves` and `arrays` filled. A trial whose result is lost comes back as failed."""
_READERS = 4
_POINTS = {measure.points for measure in MEASURES if measure.points}


def same_settings(settings: Mapping[str, Any]) -> str:
    """Return a text that is the same for the same settings."""
    return json.dumps(settings, sort_keys=True, default=str)


def choose_settings(trials: Sequence[Trial], choose: str) -> dict[str, dict[str, Any]]:
    """Return the settings of each study row that have the best mean of the metric `choose` over seeds, or the first
    settings if no trial has the metric. Only settings with the most seeds are chosen from: a search trains those again
    with further seeds that were best with the first, and one seed may be lucky."""
    known = {same_settings(trial.settings): trial.settings for trial in trials}
    finished = Counter((t.row, same_settings(t.settings)) for t in trials if t.status == "finished")
    return {
        row: known[min(keys, key=lambda key: (-finished[row, key], keys[key]))]
        for row, keys in scores(trials, choose).items()
    }


def choose_drawn(compared: Sequence[Trial], choose: str) -> list[str]:
    """Return the study rows that figures show, in the order of the trials: all of a dozen, else the references and the
    best by the metric `choose`."""
    best = {row: min(keys.values()) for row, keys in scores(compared, choose).items()}
    known = {trial.row for trial in compared if trial.is_reference}
    references = [row for row in best if row in known]
    variants = sorted((row for row in best if row not in references), key=lambda row: best[row])
    drawn = {*variants[: SHOWN_ROWS - len(references)], *references}
    return [row for row in best if row in drawn]


def scores(trials: Sequence[Trial], choose: str) -> dict[str, dict[str, float]]:
    """Return by study row and settings the mean of the metric `choose` over finished seeds: less is better, since
    accuracies have their sign changed. It is infinite if no trial has the metric."""
    values: dict[str, dict[str, list[float]]] = {}
    for trial in trials:
        seeds = values.setdefault(trial.row, {}).setdefault(same_settings(trial.settings), [])
        if trial.status == "finished" and np.isfinite(trial.metrics.get(choose, np.nan)):
            seeds.append(-trial.metrics[choose] if "accuracy" in choose else trial.metrics[choose])
    return {
        row: {key: float(np.mean(seeds)) if seeds else np.inf for key, seeds in keys.items()}
        for row, keys in values.items()
    }


def read_results(trials: Sequence[Trial], read: Read, drawn: Sequence[str]) -> list[Trial]:
    """Read the finished trials, several study rows at a time, and return all trials in their order.

    Of each trial the values per test row stay. Curves stay for the study rows `drawn`, and pictures for the lowest seed
    of each of these that has some.
    """
    rows: dict[str, list[int]] = {}
    for place in sorted(range(len(trials)), key=lambda place: trials[place].seed):
        rows.setdefault(trials[place].row, []).append(place)

    def read_row(row: str) -> list[Trial]:
        results: list[Trial] = []
        pictured = row not in drawn
        for place in rows[row]:
            trial = read(trials[place]) if trials[place].status == "finished" else trials[place]
            results.append(_without_excess(trial, row in drawn, not pictured))
            pictured |= bool(results[-1].arrays.keys() - _POINTS)
        return results

    with ThreadPoolExecutor(_READERS) as readers:
        results = dict(zip(rows, readers.map(read_row, rows), strict=True))
    by_place = {place: trial for row, places in rows.items() for place, trial in zip(places, results[row], strict=True)}
    return [by_place[place] for place in range(len(trials))]


def _without_excess(trial: Trial, curves: bool, pictures: bool) -> Trial:
    arrays = {name: values for name, values in trial.arrays.items() if pictures or name in _POINTS}
    if curves:
        return trial._replace(arrays=arrays)
    notes = {name: value for name, value in trial.curves.items() if name == "notes"}
    return trial._replace(arrays=arrays, curves=notes, history=())
