"""A trial of a study is one MLflow run, whatever the number of its stages, and costs MLflow few requests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from aecore.config.experiment import Dense, Experiment, Fit
from aecore.config.facts import Facts
from aecore.config.specs import Numerics
from aecore.data.dataset import inspect
from aecore.data.splits import Arrays
from pipelines.cluster.share import Share
from pipelines.execution.assignment import Assignment, Opened
from pipelines.execution.journal import Computed
from pipelines.execution.trial import compute_trials
from pipelines.store.connection import connect
from pipelines.store.record import MEASURED, TRAINED
from pipelines.store.runs import Tracker
from pipelines.study.plan import TrialPlan, plan_trials
from pipelines.study.schema import Study
from tests.nodes import mlflow_server

EPOCHS = 4
MOST_REQUESTS = 8


def plans_of(**fields: Any) -> list[TrialPlan]:
    """Trials of digits that take a second."""
    base = Experiment(network=Dense(widths=(6, 4)), pretrain=None)
    study = Study.model_validate({
        "base": base.model_dump(), "variants": {"stacked": {"pretrain": {}}, "plain": {}}, "seeds": (0,),
        "budget": {"epochs": EPOCHS}, "labels": {"counts": (100,), "fit": Fit(epochs=1).model_dump()}, **fields,
    })  # fmt: skip
    return plan_trials(study, inspect(base.data), Numerics())


def compute(
    tracker: Tracker, study: str, plan: TrialPlan, arrays: Arrays, up_to_last: bool = False, **more: Any
) -> Any:
    """What `compute_trials` returns for one trial."""
    assignment = Assignment(store=tuple(tracker), parent=study, share=Share(0, 1), tags=plan.tags(), quiet=True)
    load = next(stage for stage in plan.stages().values() if not stage.kept)
    (outcome,) = compute_trials(
        [plan.stage], [replace(assignment, **more)], {load.key: arrays}, up_to_last=up_to_last
    )  # fmt: skip
    return outcome


def study_run(tracker: Tracker) -> str:
    """The open run of a study."""
    return tracker.client.create_run(tracker.experiment_id).info.run_id


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The HTTP requests so far."""
    sent: list[str] = []
    send = requests.adapters.HTTPAdapter.send

    def counted(self: Any, request: Any, *args: Any, **options: Any) -> Any:
        sent.append(f"{request.method} {request.path_url.partition('?')[0]}")
        return send(self, request, *args, **options)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", counted)
    return sent


def test_a_trial_costs_at_most_eight_requests(
    digits: tuple[Facts, Arrays], tmp_path: Path, count: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained and measured by one process, as on CPUs, and by two, as on a cluster with GPUs."""
    # as the store sets it where it is imported first
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    with mlflow_server(tmp_path) as uri:
        made = connect(uri, "test")
        assert made is not None
        tracker = made._replace(leases=(study_run(made),))
        for row, by_two in (("stacked", False), ("stacked", True), ("plain", True)):
            (plan,) = [plan for plan in plans_of(seeds=(int(by_two),)) if plan.row == row]
            study = study_run(tracker)
            count.clear()
            outcome = compute(tracker, study, plan, digits[1], up_to_last=by_two)
            if by_two:
                assert isinstance(outcome, Opened)
                outcome = compute(tracker, study, plan, digits[1], opened=outcome)
            sent = list(count)
            assert isinstance(outcome, Computed) and len(sent) <= MOST_REQUESTS, sent
            assert sent.count("POST /api/2.0/mlflow/runs/search") == sent.count("POST /api/2.0/mlflow/runs/create") == 1
            print(row, by_two, len(sent), *sent, sep="\n")
            whole(tracker, study, plan, outcome)


def whole(tracker: Tracker, study: str, plan: TrialPlan, outcome: Computed) -> None:
    """Assert that a trial's one run has all that the trial should leave."""
    (record,) = tracker.trials_of(study).values()
    assert record.run_id == outcome.run_id and record.is_finished and record.key == plan.stage.key
    assert record.tags["row"] == plan.row and record.tags["mlflow.parentRunId"] == study
    assert record.metrics.items() >= outcome.result.metrics.items()
    assert not {name for name in record.metrics if name.startswith(("train/", "epoch/"))}
    assert record.metrics["epochs"] == EPOCHS and record.metrics["train_seconds"] > 0
    assert record.metrics["cpu_seconds"] > 0 and record.metrics["gpu_seconds"] == 0
    history = tracker.client.get_metric_history(record.run_id, "epoch/train/loss")
    assert sorted(point.step for point in history) == list(range(1, EPOCHS + 1))
    params = tracker.client.get_run(record.run_id).data.params
    assert params["fit.lr"] == "0.001" and params["variant.kind"] == "plain" and "layers" in params
    kept = {stage.key for stage in plan.stages().values() if stage.kept}
    assert set(record.places) == kept and set(record.places.values()) == {TRAINED, MEASURED}
    for key in kept:
        assert tracker.find(key) == record.run_id
        assert tracker.restore(record.run_id, key).weights.keys()
    measured = tracker.restore(record.run_id)
    assert measured.metrics == outcome.result.metrics
    assert all(np.array_equal(measured.weights[name], value) for name, value in outcome.result.weights.items())
