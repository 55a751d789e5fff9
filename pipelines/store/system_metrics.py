"""The load of this machine, logged to a run while the run is open.

MLflow starts its own monitor only for the active run of its fluent interface, whose end would set the run's status, or
through a class that it does not document. This monitor logs under the same names, in one request per sample, not two.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pynvml
from mlflow import MlflowClient
from mlflow.entities import Metric

from pipelines.store.patience import HURRY_SECONDS
from pipelines.store.record import LOAD

SAMPLE_SECONDS = 5.0
"""Seconds between two samples, unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says otherwise."""


@contextmanager
def system_metrics(uri: str, run_id: str) -> Iterator[None]:
    """Log the load of processors, memory, disk, network and NVIDIA GPUs to a run while the block runs."""
    ended = threading.Event()
    thread = threading.Thread(target=_log_until, args=[ended, MlflowClient(tracking_uri=uri), run_id], daemon=True)
    thread.start()
    patience = 0.0
    try:
        yield
        patience = HURRY_SECONDS
    finally:
        ended.set()
        thread.join(patience)  # the thread may be waiting for an MLflow that does not answer


def _log_until(ended: threading.Event, client: MlflowClient, run_id: str) -> None:
    seconds = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or SAMPLE_SECONDS)
    gpus, traffic = _gpus(), psutil.net_io_counters()
    psutil.cpu_percent()  # each call gives the mean since the call before
    step: int | None = None
    while not ended.wait(seconds):
        sample = _machine(traffic)
        for number, gpu in enumerate(gpus):
            sample |= {f"gpu_{number}_{name}": value for name, value in _gpu(gpu).items()}
        with suppress(Exception):  # whatever fails, a sample is not worth a failed run
            if step is None:  # after the last step of an earlier attempt
                history = client.get_metric_history(run_id, f"{LOAD}cpu_utilization_percentage")
                step = max((point.step for point in history), default=-1)
            step, now = step + 1, round(1000 * time.time())
            client.log_batch(run_id, [Metric(LOAD + name, value, now, step) for name, value in sample.items()])


def _machine(traffic: Any) -> dict[str, float]:
    """Return the load of processors, memory, disk and network; traffic is counted from `traffic` on."""
    memory, disk, now = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": round(memory.used / 1e6, 1),
        "system_memory_usage_percentage": round(100 * memory.used / memory.total, 1),
        "disk_usage_percentage": disk.percent,
        "disk_usage_megabytes": round(disk.used / 1e6, 1),
        "disk_available_megabytes": round(disk.free / 1e6, 1),
        "network_receive_megabytes": (now.bytes_recv - traffic.bytes_recv) / 1e6,
        "network_transmit_megabytes": (now.bytes_sent - traffic.bytes_sent) / 1e6,
    }


def _gpus() -> list[Any]:
    """Return NVML's handles of this machine's GPUs; none where there is no NVIDIA driver."""
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    return []


def _gpu(handle: Any) -> dict[str, float]:
    """Return memory, utilization and power of a GPU, as far as its driver tells them."""
    sample: dict[str, float] = {}
    with suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        sample["memory_usage_percentage"] = round(100 * memory.used / memory.total, 1)
        sample["memory_usage_megabytes"] = round(memory.used / 1e6, 1)
    with suppress(pynvml.NVMLError):
        sample["utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    with suppress(pynvml.NVMLError):
        milliwatts, limit = pynvml.nvmlDeviceGetPowerUsage(handle), pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)
        sample["power_usage_watts"] = round(milliwatts / 1000, 1)
        sample["power_usage_percentage"] = round(100 * milliwatts / limit, 1)
    return sample
