"""What a study will cost and what it has spent: forecasts from finished trials, probes and guesses; budgets."""

from pathlib import Path
from typing import Any

import pytest

from aecore.config.facts import Facts
from aecore.config.specs import FinetuneSpec, Numerics
from aecore.core.errors import InputError
from aecore.data.splits import Arrays
from aecore.evaluation.trial import Trial
from jobs import cli
from jobs.compare import Compare
from pipelines.cluster.nodes import Node
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share
from pipelines.execution.probe import expected_seconds
from pipelines.graph.work import guessed_seconds, shape_of
from pipelines.store.runs import Tracker
from pipelines.study.cost import (
    ALL,
    SHARED,
    Cost,
    Machine,
    Sample,
    cost_of_plan,
    describe,
    finished_samples,
    forecast,
    groups_of,
    machine_for,
    plans_of_search,
)
from pipelines.study.plan import TrialPlan, plan_trials
from pipelines.study.schema import Budget, Study
from pipelines.study.spending import Spending, cost_report, cost_rows, spent_by_row

FACTS = Facts(digest="d", shape=(1, 8, 8), levels=17, classes=tuple("0123456789"), rows=1797)
CPU = Machine(Share(0, 1), 2)


def study(**fields: Any) -> Study:
    return Study.model_validate({"labels": {"counts": [100]}, **fields})


def planned(facts: Facts = FACTS, **fields: Any) -> list[TrialPlan]:
    """The trials of one study row, or of those in `fields`."""
    plans = plan_trials(study(**fields), facts, Numerics())
    return [plan for plan in plans if plan.kind not in ("pca", "random")]


def finished(plan: TrialPlan, seconds: float, share: Share = CPU.share) -> Sample:
    return Sample(*cost_of_plan(plan), Cost.of(share, seconds))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"seeds": [7]}, True),
        ({"variants": {"plain": {"finetune": {"lr": 5e-2}}}}, True),
        ({"budget": {"epochs": 3}}, True),
        ({"labels": {"counts": [200]}}, True),
        ({"variants": {"plain": {"finetune": {"batch_size": 64}}}}, False),
        ({"variants": {"plain": {"network": {"widths": [8]}}}}, False),
        ({"variants": {"plain": {"variant": {"kind": "contractive"}}}}, False),
        ({"labels": {"counts": []}}, False),
    ],
)
def test_trials_of_one_shape_differ_in_numbers_alone(change: dict[str, Any], same: bool) -> None:
    shapes = {cost_of_plan(planned(seeds=[0])[0])[0], cost_of_plan(planned(**{"seeds": [0], **change})[0])[0]}
    assert len(shapes) == (1 if same else 2)


def test_work_grows_with_epochs_and_rows() -> None:
    (one,) = planned(seeds=[0], budget={"epochs": 10})
    (more,) = planned(seeds=[0], budget={"epochs": 20})
    (larger,) = planned(FACTS.model_copy(update={"rows": 4 * FACTS.rows}), seeds=[0], budget={"epochs": 10})

    def training(plan: TrialPlan) -> float:
        stack = plan.stage.inputs["stack"]
        assert not isinstance(stack, tuple)
        return guessed_seconds(stack)

    assert training(more) == pytest.approx(2 * training(one))
    assert training(larger) == pytest.approx(4 * training(one), rel=0.02)


def test_the_epochs_of_few_labels_are_counted_as_they_are_trained() -> None:
    (plan,) = planned(seeds=[0])
    few, every = [stage for stage in plan.stages().values() if "classify" in stage.name]
    assert isinstance(few.spec, FinetuneSpec) and few.spec.labels == 100
    assert 0 < guessed_seconds(few) < guessed_seconds(every)


def test_finished_trials_of_the_same_shape_tell_the_cost() -> None:
    plans = planned(seeds=[0, 1, 2])
    samples = [finished(plan, seconds) for plan, seconds in zip(plans, (9, 10, 11), strict=True)]
    new = planned(seeds=[5, 6], variants={"plain": {"finetune": {"lr": 0.1}}})
    expected = forecast(new, CPU, samples)
    (row,) = expected.rows
    assert row.trials == 2 and (row.cost.cpu_seconds, row.seconds) == pytest.approx((20, 10))
    assert row.basis == "measured on finished trials like these (3)"
    assert row.low < 0.85 < 1.2 <= row.high  # two standard deviations of the three
    assert expected.total.seconds > row.seconds  # Ray and the report take time, too
    assert expected.total.trials == 2


def test_other_epochs_are_scaled_and_said_to_be_less_sure() -> None:
    sample = finished(planned(seeds=[0], budget={"epochs": 40})[0], 10)
    (exact,) = forecast(planned(seeds=[1], budget={"epochs": 40}), CPU, [sample]).rows
    (scaled,) = forecast(planned(seeds=[1], budget={"epochs": 80}), CPU, [sample]).rows
    assert 1.2 * exact.cost.cpu_seconds < scaled.cost.cpu_seconds < 2 * exact.cost.cpu_seconds
    assert "scaled" in scaled.basis and scaled.high > exact.high and scaled.low < exact.low


