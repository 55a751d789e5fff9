"""MLflow as the store: each stage is one run, its status is the commit, and models load anywhere."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.system_metrics.metrics import gpu_monitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from aecore.config.experiment import Data, Experiment, Finetune, Fit
from aecore.config.facts import Facts
from aecore.config.specs import Numerics
from aecore.core.errors import InputError, OutageError
from aecore.data.dataset import inspect
from aecore.models.storage import Result
from pipelines.cluster.share import Share
from pipelines.execution.assignment import Assignment
from pipelines.execution.journal import Journal
from pipelines.graph.recipe import Stacked, build
from pipelines.graph.stage import Stage
from pipelines.store import system_metrics
from pipelines.store.connection import connect
from pipelines.store.errors import LostResultError
from pipelines.store.lease import held_leases
from pipelines.store.runs import Tracker
from tests.here import run_here

ROOT = Path(__file__).parents[1]
RESULT = Result({"layer": 1}, {"w": np.arange(6.0).reshape(2, 3)}, {"best/loss": 0.5}, {"units": b"a png"})


def stage(number: int) -> Stage:
    return Stage(f"stage {number}", "pretrain_layer", Fit(epochs=number))


def runs(tracker: Tracker, key: str) -> list[Run]:
    return tracker.search(f"tags.`stage.key` = '{key}'", 10)


def history(tracker: Tracker, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in tracker.client.get_metric_history(run_id, name)]


def parent(tracker: Tracker, name: str) -> str:
    with tracker.job_run("test", name, {}, {}) as run_id:
        return run_id


def points(*epochs: int) -> list[tuple[int, int, dict[str, float]]]:
    return [(epoch, 1000 * epoch, {"train/loss": float(epoch), "seconds": 0.1}) for epoch in epochs]


def test_a_finished_stage_is_found_and_restored_bit_for_bit(tracker: Tracker) -> None:
    top = parent(tracker, "restore")
    run = tracker.open_run(stage(1), top, started_at=123_000)
    run.log(points(1, 2))
    assert tracker.find(stage(1).key) is None
    run.commit(RESULT)
    assert tracker.find(stage(1).key) == run.run_id
    again = tracker.restore(run.run_id)
    assert again.config == RESULT.config and np.array_equal(again.weights["w"], RESULT.weights["w"])
    assert again.metrics["best/loss"] == 0.5
    assert history(tracker, run.run_id, "train/loss") == [(1, 1.0), (2, 2.0)]
    found = tracker.client.get_run(run.run_id)
    assert found.data.tags["mlflow.parentRunId"] == top and found.data.tags["attempts"] == "1"
    assert found.data.params["epochs"] == "1" and found.info.start_time == 123_000
    assert tracker.client.list_artifacts(run.run_id, "figures")[0].path == "figures/units.png"


def test_a_run_is_looked_up_by_what_has_an_index(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker.open_run(stage(8), parent(tracker, "index")).commit(RESULT)
    asked, search = [], MlflowClient.search_runs

    def ask(self: MlflowClient, ids: list[str], condition: str, **more: Any) -> Any:
        asked.append(condition)
        return search(self, ids, condition, **more)

    monkeypatch.setattr(MlflowClient, "search_runs", ask)
    assert tracker.find(stage(8).key) and tracker.find(stage(9).key) is None
    assert [condition.split("`")[1] for condition in asked] == [f"stage.key.{stage(n).key}" for n in (8, 9)]
    # experiments of early versions have runs without such a tag
    old = tracker.client.create_run(tracker.experiment_id, tags={"stage.key": stage(9).key}).info.run_id
    tracker.client.set_terminated(old, "FINISHED")
    assert tracker._replace(marked=False).find(stage(9).key) == old


def test_attempts_share_one_run_and_each_epoch_has_one_point(tracker: Tracker) -> None:
    top = parent(tracker, "attempts")
    run = tracker.open_run(stage(2), top)
    run.log(points(1))
    run.log(points(1, 2))
    run.close("FAILED")
    assert tracker.find(stage(2).key) is None
    # an attempt whose process was killed leaves its run open, and counts like one that has failed
    tracker.open_run(stage(2), top).log(points(1, 2, 3))
    third = tracker.open_run(stage(2), top)
    third.log(points(3, 4))
    third.commit(RESULT)
    (only,) = runs(tracker, stage(2).key)
    assert only.info.status == "FINISHED" and only.data.tags["attempts"] == "3"
    assert history(tracker, run.run_id, "train/loss") == [(n, float(n)) for n in (1, 2, 3, 4)]


def test_a_lost_result_is_computed_again(tracker: Tracker) -> None:
    graph, _ = small(seed=2)
    top = parent(tracker, "lost")
    before = run_here(graph.layers[0], tracker, top)
    run_id = tracker.find(graph.layers[0].key)
    assert run_id is not None
    uri = tracker.client.get_run(run_id).info.artifact_uri
    assert uri is not None
    weights = Path(uri.removeprefix("file://")) / "result" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(LostResultError, match="checksum"):
        tracker.restore(run_id)
    assert tracker.find(graph.layers[0].key) is None
    again = run_here(graph.layers[0], tracker, top)
    assert all(np.array_equal(before.weights[name], again.weights[name]) for name in before.weights)
    assert tracker.find(graph.layers[0].key) == run_id


def test_what_another_job_has_finished_stays_as_it_is(tracker: Tracker) -> None:
    run = tracker.open_run(stage(7), parent(tracker, "one"))
    run.commit(RESULT)
    top = parent(tracker, "another")
    for outcome in (RESULT, ValueError("wrong")):
        with Journal(stage(7), Assignment(store=tuple(tracker), parent=top, share=Share(0, 1))) as journal:
            journal.close(outcome)
            assert journal.run_id == run.run_id
    (only,) = runs(tracker, stage(7).key)
    assert only.info.status == "FINISHED" and only.data.tags["mlflow.parentRunId"] != top


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(1), "KILLED")]
)
def test_a_job_that_ends_badly_leaves_nothing_running(tracker: Tracker, error: BaseException, status: str) -> None:
    name = f"bad end {type(error).__name__}"
    with pytest.raises(type(error)), tracker.job_run("test", name, {}, {}) as top:
        child = tracker.client.create_run(tracker.experiment_id, tags={"mlflow.parentRunId": top}).info.run_id
        raise error
    assert [tracker.client.get_run(run).info.status for run in (top, child)] == [status, status]
    with tracker.job_run("test", name, {}, {}) as again:
        assert again == top and tracker.client.get_run(top).info.status == "RUNNING"
    assert tracker.client.get_run(top).info.status == "FINISHED"


def test_runs_of_drivers_without_a_lease_are_closed(tracker: Tracker) -> None:
    ended = parent(tracker, "ended")

    def open_run(**tags: str) -> str:
        tags = {name.replace("_", "."): value for name, value in tags.items()}
        return tracker.client.create_run(tracker.experiment_id, tags=tags).info.run_id

    with tracker.lease("other", "test"):
        (held,) = held_leases()
        dead, living = (open_run(job="test", lease=lease) for lease in ("0" * 32, held))
        nested = open_run(mlflow_parentRunId=dead)
        stage_of_ended_job = open_run(mlflow_parentRunId=ended, stage_fn="stages.finetune")
        with tracker.job_run("test", "next", {}, {}):
            statuses = [
                tracker.client.get_run(run_id).info.status for run_id in (dead, nested, stage_of_ended_job, living)
            ]
    assert statuses == ["KILLED", "KILLED", "KILLED", "RUNNING"]
    tracker.client.set_terminated(living, "KILLED")


def test_a_search_reads_all_pages(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    study = parent(tracker, "many trials")
    for number in range(7):
        tags = {"row": "a", "settings": json.dumps({"number": number})}
        trial = tracker.open_trial(
            Stage(f"trial {number}", "evaluation.measure", Data(labels=str(number))), study, [], tags=tags
        )
        trial.close("FINISHED")
    monkeypatch.setattr("pipelines.store.client.PAGE_SIZE", 3)
    records = tracker.trials_of(study)
    assert sorted(json.loads(one.tags["settings"])["number"] for one in records.values()) == list(range(7))
    assert len(tracker.runs({"row": "a"})) == 7 and len(tracker.runs({"row": "a"}, limit=5)) == 5
    # a job that ends closes all the runs in it, however many they are
    with pytest.raises(KeyboardInterrupt), tracker.job_run("test", "many runs", {}, {}) as top:
        for _ in range(7):
            tracker.client.create_run(tracker.experiment_id, tags={"mlflow.parentRunId": top})
        raise KeyboardInterrupt
    assert len(tracker.runs({"mlflow.parentRunId": top}, "KILLED")) == 7


def test_job_tags_params_data_and_config(tracker: Tracker) -> None:
    config = Experiment().model_dump(mode="json")
    facts = Facts(digest="f" * 64, shape=(1, 8, 8), levels=17, classes=("a", "b"), rows=10)
    for _ in range(2):
        with tracker.job_run("train", "tags", {"data.digest": facts.digest}, config) as run_id:
            tracker.log_data(run_id, "digits", facts)
            tracker.log_summary(run_id, {"test/error": 0.25}, {"run.finetune": "x"})
    run = tracker.client.get_run(run_id)
    assert run.data.params["network.widths"] == "[48, 32, 16]" and run.data.params["finetune.lr"] == "0.001"
    assert {"job", "git.commit", "data.digest", "run.finetune"} <= set(run.data.tags)
    assert history(tracker, run_id, "test/error") == [(0, 0.25)]
    assert run.inputs is not None
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.name == "digits" and given.dataset.digest == "f" * 36


def test_system_metrics_are_logged(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.store.system_metrics.SAMPLE_SECONDS", 0.1)
    with tracker.job_run("test", "system", {}, {}) as run_id:
        time.sleep(1)
    logged = tracker.client.get_run(run_id).data.metrics
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= set(logged)
    assert not [name for name in tracker.metrics(run_id) if name.startswith("system/")]
    before = len(history(tracker, run_id, "system/disk_usage_percentage"))
    with tracker.job_run("test", "system", {}, {}):
        time.sleep(1)
    steps = [step for step, _ in history(tracker, run_id, "system/disk_usage_percentage")]
    assert steps == list(range(len(steps))) and len(steps) > before


def test_system_metrics_have_the_names_that_mlflow_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nvml:
        NVMLError = RuntimeError

        def __getattr__(self, name: str) -> Any:
            values = {
                "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=2e9, total=8e9), "nvmlDeviceGetPowerUsage": 70_000,
                "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=50), "nvmlDeviceGetEnforcedPowerLimit": 350_000,
                "nvmlDeviceGetCount": 1,
            }  # fmt: skip
            return lambda *args: values.get(name)

    for module in (system_metrics, gpu_monitor):
        monkeypatch.setattr(module, "pynvml", Nvml())
    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor(), gpu_monitor.GPUMonitor()]
    for monitor in monitors:
        monitor.collect_metrics()
    theirs = {name: value for monitor in monitors for name, value in monitor.aggregate_metrics().items()}
    (gpu,) = system_metrics._gpus()
    gpu_load = {f"gpu_0_{name}": value for name, value in system_metrics._gpu(gpu).items()}
    assert system_metrics._machine(psutil.net_io_counters()).keys() | gpu_load.keys() == theirs.keys()
    assert gpu_load.items() <= theirs.items()


def test_the_params_are_logged_whether_or_not_there_are_epochs(tracker: Tracker) -> None:
    top = parent(tracker, "params")
    committed, failed = (tracker.open_run(stage(number), top) for number in (13, 14))
    committed.waiting_like(tracker._replace(patience=1.0)).commit(RESULT)
    failed.fail(RuntimeError("no"))
    for run, epochs in ((committed, "13"), (failed, "14")):
        assert tracker.client.get_run(run.run_id).data.params["epochs"] == epochs


def test_a_run_whose_creation_was_not_answered_is_the_first_attempt(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    top, create, lost = parent(tracker, "lost answer"), MlflowClient.create_run, [True]

    def lose_answer(self: MlflowClient, *args: Any, **kwargs: Any) -> Run:
        run = create(self, *args, **kwargs)
        if lost[0]:
            lost[0] = False
            raise ConnectionError("reset")
        return run

    monkeypatch.setattr(MlflowClient, "create_run", lose_answer)
    monkeypatch.setattr("pipelines.store.patience.FIRST_WAIT", 0.01)
    opened = tracker._replace(patience=5.0).open_run(stage(12), top)
    opened.log(points(1))
    (only,) = runs(tracker, stage(12).key)
    assert only.info.run_id == opened.run_id and only.data.tags["attempts"] == "1"
    assert only.data.params["epochs"] == "12" and only.data.metrics["train/loss"] == 1.0


def test_a_long_stage_logs_its_epochs_itself_as_they_come(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.execution.journal._MONITOR_SECONDS", 0.0)
    monkeypatch.setattr("pipelines.execution.journal._LOG_SECONDS", 0.01)
    monkeypatch.setattr("pipelines.store.system_metrics.SAMPLE_SECONDS", 0.02)
    graph, _ = small(seed=1, epochs=40)
    assert graph.finetune is not None
    opened: list[str] = []
    original = Tracker.open_run

    def spy(self: Tracker, stage: Stage, *args: Any, **kwargs: Any) -> Any:
        opened.append(stage.name)
        return original(self, stage, *args, **kwargs)

    monkeypatch.setattr(Tracker, "open_run", spy)
    run_here(graph.finetune, tracker, parent(tracker, "live"))
    assert opened == ["layer 1", "layer 2", "layer 3", "finetune"]
    run_id = tracker.find(graph.finetune.key)
    assert run_id is not None
    assert [step for step, _ in history(tracker, run_id, "train/loss")] == list(range(1, 41))
    logged = tracker.client.get_run(run_id).data
    assert logged.tags["attempts"] == "1" and "system/cpu_utilization_percentage" in logged.metrics


def small(seed: int = 0, **fields: Any) -> tuple[Stacked, Facts]:
    experiment = Experiment(
        seed=seed, pretrain=Fit(epochs=2), finetune=Finetune.model_validate({"epochs": 3, **fields})
    )
    facts = inspect(experiment.data)
    return build(experiment, facts, Numerics()), facts


def test_the_model_loads_anywhere_with_any_batch_size(tracker: Tracker, tmp_path: Path) -> None:
    graph, _ = small()
    assert graph.finetune is not None
    run_here(graph.finetune, tracker, parent(tracker, "model"))
    run_id = tracker.find(graph.finetune.key)
    assert run_id is not None
    version = tracker.models.register("digits-model", tracker.models.logged_by(run_id))
    assert version == "1" and tracker.models.register("digits-model", tracker.models.logged_by(run_id)) == "1"
    code = f"""
