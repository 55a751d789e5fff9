"""The command that shows what a GPU makes of Diabolo: its own harness, tiny, on a CPU."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from aecore.config.experiment import Dense
from aecore.models.storage import Result
from aecore.stages.training import train
from aecore.training import fused, graphs, groups
from aecore.variants import Plain
from tests.gpu import __main__ as command
from tests.gpu import checks, jobs, memory
from tests.gpu.report import Report
from tests.gpu.scale import CPU

ROOT = Path(__file__).parents[1]
ONE_CASE = {"dense, plain": checks.CASES["dense, plain"]}
FP32 = replace(CPU, precisions=("fp32",))
WITH_GRAPHS = replace(FP32, captures=True)


def run_main(monkeypatch: pytest.MonkeyPatch, *args: str) -> int | str | None:
    """Run the command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["tests.gpu", *args])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return ended.value.code


def failures_of(part: Callable[[Any, Report], Any], scale: Any = FP32) -> list[str]:
    report = Report()
    part(scale, report)
    return report.failures


def test_without_a_gpu_it_says_so_in_one_line_and_needs_neither_ray_nor_mlflow() -> None:
    code = (
        "import runpy, sys; sys.modules['ray'] = sys.modules['mlflow'] = sys.modules['pytest'] = None; "
        "import torch; torch.cuda.is_available = lambda: False; "
        "sys.argv = ['tests.gpu']; runpy.run_module('tests.gpu', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    expected = "error: no CUDA GPU here; run this where there is one, or add --cpu\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_what_needs_torch_alone_passes_tiny_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DIABOLO_DATA", raising=False)
    parts = [part for part in command.PARTS if part != "jobs"]
    assert run_main(monkeypatch, "--cpu", "--only", *parts) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["failures"] == [] and set(found["measured"]) == set(found["seconds"]) == set(parts)
    assert [row["case"] for row in found["measured"]["checks"]] == list(checks.CASES) * len(CPU.precisions)
    assert {row["as one"] for row in found["measured"]["checks"]} == {"2 of 2"}
    assert [target["result"] for target in found["targets"]] == ["not judged"] * 2


def test_losses_that_differ_are_a_failure_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_as_one = fused.fit_as_one

    def wrong(trained: Any) -> Any:
        outcomes = fit_as_one(trained)
        for outcome in outcomes:
            assert not isinstance(outcome, Exception)
            outcome.history[0]["train/reconstruction"] *= 1.01
        return outcomes

    monkeypatch.setattr(fused, "fit_as_one", wrong)
    monkeypatch.setattr(checks, "CASES", ONE_CASE)
    assert run_main(monkeypatch, "--cpu", "--only", "checks") == 1
    (failure,) = json.loads(capsys.readouterr().out.splitlines()[-1])["failures"]
    assert failure == "dense, plain, fp32: losses as one differ by 0.01 from those of single steps, more than 0.001"


def test_a_loss_that_is_not_a_number_differs() -> None:
    one, two = (Result({"history": [{"train/loss": loss}]}, {}, {}) for loss in (1.0, float("nan")))
    assert checks.difference(one, one) == 0 and checks.difference(one, two) == float("inf")


def test_fits_that_are_not_trained_as_one_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CASES", ONE_CASE)
    monkeypatch.setattr(groups, "group_key", lambda job, everywhere: "")
    assert failures_of(checks.check) == ["dense, plain, fp32: the fits were not trained as one"]


def test_captures_are_counted_and_their_lack_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU what is captured is called instead."""
    monkeypatch.setattr(checks, "CASES", ONE_CASE)
    missing = [
        "dense, plain, fp32: 0 of 2 fits were captured", "dense, plain, fp32: the step of all was not captured"
    ]  # fmt: skip
    assert failures_of(checks.check, WITH_GRAPHS) == missing
    monkeypatch.setattr(graphs, "can_be_captured", lambda job: True)
    with monkeypatch.context() as patched:
        patched.setattr(graphs, "capture", lambda step, stream: lambda: step())
        assert failures_of(checks.check, WITH_GRAPHS) == []

    def refuse(*args: Any, **options: Any) -> NoReturn:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    failures = failures_of(checks.check, WITH_GRAPHS)
    assert len(failures) == 2 and all("cannot be captured as a CUDA graph" in one for one in failures)


def test_an_error_in_one_case_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = checks.Case(Dense(widths=(4,)), (None, Plain()))
    monkeypatch.setattr(checks, "CASES", {"broken": broken, **ONE_CASE})
    report = Report()
    rows = checks.check(FP32, report)
    assert [row["case"] for row in rows] == ["broken", "dense, plain"] and "broken" in report.failures[0]
    assert not any(failure.startswith("dense, plain") for failure in report.failures)


def test_memory_that_is_left_behind_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[torch.Tensor] = []

    def forgetful(training: Any) -> Any:
        left.append(torch.zeros(2**19))
        return train(training)

    monkeypatch.setattr("tests.gpu.memory.train", forgetful)
    failures = failures_of(memory.check)
    assert len(failures) == 2 and all(failure.startswith("memory grows: MB") for failure in failures)


def test_a_target_that_is_missed_is_no_failure_and_a_part_that_ends_in_an_error_is_one() -> None:
    report = Report()
    report.target("seconds", 6.0, 5.0)
    report.target("times quicker", 13.0, 12.0, at_least=True)
    assert [target["result"] for target in report.targets] == ["missed", "met"] and report.close() == 0
    report.run("broken", lambda: 1 / 0)
    report.run("whole", lambda: "result")
    assert report.failures == ["broken: ZeroDivisionError: division by zero"] and report.close() == 1
    assert report.as_json()["measured"] == {"whole": "result"} and set(report.seconds) == {"broken", "whole"}


WORKED = jobs.Done(0, 10.0, {"metrics": {"test/accuracy": 0.98}, "stages": {"restored": 0}}, "", 0.0)


@pytest.mark.parametrize(
    ("done", "failure"),
    [
        (WORKED, None),
        (WORKED._replace(code=1, stderr="a line\nerror: no device\n\n"), "exit code 1 (error: no device)"),
        (WORKED._replace(code=None), "did not end within 200 s"),
        (WORKED._replace(report={}), "its last line is no JSON"),
        (WORKED._replace(report={"trials": {"finished": 27, "stopped": 0, "failed": 3}}), "trials failed: 3"),
        (WORKED._replace(report={"stages": {"restored": 5}}), "5 stages were restored, so its seconds say nothing"),
        (
            WORKED._replace(report={"metrics": {"test/accuracy": 0.5}}),
            "accuracy 0.5000 on the test rows, less than 0.97",
        ),
    ],
)
def test_what_is_wrong_with_a_job_is_a_failure(done: jobs.Done, failure: str | None, tmp_path: Path) -> None:
    report = Report()
    row = jobs.judged("MNIST", jobs.JOBS["MNIST, cold"], done, tmp_path, report)
    assert report.failures == ([f"MNIST: {failure}"] if failure else [])
    assert row["exit code"] == done.code and row["s of training"] is None  # there is no store
    assert [target["result"] for target in report.targets] == (["met"] if done.code == 0 else [])


def test_worker_processes_are_counted_by_their_lines() -> None:
    lines = """\
\x1b[36m(layer 1 pid=123)\x1b[0m layer 1: done after 2.0 s
\x1b[36m(layer 2 pid=123)\x1b[0m layer 2: done after 2.0 s
(evaluate pid=45, ip=10.0.0.2) evaluate: done after 1.0 s [repeated 2x across cluster]
restored (by hand)
"""
    assert WORKED._replace(stderr=lines).workers == 2


def test_jobs_that_cannot_run_are_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report()
    monkeypatch.setattr(jobs, "NEEDED", ("ray", "no_such_module"))
    assert jobs.measure(CPU, None, report) == []
    assert report.skipped == ["all jobs: no_such_module cannot be imported"] and report.close() == 0
    monkeypatch.setattr(jobs, "NEEDED", ())
    monkeypatch.setattr(jobs, "JOBS", {"MNIST, cold": jobs.JOBS["MNIST, cold"]})
    assert jobs.measure(CPU, None, report) == [] and report.skipped[1].startswith("MNIST, cold: there is no MNIST")
