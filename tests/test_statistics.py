"""Tests of paired comparisons: known answers, and rates of errors on random data of which the truth is known."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from aecore.evaluation import statistics
from aecore.evaluation.statistics import Pair, compare, holm, resolution
from aecore.evaluation.verdicts import judge, listed, worth


def made(
    rng: np.random.Generator, shifts: tuple[float, ...], seeds: int, points: int, between: float
) -> dict[str, np.ndarray]:
    """Draw rows with means `shifts` that find the same points hard; their seeds spread by `between`."""
    shared = rng.normal(size=points)
    return {
        f"row{number}": shared
        + shift
        + between * rng.normal(size=(seeds, 1))
        + 0.3 * rng.normal(size=points)
        + 0.3 * rng.normal(size=(seeds, points))
        for number, shift in enumerate(shifts)
    }


def means(values: dict[str, np.ndarray]) -> dict[str, float]:
    return {row: float(np.nanmean(found)) for row, found in values.items()}


def test_holm_by_hand() -> None:
    # sorted: .005 .01 .03 .04; times 4, 3, 2, 1: .02 .03 .06 .04; none below the one before: .02 .03 .06 .06
    assert np.allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    assert np.allclose(holm(np.array([0.6, 0.9])), [1, 1])


def test_a_clear_winner_is_found() -> None:
    values = made(np.random.default_rng(0), (0, 0, 2, 0.5), 3, 500, 0.01)
    verdict = judge(means(values), compare(values), True, ("row0", "row1"))
    assert verdict.best == ("row2",)
    assert verdict.above == ("row2", "row3")
    assert verdict.words() == "row2 wins. Better than both row0 and row1: row2 and row3."
    lower = judge(means(values), compare(values), False, ("row2", "absent"))
    assert set(lower.best) == {"row0", "row1"} and set(lower.above) == {"row0", "row1", "row3"}
    assert "tie (no difference that holds at 5 % with 3 seeds). Better than row2: " in lower.words()


def test_a_reference_that_wins_is_called_one() -> None:
    values = made(np.random.default_rng(0), (0, 2), 3, 500, 0.01)
    words = judge(means(values), compare(values), True, ("row1",)).words()
    assert words == "row1 wins, a reference. Better than row1: none."


@pytest.mark.parametrize(("seeds", "between"), [(3, 0.0), (3, 0.3), (5, 0.3), (1, 0.0)])
def test_noise_is_called_a_tie(seeds: int, between: float) -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(200):
        values = made(rng, (0, 0, 0, 0), seeds, 80, between)
        wrong += any(pair.holds for pair in compare(values, replicates=1200))
    assert wrong / 200 <= 0.1


@pytest.mark.parametrize(("seeds", "between"), [(3, 0.3), (3, 0.05), (8, 0.1)])
def test_intervals_hold_the_truth(seeds: int, between: float) -> None:
    rng = np.random.default_rng(2)
    held = []
    for _ in range(400):
        (pair,) = compare(made(rng, (0.7, 0), seeds, 80, between), replicates=800)
        held.append(pair.low <= 0.7 <= pair.high)
    # .95 less three standard errors in 400; intervals are too wide where points and seeds both matter
    assert 0.917 <= np.mean(held) <= 0.995


@pytest.mark.parametrize(("seeds", "largest", "allowed"), [(3, 1, 0.05), (3, 5, 0.12), (5, 5, 0.06)])
def test_pooling_finds_little_that_is_not_there(seeds: int, largest: float, allowed: float) -> None:
    rng = np.random.default_rng(7)
    spreads = np.array([1.0] * 9 + [largest])
    wrong = 0
    for _ in range(400):
        rows = 0.5 * rng.normal(size=seeds) + rng.normal(size=(10, seeds)) * spreads[:, None]
        wrong += any(pair.holds for pair in compare({str(n): row for n, row in enumerate(rows)}))
    assert wrong / 400 <= allowed


def test_pooling_finds_with_three_seeds_what_is_there() -> None:
    rng = np.random.default_rng(8)
    found = []
    for _ in range(100):
        rows = rng.normal(size=(10, 3))
        rows[0] += 6
        pairs = compare({str(n): row for n, row in enumerate(rows)})
        found += [pair.holds for pair in pairs if pair.first == "0"]
    # with the pair's own three seeds, one in twenty would be found
    assert np.mean(found) > 0.5


@pytest.mark.parametrize("points", [(), (200,)])
def test_ratios_do_not_depend_on_the_size_of_an_error(points: tuple[int, ...]) -> None:
    rng = np.random.default_rng(9)
    errors = np.exp(0.02 * rng.normal(size=(3, 4, *points)))
    rows = {"a": errors[0], "b": 1.2 * errors[1], "poor": 100 * errors[2]}
    pairs = {(p.first, p.second): p for p in compare(rows, ratios=True)}
    assert pairs["a", "b"].holds and np.exp(pairs["a", "b"].difference) == pytest.approx(1 / 1.2, rel=0.05)
    scaled = compare({name: 7 * row for name, row in rows.items()}, ratios=True)
    assert [p.adjusted for p in scaled] == pytest.approx([p.adjusted for p in pairs.values()])


def test_seeds_widen_what_points_alone_would_say() -> None:
    values = made(np.random.default_rng(3), (0, 0), 3, 400, 0.5)
    (pair,) = compare(values)
    (one,) = compare({row: found[:1] for row, found in values.items()})
    assert pair.high - pair.low > 5 * (one.high - one.low)


def test_without_spread_over_points_it_is_the_t_test() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 5))
    expected = ttest_rel(a, b)
    low, high = expected.confidence_interval()
    (by_seed,) = compare({"a": a, "b": b})
    assert by_seed[2:6] == pytest.approx((a.mean() - b.mean(), low, high, expected.pvalue))
    (drawn,) = compare({"a": np.repeat(a[:, None], 50, 1), "b": np.repeat(b[:, None], 50, 1)})
    assert drawn[2:6] == pytest.approx((a.mean() - b.mean(), low, high, expected.pvalue), rel=0.01)


@pytest.mark.parametrize("points", [(), (50,)])
def test_no_spread_at_all(points: tuple[int, ...]) -> None:
    ones = np.ones((3, *points))
    # 0.1 * 3 is not 0.3 in floating point: rounding is no finding
    same, apart, _ = compare({"a": 0.1 * 3 * ones, "b": 0.3 * ones, "c": 0 * ones})
    assert (same.p, same.adjusted, same.holds) == (1, 1, False)
    assert apart.holds and (apart.low, apart.high) == pytest.approx((0.3, 0.3))
    assert apart.p == (pytest.approx(2 / 4001) if points else 0)


def test_a_row_without_spread_against_one_with() -> None:
    (pair,) = compare({"pca": np.ones(4), "sparse": np.array([1.1, 1.3, 1.2, 1.25])})
    assert pair.p == pytest.approx(ttest_rel(np.ones(4), [1.1, 1.3, 1.2, 1.25]).pvalue)


def test_one_seed_allows_no_test_of_seeds() -> None:
    (pair,) = compare({"a": np.array([0.0]), "b": np.array([9.0])})
    assert pair.p == 1 and np.isnan(pair.low) and pair.difference == -9
    words = judge({"a": 0, "b": 9}, [pair], True).words()
    assert words == "b and a tie (no difference that holds at 5 % with 1 seed)."


def test_pairs_use_the_seeds_that_both_have() -> None:
    values = made(np.random.default_rng(5), (0, 0, 0), 4, 60, 0.1)
    missing = {row: found.copy() for row, found in values.items()}
    missing["row1"][1] = np.nan
    missing["row2"][[0, 1, 2, 3]] = np.nan
    pairs = compare(missing)
    assert [pair.seeds for pair in pairs] == [3, 0, 0]
    left = [0, 2, 3]
    expected = compare({row: values[row][left] for row in ("row0", "row1")})
    assert pairs[0][2:4] == pytest.approx(expected[0][2:4], abs=0.01)
    assert np.isnan(pairs[1].difference) and pairs[1].p == 1


def test_a_pair_better_on_the_common_seeds_is_never_left_out() -> None:
    pair = Pair("a", "b", -1.0, -1.1, -0.9, 0.001, 0.001, 2)
    assert judge({"a": 5.0, "b": 4.0}, [pair], True).best == ("a", "b")


def test_the_same_again_bit_for_bit() -> None:
    values = made(np.random.default_rng(6), (0, 0.1), 3, 100, 0.1)
    assert compare(values) == compare(values)


def test_many_rows_leave_p_room_to_be_small() -> None:
    values = {f"row{number}": np.full((2, 20), float(number)) for number in range(16)}
    assert all(pair.holds for pair in compare(values))


def test_what_pretraining_is_worth_is_said_in_points_with_its_interval() -> None:
    gained = Pair("SDAE", "random", 0.0041, 0.0021, 0.0062, 0.001, 0.002, 3)
    worse = Pair("random", "plain", 0.01, 0.006, 0.014, 0.001, 0.002, 3)
    tied = Pair("random", "SAE", 0.001, -0.001, 0.003, 0.3, 0.6, 3)
    untested = Pair("random", "one", 0.001, np.nan, np.nan, 1.0, 1.0, 1)
    others = [
        Pair("SDAE", "plain", 0.1, 0.0, 0.2, 0.0, 0.0, 3),
        Pair("lost", "random", np.nan, np.nan, np.nan, 1.0, 1.0, 0),
    ]
    assert worth([gained, worse, tied, untested, *others], "random") == [
        "The pretraining of SDAE is worth: +0.41 points of accuracy (95 % interval +0.21 to +0.62).",
        "The pretraining of plain does harm: -1.00 points of accuracy (95 % interval -1.40 to -0.60).",
        "The pretraining of SAE makes no difference that holds: "
        "-0.10 points of accuracy (95 % interval -0.30 to +0.10).",
        "The pretraining of one makes no difference that holds: -0.10 points of accuracy.",
    ]


def test_resolution_is_where_a_difference_starts_to_hold() -> None:
    edge = resolution(4, 2)
    spread = np.array([-1.0, 1.0, -1.0, 1.0])
    spread /= spread.std(ddof=1)
    held = [compare({"a": spread + size * edge, "b": np.zeros(4)})[0].holds for size in (0.99, 1.01)]
    assert held == [False, True]


def test_unpaired_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 5\), \(3, 5\)"):
        compare({"a": np.zeros((3, 5)), "b": np.zeros((2, 5))})


def both_ways(values: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, ratios: bool = False) -> list[np.ndarray]:
    """Compare rows by the bootstrap and in closed form; return the numbers of all pairs, (pairs, 6), for each."""
    results = []
    for limit in (len(values), len(values) - 1):
        monkeypatch.setattr(statistics, "BOOTSTRAPPED_ROWS", limit)
        results.append(np.array([pair[2:] for pair in compare(values, 20_000, ratios)], np.float64))
    return results


@pytest.mark.parametrize("ratios", [False, True])
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_closed_form_agrees_with_the_bootstrap(seeds: int, ratios: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values = made(np.random.default_rng(seeds), (0, 0.05, 0.1, 0.2), seeds, 500, 0.05 if seeds > 1 else 0.0)
    values = {row: np.exp(found / 4) for row, found in values.items()}
    if seeds > 1:
        values["row3"][2] = np.nan
    drawn, closed = both_ways(values, monkeypatch, ratios)
    assert np.allclose(drawn[:, 0], closed[:, 0]) and (drawn[:, 5] == closed[:, 5]).all()
    width = (closed[:, 2] - closed[:, 1]) / (drawn[:, 2] - drawn[:, 1])
    assert np.all((width > 0.9) & (width < 1.1))
    assert np.allclose(drawn[:, 3], closed[:, 3], atol=0.03)


def test_without_points_the_closed_form_is_the_same_test(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values = {f"row{n}": n / 4 + rng.normal(size=4) for n in range(5)} | {"even": np.ones(4), "alike": np.ones(4)}
    values["row1"][:3] = np.nan
    values["row2"][0] = np.nan
    drawn, closed = both_ways(values, monkeypatch)
    assert np.allclose(drawn, closed, equal_nan=True)


def test_of_many_equal_rows_few_are_found_different() -> None:
    wrong = 0
    for number in range(40):
        values = made(np.random.default_rng(number), (0.0,) * 30, 3, 200, 0.05)
        wrong += any(pair.holds for pair in compare(values))
    assert wrong <= 5


def test_long_lists_of_names_are_cut() -> None:
    assert listed([*"abcdefghijkl"]) == "a, b, c, d, e, f, g, h, i, j, k and l"
    assert listed([*"abcdefghijklm"]) == "a, b, c, d, e, f, g, h, i, j and 3 more"
