"""The agenda of a study: groups, retries, trials that follow from others, and what happens when it is halted."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from aecore.config.facts import Facts
from aecore.config.specs import Numerics
from pipelines.study.agenda import Agenda
from pipelines.study.plan import TrialPlan, plan_trial, plan_trials
from pipelines.study.race import Race
from pipelines.study.schema import Study
from pipelines.study.search import Search

FACTS = Facts(digest="d", shape=(1, 8, 8), levels=17, classes=tuple("0123456789"), rows=1797)
STUDY = Study.model_validate({
    "variants": {"plain": {}, "sparse": {"variant": {"kind": "sparse"}}}, "seeds": list(range(32)),
})  # fmt: skip
SEARCH = Study.model_validate({
    "variants": {"plain": {}, "sparse": {"variant": {"kind": "sparse"}}},
    "settings": {"finetune.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "network.widths": [[8], [16, 8]]},
    "search": "optuna", "seeds": [0, 1, 2], "budget": {"settings": 6},
})  # fmt: skip


def planned(study: Study = STUDY) -> list[TrialPlan]:
    return plan_trials(study, FACTS, Numerics())


def agenda_of(plans: list[TrialPlan], **fields: Any) -> Agenda:
    agenda = Agenda(retries=2, **fields)
    agenda.add(plans)
    return agenda


def sizes(agenda: Agenda, devices: int | None) -> list[int]:
    """Sizes of the groups that are no references, in the order in which they are handed out."""
    found = []
    while group := agenda.take(devices):
        if not group[0].is_fixed_reference:
            found.append(len(group))
    return found


@pytest.mark.parametrize(
    ("devices", "expected"), [(1, [32, 32]), (4, [16, 16, 16, 16]), (None, [1] * 64), (64, [1] * 64)]
)  # fmt: skip
def test_groups_are_cut_for_the_devices(devices: int | None, expected: list[int]) -> None:
    assert sizes(agenda_of(planned()), devices) == expected


def test_where_devices_may_come_later_groups_get_smaller() -> None:
    assert sizes(agenda_of(planned(), grows=True), 1) == [32, 16, 16]
    found = sizes(agenda_of(planned(), grows=True), 4)
    assert sum(found) == 64 and len(found) > 8 and min(found) == 4 and found[0] == 8


def test_all_seeds_of_a_reference_are_one_group() -> None:
    agenda = agenda_of(planned())
    assert {plan.row for plan in agenda.take(1)} == {"pca"} and {plan.row for plan in agenda.take(1)} == {"random"}


def test_a_lost_trial_runs_again_at_once_and_fails_after_its_retries() -> None:
    agenda = agenda_of([plan for plan in planned() if plan.row == "plain"][:2])
    first, second = agenda.take(None) + agenda.take(None)
    agenda.lose([first], "worker died")
    assert not agenda.is_done and agenda.take(None) == [first]
    agenda.lose([first], "worker died")
    assert agenda.take(None) == [first]
    agenda.lose([first], "worker died")
    agenda.finish(second)
    assert agenda.is_done and agenda.endings.errors == {first.stage.key: "worker died"}


def test_a_halted_agenda_hands_nothing_out_and_says_why() -> None:
    agenda = agenda_of([plan for plan in planned() if plan.row == "plain"][:3])
    (running,) = agenda.take(None)
    agenda.halt("the budget is spent")
    assert agenda.take(None) == [] and not agenda.is_done
    agenda.finish(running)
    assert agenda.is_done
    agenda.close(agenda.halted)
    assert list(agenda.endings.errors.values()) == ["the budget is spent"] * 2


def test_a_search_that_is_halted_has_not_finished() -> None:
    def plan_of(row: str, settings: dict[str, Any], seed: int) -> TrialPlan:
        return plan_trial(SEARCH, row, settings, seed, FACTS, Numerics())

    agenda = Agenda(retries=0)
    agenda.sources = [Search(SEARCH, "plain", plan_of, [])]
    (first,) = agenda.take(None)
    agenda.halt("the budget is spent")
    agenda.finish(first, 1.0)
    assert agenda.is_done and not agenda.endings.errors
    agenda.close(agenda.halted)
    assert list(agenda.endings.errors.values()) == ["the budget is spent"] and len(agenda.plans) == 2


def test_a_lost_group_runs_again_in_halves() -> None:
    agenda = agenda_of([plan for plan in planned() if plan.row == "plain"])
    group = agenda.take(1)
    agenda.lose(group, "worker died")
    assert [len(agenda.take(1)), len(agenda.take(1))] == [16, 16] and len(group) == 32


def test_a_race_adds_a_seed_at_a_time_and_drops_the_worse_row() -> None:
    study = Study.model_validate({
        "variants": {"plain": {}, "narrow": {"network": {"widths": [1]}}, "wide": {"network": {"widths": [9]}}},
        "seeds": list(range(5)), "scheduler": "race",
    })  # fmt: skip

    def plan_of(row: str, settings: dict[str, Any], seed: int) -> TrialPlan:
        return plan_trial(study, row, settings, seed, FACTS, Numerics())

    def scores(plans: Sequence[TrialPlan]) -> dict[str, np.ndarray]:
        asked.append(len(plans))
        noise = np.random.default_rng(len(asked))
        return {m.stage.key: (5 if m.row == "narrow" else 1) + 0.1 * noise.random(200) for m in plans}

    asked: list[int] = []
    agenda = Agenda(retries=0)
    agenda.sources = [Race(study, plan_of, scores)]
    sizes_of_rounds = []
    while group := agenda.take(None):
        running = [group[0]]
        while group := agenda.take(None):
            running += group
        sizes_of_rounds.append(len(running))
        for plan in running:
            agenda.finish(plan)
    assert sizes_of_rounds == [6, 2, 2, 2] and agenda.is_done
    assert asked == [6, 2, 2]  # what was read once is kept


def test_trials_that_stand_on_a_failed_stage_are_refused_and_the_others_stay() -> None:
    plans = [plan for plan in planned() if plan.row == "plain"][:3]
    agenda = agenda_of(plans)
    agenda.refuse({plans[1].stage.key: "layer 1 diverged"})
    assert agenda.waiting() == [plans[0], plans[2]]
    assert agenda.endings.errors == {plans[1].stage.key: "layer 1 diverged"}


def test_searches_of_all_rows_run_at_once_and_the_best_settings_get_the_other_seeds() -> None:
    def plan_of(row: str, settings: dict[str, Any], seed: int) -> TrialPlan:
        return plan_trial(SEARCH, row, settings, seed, FACTS, Numerics())

    agenda = Agenda(retries=0)
    agenda.sources = [Search(SEARCH, row, plan_of, []) for row in SEARCH.variants]
    running = [agenda.take(None)[0] for _ in range(4)]
    assert [plan.row for plan in running] == ["plain", "sparse"] * 2
    tried: dict[str, list[tuple[float, dict[str, Any]]]] = {"plain": [], "sparse": []}
    further: list[tuple[str, dict[str, Any], int]] = []
    while running:
        plan = running.pop(0)
        rate = plan.settings["finetune.lr"]
        agenda.finish(plan, abs(rate - 1e-3))
        if plan.seed == 0:
            tried[plan.row].append((abs(rate - 1e-3), plan.settings))
        else:
            further.append((plan.row, plan.settings, plan.seed))
        while group := agenda.take(None):
            running += group
    assert {row: len(of) for row, of in tried.items()} == {"plain": 6, "sparse": 6} and agenda.is_done
    for row, of in tried.items():
        best = min(of, key=lambda one: one[0])[1]
        assert [(settings, seed) for of_row, settings, seed in further if of_row == row] == [(best, 1), (best, 2)]


def test_a_search_goes_on_from_what_was_finished_before() -> None:
    def plan_of(row: str, settings: dict[str, Any], seed: int) -> TrialPlan:
        return plan_trial(SEARCH, row, settings, seed, FACTS, Numerics())

    tried = [({"finetune.lr": 1e-3 * n, "network.widths": [8]}, float(n)) for n in range(1, 6)]
    search = Search(SEARCH, "plain", plan_of, tried)
    last = search.next()
    assert last is not None and last.seed == 0 and search.next() is None
    search.ended(last, 9.0)
    further = [search.next(), search.next(), search.next()]
    assert [plan and (plan.settings, plan.seed) for plan in further] == [(tried[0][0], 1), (tried[0][0], 2), None]
