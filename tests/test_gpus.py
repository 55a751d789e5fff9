"""Stages on GPUs that Ray only pretends to have: how they share worker processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
JOB = """
import sys
import ray
import jobs.train
from jobs import cli

ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False)
cli.main("train", lambda: jobs.train.train(cli.parse(jobs.train.Train, "python -m jobs.train")))
"""


def test_one_worker_process_computes_all_stages_of_a_gpu(tmp_path: Path) -> None:
    args = ["--pretrain.epochs", "2", "--finetune.epochs", "2", "--network.widths", "[16,8]", "--control", "false"]
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    done = subprocess.run(
        [sys.executable, "-c", JOB, *args], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240,
        env=env | {"PYTHONPATH": str(ROOT), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    workers = dict(re.findall(r"\((\S[^()]*) pid=(\d+)\)\S* \1: done after", done.stderr))
    assert set(workers) == {"layer 1", "layer 2", "finetune", "evaluate"}, done.stderr
    assert len(set(workers.values())) == 1
