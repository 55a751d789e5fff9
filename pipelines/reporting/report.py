"""The report of a study: one HTML page that needs no other file, its figures as PNG, all numbers as Parquet and CSV."""

import json
from base64 import b64encode
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd

from aecore.evaluation.figures import codes, curves, images, settings
from aecore.evaluation.statistics import resolution
from aecore.evaluation.trial import Trial
from pipelines.reporting.measures import compare_measures

CAPTIONS = {
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
    "importance": "All finished trials of the search. A bar that ends near its tick shows no effect.",
}
"""The caption of each figure, in the order of the report."""


class Report(NamedTuple):
    """The files of a report, and the verdicts and means that it contains."""

    files: list[Path]
    """The page comes first."""
    verdicts: dict[str, str]
    """Which study row is best, in words, by measure."""
    means: dict[str, dict[str, float]]
    """Means over seeds of the chosen settings, by measure and study row."""


def write(
    trials: Sequence[Trial], title: str, facts: dict[str, str], classes: Sequence[str], folder: Path, choose: str
) -> Report:
    """Write the report of a study into `folder`: `report.html`, `results.parquet`, `results.csv` and `figures/*.png`.

    Args:
        trials: all trials, however they ended, in the order in which study rows are to appear.
        facts: lines to print under the title, by name.
        classes: names of the classes; empty without labels.
        choose: the validation metric by which a study row's settings are chosen, where several were tried: more is
            better if the name contains `accuracy`, else less.
    """
    chosen = _choose_settings(trials, choose)
    compared = [trial for trial in trials if _key(trial.settings) == _key(chosen[trial.row])]
    stopped = [t for t in trials if t.status == "stopped" and _key(t.settings) != _key(chosen[t.row])]
    with ThreadPoolExecutor(1) as thread:
        maps = thread.submit(codes.planes, compared)  # takes as long as all other figures together
        comparisons = compare_measures(compared, list(chosen))
        drawn = {
            "learning_curves": curves.learning_curves([*compared, *stopped]),
            "label_efficiency": curves.label_efficiency(compared),
            "robustness": curves.robustness(compared),
            "contraction": curves.contraction(compared),
            "reconstructions": images.reconstructions(compared),
            "triptychs": images.triptychs(compared),
            "activations": codes.activations(compared),
            "identity_risk": images.identity_risk(compared),
            "samples": images.samples(compared),
            "importance": settings.importance(trials, choose),
        }
        drawn["codes_maps"] = codes.codes_maps(compared, maps.result(), classes)
    figures = {name: png for name in CAPTIONS if (png := drawn[name])}
    page = _render(
        title=title,
        facts=facts,
        unfinished=[trial for trial in trials if trial.status != "finished"],
        rows=list(chosen),
        comparisons=comparisons,
        seeds=_describe_seeds(compared),
        chosen={row: _describe(values) for row, values in chosen.items() if values},
        choose=choose,
        figures=[(CAPTIONS[name], name, b64encode(png).decode()) for name, png in figures.items()],
        costs=_costs(trials),
    )
    files = _write_files(folder, page, figures, _table(trials))
    verdicts = {one.measure.name: one.verdict for one in comparisons if one.verdict}
    return Report(files, verdicts, {one.measure.name: one.means for one in comparisons})


def _choose_settings(trials: Sequence[Trial], choose: str) -> dict[str, dict[str, Any]]:
    """Return the settings of each study row that have the best mean of the metric `choose` over seeds, or the first
    settings if no trial has the metric."""
    scores: dict[str, dict[str, list[float]]] = {}
    known = {_key(trial.settings): trial.settings for trial in trials}
    for trial in trials:
        seeds = scores.setdefault(trial.row, {}).setdefault(_key(trial.settings), [])
        if trial.status == "finished" and np.isfinite(trial.metrics.get(choose, np.nan)):
            seeds.append(-trial.metrics[choose] if "accuracy" in choose else trial.metrics[choose])
    return {
        row: known[min(keys, key=lambda key: np.mean(keys[key]) if keys[key] else np.inf)]
        for row, keys in scores.items()
    }


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def _render(**context: Any) -> str:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return templates.get_template("report.html.j2").render(**context)


def _write_files(folder: Path, page: str, figures: dict[str, bytes], table: pd.DataFrame) -> list[Path]:
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files = [folder / "report.html", folder / "results.parquet", folder / "results.csv"]
    files[0].write_text(page, encoding="utf-8")
    table.to_parquet(files[1], index=False)
    table.to_csv(files[2], index=False)
    for name, png in figures.items():
        files.append(folder / "figures" / f"{name}.png")
        files[-1].write_bytes(png)
    return files


def _describe(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}" for name, value in settings.items()
    )


def _describe_seeds(trials: Sequence[Trial]) -> str:
    """Return sentences that say over how many seeds the means are taken."""
    finished: dict[str, list[int]] = {trial.row: [] for trial in trials}
    for trial in trials:
        if trial.status == "finished":
            finished[trial.row].append(trial.seed)
    sets = {tuple(sorted(seeds)) for seeds in finished.values()}
    if len(sets) > 1:
        each = ", ".join(f"{row} {len(seeds)}" for row, seeds in finished.items())
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


def _costs(trials: Sequence[Trial]) -> list[list[str]]:
    """Return the cells of the table of costs (trials, epochs, hours): a line per study row, then a line of totals."""
    frame = pd.DataFrame(
        {
            "row": [trial.row for trial in trials],
            **{kind: [trial.status == kind for trial in trials] for kind in ("finished", "stopped", "failed")},
            "planned": [trial.epochs_planned for trial in trials],
            "used": [trial.epochs_used for trial in trials],
            "hours": [trial.seconds / 3600 for trial in trials],
        }
    )
    table = frame.groupby("row", sort=False).sum()
    lines = [*table.itertuples(), ("all rows", *table.sum())]
    return [[row, *(f"{value:.0f}" for value in values[:-1]), f"{values[-1]:.3g}"] for row, *values in lines]


def _table(trials: Sequence[Trial]) -> pd.DataFrame:
    """Return a table with a line per trial and a column per field, setting (`settings.<name>`) and metric. Settings
    that are not scalars are written as JSON."""

    def scalar(value: Any) -> Any:
        return value if isinstance(value, str | int | float | bool | None) else json.dumps(value, default=str)

    fields = ("row", "kind", "seed", "status", "error", "run_id", "epochs_planned", "epochs_used", "seconds")
    lines = []
    for trial in trials:
        line = {field: getattr(trial, field) for field in fields[:2]}
        line |= {f"settings.{name}": scalar(value) for name, value in trial.settings.items()}
        lines.append(line | {field: getattr(trial, field) for field in fields[2:]} | dict(trial.metrics))
    table = pd.DataFrame(lines)
    for name in [name for name in table.columns if str(name).startswith("settings.")]:
        # a column of Parquet has one type
        if len({isinstance(value, str) for value in table[name].dropna()}) > 1:
            table[name] = [None if pd.isna(value) else str(value) for value in table[name]]
    return table
