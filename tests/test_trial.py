"""A trial of a study is one MLflow run, whatever the number of its stages, and costs MLflow few requests."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from aecore.config.experiment import Dense, Experiment
from aecore.config.facts import Facts
from aecore.config.specs import Numerics
from aecore.core.errors import DivergenceError
from aecore.data.dataset import inspect
from aecore.data.splits import Arrays
from aecore.models.storage import Result
from pipelines.cluster.share import Share
from pipelines.execution.assignment import Assignment, Opened
from pipelines.execution.journal import Computed
from pipelines.execution.trial import compute_trials
from pipelines.graph.stage import Stage
from pipelines.store.client import SETTINGS
from pipelines.store.connection import connect
from pipelines.store.errors import LostResultError
from pipelines.store.record import MEASURED, TRAINED
from pipelines.store.runs import Tracker
from pipelines.store.stage_run import StageRun
from pipelines.study.agenda import Endings
from pipelines.study.plan import TrialPlan, plan_trials
from pipelines.study.results import read, trial_of
from pipelines.study.schema import Study
from tests.here import run_here
from tests.nodes import mlflow_server

EPOCHS = 4
MOST_REQUESTS = 8


def plan_of(row: str, seed: int, **fields: Any) -> TrialPlan:
    """A trial of digits that takes a second."""
    base = Experiment(network=Dense(widths=(6, 4)), pretrain=None)
    study = Study.model_validate({
        "base": base.model_dump(), "variants": {"stacked": {"pretrain": {}}, "plain": {}}, "seeds": (seed,),
        "budget": {"epochs": EPOCHS}, "labels": {"counts": (100,), "fit": {"epochs": 1}}, **fields,
    })  # fmt: skip
    return next(plan for plan in plan_trials(study, inspect(base.data), Numerics()) if plan.row == row)


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
    for name, value in SETTINGS.items():  # without them MLflow asks more
        monkeypatch.setenv(name, value)
    with mlflow_server(tmp_path) as uri:
        made = connect(uri, "test")
        assert made is not None
        tracker = made._replace(leases=(study_run(made),))
        for row, by_two in (("stacked", True), ("stacked", False)):
            plan, study = plan_of(row, int(by_two)), study_run(tracker)
            count.clear()
            outcome = compute(tracker, study, plan, digits[1], up_to_last=by_two)
            if by_two:
                assert isinstance(outcome, Opened)
                outcome = compute(tracker, study, plan, digits[1], opened=outcome)
            sent = list(count)
            assert isinstance(outcome, Computed) and len(sent) <= MOST_REQUESTS, "\n".join(sent)
            assert sent.count("POST /api/2.0/mlflow/runs/search") == sent.count("POST /api/2.0/mlflow/runs/create") == 1
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


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of the stages whose functions were called."""
    called: list[str] = []
    function = Stage.function

    def spied(stage: Stage) -> Any:
        def call(*args: Any, **inputs: Any) -> Any:
            called.append(stage.name.rpartition(": ")[2])
            return function(stage)(*args, **inputs)

        return call

    monkeypatch.setattr(Stage, "function", spied)
    return called


def test_what_was_restored_before_the_hand_over_is_not_trained_by_who_measures(
    digits: tuple[Facts, Arrays], tracker: Tracker, trained: list[str]
) -> None:
    """Else a task on a CPU would train the stack that another trial's run holds."""
    compute(tracker, study_run(tracker), plan_of("plain", 14), digits[1])
    trained.clear()
    other, study = plan_of("plain", 14, labels={"counts": (), "fit": {"epochs": 2}}), study_run(tracker)
    opened = compute(tracker, study, other, digits[1], up_to_last=True)
    assert isinstance(opened, Opened) and trained == ["classify, all labels"]
    outcome = compute(tracker, study, other, digits[1], opened=opened)
    assert isinstance(outcome, Computed) and trained == ["classify, all labels", "plain seed=14"]


