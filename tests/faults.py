"""An MLflow client that fails by a schedule, and one in memory that is quick enough for hundreds of failures."""

import itertools
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST
from mlflow.store.entities import PagedList

HANG_SECONDS, NEXT_HANG_SECONDS = 0.05, 0.002


class Schedule:
    """Draws from a seed which calls fail and how: every n-th on average, and now and then several in a row.

    Args:
        least, most: Bounds of n.
    """

    def __init__(self, seed: int, least: int, most: int) -> None:
        self.random = random.Random(seed)
        self.every = self.random.randint(least, most)
        self.next_one = self.random.randint(1, 2 * self.every)
        self.kinds = self.random.sample(["refuse", "lose", "hang", "tear"], self.random.randint(1, 4))
        self.outage = self.random.randint(1, 60), self.random.choice([0, 0, 3, 12])  # first call, and number
        self.calls = itertools.count(1)
        self.failed = 0
        self.hung = False
        self.on = True

    def next(self) -> str | None:
        """Return how the next call fails, or None."""
        number = next(self.calls)
        begin, length = self.outage
        if not self.on:
            return None
        if begin <= number < begin + length:
            self.failed += 1
            return "refuse"
        if number < self.next_one:
            return None
        self.next_one = number + self.random.randint(1, 2 * self.every - 1)
        self.failed += 1
        return self.random.choice(self.kinds)


class Faulty:
    """A client, or the files in `folder`, whose calls fail by a schedule: before they act, after, after a while, or
    with a file cut short."""

    def __init__(self, client: Any, schedule: Schedule, folder: Path | None = None) -> None:
        self._client, self._schedule, self._folder = client, schedule, folder

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            fault = self._schedule.next()
            if fault == "refuse":
                raise MlflowException("API request failed with exception: connection refused")
            if fault == "hang":
                time.sleep(NEXT_HANG_SECONDS if self._schedule.hung else HANG_SECONDS)
                self._schedule.hung = True
                raise TimeoutError("timed out")
            answer = method(*args, **kwargs)
            if fault == "tear" and name.startswith("log_artifact") and self._folder:
                self._tear(self._folder)
            elif fault in ("lose", "tear"):
                raise ConnectionError("connection reset by peer")
            return answer

        return call

    def _tear(self, folder: Path) -> None:
        """Cut one file short without an error."""
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        file = self._schedule.random.choice(files)
        file.write_bytes(file.read_bytes()[: self._schedule.random.randrange(file.stat().st_size)])


class MemoryClient:
    """What `pipelines.store` uses of an MlflowClient for runs, kept in memory; only artifacts are files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs: dict[str, Any] = {}
        self.experiments: dict[str, Any] = {}
        self.lock = threading.RLock()
        self.create_experiment("Default")
        self.create_experiment("test")

    def folder(self, run_id: str) -> Path:
        return self.root / run_id

    def create_run(self, experiment_id: str, start_time: int | None = None, tags: dict[str, str] | None = None) -> Any:
        run_id = uuid.uuid4().hex
        info = SimpleNamespace(
            run_id=run_id, experiment_id=experiment_id, status="RUNNING", start_time=start_time,
            lifecycle_stage="active", artifact_uri=str(self.folder(run_id)),
        )  # fmt: skip
        data = SimpleNamespace(tags=dict(tags or {}), params={}, points={}, metrics={})
        self.runs[run_id] = SimpleNamespace(info=info, data=data, inputs=None, outputs=None)
        return self.runs[run_id]

    def get_run(self, run_id: str) -> Any:
        if run_id not in self.runs:
            raise MlflowException("there is none", RESOURCE_DOES_NOT_EXIST)
        return self.runs[run_id]

    def delete_run(self, run_id: str) -> None:
        self.get_run(run_id).info.lifecycle_stage = "deleted"

    def active_run(self, run_id: str) -> Any:
        if self.get_run(run_id).info.lifecycle_stage != "active":
            raise MlflowException("it must be in the 'active' state", INVALID_PARAMETER_VALUE)
        return self.runs[run_id]

    def create_experiment(self, name: str, tags: dict[str, str] | None = None) -> str:
        with self.lock:
            if name in self.experiments:
                raise MlflowException("it exists", RESOURCE_ALREADY_EXISTS)
            number = str(len(self.experiments))
            self.experiments[name] = SimpleNamespace(name=name, experiment_id=number, lifecycle_stage="active")
            return number

    def get_experiment(self, experiment_id: str) -> Any:
        return list(self.experiments.values())[int(experiment_id)]

    def get_experiment_by_name(self, name: str) -> Any:
        return self.experiments.get(name)

    def restore_experiment(self, experiment_id: str) -> None:
        self.get_experiment(experiment_id).lifecycle_stage = "active"
        for run in self.runs.values():
            if run.info.experiment_id == experiment_id:
                run.info.lifecycle_stage = "active"

    def search_runs(
        self, experiment_ids: Sequence[str], condition: str = "", max_results: int = 1000, page_token: str | None = None
    ) -> PagedList[Any]:
        def fits(run: Any) -> bool:
            if run.info.experiment_id not in experiment_ids or run.info.lifecycle_stage != "active":
                return False
            for part in condition.split(" and ") if condition else ():
                match = re.fullmatch(r"(.+) (=|LIKE) '(.*)'", part)
                assert match is not None, part
                field, operator, value = match.groups()
                name = field.removeprefix("tags.").strip("`")
                found = run.info.status if field == "attributes.status" else run.data.tags.get(name)
                if found is None or (operator == "=" and found != value):
                    return False
            return True

        with self.lock:
            found, begin = [run for run in self.runs.values() if fits(run)], int(page_token or 0)
            end = begin + max_results
            return PagedList(found[begin:end], str(end) if end < len(found) else None)

    def update_run(self, run_id: str, status: str) -> None:
        self.active_run(run_id).info.status = status

    def set_terminated(self, run_id: str, status: str) -> None:
        self.update_run(run_id, status)

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self.active_run(run_id).data.tags[key] = value

    def log_batch(self, run_id: str, metrics: Sequence[Any] = (), params: Sequence[Any] = (), tags: Any = ()) -> None:
        data = self.active_run(run_id).data
        for param in params:
            assert data.params.setdefault(param.key, param.value) == param.value
        data.tags |= {tag.key: tag.value for tag in tags}
        for m in metrics:
            data.points[m.key, m.timestamp, m.step, m.value] = m  # MLflow's identity of a point
            data.metrics[m.key] = m.value

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [m for m in self.runs[run_id].data.points.values() if m.key == key]

    def list_artifacts(self, run_id: str, path: str | None = None) -> list[Any]:
        found = sorted((self.folder(run_id) / (path or "")).glob("*"))
        return [SimpleNamespace(path=str(file.relative_to(self.folder(run_id)))) for file in found]