def test_the_trials_whose_work_is_nearest_count() -> None:
    near, far = (planned(seeds=[0], budget={"epochs": epochs})[0] for epochs in (40, 400))
    samples = [finished(near, 10), finished(far, 1000)]
    (row,) = forecast(planned(seeds=[1], budget={"epochs": 40}), CPU, samples).rows
    assert row.cost.cpu_seconds == pytest.approx(10) and "like these (1)" in row.basis


def test_without_any_knowledge_the_forecast_is_a_wide_guess() -> None:
    expected = forecast(planned(seeds=[0]), CPU, [])
    assert "guessed" in expected.total.basis and expected.total.high == pytest.approx(3)
    assert expected.total.cost.cpu_seconds > 0
    assert "--plan probe" in list(describe(expected))[-1]


def test_guesses_use_the_speed_of_other_trials() -> None:
    (other,) = planned(seeds=[0], variants={"sparse": {"variant": {"kind": "sparse"}}})
    plans = planned(seeds=[0])
    slow = finished(other, 10 * cost_of_plan(other)[1])
    alone, beside = forecast(plans, CPU, []).total, forecast(plans, CPU, [slow]).total
    assert beside.cost.cpu_seconds > 5 * alone.cost.cpu_seconds and beside.high < alone.high


def test_a_probe_of_stages_tells_the_cost() -> None:
    (plan,) = planned(seeds=[0])
    stages = [stage for stage in plan.stages().values() if stage.kept]
    probed = [Sample(shape_of([one]), guessed_seconds(one), Cost(cpu_seconds=3)) for one in stages]
    (row,) = forecast(planned(seeds=[4]), CPU, [], probed).rows
    assert row.cost.cpu_seconds == pytest.approx(3 * len(stages), abs=1.5) and "probed" in row.basis


def test_shared_stages_are_counted_once() -> None:
    stacked = {"pretrain": {"lr": 1e-3}, "settings": {"finetune.lr": [1e-3, 2e-3, 4e-3]}}
    plans = planned(variants={"stacked": stacked}, seeds=[0], budget={"epochs": 8})
    expected = forecast(plans, CPU, [])
    shared, row = expected.rows
    assert shared.label == SHARED and shared.trials == 3 and row.trials == 3
    every = {key: guessed_seconds(stage) for plan in plans for key, stage in plan.stages().items()}
    assert sum(every.values()) == pytest.approx(shared.cost.cpu_seconds + row.cost.cpu_seconds - 3, abs=0.1)


def test_seconds_on_a_gpu_say_nothing_of_a_cpu() -> None:
    (plan,) = planned(seeds=[0])
    on_gpu = Sample(*cost_of_plan(plan), Cost(cpu_seconds=4, gpu_seconds=5))
    assert "guessed" in forecast([plan], CPU, [on_gpu]).total.basis
    gpu = forecast([plan], Machine(Share(0.5, 1), 2), [on_gpu]).rows[0]
    assert gpu.cost == Cost(4, 5) and gpu.seconds == pytest.approx(5)  # 10 seconds of half a GPU, two side by side


def test_the_last_long_trial_decides_on_the_wall_time() -> None:
    plans = planned(seeds=[0, 1, 2])
    samples = [finished(plans[0], 100)]
    two, three = (forecast(plans[:count], CPU, samples).total.seconds for count in (2, 3))
    assert three == pytest.approx(two + 100)


def test_the_machine_holds_as_many_trials_as_it_has_shares() -> None:
    groups = [[plan] for plan in planned(seeds=[0, 1])]
    nodes = [Node({"CPU": 4}), Node({"CPU": 3})]
    assert machine_for(groups, Resources(), nodes) == Machine(Share(0, 1), 7)
    assert machine_for(groups, Resources(cpus=2), nodes).slots == 3
    assert machine_for(groups, Resources(max_concurrent=2), nodes).slots == 2
    assert machine_for(groups, Resources(gpus=0.25), [Node({"CPU": 8, "GPU": 2})]) == Machine(Share(0.25, 1), 8)


def test_groups_are_those_that_the_study_itself_would_run() -> None:
    plans, chosen = planned(seeds=[0, 1, 2, 3]), study(seeds=[0, 1, 2, 3])
    nodes = [Node({"CPU": 8, "GPU": 2})]
    assert [len(group) for group in groups_of(plans, chosen, Resources(), nodes)] == [2, 2]
    assert [len(group) for group in groups_of(plans, chosen, Resources(gpus=0), nodes)] == [1, 1, 1, 1]


def test_what_optuna_will_choose_is_forecast_by_random_settings() -> None:
    space = {"finetune.lr": {"low": 1e-4, "high": 1e-2}}
    chosen = study(search="optuna", settings=space, budget={"settings": 4}, seeds=[0, 1, 2])
    plans = plans_of_search(chosen, FACTS, Numerics())
    assert len(plans) == 4 + 2 and {plan.row for plan in plans} == {"plain"}
    assert plans_of_search(study(settings={}), FACTS, Numerics()) == []