import sys, warnings
warnings.simplefilter("ignore")
sys.path = [entry for entry in sys.path if entry not in ("", {str(ROOT)!r})]
import mlflow, numpy as np
mlflow.set_tracking_uri({tracker.uri!r})
model = mlflow.pyfunc.load_model("models:/digits-model/1")
x = np.random.default_rng(0).integers(0, 17, (7, 1, 8, 8), dtype=np.uint8)
whole, single = model.predict(x), model.predict(x[:1])
columns = ["code", "prediction", "probability", "reconstruction_mse", "anomaly_score"]
assert list(whole.columns) == columns and len(whole) == 7 and len(single) == 1
assert abs(whole.probability[0] - single.probability[0]) < 1e-6 and len(whole.code[0]) == 16
assert set(whole.prediction) <= set("0123456789")
import aecore
assert not aecore.__file__.startswith({str(ROOT)!r}), aecore.__file__
print("loaded", model.metadata.signature is not None, model.input_example.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "loaded True (4, 1, 8, 8)", done.stderr
    kept = {item.path for item in tracker.client.list_artifacts(run_id, "result")}
    assert kept == {"result/config.json", "result/weights.safetensors"}


def test_a_model_is_logged_once_whatever_fails(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail = ["create_logged_model", "log_outputs", "log_model_artifacts"]

    class LosesAnswers:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.client = MlflowClient(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            method = getattr(self.client, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                answer = method(*args, **kwargs)
                if name in fail:
                    fail.remove(name)
                    raise ConnectionError("reset")
                return answer

            return call

    graph, _ = small(seed=3)
    assert graph.finetune is not None
    top = parent(tracker, "one model")
    monkeypatch.setattr("pipelines.store.client.MlflowClient", LosesAnswers)
    monkeypatch.setattr("pipelines.store.patience.FIRST_WAIT", 0.01)
    run_here(graph.finetune, tracker._replace(patience=20.0), top)
    assert fail == [] and capsys.readouterr().err.count("waiting for it") == 1
    (run,) = runs(tracker, graph.finetune.key)
    client = tracker.direct
    (model,) = client.search_logged_models([tracker.experiment_id], f"source_run_id = '{run.info.run_id}'")
    assert str(model.status) == "READY" and model.experiment_id == tracker.experiment_id
    outputs = client.get_run(run.info.run_id).outputs
    assert outputs is not None and [output.model_id for output in outputs.model_outputs] == [model.model_id]


def test_the_graph_folds_in_process_and_restores(tracker: Tracker) -> None:
    graph, _ = small(task="reconstruct")
    assert graph.finetune is not None
    top = parent(tracker, "fold")
    first = run_here(graph.finetune, tracker, top)
    before = tracker.find(graph.finetune.key)
    second = run_here(graph.finetune, tracker, top)
    assert tracker.find(graph.finetune.key) == before
    assert all(np.array_equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert second.config["task"] == "reconstruct"


def test_an_unreachable_store_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as error:
        connect(f"sqlite:///{tmp_path}/file/mlflow.db")
    assert "MLFLOW_TRACKING_URI" in str(error.value) and "\n" not in str(error.value)


def test_messages_about_the_store_hold_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    uri = "http://me:secret@host:5000"

    def refuse() -> None:
        raise ConnectionError(f"no route to {uri}")

    with pytest.raises(OutageError, match=r"^MLflow at http://\*\*\*@host:5000 has not answered for") as error:
        Tracker(uri, "1", patience=0.01).wait_for(refuse)
    assert "secret" not in str(error.value) + capsys.readouterr().err


def test_no_store_is_made_where_none_is_wanted(tmp_path: Path) -> None:
    assert connect(f"sqlite:///{tmp_path}/mlflow.db", create=False) is None
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_experiment_ends_in_one_line(tmp_path: Path) -> None:
    tracker = connect(f"sqlite:///{tmp_path}/mlflow.db", "gone")
    assert tracker is not None
    tracker.client.delete_experiment(tracker.experiment_id)
    with pytest.raises(InputError, match="experiment gone is deleted"):
        connect(tracker.uri, "gone")


def test_trials_that_were_stopped_or_died_are_closed(tracker: Tracker) -> None:
    study = parent(tracker, "study")
    for name in ("stopped", "dead"):
        run = tracker.open_trial(Stage(name, "evaluation.measure", Data(labels=name)), study, [], tags={"row": "a"})
        if name == "stopped":
            tracker.stop_trial(run.run_id, 7)
        else:
            tracker.fail_trial(run.run_id, "OOM")
    stopped, dead = sorted(tracker.trials_of(study).values(), key=lambda one: one.status, reverse=True)
    assert (stopped.status, stopped.stopped, stopped.tags.get("error")) == ("KILLED", 7, None)
    assert (dead.status, dead.stopped, dead.tags.get("error")) == ("FAILED", None, "OOM")
    assert not stopped.is_finished and not dead.is_finished
