"""The tables of the report: all numbers of all trials, all pairs of study rows, and costs."""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from aecore.evaluation.statistics import Pair
from aecore.evaluation.trial import Trial
from pipelines.reporting.measures import Comparison

_FIELDS = (
    "row", "kind", "seed", "status", "error", "run_id", "number", "epochs_planned", "epochs_used", "seconds",
    "cpu_seconds", "gpu_seconds",
)  # fmt: skip


def results_table(trials: Sequence[Trial]) -> pd.DataFrame:
    """Return a table with a line per trial and a column per field, setting (`settings.<name>`) and metric. Settings
    that are not scalars are written as JSON. Where a study has several data sets, the first column names the set."""

    def scalar(value: Any) -> Any:
        return value if isinstance(value, str | int | float | bool | None) else json.dumps(value, default=str)

    lines = []
    for trial in trials:
        line = {"data": trial.data} if trial.data else {}
        line |= {field: getattr(trial, field) for field in _FIELDS[:2]}
        line |= {f"settings.{name}": scalar(value) for name, value in trial.settings.items()}
        lines.append(line | {field: getattr(trial, field) for field in _FIELDS[2:]} | dict(trial.metrics))
    table = pd.DataFrame(lines)
    for name in [name for name in table.columns if str(name).startswith("settings.")]:
        # a column of Parquet has one type
        if len({isinstance(value, str) for value in table[name].dropna()}) > 1:
            table[name] = [None if pd.isna(value) else str(value) for value in table[name]]
    return table


def pairs_table(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """Return a table with a line per measure and pair of study rows. The difference of errors is that of their
    logarithms, which `ratio` says."""
    tables = [pd.DataFrame(columns=["measure", "ratio", *Pair._fields])]
    for one in comparisons:
        if one.pairs:
            table = pd.DataFrame(list(one.pairs), columns=Pair._fields)
            table.insert(0, "measure", one.measure.name)
            table.insert(1, "ratio", one.measure.ratios)
            tables.append(table)
    return pd.concat(tables[1:] or tables, ignore_index=True)


def costs(trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns of the table of costs, and its cells: a line per study row, then one of totals.

    Hours of CPUs and GPUs are left out where no trial tells any.
    """
    columns: dict[str, list[float]] = {
        **{kind: [trial.status == kind for trial in trials] for kind in ("finished", "stopped", "failed")},
        "epochs planned": [trial.epochs_planned for trial in trials],
        "epochs used": [trial.epochs_used for trial in trials],
        "hours of training": [trial.seconds / 3600 for trial in trials],
        "CPU-hours": [trial.cpu_seconds / 3600 for trial in trials],
        "GPU-hours": [trial.gpu_seconds / 3600 for trial in trials],
    }
    columns = {name: values for name, values in columns.items() if "PU" not in name or any(values)}
    table = pd.DataFrame(columns).groupby([trial.row for trial in trials], sort=False).sum()
    table.loc["all rows"] = table.sum()
    counts = [not name.endswith(("hours", "training")) for name in columns]
    lines = [
        [row, *(f"{value:.0f}" if count else f"{value:.3g}" for value, count in zip(values, counts, strict=True))]
        for row, *values in table.itertuples()
    ]
    return list(columns), lines
