"""What a study found: one HTML page that needs nothing else, its figures as PNG, all numbers as Parquet and CSV."""

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
from aecore.evaluation.statistics import Pair, compare, judge, resolution
from pipelines.study.trial import REFERENCES, Trial


class Measure(NamedTuple):
    name: str
    label: str
    better: str = ""
    """`higher` or `lower`; empty for what is described and never won."""
    points: str = ""
    """The array of its values per test row, where it has one: rows are then drawn as well as seeds."""
    ratios: bool = False
    """Whether rows are compared by their ratio, as errors are."""

    def show(self, value: float, places: int = 4) -> str:
        if not np.isfinite(value):
            return "–"
        return f"{100 * value:.2f} %" if self.name.endswith("accuracy") else f"{value:.{places}g}"


MEASURES = (
    Measure("test/reconstruction_mse", "Squared error a feature", "lower", "sse", True),
    Measure("test/unexplained", "Variance left unexplained", "lower", ratios=True),
    Measure("probe/accuracy", "Linear probe, accuracy", "higher", "correct/probe"),
    Measure("knn/accuracy", "Nearest neighbours, accuracy", "higher", "correct/knn"),
    Measure("finetuned/accuracy", "Finetuned, accuracy", "higher", "correct/finetuned"),
    Measure("cluster/nmi", "k-means, mutual information (NMI)", "higher"),
    Measure("cluster/ari", "k-means, Rand index (ARI)", "higher"),
    Measure("cluster/accuracy", "k-means, accuracy", "higher"),
    Measure("robust/accuracy", "Probe under noise, mean accuracy", "higher"),
    Measure("robust/mse", "Restored from noise, mean squared error", "lower", ratios=True),
    Measure("vae/bound", "Evidence lower bound, nats", "higher"),
    Measure("vae/iw_bound", "Importance-weighted bound, nats", "higher"),
    Measure("sample/frechet", "Samples, Fréchet distance", "lower", ratios=True),
    Measure("sample/frechet_floor", "Real rows, Fréchet distance"),
    Measure("vae/active_units", "Active latent units"),
    Measure("contraction/norm", "Norm of the encoder's Jacobian"),
    Measure("contraction/relative", "The same by the spread of the codes"),
    Measure("units/mean_activation", "Mean activity of a unit"),
    Measure("units/dead", "Share of units that never move"),
    Measure("units/saturated", "Share of activities at their bounds"),
)
"""What the report compares, in its order."""
CAPTIONS = {
    "learning_curves": "Mean over seeds, to the epoch that all of them reached. Faint: trials the scheduler stopped.",
    "label_efficiency": "The encoder has seen all training rows without labels; the labels are the same in every row.",
    "robustness": "The same noise for every row. Accuracy is that of the probe fitted to clean codes.",
    "contraction": "Steps in random directions from test rows, the same for every row. At 1 a step passes whole.",
    "codes_maps": "The lowest seed of each row. Distances between clusters in a t-SNE mean nothing.",
    "reconstructions": "The same test rows everywhere; the lowest seed of each row.",
    "triptychs": "The same test rows and the same noise everywhere; the lowest seed of each row.",
    "activations": "The same test rows and one colour scale everywhere; the lowest seed of each row.",
    "identity_risk": "A code wider than the data can copy it; weights of the lowest seed, each on its own scale.",
    "samples": "Samples and manifold are decoded means; the lowest seed of each row.",
    "importance": "All finished trials of the search. A bar near its tick tells nothing.",
}


class Report(NamedTuple):
    files: list[Path]
    """The page first."""
    verdicts: dict[str, str]
    """In words, by measure."""
    means: dict[str, dict[str, float]]
    """Over seeds, by measure and row, for the settings chosen."""


def write(
    trials: Sequence[Trial], title: str, facts: dict[str, str], classes: Sequence[str], folder: Path, choose: str
) -> Report:
    """The report of a study in `folder`: `report.html`, `results.parquet`, `results.csv` and `figures/*.png`.

    Args:
        trials: all of them, whatever became of them, in the order in which rows are to appear.
        facts: what to say under the title, by name.
        classes: names of the classes; empty without labels.
        choose: the metric of validation by which a row's settings are chosen, where several were tried: the larger the
            better if its name contains `accuracy`, else the smaller.
    """
    chosen = _chosen(trials, choose)
    compared = [trial for trial in trials if _key(trial.settings) == _key(chosen[trial.row])]
    stopped = [t for t in trials if t.status == "stopped" and _key(t.settings) != _key(chosen[t.row])]
    with ThreadPoolExecutor(1) as aside:
        maps = aside.submit(codes.planes, compared)  # as long as all the rest, which goes on beside it
        measures = _measures(compared, list(chosen))
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
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files = [folder / "report.html", folder / "results.parquet", folder / "results.csv"]
    for name, png in figures.items():
        files.append(folder / "figures" / f"{name}.png")
        files[-1].write_bytes(png)
    frame = _frame(trials)
    frame.to_parquet(files[1], index=False)
    frame.to_csv(files[2], index=False)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = templates.get_template("report.html.j2").render(
        title=title,
        facts=facts,
        ended=[trial for trial in trials if trial.status != "finished"],
        rows=list(chosen),
        measures=measures,
        seeds=_seeds(compared),
        chosen={row: _said(settings) for row, settings in chosen.items() if settings},
        choose=choose,
        figures=[(CAPTIONS[name], name, b64encode(png).decode()) for name, png in figures.items()],
        spent=_spent(trials),
    )
    files[0].write_text(page, encoding="utf-8")
    verdicts = {shown["measure"].name: shown["verdict"] for shown in measures if shown["verdict"]}
    return Report(files, verdicts, {shown["measure"].name: shown["means"] for shown in measures})


