"""Kills: what is left is what an undisturbed job leaves. `python -m tests.chaos` has them by the dozen."""

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from aecore.data.dataset import inspect
from jobs import cli
from jobs.train import Train
from pipelines.graph.recipe import build
from pipelines.store.runs import Tracker
from tests import chaos
from tests.chaos import DENOISING, Job, Moment, World, faults, left_over, tracker_of, truth_of
from tests.here import run_here


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path, stack)


def truth_here(tracker: Tracker, args: list[str]) -> None:
    """The same stages in this process, which nobody kills."""
    settings = cli.parse(Train, "train", args)
    made: dict[str, object] = {}
    with tracker.job_run("train", "here", {}, {}) as top:
        for stage in build(settings.experiment, inspect(settings.data), settings.resources.numerics).kept():
            run_here(stage, tracker, top, done=made)


def test_a_worker_and_the_driver_are_killed_and_nothing_shows(world: World, tracker: Tracker, tmp_path: Path) -> None:
    rng = random.Random(0)
    args = [
        *DENOISING, "--network.widths", "[256]", "--pretrain.epochs", "200", "--finetune", "null", "--resources.cpus",
        "1", "--resources.checkpoint_every", "0.05",
    ]  # fmt: skip
    (tmp_path / "job" / "tmp").mkdir(parents=True)
    job = Job("jobs.train", args, tmp_path / "job", world.env(tmp_path / "job", embedded=True))
    job.start()
    assert job.until(Moment("layer 1: epoch", rng.uniform(0, 0.5)))
    assert chaos.kill("worker", world, job, rng)
    assert job.until(Moment("layer 1: attempt 2 begins in 1 s", 0))
    assert job.until(Moment("layer 1: done", rng.uniform(0, 1)))
    chaos.kill("driver", world, job, rng)
    assert job.end() != 0
    job.start()
    assert job.end() == 0, job.text
    truth_here(tracker, args)
    report = job.report()
    assert faults(tracker_of(job.env), report, truth_of(tracker, report)) == []
    assert left_over(world, job, job.folder / "tmp", job.folder / "checkpoints") == []


@pytest.mark.long
@pytest.mark.parametrize("kind", chaos.KINDS)
def test_whatever_is_killed(kind: str, world: World) -> None:
    run = chaos.disturbed(world, 0, 7, kind, chaos.undisturbed(world, embedded=kind == "driver"))
    assert run.killed and run.faults == []


@pytest.mark.long
@pytest.mark.parametrize("kills", [("driver", "driver"), ("trial",)])
def test_a_study_is_killed_and_its_report_is_the_same(kills: tuple[str, ...], world: World) -> None:
    assert chaos.killed_study(world, 7, kills) == []


@pytest.mark.long
def test_a_node_that_is_always_full_ends_the_job_with_what_to_lower(world: World, tmp_path: Path) -> None:
    job = chaos.job_of(world, "full", embedded=True)
    job.env |= {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
    job.start()
    assert job.end() == 1
    assert "its node ran out of memory; it is tried once more with batches in halves" in job.text
    assert "its node ran out of memory with batches in halves, too; lower batch_size" in job.text.splitlines()[-1]


@pytest.mark.long
def test_two_drivers_of_one_job_make_one_set_of_runs(world: World) -> None:
    assert chaos.two_drivers(world) == []
