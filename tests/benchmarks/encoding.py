"""python -m tests.benchmarks.encoding --root FOLDER [--repeat 1 10]

MNIST's 60,000 training rows, repeated, encoded by `jobs.encode` with two workers against a plain PyTorch loop that
reads the same Parquet and writes the same columns, with one thread or all, whichever is faster: rows a second, and peak
memory of all processes (PSS: what they share counts once). Then the first set again, killed half-way and started anew,
against the model called directly. FOLDER holds MNIST/raw.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from aecore.config.experiment import Data
from aecore.data.dataset import identify, load_rows
from aecore.models.storage import Result, load_weights
from aecore.serving.model import Model
from tests.benchmarks.streaming import environ, memory_of

ROOT = Path(__file__).parents[2]
GROUP, BATCH = 5_000, 2048
NETWORK = "--network.widths [256,128,64] --pretrain.epochs 2 --finetune.epochs 2 --control false"


def write(path: Path, x: np.ndarray, repeat: int) -> None:
    """Images (rows, 1, 28, 28) so many times, in row groups of 4 MB."""
    kind = pa.fixed_shape_tensor(pa.uint8(), x.shape[2:])
    schema = pa.schema([("image", kind)])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in (start for _ in range(repeat) for start in range(0, len(x), GROUP)):
            part = x[start : start + GROUP].reshape(-1)
            storage = pa.FixedSizeListArray.from_arrays(pa.array(part), x[0].size)
            writer.write_table(pa.table([pa.ExtensionArray.from_storage(kind, storage)], schema=schema))


def plain(path: str, weights: str, output: str) -> None:
    """Print the seconds that the loop takes, without imports and the reading of the model."""
    import torch

    seconds = {}
    for threads in {1, torch.get_num_threads()}:
        torch.set_num_threads(threads)
        rows, seconds[threads] = loop(path, weights, output)
    threads = min(seconds, key=lambda n: seconds[n])
    print(json.dumps({"rows": rows, "seconds": seconds[threads], "threads": threads}))


def loop(path: str, weights: str, output: str) -> tuple[int, float]:
    """What one would write by hand; its rows and seconds."""
    import torch

    from aecore.models.rebuild import build_autoencoder, build_classifier, build_prepare

    result = Result(*load_weights(Path(weights)), {})
    net, prepare = build_classifier(result).eval(), build_prepare(result)
    autoencoder = build_autoencoder(result)
    assert autoencoder is not None
    autoencoder.eval()
    classes, errors = np.array(result.config["classes"]), np.sort(result.weights["reference.error"])
    began, count, writer = time.perf_counter(), 0, None
    with torch.inference_mode():
        for batch in pq.ParquetFile(path).iter_batches(BATCH):
            pixels = batch["image"].storage.flatten().to_numpy().reshape(-1, 1, 28, 28)
            x = prepare(torch.tensor(pixels))
            code = net.encode(x)
            best = net.head(code).softmax(1).max(1)
            error = (autoencoder.reconstruct(x) - x).square().flatten(1).mean(1).numpy()
            score = 100 * np.searchsorted(errors, error, side="right") / len(errors)
            number = np.arange(count, count + len(x))
            count += len(x)
            table = pa.table(
                {
                    "id": number,
                    "file": pa.DictionaryArray.from_arrays(np.zeros(len(x), np.int32), [path]),
                    "row": number,
                    "code": pa.FixedSizeListArray.from_arrays(pa.array(code.numpy().reshape(-1)), code.shape[1]),
                    "prediction": pa.array(classes[best.indices.numpy()]).dictionary_encode(),
                    "probability": best.values.numpy(),
                    "reconstruction_mse": error,
                    "anomaly_score": score.astype(np.float32),
                }
            )
            if writer is None:
                writer = pq.ParquetWriter(output, table.schema, use_dictionary=["file", "prediction"])
            writer.write_table(table)
    assert writer is not None
    writer.close()
    return count, time.perf_counter() - began


def watched(command: list[str], folder: Path) -> tuple[dict[str, Any], float]:
    """The last line of a command, and the peak memory of its processes in GB."""
    with (folder / "log.txt").open("w") as log, start(command, folder, log) as process:
        peak = 0
        while process.poll() is None:
            with suppress(psutil.Error):
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                peak = max(peak, sum(memory_of(member)[1] for member in family))
            time.sleep(2)  # asking costs a third of a second
        assert process.stdout is not None
        told = process.stdout.read()
    if process.returncode:
        raise SystemExit((folder / "log.txt").read_text()[-2000:])
    return json.loads(told.splitlines()[-1]), peak / 1e9


def start(command: list[str], folder: Path, log: Any) -> subprocess.Popen[str]:
    env = {**environ(), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", *command]
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True, env=env)


def encoding(path: Path, output: Path) -> list[str]:
    return [
        "jobs.encode", "--model", "models:/mnist/1", "--data.name", "parquet", "--data.path", str(path),
        "--output", str(output), "--workers", "2",
    ]  # fmt: skip


def train(root: Path, folder: Path) -> Path:
    """Register a model of MNIST in a store of its own; the folder of its weights."""
    recipe = ["jobs.train", "--data.name", "mnist", "--data.root", str(root), *NETWORK.split()]
    watched([*recipe, "--register", "mnist"], folder)
    (found,) = (path.parent for path in (folder / "mlruns").rglob("data/result/config.json"))
    return found


def compared(output: Path, weights: Path, x: np.ndarray) -> tuple[int, float]:
    """Distinct ids, and by how much codes differ at most from those of the model called directly."""
    table = pq.read_table(output).sort_by("id")
    direct = Model(Result(*load_weights(weights), {})).measure(x)["code"]
    codes = table["code"].combine_chunks().flatten().to_numpy().reshape(direct.shape)
    return len(np.unique(table["id"].to_numpy())), float(np.abs(codes - direct).max())


def killed(path: Path, output: Path, folder: Path) -> int:
    """Start a job and kill it and its workers when half of the files are there; how many those are."""
    with (folder / "log.txt").open("w") as log, start(encoding(path, output), folder, log) as process:
        while process.poll() is None and len(list(output.glob("part-*"))) < 3:
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        for member in [process, *family]:  # at once: workers left to notice would write what is missing
            with suppress(psutil.Error):
                member.kill()
        process.wait()
        psutil.wait_procs(family, timeout=20)
    return len(list(output.glob("part-*")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--repeat", nargs="+", type=int, default=[1, 10])
    options = parser.parse_args()
    data = Data(name="mnist", root=options.root.resolve())
    x = load_rows(data, identify(data)).x[:60_000]
    with tempfile.TemporaryDirectory(prefix="diabolo_encoding") as temporary:
        folder = Path(temporary)
        weights = train(data.root, folder)
        print("   rows   plain, rows/s   encode, rows/s   ratio   job, s   plain, GB   encode, GB", flush=True)
        for repeat in options.repeat:
            path, output = folder / f"{repeat}.parquet", folder / f"codes{repeat}"
            write(path, x, repeat)
            here = (
                f"from tests.benchmarks.encoding import plain; plain({str(path)!r}, {str(weights)!r}, 'plain.parquet')"
            )
            (folder / "loop.py").write_text(here)
            straight, own = watched(["loop"], folder)
            report, memory = watched(encoding(path, output), folder)
            plainly, rate = straight["rows"] / straight["seconds"], report["metrics"]["rows_per_second"]
            print(
                f"{straight['rows']:7,} {plainly:15,.0f} {rate:16,.0f} {rate / plainly:7.2f} {report['seconds']:8.1f} "
                f"{own:11.2f} {memory:12.2f}", flush=True,
            )  # fmt: skip
        path, output = folder / f"{options.repeat[0]}.parquet", folder / "again"
        whole = killed(path, output, folder)
        report, _ = watched(encoding(path, output), folder)
        ids, difference = compared(output, weights, np.tile(x, (options.repeat[0], 1, 1, 1)))
        print(f"killed with {whole} files whole; then {report['rows']}: {ids:,} ids, codes differ by {difference:.1e}")


if __name__ == "__main__":
    main()
