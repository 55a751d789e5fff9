"""The report of a study: one HTML page that needs no other file, its figures as PNG, all numbers as Parquet and CSV."""

from base64 import b64encode
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd

from aecore.evaluation.figures import codes, curves, detection, images, settings
from aecore.evaluation.trial import Dropped, Trial
from pipelines.reporting import summary, tables
from pipelines.reporting.measures import SHOWN_ROWS, Comparison, compare_measures, worth_of_pretraining
from pipelines.reporting.selection import Read, choose_drawn, choose_settings, read_results, same_settings

CAPTIONS = {
    "ranking": "Test rows from the strangest down; the lowest seed of each row. Dotted: chance.",
    "scores": "The default score of the test rows, the lowest seed of each row. The scale is the score's logarithm "
    "where it spreads wide.",
    "strangest": "The test rows with the highest scores, and what each of three features adds to them, with its value "
    "and the mean of normal rows that are alike otherwise.",
    "learning_curves": "Means over seeds, to the last epoch that all seeds reached. Faint: trials that the scheduler "
    "stopped.",
    "label_efficiency": "The encoder has seen all training rows without labels; the labels are the same in every row.",
    "robustness": "The noise is the same for every row. The accuracy is that of a probe fitted to clean codes.",
    "contraction": "Steps from test rows in random directions, the same for every row. At 1 the code moves as far as "
    "its input.",
    "codes_maps": "The lowest seed of each row. Distances between clusters in a t-SNE mean nothing.",
    "reconstructions": "The same test rows everywhere; the lowest seed of each row.",
    "triptychs": "The same test rows and the same noise everywhere; the lowest seed of each row.",
    "activations": "The same test rows and one colour scale everywhere; the lowest seed of each row.",
    "identity_risk": "A code wider than the data can copy it. Weights of the lowest seed, each unit on its own scale.",
    "samples": "Samples and manifold are decoded means; the lowest seed of each row.",
    "search": "Each row's best settings so far, in the order in which they were started. Points: each settings' mean "
    "over its seeds.",
    "importance": "All finished trials of the search. A bar that ends near its tick shows no effect.",
}
"""The caption of each figure, in the order of the report."""
QUICK = ("ranking", "scores", "strangest", "learning_curves", "label_efficiency", "search", "importance")
"""The figures that take little time: no maps, no pictures, no curves of robustness."""


class Cost(NamedTuple):
    """A line of the table that sets what a study was forecast to cost beside what it spent."""

    label: str
    forecast: str
    spent: str


class About(NamedTuple):
    """What a report tells of a study besides its trials."""

    title: str
    choose: str
    """The validation metric by which a study row's settings are chosen, where several were tried: more is better if the
    name contains `accuracy`, else less."""
    facts: Mapping[str, str] = {}
    """Lines to print under the matrix, by name."""
    classes: Sequence[str] = ()
    """Names of the classes; empty without labels."""
    dropped: Sequence[Dropped] = ()
    """The study rows that racing dropped."""
    costs: Sequence[Cost] = ()


class Report(NamedTuple):
    """The files of a report, and the verdicts and means that it contains."""

    files: list[Path]
    """The page comes first."""
    answer: str
    """Which study row to use, in a sentence or two."""
    verdicts: dict[str, str]
    """Which study row is best, in words, by measure."""
    means: dict[str, dict[str, float]]
    """Means over seeds of the chosen settings, by measure and study row."""
    notes: list[str]
    """Which measures are left out or were taken on a sample, and why."""
    comparisons: Sequence[Comparison]
    """The measures with their differences; empty for a page on several data sets."""


def write(
    trials: Sequence[Trial], about: About, folder: Path, read: Read, wanted: Collection[str] = tuple(CAPTIONS)
) -> Report:  # fmt: skip
    """Write the report of a study into `folder`: `report.html`, `results.parquet`, `results.csv`, `pairs.csv` and
    `figures/*.png`.

    Args:
        trials: all trials, however they ended, in the order in which study rows are to appear.
        read: called in a few threads, once for each finished trial with the settings that were chosen.
        wanted: the names of the figures to draw.
    """
    chosen = choose_settings(trials, about.choose)
    places = [n for n, trial in enumerate(trials) if same_settings(trial.settings) == same_settings(chosen[trial.row])]
    drawn = choose_drawn([trials[place] for place in places], about.choose)
    compared = read_results([trials[place] for place in places], read, drawn)
    results = dict(zip(places, compared, strict=True))
    trials = [results.get(place, trial) for place, trial in enumerate(trials)]
    with ThreadPoolExecutor(1) as thread:
        shown = [trial for trial in compared if trial.row in drawn]
        mapped = shown if "codes_maps" in wanted else []
        maps = thread.submit(codes.planes, mapped)  # takes as long as all other figures together
        comparisons = compare_measures(compared, [one.row for one in about.dropped])
        figures = _draw(trials, shown, about, wanted)
        if png := codes.codes_maps(mapped, maps.result(), about.classes):
            figures["codes_maps"] = png
    notes = summary.describe_notes(compared)
    answer = summary.answer(summary.leading(comparisons, about.choose), compared)
    page = render(
        "report.html.j2",
        about=about,
        answer=answer,
        notes=notes,
        figures=[(CAPTIONS[name], name, b64encode(figures[name]).decode()) for name in CAPTIONS if name in figures],
        chosen={row: summary.describe_settings(values) for row, values in chosen.items() if values},
        **_compared(comparisons, compared, drawn, about.choose),
        **_ended(trials, drawn),
    )
    files = _write_files(folder, page, figures, tables.results_table(trials), tables.pairs_table(comparisons))
    verdicts = {one.measure.name: one.words for one in comparisons if one.words}
    means = {one.measure.name: one.means for one in comparisons}
    return Report(files, answer.words(), verdicts, means, notes, comparisons)


