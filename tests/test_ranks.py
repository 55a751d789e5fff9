"""Mean ranks of study rows over data sets."""

import numpy as np
import pytest
from scipy import stats

from aecore.evaluation.figures.ranks import critical_difference
from aecore.evaluation.figures.trials import Look
from aecore.evaluation.ranks import Ranks, compare_ranks


def draw(seed: int, rows: int = 5, sets: int = 20, gap: float = 0.0) -> dict[str, dict[str, float]]:
    """Draw values of rows, each by `gap` better than the one before."""
    values = np.random.default_rng(seed).normal(size=(rows, sets)) + gap * np.arange(rows)[:, None]
    return {f"row {n}": {f"set {m}": float(v) for m, v in enumerate(each)} for n, each in enumerate(values)}


def test_the_first_test_is_friedmans_in_the_form_of_iman_and_davenport() -> None:
    values = draw(0, gap=0.3)
    table = np.array([[*each.values()] for each in values.values()])
    chi = stats.friedmanchisquare(*table).statistic
    rows, sets = table.shape
    p = stats.f.sf((sets - 1) * chi / (sets * (rows - 1) - chi), rows - 1, (rows - 1) * (sets - 1))
    assert compare_ranks(values, higher=True).p == pytest.approx(p)


def test_the_example_of_demsar() -> None:
    """Demsar 2006, table 6: four classifiers on 14 sets; ranks 3.143, 2.000, 2.893, 1.964 and CD 1.25 (sec. 3.2.4)."""
    table = [
        (0.763, 0.768, 0.771, 0.798), (0.599, 0.591, 0.590, 0.569), (0.954, 0.971, 0.968, 0.967),
        (0.628, 0.661, 0.654, 0.657), (0.882, 0.888, 0.886, 0.898), (0.936, 0.931, 0.916, 0.931),
        (0.661, 0.668, 0.609, 0.685), (0.583, 0.583, 0.563, 0.625), (0.775, 0.838, 0.866, 0.875),
        (1.000, 1.000, 1.000, 1.000), (0.940, 0.962, 0.965, 0.962), (0.619, 0.666, 0.614, 0.669),
        (0.972, 0.981, 0.9751, 0.975), (0.957, 0.978, 0.946, 0.970),
    ]  # fmt: skip
    names = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")
    values = {name: {str(n): line[column] for n, line in enumerate(table)} for column, name in enumerate(names)}
    found = compare_ranks(values, higher=True)
    assert found.means == pytest.approx({"C4.5": 3.143, "C4.5+m": 2.0, "C4.5+cf": 2.893, "C4.5+m+cf": 1.964}, abs=1e-3)
    assert found.critical_difference == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 14)), abs=2e-3)
    assert found.p < 0.05 and next(iter(found.means)) == "C4.5+m+cf"


def test_few_studies_without_a_difference_find_one() -> None:
    found = [compare_ranks(draw(seed), higher=True) for seed in range(300)]
    assert np.mean([np.isfinite(one.critical_difference) for one in found]) < 0.08
    assert all(one.groups == (tuple(one.means),) for one in found if not np.isfinite(one.critical_difference))


@pytest.mark.parametrize("higher", [True, False])
def test_differences_are_found_and_ordered(higher: bool) -> None:
    found = compare_ranks(draw(1, gap=2.0, sets=40), higher)
    expected = [f"row {n}" for n in range(5)]
    assert list(found.means) == (expected[::-1] if higher else expected)
    assert found.p < 1e-6 and all(len(group) < 5 for group in found.groups)
    values = [*found.means.values()]
    for group in found.groups:
        assert found.means[group[-1]] - found.means[group[0]] <= found.critical_difference
    assert values[-1] - values[0] > found.critical_difference


def test_sets_that_lack_a_row_are_left_out_and_equal_values_share_ranks() -> None:
    values = draw(2, rows=3, sets=6)
    values["row 1"]["set 0"] = float("nan")
    del values["row 2"]["set 1"]
    assert compare_ranks(values, higher=True).sets == 4
    same = {name: dict.fromkeys(map(str, range(5)), 0.7) for name in ("a", "b", "c")}
    assert compare_ranks(same, higher=True) == Ranks(
        dict.fromkeys(("a", "b", "c"), 2.0), 5, 1.0, np.inf, (("a", "b", "c"),)
    )


def test_two_sets_that_agree_prove_nothing() -> None:
    values = {row: {"a": float(n), "b": float(n)} for n, row in enumerate("xyz")}
    found = compare_ranks(values, higher=True)
    assert found.p == pytest.approx(1 / 6) and found.critical_difference == np.inf


@pytest.mark.parametrize("sets", [0, 1])
def test_one_set_compares_nothing(sets: int) -> None:
    found = compare_ranks(draw(3, sets=sets), higher=True)
    assert np.isnan(found.p) and found.critical_difference == np.inf


@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_the_diagram_is_drawn(gap: float) -> None:
    found = compare_ranks(draw(4, rows=12, gap=gap), higher=True)
    png = critical_difference(found, {row: Look("#000000", "-") for row in found.means})
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