def _chosen(trials: Sequence[Trial], choose: str) -> dict[str, dict[str, Any]]:
    """Each row's settings with the best mean of `choose` over seeds; the first where no trial has it."""
    scores: dict[str, dict[str, list[float]]] = {}
    known = {_key(trial.settings): trial.settings for trial in trials}
    for trial in trials:
        found = scores.setdefault(trial.row, {}).setdefault(_key(trial.settings), [])
        if trial.status == "finished" and np.isfinite(trial.metrics.get(choose, np.nan)):
            found.append(-trial.metrics[choose] if "accuracy" in choose else trial.metrics[choose])
    return {
        row: known[min(settings, key=lambda key: np.mean(settings[key]) if settings[key] else np.inf)]
        for row, settings in scores.items()
    }


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def _said(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}" for name, value in settings.items()
    )


def _values(trials: Sequence[Trial], measure: Measure) -> dict[str, np.ndarray]:
    """An array (seeds,) or, where every row has it, (seeds, test rows) a row; NaN for the seeds that a row lacks."""
    has = [t for t in trials if t.status == "finished" and np.isfinite(t.metrics.get(measure.name, np.nan))]
    seeds = sorted({trial.seed for trial in has})
    points = bool(measure.points) and all(measure.points in trial.arrays for trial in has)
    shape = has[0].arrays[measure.points].shape if has and points else ()
    values = {trial.row: np.full((len(seeds), *shape), np.nan) for trial in has}
    for trial in has:
        found = trial.arrays[measure.points] if points else trial.metrics[measure.name]
        values[trial.row][seeds.index(trial.seed)] = found
    return values


def _measures(trials: Sequence[Trial], rows: Sequence[str]) -> list[dict[str, Any]]:
    """What the page shows of each measure that some row has: verdict, cells by row, pairs."""
    shown = []
    for measure in MEASURES:
        numbers = _values(trials, measure._replace(points=""))
        if not numbers:
            continue
        means = {row: float(np.nanmean(found)) for row, found in numbers.items()}
        cells = {row: _cell(measure, found) for row, found in numbers.items()}
        pairs: tuple[Pair, ...] = ()
        best: tuple[str, ...] = ()
        verdict = ""
        if measure.better and len(means) > 1:
            pairs = compare(_values(trials, measure), ratios=measure.ratios)
            found = judge(means, pairs, measure.better == "higher", REFERENCES)
            best, verdict = found.best, found.words()
        elif measure.better:
            verdict = "; ".join(f"only {row} has it, {cell}: not compared." for row, cell in cells.items())
        shown.append(
            {
                "measure": measure,
                "means": means,
                "verdict": verdict,
                "cells": [(cells.get(row, "–"), row in best) for row in rows],
                "pairs": [
                    (pair, *(_difference(measure, value) for value in (pair.difference, pair.low, pair.high)))
                    for pair in pairs
                ],
            }
        )
    return shown


def _difference(measure: Measure, value: float) -> str:
    return f"× {np.exp(value):.3g}" if measure.ratios and np.isfinite(value) else measure.show(value, 3)


def _cell(measure: Measure, values: np.ndarray) -> str:
    values = values[np.isfinite(values)]
    mean = measure.show(float(values.mean()))
    if len(values) == 1:
        return mean
    spread = float(values.std(ddof=1))
    # what is left of equal numbers is rounding
    return f"{mean} ± {measure.show(spread if spread > 1e-12 * abs(values.mean()) else 0.0, 2)}"


def _seeds(trials: Sequence[Trial]) -> str:
    """How many seeds stand behind the numbers."""
    finished: dict[str, list[int]] = {trial.row: [] for trial in trials}
    for trial in trials:
        if trial.status == "finished":
            finished[trial.row].append(trial.seed)
    kinds = {tuple(sorted(seeds)) for seeds in finished.values()}
    if len(kinds) > 1:
        each = ", ".join(f"{row} {len(seeds)}" for row, seeds in finished.items())
        return f"Finished seeds: {each}. Rows are compared in pairs, on the seeds that both have."
    (seeds,) = kinds
    if len(seeds) == 1:
        return "One seed a row: what is said speaks of these weights; another seed may say otherwise."
    said = f"{len(seeds)} seeds in every row, the same in each."
    pairs = len(finished) * (len(finished) - 1) // 2
    if len(seeds) > 1 and pairs:
        least = f"{resolution(len(seeds), len(finished)):.2g} times their standard deviation over seeds"
        said += f" Differences of less than about {least} are ties (pairs: {pairs})."
    return said


def _spent(trials: Sequence[Trial]) -> list[list[str]]:
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


def _frame(trials: Sequence[Trial]) -> pd.DataFrame:
    """A line a trial: `settings.<name>` and every metric under its own name; settings that are no scalars as JSON."""

    def plain(value: Any) -> Any:
        return value if isinstance(value, str | int | float | bool | None) else json.dumps(value, default=str)

    frame = pd.DataFrame(
        [
            {
                "row": trial.row,
                "kind": trial.kind,
                **{f"settings.{name}": plain(value) for name, value in trial.settings.items()},
                "seed": trial.seed,
                "status": trial.status,
                "error": trial.error,
                "run_id": trial.run_id,
                "epochs_planned": trial.epochs_planned,
                "epochs_used": trial.epochs_used,
                "seconds": trial.seconds,
                **trial.metrics,
            }
            for trial in trials
        ]
    )
    for name in frame.columns[[str(name).startswith("settings.") for name in frame.columns]]:
        # a column of Parquet has one type
        if len({isinstance(value, str) for value in frame[name].dropna()}) > 1:
            frame[name] = [None if pd.isna(value) else str(value) for value in frame[name]]
    return frame
