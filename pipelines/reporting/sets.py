"""The report of a study of several data sets: a page of each set, and one that lays them side by side."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd

from aecore.evaluation.trial import Trial
from pipelines.reporting import report, summary, tables
from pipelines.reporting.measures import MEASURES, Measure
from pipelines.reporting.report import About, Report
from pipelines.reporting.selection import Read

_MOST_WITH_ALL_FIGURES = 3
"""The most sets whose pages have all figures, which take seconds; those of more sets have `report.QUICK`."""
_NAMED = 4
"""The most rows that the answer names."""


class Cell(NamedTuple):
    """A study row's mean on a data set; the text is empty where it has none."""

    value: float
    text: str
    leads: bool
    """Whether the mean is the best one on the set."""


class Line(NamedTuple):
    """A data set in the table of the page."""

    name: str
    link: str
    cells: list[Cell]


def write_each(trials: Sequence[Trial], abouts: Mapping[str, About], folder: Path, read: Read) -> dict[str, Report]:
    """Write the report of each data set into `folder/sets/NAME`, as of a study of it alone.

    Args:
        abouts: What each report tells besides the trials, by the name of the set.
        read: See `report.write`.
    """
    wanted = tuple(report.CAPTIONS) if len(abouts) <= _MOST_WITH_ALL_FIGURES else report.QUICK
    return {
        name: report.write([one for one in trials if one.data == name], about, folder / "sets" / name, read, wanted)
        for name, about in abouts.items()
    }


def write(reports: Mapping[str, Report], trials: Sequence[Trial], about: About, folder: Path) -> Report:
    """Write the page on all data sets into `folder`: `report.html`, `results.parquet` and `results.csv`.

    Args:
        reports: See `write_each`.
        trials: All trials of all sets.

    Returns:
        What holds for all sets: means over them, and no verdicts.
    """
    measure = _leading(reports, about.choose)
    table = _means(reports, measure.name) if measure else pd.DataFrame()
    answer = _answer(table, measure) if measure else "Nothing to choose from: fewer than two rows finished."
    page = report.render(
        "sets.html.j2",
        about=about,
        answer=answer,
        measure=measure,
        rows=list(table),
        lines=[_line(name, table.loc[name], measure) for name in table.index] if measure else [],
        status=summary.describe_status(trials),
        failures=summary.failures(trials),
    )
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("report.html", "results.parquet", "results.csv")]
    files[0].write_text(page, encoding="utf-8")
    results = tables.results_table(trials)
    results.to_parquet(files[1], index=False)
    results.to_csv(files[2], index=False)
    notes = [f"{name}: {note}" for name, one in reports.items() for note in one.notes]
    return Report(files, answer, {}, means_over_sets(reports), notes)


def means_over_sets(reports: Mapping[str, Report]) -> dict[str, dict[str, float]]:
    """Return by measure and study row the mean over the data sets on which every row has the measure, so that no row
    gains by failing on a hard set."""
    means = {}
    for name in dict.fromkeys(name for one in reports.values() for name in one.means):
        whole = _means(reports, name).dropna()
        if len(whole):
            means[name] = {str(row): float(mean) for row, mean in whole.mean().items()}
    return means


def _means(reports: Mapping[str, Report], measure: str) -> pd.DataFrame:
    """Return a measure's means, a line per data set and a column per study row; NaN where a row has none."""
    means = {name: one.means.get(measure, {}) for name, one in reports.items()}
    return pd.DataFrame.from_dict(
        means, orient="index", columns=list(dict.fromkeys(r for m in means.values() for r in m))
    )


def _leading(reports: Mapping[str, Report], choose: str) -> Measure | None:
    """Return the measure that answers which study row to use: the one that settings were chosen by, else the first."""
    compared = {name for one in reports.values() for name, means in one.means.items() if len(means) > 1}
    known = [measure for measure in MEASURES if measure.better and measure.name in compared]
    wanted = [measure for name in summary.leading_names(choose) for measure in known if measure.name == name]
    return next(iter(wanted or known), None)


def _best(values: "pd.Series[float]", measure: Measure) -> str:
    """Return the study row with the best mean on a data set; nothing if none has one."""
    values = values.dropna()
    return "" if values.empty else str(values.idxmin() if measure.better == "lower" else values.idxmax())


def _line(name: str, values: "pd.Series[float]", measure: Measure) -> Line:
    best = _best(values, measure)
    cells = [
        Cell(value, measure.show(value, 3) if np.isfinite(value) else "", row == best) for row, value in values.items()
    ]
    return Line(name, f"sets/{quote(name)}/report.html", cells)


def _answer(table: pd.DataFrame, measure: Measure) -> str:
    """Say which study row has the best mean on the most data sets, and which are next."""
    wins = Counter(filter(None, (_best(values, measure) for _, values in table.iterrows())))
    (row, most), *others = wins.most_common(_NAMED)
    rest = "".join(f", {other} on {count}" for other, count in others)
    return f"{row}: by {measure.in_words} it has the best mean on {most} of {len(table)} sets{rest}."