def test_a_reopened_run_neither_promises_what_another_run_holds_nor_stays_stopped(
    digits: tuple[Facts, Arrays], tracker: Tracker
) -> None:
    plan, study = plan_of("plain", 15), study_run(tracker)
    stack = plan.trained
    killed = tracker.open_trial(plan.stage, study, [stack.key], tags=plan.tags())
    tracker.stop_trial(killed.run_id, 3)
    run_here(stack, tracker, study)  # as a stage that several trials share
    shared = tracker.find(stack.key)
    outcome = compute(tracker, study, plan, digits[1])
    assert isinstance(outcome, Computed) and outcome.run_id == killed.run_id
    record = tracker.trials_of(study)[plan.stage.key]
    assert stack.key not in record.places and record.stopped is None and record.is_finished
    assert shared and tracker.find(stack.key) == shared


ALL = ["layer 1", "layer 2", "finetune", "classify, 100 labels", "classify, all labels", "stacked seed=2"]


def test_a_trial_says_nothing_and_is_restored_by_any_study(
    digits: tuple[Facts, Arrays], tracker: Tracker, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan, one, two = plan_of("stacked", 2), study_run(tracker), study_run(tracker)
    first = compute(tracker, one, plan, digits[1])
    assert isinstance(first, Computed) and trained == ALL
    assert capsys.readouterr().err == ""
    second = compute(tracker, two, plan, digits[1])
    assert second.run_id == first.run_id and trained == ALL
    assert tracker.trials_of(one).keys() == tracker.trials_of(two).keys() == {plan.stage.key}
    # another measure of the same stack
    other = plan_of("stacked", 2, labels={"counts": (), "fit": {"epochs": 1}})
    assert other.stage.key != plan.stage.key
    third = compute(tracker, two, other, digits[1])
    assert isinstance(third, Computed) and trained == [*ALL, ALL[-1]]
    record = tracker.trials_of(two)[other.stage.key]
    assert set(record.places) == {other.stage.key} and record.metrics["epochs"] == EPOCHS


def test_a_trial_goes_on_from_what_an_earlier_attempt_has_left(
    digits: tuple[Facts, Arrays], tracker: Tracker, trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, study = plan_of("stacked", 3), study_run(tracker)
    calm = compute(tracker._replace(experiment_id=tracker.client.create_experiment("calm")), study, plan, digits[1])
    trained.clear()
    folder: dict[str, Any] = {"checkpoint_folder": str(tmp_path)}
    commit = StageRun.commit_trial

    def killed(self: StageRun, *args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StageRun, "commit_trial", killed)
    with pytest.raises(KeyboardInterrupt):
        compute(tracker, study, plan, digits[1], **folder)
    assert list(tmp_path.iterdir())  # checkpoints stay until the trial is finished
    monkeypatch.setattr(StageRun, "commit_trial", lambda *args: pytest.fail("no"))
    (record,) = tracker.trials_of(study).values()
    assert record.status == "RUNNING" and tracker.find(plan.stage.key) is None
    assert tracker.find(next(key for key, place in record.places.items() if place == TRAINED)) is None
    trained.clear()
    monkeypatch.setattr(StageRun, "commit_trial", commit)
    outcome = compute(tracker, study, plan, digits[1], **folder)
    assert trained == ["stacked seed=3"] and not list(tmp_path.iterdir())
    whole(tracker, study, plan, outcome)
    assert outcome.run_id == record.run_id
    assert tracker.trials_of(study)[plan.stage.key].tags["attempts"] == "2"
    assert all(np.array_equal(calm.result.weights[name], value) for name, value in outcome.result.weights.items())


@pytest.mark.parametrize("by_two", [False, True])
def test_an_upload_that_was_cut_short_is_found_when_it_is_read(
    by_two: bool, digits: tuple[Facts, Arrays], tracker: Tracker, trained: list[str]
) -> None:
    plan, study = plan_of("plain", 4 + by_two), study_run(tracker)
    outcome = compute(tracker, study, plan, digits[1], up_to_last=by_two)
    files = Path((tracker.client.get_run(outcome.run_id).info.artifact_uri or "").removeprefix("file://"))
    torn = files / (TRAINED if by_two else MEASURED)
    torn.write_bytes(torn.read_bytes()[:-7])
    trained.clear()
    if by_two:  # the process that measures trains again
        again = compute(tracker, study, plan, digits[1], opened=outcome)
        assert len(trained) == 4
    else:
        with pytest.raises(LostResultError):
            tracker.restore(outcome.run_id)
        assert tracker.find(plan.stage.key) is None
        again = compute(tracker, study, plan, digits[1])
        assert trained == ["plain seed=4"]  # what was trained is whole
    assert again.run_id == outcome.run_id
    whole(tracker, study, plan, again)


def test_stages_that_are_finished_are_not_computed(
    digits: tuple[Facts, Arrays], tracker: Tracker, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared stages, of which the driver tells, and stages that an earlier version has kept in runs of their own."""
    for seed, told in ((6, True), (7, False)):
        plan, study = plan_of("stacked", seed), study_run(tracker)
        layers = [stage for stage in plan.stages().values() if stage.kind == "layer"]
        for layer in layers:
            run_here(layer, tracker, study)
        known = {layer.key: tracker.find(layer.key) or "" for layer in layers}
        trained.clear()
        outcome = compute(tracker, study, plan, digits[1], known=known if told else {})
        assert isinstance(outcome, Computed) and trained == [*ALL[2:-1], f"stacked seed={seed}"]
        record = tracker.trials_of(study)[plan.stage.key]
        assert not known.keys() & record.places.keys() and record.metrics["epochs"] == EPOCHS
        history = tracker.client.get_metric_history(record.run_id, "epoch/train/loss")
        assert sorted(point.step for point in history) == [3, 4]


def test_a_study_of_an_earlier_version_is_found(
    digits: tuple[Facts, Arrays], tracker: Tracker, trained: list[str]
) -> None:
    """Each stage of a trial had its own run."""
    plan, study = plan_of("plain", 8), study_run(tracker)
    for stage in plan.stages().values():
        if stage.kept and stage.key != plan.stage.key:
            run_here(stage, tracker, study)
    old = tracker.open_run(plan.stage, study, tags=plan.tags())
    old.commit(Result({"history": []}, {"sse": np.ones(3)}, {"test/reconstruction_mse": 0.5}))
    record = tracker.trials_of(study)[plan.stage.key]
    assert record.run_id == old.run_id and record.is_finished
    trial = read(trial_of(plan, record, EPOCHS, Endings()), tracker)
    assert trial.status == "finished" and trial.arrays["sse"].sum() == 3 and trial.epochs_used == EPOCHS
    trained.clear()
    other = study_run(tracker)
    outcome = compute(tracker, other, plan, digits[1])
    assert outcome.run_id == old.run_id and trained == []
    assert tracker.trials_of(other).keys() == {plan.stage.key}


def test_a_trial_that_fails_says_why_and_what_it_has_cost(digits: tuple[Facts, Arrays], tracker: Tracker) -> None:
    variants = {"bad": {"finetune": {"lr": 1e30}}}
    plan, study = plan_of("bad", 9, variants=variants), study_run(tracker)
    for attempt in (1, 2):
        outcome = compute(tracker, study, plan, digits[1])
        assert isinstance(outcome, DivergenceError)
        (record,) = tracker.trials_of(study).values()
        assert record.status == "FAILED" and "DivergenceError" in record.tags["error"]
        costs = [m.value for m in tracker.client.get_metric_history(record.run_id, "cpu_seconds")]
        assert len(costs) == attempt and sorted(costs)[-1] == record.metrics["cpu_seconds"]


def test_a_long_trial_logs_its_epochs_now_and_then(
    digits: tuple[Facts, Arrays], tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.execution.trial_journal.STUDY_LOG_SECONDS", 0.02)
    plan, study, seen = plan_of("stacked", 10), study_run(tracker), list[int]()

    def tell(stage: Stage, epoch: int, metrics: dict[str, float]) -> None:
        (run,) = tracker.search(f"tags.`study.{study}` = '1'")
        time.sleep(0.2)
        seen.append(len(tracker.client.get_metric_history(run.info.run_id, "epoch/train/loss")))

    whole(tracker, study, plan, compute(tracker, study, plan, digits[1], tell=tell))
    assert any(seen)