def test_the_store_remembers_what_trials_have_cost(tracker: Tracker) -> None:
    (plan,) = planned(seeds=[0])
    run = tracker.client.create_run(tracker.experiment_id, tags=plan.tags())
    for name, value in {"cpu_seconds": 12.5, "gpu_seconds": 2.5}.items():
        tracker.client.log_metric(run.info.run_id, name, value)
    assert finished_samples(tracker) == []
    tracker.client.set_terminated(run.info.run_id, "FINISHED")
    assert finished_samples(tracker) == [Sample(*cost_of_plan(plan), Cost(12.5, 2.5))]


def test_forecast_and_spent_are_told_side_by_side() -> None:
    plans = planned(seeds=[0, 1])
    expected = forecast(plans[1:], CPU, [finished(plans[0], 3600)])
    trials = [
        Trial(plan.row, {}, plan.seed, plan.kind, "failed", cpu_seconds=1800 * (seed + 1))
        for seed, plan in enumerate(plans)
    ]
    spent = spent_by_row(trials[1:], Cost(cpu_seconds=36), held=Cost(cpu_seconds=3672))
    rows = cost_rows(expected, spent, 90)
    assert rows[0] == ("plain", "1 CPU-hours", "1 CPU-hours")
    assert rows[1].spent == "0.02 CPU-hours", "what was held beside the trials has a line of its own"
    assert rows[2] == (ALL, "1 CPU-hours", "1.02 CPU-hours")
    assert rows[-1].label == "wall time" and rows[-1].spent == "1 min 30 s"
    report = cost_report(expected, spent, 90)
    assert report["forecast"]["cpu_hours"] == 1 and report["spent"] == {
        "seconds": 90, "cpu_hours": 1.02, "gpu_hours": 0
    }  # fmt: skip


def test_a_study_spends_what_its_tasks_hold_however_they_end() -> None:
    now = 0.0
    spending = Spending(Budget(cpu_hours=1, gpu_hours=1), clock=lambda: now)
    spending.begin("a", Share(0.25, 2))
    now = 1000
    spending.begin("a", Share(0.25, 2))  # another attempt: the first was lost without an end
    spending.begin("b", Share(0, 1))
    now = 1500
    spending.end("a")
    spending.end("a")
    assert spending.total() == Cost(2 * 1500 + 500, 0.25 * 1500) and spending.exhausted() is None
    now = 1600
    assert spending.exhausted() == "the study's CPU-hours were spent; raise budget.cpu_hours above 1 and start it again"


def test_what_earlier_commands_spent_counts() -> None:
    now = 0.0
    first = Spending(Budget(gpu_hours=0.5), clock=lambda: now)
    first.begin("a", Share(1, 1))
    now = 1700
    again = Spending.after(Budget(gpu_hours=0.5), first.metrics())
    assert again.total() == Cost(1700, 1700) and again.exhausted() is None
    again.add(Cost(3, 4))
    assert again.of_this_command() == Cost(3, 4)
    more = Spending.after(Budget(gpu_hours=0.4), first.metrics())
    assert "budget.gpu_hours above 0.4" in (more.exhausted() or "")
    assert Spending.after(Budget(), first.metrics()).exhausted() is None


@pytest.mark.parametrize("field", ["cpu_hours", "gpu_hours"])
def test_a_budget_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(InputError, match=f"budget.{field}"):
        cli.parse(Compare, "compare", [f"--budget.{field}", "0"])


@pytest.mark.parametrize(
    ("args", "plan", "recipe"),
    [
        ([], False, "study_digits.yaml"),
        (["--plan"], True, "study_digits.yaml"),
        (["--plan", "probe"], "probe", "study_digits.yaml"),
        (["--plan", "jobs/recipes/study_mnist.yaml"], True, "study_mnist.yaml"),
        (["jobs/recipes/study_mnist.yaml", "--plan", "probe"], "probe", "study_mnist.yaml"),
        (["--plan", "--seeds", "[0]"], True, "study_digits.yaml"),
    ],
)
def test_the_plan_may_have_a_word_behind_it(
    args: list[str], plan: bool | str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    settings = cli.parse(Compare, "compare", args)
    assert settings.plan == plan and settings.recipe.name == recipe


def test_a_probe_computes_a_few_steps_of_all_stages(digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = digits
    (plan,) = planned(facts, seeds=[0], budget={"epochs": 400}, variants={"stacked": {"pretrain": {}}})
    seconds = expected_seconds([plan.stage], Share(0, 1), False, arrays)
    kept = {key: stage for key, stage in plan.stages().items() if stage.kept}
    assert seconds.keys() == kept.keys() and all(value > 0 for value in seconds.values())
    stack = next(key for key, stage in kept.items() if stage is plan.stage.inputs["stack"])
    assert seconds[stack] > 1  # of 200 epochs, few of which were trained
