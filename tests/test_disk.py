"""A full or read-only disk and vanished temporary files end in one line, and leave nothing that is half written."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jobs.train
from jobs import cli
from pipelines.store import stage_run
from pipelines.store.connection import connect
from tests.test_train import compute_here

QUICK = [
    "--network.widths",
    "[8]",
    "--pretrain.epochs",
    "1",
    "--finetune",
    "null",
    "--control",
    "false",
    "--resources.mlflow_patience",
    "1",
]


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/weights.safetensors")


def vanish(folder: Path, *_: Any, **__: Any) -> None:
    shutil.rmtree(folder.parent)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], Any]:
    """Run `jobs.train` to its last line in this process; returns exit code, report and stderr."""

    class Exit(BaseException):
        pass

    def leave(code: int) -> None:
        raise Exit(code)

    monkeypatch.setattr(jobs.train, "compute", compute_here)
    monkeypatch.setattr("pipelines.execution.store.start_ray", lambda warm: None)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.chdir(tmp_path)

    def run() -> tuple[int, dict[str, Any], str]:
        with pytest.raises(Exit) as ended:
            cli.main("train", lambda: jobs.train.train(cli.parse(jobs.train.Train, "python -m jobs.train", QUICK)))
        out, err = capsys.readouterr()
        return ended.value.args[0], json.loads(out.splitlines()[-1]), err

    return run


@pytest.mark.parametrize(
    ("fault", "told"),
    [(full, "No space left on device"), (vanish, "No such file or directory")],
)
def test_a_commit_that_the_disk_refuses_ends_in_one_line_and_leaves_nothing(
    fault: Callable[..., None], told: str, job: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(stage_run, "save_weights", fault)
        broken.setattr(signal, "signal", lambda *_: None)
        code, report, err = job()
    assert (code, report["status"]) == (1, "failed")
    last = err.splitlines()[-1]
    assert "Traceback" not in err and told in last and "run the same command again" in last
    tracker = connect(f"sqlite:///{tmp_path}/mlflow.db")
    assert tracker is not None
    runs = tracker.search("", 100)
    assert runs and {run.info.status for run in runs} == {"FAILED"}
    assert all(not tracker.client.list_artifacts(run.info.run_id, "result") for run in runs)
    code, report, err = job()
    assert (code, report["status"]) == (0, "finished"), err
    assert {run.info.status for run in tracker.search("", 100)} == {"FINISHED"}
    assert len(tracker.search("", 100)) == len(runs) + 1  # the stage behind the one that failed
