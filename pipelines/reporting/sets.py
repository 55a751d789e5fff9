"""The report of a study of several data sets: a page of each set, and one that lays them side by side."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd

from aecore.evaluation.figures.ranks import critical_difference
from aecore.evaluation.figures.trials import looks
from aecore.evaluation.ranks import Ranks, compare_ranks
from aecore.evaluation.trial import Trial
from aecore.evaluation.verdicts import listed
from pipelines.reporting import report, summary, tables
from pipelines.reporting.measures import MEASURES, Comparison, Measure
from pipelines.reporting.report import About, Report
from pipelines.reporting.selection import Read

_MOST_WITH_ALL_FIGURES = 3
"""The most sets whose pages have all figures, which take seconds; those of more sets have `report.QUICK`."""


class Cell(NamedTuple):
    """A study row's mean on a data set; the text is empty where it has none."""

    value: float
    text: str
    rank: str
    """`best`: it wins alone on the set; `tied`: it is among the best; `worse`; or empty."""
    leads: bool
    """Whether the mean is the best one on the set."""


class Line(NamedTuple):
    """A data set in a table of the page."""

    name: str
    link: str
    cells: list[Cell]


class Wins(NamedTuple):
    """On how many data sets a study row is better or worse than a reference beyond doubt."""

    better: int
    worse: int
    sets: int
    """Number of sets on which both were compared."""

    @property
    def ties(self) -> int:
        """Number of sets on which it is neither better nor worse."""
        return self.sets - self.better - self.worse

    @property
    def text(self) -> str:
        """The numbers of better, tied and worse sets."""
        return f"{self.better} / {self.ties} / {self.worse}" if self.sets else "–"


class Overview(NamedTuple):
    """A measure on all data sets."""

    measure: Measure
    rows: list[str]
    """The study rows, the best mean rank first."""
    references: tuple[str, ...]
    means: dict[str, float]
    """Means over the sets on which all rows have the measure, by study row."""
    ranks: Ranks
    wins: dict[str, dict[str, Wins]]
    """How often each study row is better or worse than each reference: by the row's name, then by the reference's."""
    lines: list[Line]
    png: bytes
    """The diagram of mean ranks; empty where there are too few sets to rank rows."""

    @property
    def mean_texts(self) -> list[str]:
        """The means as the table shows them, in the order of `rows`."""
        return [self.measure.show(self.means[row], 3) if row in self.means else "" for row in self.rows]

    @property
    def image(self) -> str:
        """The diagram in base64."""
        return b64encode(self.png).decode()


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
    """Write the page on all data sets into `folder`: `report.html`, `results.parquet`, `results.csv` and the diagrams
    of mean ranks in `figures`.

    Args:
        reports: See `write_each`.
        trials: All trials of all sets.

    Returns:
        What holds for all sets: means over them, and verdicts on mean ranks.
    """
    overviews = overview(reports, trials, about.choose)
    answer = _answer(overviews[0]) if overviews else "Nothing to choose from: fewer than two rows finished."
    page = report.render(
        "sets.html.j2", about=about, answer=answer, overviews=overviews, status=summary.describe_status(trials),
        failures=summary.failures(trials),
    )  # fmt: skip
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("report.html", "results.parquet", "results.csv")]
    files[0].write_text(page, encoding="utf-8")
    results = tables.results_table(trials)
    results.to_parquet(files[1], index=False)
    results.to_csv(files[2], index=False)
    for one in overviews:
        if one.png:
            files.append(folder / "figures" / f"ranks_{one.measure.name.replace('/', '_')}.png")
            files[-1].write_bytes(one.png)
    notes = [f"{name}: {note}" for name, one in reports.items() for note in one.notes]
    verdicts = {one.measure.name: _verdict(one, one.rows[0]) for one in overviews}
    return Report(files, answer, verdicts, means_over_sets(reports), notes, ())


def overview(reports: Mapping[str, Report], trials: Sequence[Trial], choose: str) -> list[Overview]:
    """Return the measures by which study rows are compared on all data sets, the one that answers first."""
    compared = {one.measure.name for each in reports.values() for one in each.comparisons if one.verdict}
    known = [measure for measure in MEASURES if measure.name in compared]
    leading = summary.leading_names(choose)
    known.sort(key=lambda measure: leading.index(measure.name) if measure.name in leading else len(leading))
    references = tuple(dict.fromkeys(trial.row for trial in trials if trial.is_reference))
    return [_overview(reports, trials, measure, references) for measure in known]


def means_over_sets(reports: Mapping[str, Report]) -> dict[str, dict[str, float]]:
    """Return by measure and study row the mean over the data sets on which every row has the measure, so that no row
    gains by failing on a hard set."""
    names = dict.fromkeys(name for one in reports.values() for name in one.means)
    means = {name: _mean_over_sets(_means(reports, name)) for name in names}
    return {name: of_rows for name, of_rows in means.items() if of_rows}


