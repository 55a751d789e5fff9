"""Tests of the report of a study, which is made from invented trials."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from aecore.evaluation.figures import codes, curves, images, settings
from aecore.evaluation.figures.trials import COLOURS, looks
from aecore.evaluation.trial import Dropped, Trial, study_status
from pipelines.reporting.measures import MEASURES
from pipelines.reporting.report import About, Cost, Report
from pipelines.reporting.report import write as write_report

CLASSES = tuple("0123456789")
ROWS = {
    "plain": "plain",
    "stacked": "plain",
    "overcomplete": "plain",
    "sparse": "sparse",
    "sparse overcomplete": "sparse",
    "denoising": "denoising",
    "variational": "variational",
    "pca": "pca",
    "random": "random",
}
POINTS = 200


def trial(
    row: str,
    seed: int,
    kind: str = "plain",
    quality: float = 0.0,
    shape: tuple[int, ...] = (1, 8, 8),
    labels: bool = True,
    status: Literal["finished", "stopped", "failed"] = "finished",
    settings: dict[str, Any] | None = None,
    error: str = "",
) -> Trial:
    """Invent a trial whose measures are better where `quality` is higher; the same arguments give the same trial."""
    shared, own = np.random.default_rng(0), np.random.default_rng([seed, len(row), sum(map(ord, row))])
    luck = 0.0 if kind == "pca" else 0.0005 * own.normal()
    accuracy = 0.85 + 0.1 * quality + luck
    inputs = shared.random((12, *shape)) * (shared.random((12, *shape)) < 0.3)
    hard, place = shared.random(POINTS), shared.integers(10, size=POINTS)
    sse = 10 - 3 * quality + 100 * luck + hard
    mse = float(sse.mean() / np.prod(shape))
    noisy = np.clip(inputs[:6] + 0.4 * shared.normal(size=(6, *shape)), 0, 1)
    blur = 0.3 - 0.1 * quality
    counts, levels = [100, 1000, 10000], [0.0, 0.1, 0.3, 0.5]
    metrics = {
        "test/reconstruction_mse": mse,
        "val/reconstruction_mse": mse,
        "test/unexplained": mse / 0.2,
        "contraction/norm": 1 - quality,
        "units/mean_activation": 0.1,
        "robust/mse": 2 * mse,
    }
    curves: dict[str, Any] = {
        "robustness": {
            noise: {"levels": levels, "mse": [mse * (1 + place * level) for level in levels]}
            for place, noise in enumerate(("gaussian", "masking", "salt_and_pepper"), 1)
        },
        "contraction": {"radius": [0.1, 1.0, 10.0], "ratio": [1 - quality / 2, 0.5 + luck, 0.1]},
    }
    arrays: dict[str, np.ndarray] = {
        "sse": sse,
        "inputs": inputs,
        "reconstructed": inputs + blur * own.normal(size=inputs.shape),
        "corrupted": noisy,
        "restored": noisy + blur * (inputs[:6] - noisy),
        "codes": own.random((64, 32)) ** (8 if kind == "sparse" else 1),
        "map": np.column_stack([place % 4, place // 4]) + own.normal(size=(POINTS, 2)) * blur,
        "filters": own.normal(size=(16, *shape)),
    }
    if labels:
        for name in ("probe", "knn", "finetuned"):
            arrays[f"correct/{name}"] = hard < accuracy
            metrics[f"{name}/accuracy"] = float((hard < accuracy).mean())
        metrics |= {"val/probe_accuracy": accuracy, "cluster/nmi": accuracy / 2, "robust/accuracy": accuracy / 1.2}
        arrays["map_labels"] = place
        learned = [accuracy - 0.4 / count**0.2 for count in counts]
        curves["labels"] = {"counts": counts, "probe": learned, "finetuned": [v + 0.02 for v in learned]}
        for curve in curves["robustness"].values():
            curve["accuracy"] = [accuracy - 0.4 * level for level in levels]
    if kind == "variational":
        metrics |= {"vae/bound": -90.0 + luck, "sample/frechet": 12.0, "sample/frechet_floor": 3.0}
        arrays |= {"samples": own.random((100, *shape)), "manifold": own.random((100, *shape))}
    losses = mse * (1 + 6 / np.arange(1, 13) + 0.02 * own.normal(size=12))
    return Trial(
        row, settings or {}, seed, kind, status, error, f"run{seed}", metrics if status == "finished" else {},
        () if kind in ("pca", "random") else tuple({"val/reconstruction": float(v)} for v in losses),
        curves, arrays, 12, 12, 36.0,
    )  # fmt: skip


def bare(row: str, seed: int, kind: str = "plain", quality: float = 0.0) -> Trial:
    """Invent a trial with a value for each test row but without pictures, which take seconds to draw."""
    one = trial(row, seed, kind, quality)
    arrays = {name: values for name, values in one.arrays.items() if name in {measure.points for measure in MEASURES}}
    return one._replace(arrays=arrays, curves={})


def qualities() -> dict[str, float]:
    return {row: 0.0 for row in ROWS} | {"sparse": 1.0, "random": -1.0, "pca": -0.5}


def write(
    trials: list[Trial], title: str, facts: dict[str, str], classes: Sequence[str], folder: Path, choose: str
) -> Report:
    """Write a report of trials that need not be read."""
    return write_report(trials, About(title, choose, facts, classes), folder, lambda trial: trial)


def text(page: Path) -> str:
    """Return the page's text on one line, as people read it."""
    kept = re.sub(r"<style>.*?</style>|<script>.*?</script>|<[^>]*>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(kept).split())


@pytest.fixture(scope="module")
def study() -> list[Trial]:
    quality = qualities()
    return [trial(row, seed, kind, quality[row]) for row, kind in ROWS.items() for seed in range(3)]


@pytest.fixture(scope="module")
def written(study: list[Trial], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write(
        study, "A study", {"data": "digits"}, CLASSES, tmp_path_factory.mktemp("study"), "val/probe_accuracy"
    ).files


def test_the_page_asks_for_nothing(written: list[Path]) -> None:
    page = written[0].read_text()
    assert not re.search(r"https?://|<link|@import|url\(|fetch\(|<script [^>]", page) and page.count("<script>") == 1
    assert set(re.findall(r'src="([^"]{0,22})', page)) == {"data:image/png;base64,"}
    assert page.count("<img") == len(list((written[0].parent / "figures").glob("*.png"))) == 10


def test_all_files_are_named(written: list[Path]) -> None:
    folder = written[0].parent
    assert {*written} == {file for file in folder.rglob("*") if file.is_file()}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written if file.suffix == ".png")


def test_the_winner_wins_and_ties_are_ties(written: list[Path]) -> None:
    said = text(written[0])
    assert "Squared error per feature (lower is better): sparse wins." in said
    assert "Linear probe, accuracy (higher is better): sparse wins." in said
    assert "only variational has it, -90 ± " in said
    assert "Differences of less than about 2.2 times their standard deviation over seeds are ties (pairs: 36)" in said
    assert "Finished: no trial of 27 failed" in said
    assert re.search(
        r"Which should I use\? sparse: by probe accuracy it wins with \d\d\.\d\d %; [\w ]+, the next, has ", said
    )
    assert re.search(r"The pretraining of sparse is worth: \+[\d.]+ points of accuracy \(95 % interval ", said)
    # the best rows are marked by more than their colour
    assert re.search(r'<td class="tied" [^>]*>[^<]*★</td>', written[0].read_text())


def test_numbers_read_back(study: list[Trial], written: list[Path]) -> None:
    frame = pd.read_parquet(written[1])
    assert len(frame) == len(study) and list(frame.row.unique()) == list(ROWS)
    for line, one in zip(frame.to_dict("records"), study, strict=True):
        assert (line["row"], line["seed"], line["epochs_used"]) == (one.row, one.seed, one.epochs_used)
        assert {name: line[name] for name in one.metrics} == one.metrics
    pairs = pd.read_csv(written[3])
    assert set(pairs["measure"].value_counts()[["probe/accuracy", "test/reconstruction_mse"]]) == {36}
    again = pd.read_csv(written[2])
    assert list(again.columns) == list(frame.columns)
    assert np.allclose(again["probe/accuracy"], frame["probe/accuracy"])


def test_vectors_without_labels(tmp_path: Path) -> None:
    trials = [
        trial(row, seed, row, quality, shape=(7,), labels=False)
        for row, quality in {"plain": 0.0, "sparse": 0.0, "variational": 0.0}.items()
        for seed in range(2)
    ]
    files = write(trials, "Vectors", {}, (), tmp_path, "val/reconstruction_mse").files
    drawn = {file.stem for file in files if file.suffix == ".png"}
    assert {"reconstructions", "triptychs", "robustness", "codes_maps"} <= drawn
    assert not {"label_efficiency", "samples", "importance"} & drawn
    said = text(files[0])
    assert "accuracy (higher" not in said
    assert re.search(r"Squared error per feature \(lower is better\): (\w+, \w+|\w+) and \w+ tie", said)


def test_failures_come_first_and_markup_is_text(tmp_path: Path) -> None:
    name = "<b>&wide"
    trials = [trial(row, seed) for row in ("plain", name) for seed in range(3)]
    trials[4] = trial(name, 1, status="failed", error="loss was <nan>")
    trials.append(trial("denoising", 0, "denoising", status="stopped"))
    files = write(trials, "Some failed", {"rows": "<i>"}, CLASSES, tmp_path, "val/probe_accuracy").files
    page, said = files[0].read_text(), text(files[0])
    assert name not in page and "&lt;b&gt;&amp;wide" in page and "<nan>" not in page and "<i>" not in page
    assert said.startswith("Some failed Some failed Partial: 1 of 7 trials failed. ")
    assert said.index("1 × loss was <nan>") < said.index("Which should I use?") < said.index("1 trial was stopped")
    assert f"plain 3, {name} 2, denoising 0. Rows are compared in pairs, on the seeds that both have" in said
    assert "tie (no difference that holds at 5 % with 2 seeds)" in said
    frame = pd.read_parquet(files[1])
    assert list(frame.status[[4, 6]]) == ["failed", "stopped"] and np.isnan(frame["probe/accuracy"][4])


def test_nothing_that_comes_from_outside_is_markup(tmp_path: Path) -> None:
    evil = "</td><script>\"'><img src=x onerror=1>"
    trials = [
        trial(row, seed, settings={evil: value}) for row in (evil, "plain") for value in (evil, 0.1) for seed in (0, 1)
    ]
    trials[-1] = trials[-1]._replace(status="failed", error=evil, run_id=evil)
    page = write(trials, evil, {evil: evil}, [evil] * 10, tmp_path, "val/probe_accuracy").files[0].read_text()
    assert evil in html.unescape(page) and "onerror=1>" not in page
    assert not re.search(r"<script(?!>\n)|<img src=[^\"]|'><img", page) and page.count("<script>") == 1


def cells(page: str) -> dict[str, list[str]]:
    """Return by study row the classes of the matrix's cells."""
    body = page.split('class="box matrix', 1)[1].split("</table>")[0]
    lines = re.findall(r'<tr data-row="([^"]*)">(.*?)</tr>', body, re.DOTALL)
    return {row: re.findall(r'<td(?: class="([^"]*)")?', line) for row, line in lines}


def test_the_matrix_marks_the_best_the_tied_and_what_beats_the_references(written: list[Path]) -> None:
    page = written[0].read_text()
    marks = cells(page)
    assert set(marks) == set(ROWS) and next(iter(marks)) == "sparse"
    heads = re.findall(r'<th scope="col" data-first="(\w+)"[^>]*><button type="button">([^<]*)', page)
    order = dict((name, first) for first, name in heads)
    assert order["Probe accuracy ↑"] == "descending" and order["Squared error ↓"] == "ascending"
    assert marks["sparse"][:3] == ["best leads above"] * 3
    assert marks["plain"][0] == "worse above" and marks["random"][0] == "worse"
    assert re.search(r'<td class="best leads above" data-value="[\d.]+" title="[^"]* ± [^"]*">', page)


def test_of_rows_that_tie_the_cheapest_is_named(tmp_path: Path) -> None:
    trials = [bare(row, seed)._replace(seconds=len(row)) for row in ("plain", "wider", "dear row") for seed in (0, 1)]
    trials[2:4] = [one._replace(seconds=0.5) for one in trials[2:4]]
    report = write(trials, "A tie", {}, CLASSES, tmp_path, "val/probe_accuracy")
    assert re.fullmatch(
        r"wider: by probe accuracy it ties with .*, and of these 3 it took .*, 0.5 s per trial.", report.answer
    )
    assert {mark.split()[0] for marks in cells(report.files[0].read_text()).values() for mark in marks[2:3]} == {"tied"}


def test_failures_are_grouped_and_the_list_is_short(tmp_path: Path) -> None:
    trials = [bare("plain", seed) for seed in range(2)]
    trials += [trial("sparse", n, "sparse", status="failed", error=f"epoch {n}: loss was nan") for n in range(30)]
    trials += [trial("sparse", 30, "sparse", status="failed", error="worker died")]
    said = text(write(trials, "Failures", {}, CLASSES, tmp_path, "val/probe_accuracy").files[0])
    assert "Partial: 31 of 33 trials failed." in said and "The first 20 of them" in said
    assert said.index("30 × epoch 0: loss was nan") < said.index("1 × worker died")
    assert "sparse seed=19" in said and "sparse seed=20" not in said
    assert study_status(trials) == "partial" and study_status(trials[2:]) == "failed"
    assert study_status([*trials[2:], trial("pca", 0, "pca")]) == "failed" and study_status(trials[:2]) == "finished"


def test_dropped_rows_and_costs_are_told(tmp_path: Path) -> None:
    trials = [bare(row, 0)._replace(gpu_seconds=1800.0) for row in ("plain", "wider")]
    about = About(
        "A race", "val/probe_accuracy",
        dropped=[Dropped("wider", 2, "worse than plain by 3 points")], costs=[Cost("GPU-hours", "1.2", "1.0")],
    )  # fmt: skip
    page = write_report(trials, about, tmp_path, lambda one: one).files[0].read_text()
    assert "Dropped by the race" in page and "<td>wider</td><td>2</td><td>worse than plain by 3 points</td>" in page
    assert "<td>GPU-hours</td><td>1.2</td><td>1.0</td>" in page
    assert "<th>GPU-hours</th>" in page and "<th>CPU-hours</th>" not in page


def test_nothing_finished(tmp_path: Path) -> None:
    files = write(
        [trial("plain", 0, status="failed", error="no")], "None", {}, (), tmp_path, "val/probe_accuracy"
    ).files
    assert "there is nothing to compare" in text(files[0])


def test_a_search_compares_the_best_settings(tmp_path: Path) -> None:
    trials = [
        trial("sparse", seed, "sparse", quality, settings={"variant.weight": weight, "network.widths": widths})
        for weight, quality in {0.1: 0.0, 1.0: 0.5, 10.0: -0.5}.items()
        for widths in ([32], [64, 16])
        for seed in range(2)
    ]
    trials += [trial("plain", seed, settings={"network.widths": "narrow"}) for seed in range(2)]
    files = write(trials, "A search", {}, CLASSES, tmp_path, "val/probe_accuracy").files
    said = text(files[0])
    assert "over its seeds were chosen on validation, and only these are compared" in said
    assert "sparse: variant.weight = 1, network.widths = [32]" in said
    assert "2 seeds in every row" in said
    assert (tmp_path / "figures" / "importance.png").exists()
    frame = pd.read_parquet(files[1])
    assert set(frame["settings.network.widths"]) == {"[32]", "[64, 16]", "narrow"}
    assert list(frame["settings.variant.weight"][:2]) == [0.1, 0.1]


def test_where_smaller_is_better_the_smallest_is_chosen(tmp_path: Path) -> None:
    trials = [trial("plain", 0, quality=q, settings={"lr": lr}) for lr, q in {0.1: 0.0, 0.2: 1.0}.items()]
    said = text(write(trials, "A search", {}, CLASSES, tmp_path, "val/reconstruction_mse").files[0])
    assert "plain: lr = 0.2" in said
    assert "One seed per row" in said


def test_colours_stay_with_their_rows(study: list[Trial]) -> None:
    found = looks(study)
    assert len(set(map(str, found.values()))) == len(ROWS)
    assert all(found[kind].colour == colour for kind, colour in COLOURS.items() if kind in found)
    # the row that is named like its kind has the kind's colour, even if it comes later
    assert looks(study[::-1])["plain"].colour == COLOURS["plain"]


def test_figures_without_their_data_are_left_out() -> None:
    bare = [trial("plain", 0)._replace(metrics={}, history=(), curves={}, arrays={})]
    assert curves.learning_curves(bare) is curves.label_efficiency(bare) is curves.robustness(bare) is None
    assert curves.contraction(bare) is codes.codes_maps(bare, {}, CLASSES) is images.samples(bare) is None
    assert images.reconstructions(bare) is images.triptychs(bare) is codes.activations(bare) is None
    assert images.identity_risk(bare) is settings.importance(bare, "probe/accuracy") is None


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of the figures of settings that were drawn."""
    drawn: list[str] = []

    def figure(width: float, height: float, title: str) -> Figure:
        drawn.append(title)
        return Figure()

    monkeypatch.setattr(settings, "titled", figure)
    return drawn


def test_the_setting_that_matters_explains_the_variance(titles: list[str]) -> None:
    rng = np.random.default_rng(0)
    trials = [
        trial("plain", seed, settings={"lr": float(lr), "batch": batch})._replace(metrics={"val/loss": lr})
        for seed, lr in enumerate(rng.random(12))
        for batch in (32, 64)
    ]
    assert settings.importance(trials, "val/loss")
    assert re.fullmatch(r"lr explains (8\d|9\d) % of the variance of val/loss", titles[0])


def test_the_best_so_far_follows_the_order_of_start(titles: list[str]) -> None:
    losses = [3.0, 1.0, 2.0, 0.5]
    trials = [
        trial("plain", 0, settings={"lr": loss})._replace(metrics={"val/loss": loss}, number=10 - place)
        for place, loss in enumerate(losses)
    ]
    trials.append(trial("plain", 0, status="failed", settings={"lr": 9.0})._replace(number=20))
    assert settings.search(trials, "val/loss") and titles == [
        "plain reaches the best val/loss, 0.5, with its 1st settings"
    ]
    assert settings.search(trials[:1], "val/loss") is None


def test_measures_are_named_once() -> None:
    for names in zip(*((measure.name, measure.label, measure.short) for measure in MEASURES), strict=True):
        assert len(set(names)) == len(MEASURES)
