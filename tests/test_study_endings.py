"""How a study ends whose trials fail, whose budget is spent, or whose rows are dropped, and how the next command goes
on."""

from pathlib import Path

import pandas as pd
import pytest

from tests.test_compare import SHARING, compare, runs
from tests.test_train import store

DIVERGING = {"lr": 1e30}
SMALL = {**SHARING, "budget": {"epochs": 6}, "labels": {"counts": [], "fit": {"epochs": 1}}}


def test_a_shared_stage_that_diverges_ends_what_stands_on_it_and_nothing_else(
    tmp_path: Path, head: dict[str, str]
) -> None:
    rows = {"one": {"pretrain": DIVERGING}, "two": {"pretrain": DIVERGING, "finetune": {"lr": 3e-3}}, "plain": {}}
    study = {**SMALL, "variants": rows}
    done = compare(tmp_path, study, "--figures", "out", **head)
    assert done.code == 3 and done.report["status"] == "partial", done.err
    assert done.report["trials"] == {"finished": 3, "stopped": 0, "failed": 2}
    assert "warning: one seed=0, two seed=0 failed: DivergenceError: " in done.err and "Traceback" not in done.err
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("lower the learning rate") < page.index("<table")  # failures come first
    again = compare(tmp_path, study, **head)
    assert again.code == 3 and again.report["stages"] == {"computed": 0, "restored": 3}, again.err


def test_a_study_of_which_no_variant_finishes_has_failed(tmp_path: Path, head: dict[str, str]) -> None:
    study = {**SMALL, "variants": {"diverging": {"finetune": DIVERGING}}, "seeds": [0, 1]}
    done = compare(tmp_path, study, "--figures", "out", **head)
    assert done.code == 1 and done.report["status"] == "failed", done.err
    assert done.report["trials"] == {"finished": 4, "stopped": 0, "failed": 2}
    assert store(tmp_path).client.get_run(done.report["run_id"]).info.status == "FAILED"
    assert "lower the learning rate" in (tmp_path / "out" / "report.html").read_text()


def test_a_study_whose_cpu_hours_are_spent_is_taken_up_again(tmp_path: Path, head: dict[str, str]) -> None:
    study = {**SMALL, "variants": {"plain": {}}, "seeds": [0, 1, 2, 3, 4, 5]}
    done = compare(tmp_path, study, "--budget.cpu_hours", "0.0015", **head)
    assert done.code in (1, 3), done.err
    assert (
        done.report["trials"]["failed"]
        and "the study's CPU-hours were spent; raise budget.cpu_hours above 0.0015" in done.err
    )
    more = compare(tmp_path, study, "--budget.cpu_hours", "10", **head)
    assert more.code == 0 and more.report["run_id"] == done.report["run_id"], more.err
    assert more.report["trials"] == {"finished": 18, "stopped": 0, "failed": 0}
    assert more.report["stages"]["restored"] == done.report["trials"]["finished"]
    spent = more.report["cost"]["spent"]
    assert spent["cpu_hours"] > 0 and spent["gpu_hours"] == 0
    assert len({run.data.tags["stage.key"] for run in runs(tmp_path)}) == len(runs(tmp_path)) == 18


@pytest.mark.long
def test_a_race_drops_the_row_that_is_worse_and_the_next_command_knows(tmp_path: Path, head: dict[str, str]) -> None:
    rows = {"plain": {}, "wide": {"network": {"widths": [32, 8]}}, "slow": {"finetune": {"lr": 1e-6}}}
    study = {**SMALL, "variants": rows, "seeds": [0, 1, 2, 3, 4], "scheduler": "race"}
    done = compare(tmp_path, study, "--figures", "out", **head)
    assert done.code == 0, done.err
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    seeds = table["row"].value_counts()
    assert seeds["slow"] < seeds[["plain", "wide"]].max() <= 5 and seeds["pca"] == seeds["random"] == 5
    (dropped,) = [line for line in done.err.splitlines() if line.startswith("slow: dropped, worse than ")]
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"after {seeds['slow']} seeds" in dropped and f"after {seeds['slow']} seeds" in page
    again = compare(tmp_path, study, **head)
    assert again.code == 0 and again.report["stages"] == {"computed": 0, "restored": len(table)}, again.err
    assert again.report["verdicts"] == done.report["verdicts"]
