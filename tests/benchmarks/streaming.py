"""python -m tests.benchmarks.streaming [--gigabytes 1 2 4]

One epoch of a layer over Parquet sets of growing size that are read from disk: seconds, and peak memory of all
processes of the job. RSS counts memory that processes share once for each of them, PSS once in all.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

SIDE, CHANNELS = 28, 1
GROUP = 20_000


def write(path: Path, rows: int) -> None:
    """Grey images of 28 x 28: blurred noise, in row groups of 16 MB."""
    rng = np.random.default_rng(0)
    size = SIDE * SIDE
    basis = rng.normal(size=(16, size)).astype(np.float32)
    kind = pa.fixed_shape_tensor(pa.uint8(), (SIDE, SIDE))
    schema = pa.schema([("image", kind)])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, rows, GROUP):
            count = min(GROUP, rows - start)
            x = rng.normal(size=(count, 16)).astype(np.float32) @ basis
            pixels = np.clip(128 + 24 * x, 0, 255).astype(np.uint8)
            storage = pa.FixedSizeListArray.from_arrays(pixels.ravel(), size)
            writer.write_table(pa.table([pa.ExtensionArray.from_storage(kind, storage)], schema=schema))


def run(path: Path, folder: Path) -> dict[str, float]:
    """Train on the set in a store of its own; its figures."""
    options = (
        "--data.name parquet --data.in_memory never --network.widths [64] --pretrain.epochs 1 "
        "--pretrain.batch_size 1024 --finetune null --control false"
    )
    command = [sys.executable, "-m", "jobs.train", *options.split(), "--data.path", str(path)]
    root = Path(__file__).parents[2]
    began = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**environ(), "PYTHONPATH": str(root)},
        )
        rss = pss = training = 0
        while process.poll() is None:
            with suppress(psutil.Error):
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                memory = [memory_of(member) for member in family]
                rss = max(rss, sum(m[0] for m in memory))
                pss = max(pss, sum(m[1] for m in memory))
                if any("layer" in member.name() for member in family):
                    training = max(training, sum(m[0] for m in memory))
            time.sleep(1)
    assert process.stdout is not None
    if process.returncode:
        raise SystemExit((folder / "log.txt").read_text()[-2000:])
    report = json.loads(process.stdout.read().splitlines()[-1])
    layer = next(x for x in (folder / "log.txt").read_text().splitlines() if "layer 1: done after" in x)
    return {
        "rss": rss / 1e9, "training": training / 1e9, "pss": pss / 1e9, "layer": float(layer.split()[-2]),
        "job": time.monotonic() - began, "mse": report["metrics"]["test/reconstruction_mse"],
    }  # fmt: skip


def environ() -> dict[str, str]:
    """Without settings of the caller."""
    import os

    return {k: v for k, v in os.environ.items() if not k.startswith(("DIABOLO__", "MLFLOW_", "RAY_ADDRESS"))}


def memory_of(process: psutil.Process) -> tuple[int, int]:
    """RSS and PSS, bytes; nothing of a process that is gone."""
    with suppress(psutil.Error):
        full = process.memory_full_info()
        return full.rss, full.pss
    return 0, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", nargs="+", type=float, default=[1, 2, 4], help="of pixels")
    print("  GB       rows   layer, s   s a GB   job, s   peak RSS, GB   of it training   peak PSS, GB   test mse")
    for size in parser.parse_args().gigabytes:
        with tempfile.TemporaryDirectory(prefix="diabolo_streaming") as temporary:
            rows = round(size * 1e9 / (SIDE * SIDE * CHANNELS))
            path, folder = Path(temporary) / "set.parquet", Path(temporary) / "job"
            folder.mkdir()
            write(path, rows)
            f = run(path, folder)
            print(
                f"{size:4g} {rows:10,} {f['layer']:10.1f} {f['layer'] / size:8.1f} {f['job']:8.1f} {f['rss']:14.2f} "
                f"{f['training']:16.2f} {f['pss']:14.2f} {f['mse']:10.4f}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
