"""The instruments of the benchmarks: a job's seconds are all accounted for, once each."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import training
from tests.benchmarks.tables import shown
from tests.benchmarks.timeline import HOOK, PARTS, ROOT, Note, read, split


def test_seconds_of_the_parts_add_up_to_the_whole() -> None:
    driver, worker = 1, 2
    notes = [
        Note("ray", 1.0, 4.0, driver, True),
        Note("import mlflow", 3.0, 6.0, driver, False),  # in a thread, beside Ray's start
        Note("import", 5.0, 8.0, worker, True),
        Note("stage", 8.0, 14.0, worker, True),
        Note("fit", 9.0, 12.0, worker, True),
        Note("mlflow", 8.0, 13.0, driver, False),  # a heartbeat, for which nobody waits
        Note("mlflow", 13.5, 15.0, driver, True),
        Note("mlflow", 19.0, 25.0, driver, True),
    ]
    found = split(notes, driver, 0.0, 20.0)
    assert sum(found.values()) == pytest.approx(20.0) and set(found) == set(PARTS)
    assert {part: seconds for part, seconds in found.items() if seconds} == pytest.approx(
        {
            "training": 3, "other work of stages": 3, "imports of workers": 3, "start and end of Ray": 3,
            "MLflow: import": 1, "MLflow: calls": 2, "the rest": 5,
        }
    )  # fmt: skip


def test_a_process_notes_what_takes_how_long(tmp_path: Path) -> None:
    code = "from aecore.config import experiment; from aecore.data import dataset; dataset.inspect(experiment.Data())"
    env = {"PYTHONPATH": f"{HOOK}:{ROOT}", "BENCHMARK_TIMELINE": str(tmp_path / "notes")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    notes = read(tmp_path / "notes")
    assert "data" in {note.kind for note in notes} and all(note.began < note.ended and note.main for note in notes)


def test_three_digits_that_count() -> None:
    assert [shown(value) for value in (1234.5, 12.345, 60_000, "fit")] == ["1,234", "12.3", "60,000", "fit"]


def test_the_floors_products_end_with_the_weights_gradient() -> None:
    module, x, grad = torch.nn.Linear(256, 784), torch.rand(64, 256), torch.randn(64, 784)
    up, gradient = training._products(module, x, grad, True)
    torch.testing.assert_close(up(), module(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient(), grad.t() @ x, rtol=1e-4, atol=1e-4)


def test_the_floor_with_updates_trains_by_the_gradient_of_its_products() -> None:
    weight, seen = torch.ones(3, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]])
    training._updated(weight, lambda: seen)()
    assert weight.flatten().tolist() == pytest.approx([0.999, 1, 1.001, 1, 0.999, 1])  # Adam's first step is the rate
