"""Tests of what lets a report hold many trials: what is read and kept of them, and what the page is bounded to."""

from pathlib import Path

import numpy as np
import pandas as pd

from aecore.evaluation.trial import Trial
from pipelines.reporting.report import About, write
from pipelines.reporting.selection import choose_settings, read_results
from tests.test_report import CLASSES, bare, cells, text, trial


def test_only_chosen_trials_are_read_and_pictures_kept_of_one_seed() -> None:
    settings = [{"lr": 0.1}, {"lr": 0.2}]
    full = [
        trial(row, seed, quality=float(number), settings=choice)
        for row in ("plain", "sparse") for number, choice in enumerate(settings) for seed in (2, 0, 1)
    ]  # fmt: skip
    # the study's first seed, here 2, may be the only one with pictures
    full = [
        one if one.seed else one._replace(arrays={name: one.arrays[name] for name in ("sse", "correct/probe")})
        for one in full
    ]
    known, calls = {one.name: one for one in full}, []

    def read(one: Trial) -> Trial:
        calls.append(one.name)
        return known[one.name]

    empty = [one._replace(history=(), curves={}, arrays={}) for one in full]
    chosen = choose_settings(empty, "val/probe_accuracy")
    assert chosen == {"plain": {"lr": 0.2}, "sparse": {"lr": 0.2}}
    results = read_results([one for one in empty if one.settings == {"lr": 0.2}], read, ["plain"])
    assert sorted(calls) == sorted(one.name for one in full if one.settings == {"lr": 0.2})
    assert [(one.row, one.seed) for one in results] == [(r, s) for r in ("plain", "sparse") for s in (2, 0, 1)]
    assert {(one.row, one.seed) for one in results if "inputs" in one.arrays} == {("plain", 1)}
    assert {one.row for one in results if one.curves} == {one.row for one in results if one.history} == {"plain"}
    assert all(one.arrays["sse"] is known[one.name].arrays["sse"] for one in results)


def test_a_result_that_is_lost_is_a_failure(tmp_path: Path) -> None:
    trials = [bare(row, seed) for row in ("plain", "wider") for seed in (0, 1)]

    def read(one: Trial) -> Trial:
        return one._replace(status="failed", error="its result is lost") if one.name == "wider seed=1" else one

    report = write(trials, About("Lost", "val/probe_accuracy"), tmp_path, read)
    assert "1 of 4 trials failed" in text(report.files[0]) and "1 × its result is lost" in text(report.files[0])
    assert list(pd.read_csv(report.files[2])["status"]) == ["finished"] * 3 + ["failed"]


def test_a_thousand_trials_stay_small(tmp_path: Path) -> None:
    quality = np.random.default_rng(0).normal(0, 0.3, 320)
    trials = [
        bare(f"row {n}", seed, ("plain", "sparse")[n % 2], float(q))
        for n, q in enumerate(quality)
        for seed in (0, 1, 2)
    ]
    trials += [bare(kind, seed, kind, -3.0) for kind in ("pca", "random") for seed in (0, 1, 2)]
    about = About("Many", "val/probe_accuracy", {}, CLASSES)
    report = write(trials, about, tmp_path, lambda one: one)
    page, said = report.files[0].read_text(), text(report.files[0])
    assert len(page) < 2e6 and page.count("<td") < 8000
    assert len(cells(page)) == 322 and "12 of 322 rows: the best by val/probe_accuracy and the references" in said
    assert len(pd.read_csv(report.files[3]).query("measure == 'test/reconstruction_mse'")) == 322 * 321 / 2
    best = f"row {int(np.argmax(quality))}"
    assert best in report.verdicts["test/reconstruction_mse"] and "leads" in cells(page)[best][0]
