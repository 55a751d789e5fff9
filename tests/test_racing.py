"""Racing: what is dropped, when and why, on random data of which the truth is known."""

import numpy as np
import pytest

from aecore.evaluation.racing import GOALS, Goal, drop, rounds
from aecore.evaluation.statistics import compare
from pipelines.reporting.measures import MEASURES

ACCURACY, ERROR = GOALS["probe"], GOALS["reconstruction"]


def made(rng: np.random.Generator, means: tuple[float, ...], seeds: int) -> dict[str, np.ndarray]:
    """Draw rows (seeds, 100 test rows) that find the same test rows hard; seeds spread by 0.01."""
    shared = 0.1 * rng.normal(size=100)
    return {
        f"row{number}": mean + shared + 0.01 * rng.normal(size=(seeds, 1)) + 0.01 * rng.normal(size=(seeds, 100))
        for number, mean in enumerate(means)
    }


def test_two_seeds_come_first_and_then_one_at_a_time() -> None:
    assert rounds((4, 3, 2, 1)) == [(4, 3), (2,), (1,)]
    assert rounds((7, 8)) == [(7, 8)]


def test_a_race_goes_by_a_measure_of_the_report() -> None:
    measures = {measure.name: measure for measure in MEASURES}
    for goal in GOALS.values():
        measure = measures[goal.metric]
        assert (goal.points, goal.ratios) == (measure.points, measure.ratios)
        assert goal.higher == (measure.better == "higher")


def test_rows_that_are_clearly_worse_are_dropped_the_best_of_them_first() -> None:
    values = made(np.random.default_rng(0), (0.5, 0.9, 0.9, 0.7), 2)
    assert [(one.row, one.after_seeds) for one in drop(values, ACCURACY, 3)] == [("row3", 2), ("row0", 2)]
    assert {one.row for one in drop(values, ERROR, 3)} == {"row1", "row2", "row3"}


@pytest.mark.parametrize("names", [("good", "poor"), ("poor", "good")])
def test_the_reason_is_a_sentence_with_the_size_and_its_interval(names: tuple[str, str]) -> None:
    base = np.linspace(0.5, 1.5, 50) + np.array([[0.0], [0.001], [-0.001]])
    errors = {"good": base, "poor": 1.031 * base + np.array([[0.001], [0.0], [-0.001]])}
    (one,) = drop({name: errors[name] for name in names}, ERROR, 4)
    start, _, rest = one.words.partition(" [")
    assert (one.row, start) == ("poor", "worse than good by 3.1 %") and rest.endswith("] after 3 seeds")
    low, high = map(float, rest.split("]")[0].split(", "))
    assert 2 < low < 3.1 < high < 4.2
    (one,) = drop({name: -errors[name] for name in names}, ACCURACY, 4)
    assert one.row == "poor" and one.words.startswith("worse than good by 3.1 points [")


def test_a_tie_is_kept() -> None:
    rng, lost = np.random.default_rng(1), 0
    for _ in range(100):
        values = made(rng, (0.9,) * 6, 5)
        lost += any(drop({row: array[:seeds] for row, array in values.items()}, ACCURACY, 6) for seeds in range(2, 6))
    # the looks together spend a tenth of the level of 5 %; three standard errors in 100 races are 2.1 %
    assert lost / 100 <= 0.005 + 0.021


def test_more_looks_ask_for_more() -> None:
    values = made(np.random.default_rng(2), (0.9, 0.9, 0.9, 0.84), 4)
    by_looks = [{one.row for one in drop(values, ACCURACY, planned)} for planned in (2, 5, 1000)]
    assert by_looks == [set(), {"row3"}, set()]


def test_what_was_dropped_is_not_judged_again_and_helps_to_see() -> None:
    values = made(np.random.default_rng(3), (0.9, 0.8, 0.5, 0.5, 0.5, 0.5), 3)
    gone = [f"row{number}" for number in range(2, 6)]
    for row in gone:
        values[row][2] = np.nan
    assert [one.row for one in drop(values, ACCURACY, 4, gone)] == ["row1"]
    alone = {row: values[row] for row in ("row0", "row1")}
    assert drop(alone, ACCURACY, 4) == []  # three seeds of two rows say too little


def test_rows_with_missing_seeds_and_without_any() -> None:
    values = made(np.random.default_rng(4), (0.9, 0.9, 0.5, 0.9), 3)
    values["row2"][0] = np.nan
    values["row3"][:] = np.nan
    (one,) = drop(values, ACCURACY, 4)
    assert (one.row, one.after_seeds) == ("row2", 3) and one.words.endswith("after 2 seeds")
    assert drop({"row0": values["row0"], "row3": values["row3"]}, ACCURACY, 5) == []


def test_one_number_per_seed_is_enough() -> None:
    values = {row: array.mean(1) for row, array in made(np.random.default_rng(5), (0.9, 0.9, 0.9, 0.6), 2).items()}
    assert [one.row for one in drop(values, Goal("knn/accuracy", "", True, False), 3)] == ["row3"]


@pytest.mark.parametrize("ratios", [False, True])
def test_the_closed_form_finds_what_the_bootstrap_finds(ratios: bool) -> None:
    values = made(np.random.default_rng(6), (0.9, 0.91, 0.92, 0.93, 0.95), 4)
    values["row1"][2] = np.nan
    drawn, closed = (compare(values, replicates=count, ratios=ratios) for count in (8000, 0))
    for one, other in zip(drawn, closed, strict=True):
        assert one.difference == pytest.approx(other.difference) and one.seeds == other.seeds
        width = other.high - other.low
        assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=0.1 * width)
        assert one.p == pytest.approx(other.p, rel=0.2, abs=0.002)


def test_a_row_with_a_missing_seed_still_tells_of_the_spread() -> None:
    rng = np.random.default_rng(8)
    values = {f"row{number}": rng.normal(size=3) for number in range(10)}
    values["row0"] += 10
    for number in range(1, 10):
        values[f"row{number}"][number % 3] = np.nan
    pairs = {(pair.first, pair.second): pair for pair in compare(values)}
    # by its own two differences, with one degree of freedom, none of the pairs would hold
    assert sum(pairs["row0", f"row{number}"].holds for number in range(1, 10)) > 4