def _draw(
    trials: Sequence[Trial], compared: Sequence[Trial], about: About, wanted: Collection[str]
) -> dict[str, bytes]:
    """Draw the wanted figures, except the maps.

    Args:
        compared: the trials of the study rows that are drawn, with the chosen settings.
    """
    rows, known = {trial.row for trial in compared}, {id(trial) for trial in compared}
    searched = [trial for trial in trials if trial.row in rows]
    stopped = [trial for trial in searched if trial.status == "stopped" and id(trial) not in known]
    drawings: dict[str, Callable[[], bytes | None]] = {
        "ranking": lambda: detection.ranking_of_rows(compared),
        "scores": lambda: detection.histograms(compared),
        "strangest": lambda: detection.strangest_of_study(compared),
        "learning_curves": lambda: curves.learning_curves([*compared, *stopped]),
        "label_efficiency": lambda: curves.label_efficiency(compared),
        "robustness": lambda: curves.robustness(compared),
        "contraction": lambda: curves.contraction(compared),
        "reconstructions": lambda: images.reconstructions(compared),
        "triptychs": lambda: images.triptychs(compared),
        "activations": lambda: codes.activations(compared),
        "identity_risk": lambda: images.identity_risk(compared),
        "samples": lambda: images.samples(compared),
        "search": lambda: settings.search(searched, about.choose),
        "importance": lambda: settings.importance(trials, about.choose),
    }
    return {name: png for name, draw in drawings.items() if name in wanted and (png := draw())}


def _compared(
    comparisons: Sequence[Comparison], compared: Sequence[Trial], drawn: Sequence[str], choose: str
) -> dict[str, Any]:
    """Return what the page shows of the comparisons; study rows stand in the order of the measure that answers."""
    first = summary.leading(comparisons, choose)
    ranked = first.verdict.ranked if first and first.verdict else ()
    rows = list(dict.fromkeys([*ranked, *(trial.row for trial in compared)]))
    return {
        "rows": rows,
        "shown": [row for row in rows if row in drawn],
        "comparisons": comparisons,
        "heads": [one for one in comparisons if one.verdict],
        "matrix": summary.matrix(comparisons, rows),
        "leading": first,
        "references": first.verdict.references if first and first.verdict else (),
        "seeds": summary.describe_seeds(compared),
        "worth": worth_of_pretraining(comparisons, drawn),
        "tests": summary.describe_tests(len(rows), max((len(t.arrays.get("sse", ())) for t in compared), default=0)),
        "many": len(rows) > SHOWN_ROWS,
    }


def _ended(trials: Sequence[Trial], drawn: Sequence[str]) -> dict[str, Any]:
    """Return what the page shows of how the trials ended and what they cost."""
    columns, (*costs, total) = tables.costs(trials)
    return {
        "status": summary.describe_status(trials),
        "failures": summary.failures(trials),
        "stopped": sum(trial.status == "stopped" for trial in trials),
        "cost_columns": columns,
        "costs": [*(cells for cells in costs if cells[0] in drawn), total],
    }


def render(template: str, **context: Any) -> str:
    """Return a page of this room as HTML."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return templates.get_template(template).render(**context)


def _write_files(
    folder: Path, page: str, figures: Mapping[str, bytes], results: pd.DataFrame, pairs: pd.DataFrame
) -> list[Path]:
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("report.html", "results.parquet", "results.csv", "pairs.csv")]
    files[0].write_text(page, encoding="utf-8")
    results.to_parquet(files[1], index=False)
    results.to_csv(files[2], index=False)
    pairs.to_csv(files[3], index=False, float_format="%.6g")
    for name in (name for name in CAPTIONS if name in figures):
        files.append(folder / "figures" / f"{name}.png")
        files[-1].write_bytes(figures[name])
    return files