def _means(reports: Mapping[str, Report], measure: str) -> pd.DataFrame:
    """Return a measure's means, a line per data set and a column per study row; NaN where a row has none."""
    means = {name: one.means.get(measure, {}) for name, one in reports.items()}
    return pd.DataFrame.from_dict(
        means, orient="index", columns=list(dict.fromkeys(r for m in means.values() for r in m))
    )


def _mean_over_sets(table: pd.DataFrame) -> dict[str, float]:
    """Return the mean of each study row over the sets on which all rows have a value; nothing without such sets."""
    whole = table.dropna()
    return {str(row): float(mean) for row, mean in whole.mean().items()} if len(whole) else {}


def _overview(
    reports: Mapping[str, Report], trials: Sequence[Trial], measure: Measure, references: tuple[str, ...]
) -> Overview:
    table = _means(reports, measure.name)
    values = {str(row): {str(name): float(mean) for name, mean in table[row].items()} for row in table}
    ranks = compare_ranks(values, measure.better == "higher")
    rows = list(ranks.means)
    found = {name: one for name, each in reports.items() for one in each.comparisons if one.measure == measure}
    present = tuple(row for row in references if row in rows)
    wins = {row: {other: _wins(found, row, other) for other in present if other != row} for row in rows}
    return Overview(
        measure, rows, present, _mean_over_sets(table), ranks, wins,
        [_line(name, values, rows, found.get(name), measure) for name in reports],
        critical_difference(ranks, looks(trials)) if ranks.sets > 1 and len(rows) > 1 else b"",
    )  # fmt: skip


def _wins(found: Mapping[str, Comparison], row: str, reference: str) -> Wins:
    """Count the data sets on which a study row is better or worse than a reference, by their pair's verdict."""
    better = worse = sets = 0
    for one in found.values():
        for pair in one.pairs:
            if {pair.first, pair.second} == {row, reference} and pair.seeds:
                lead = pair.difference if pair.first == row else -pair.difference
                ahead = (lead > 0) == (one.measure.better == "higher")
                sets, better, worse = sets + 1, better + (pair.holds and ahead), worse + (pair.holds and not ahead)
    return Wins(better, worse, sets)


def _line(
    name: str, values: Mapping[str, Mapping[str, float]], rows: Sequence[str], one: Comparison | None, measure: Measure
) -> Line:
    best = one.verdict.best if one and one.verdict else ()
    cells = []
    for row in rows:
        value = values[row].get(name, np.nan)
        rank = "worse" if row not in best else "best" if len(best) == 1 else "tied"
        if np.isfinite(value):
            cells.append(Cell(value, measure.show(value, 3), rank if best else "", row == next(iter(best), "")))
        else:
            cells.append(Cell(value, "", "", False))
    return Line(name, f"sets/{quote(name)}/report.html", cells)


def _verdict(one: Overview, leader: str) -> str:
    """Say which study row has the best mean rank, and which are not worse beyond doubt.

    Args:
        leader: What the row with the best mean rank is called.
    """
    best = one.rows[0]
    if one.ranks.sets < 2:
        return "Fewer than two sets have all rows: not ranked."
    mean = one.ranks.means[best]
    rank = f"{leader} has the best mean rank, {mean:.2f} of {len(one.rows)} rows on {one.ranks.sets} sets"
    if not np.isfinite(one.ranks.critical_difference):
        return f"{rank}; no difference of ranks holds."
    tied = next((group[1:] for group in one.ranks.groups if group[0] == best), ())
    if not tied:
        return f"{rank}, and all others are worse beyond doubt."
    difference = f"critical difference {one.ranks.critical_difference:.2f}"
    return f"{rank}; not worse beyond doubt ({difference}): {listed(tied)}."


def _answer(one: Overview) -> str:
    """Say which study row to use over all data sets: how it ranks, its mean, and what it is worth beside the best
    reference."""
    best, is_reference = one.rows[0], one.rows[0] in one.references
    text = _verdict(one, f"{best} (a reference)" if is_reference else best)
    if one.ranks.sets < 2:
        return f"{text} The page of each set answers for the set."
    if best in one.means:
        text += f" Its mean is {one.measure.show(one.means[best], 3)}."
    others = [row for row in one.rows if row in one.references and row != best]
    if others and not is_reference:
        rival = others[0]
        wins = one.wins[best][rival]
        mean = f" ({one.measure.show(one.means[rival], 3)})" if rival in one.means else ""
        text += (
            f" Beside {rival}{mean}, the best reference, it is better beyond doubt on {wins.better} of {wins.sets} "
            f"sets, worse on {wins.worse}, and ties on {wins.ties}."
        )
    return text
