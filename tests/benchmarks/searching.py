"""Optuna as a study configures it against random search, on the errors of `tests.benchmarks.noop`."""

import math
import random
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from pipelines.study.search import new_search
from tests.benchmarks.noop import NOISE, error
from tests.benchmarks.tables import show

SPACE = {"lr": (1e-4, 1e-1), "weight_decay": (1e-6, 1e-2)}
COUNTS, IN_FLIGHT, REPEATS = (8, 16, 33, 66, 100), (1, 8, 32), 10
Settings = dict[str, float]
Tell = Callable[[str, float], None]


def optuna(seed: int, count: int) -> tuple[Callable[[str], Settings], Tell]:
    """The next settings, and how to tell of an error, from a search as `pipelines.study.search` makes it."""
    from optuna.distributions import FloatDistribution

    space: Any = {name: FloatDistribution(*bounds, log=True) for name, bounds in SPACE.items()}
    search, trials = new_search(count, seed, highest=False), dict[str, Any]()

    def ask(name: str) -> Settings:
        trials[name] = search.ask(space)
        settings: Settings = trials[name].params
        return settings

    return ask, lambda name, value: void(search.tell(trials.pop(name), value))


def void(value: Any) -> None:
    """Nothing."""


def drawn(seed: int, count: int) -> tuple[Callable[[str], Settings], Tell]:
    """Random search: draws as `pipelines.study.plan` makes them."""
    generator = random.Random(seed)

    def ask(name: str) -> Settings:
        bounds = {setting: (math.log(low), math.log(high)) for setting, (low, high) in SPACE.items()}
        return {setting: math.exp(generator.uniform(*logs)) for setting, logs in bounds.items()}

    return ask, lambda name, value: None


def best_of(search: tuple[Callable[[str], Settings], Tell], seed: int, in_flight: int, count: int) -> float:
    """The error, without its noise, of the settings that look best after all trials.

    Args:
        in_flight: how many trials run at once; they end in random order.
    """
    ask, tell = search
    flying: dict[str, Settings] = {}
    best, started, order = list[tuple[float, float]](), 0, random.Random(seed)
    while len(best) < count:
        while len(flying) < in_flight and started < count:
            flying[str(started)] = ask(str(started))
            started += 1
        name = order.choice(sorted(flying))
        settings = flying.pop(name)
        value, true = (error(kind="plain", seed=seed, noise=noise, **settings) for noise in (NOISE, 0.0))
        tell(name, value)
        best.append(min([(value, true), *best[-1:]]))
    return best[-1][1]


def compare_searches() -> list[dict[str, Any]]:
    """Mean and spread of the error of the best settings over ten repetitions, by how many trials have ended."""
    rows = []
    for name, search in (("random", drawn), ("Optuna", optuna)):
        for in_flight in IN_FLIGHT if search is optuna else IN_FLIGHT[:1]:
            each = {
                count: [best_of(search(seed, count), seed, in_flight, count) for seed in range(REPEATS)]
                for count in COUNTS
            }
            spread = {f"after {count}": f"{mean(of):.3f} ± {stdev(of):.3f}" for count, of in each.items()}
            rows.append({"search": name, "in flight": in_flight, **spread})
    return rows


def show_search(rows: list[dict[str, Any]]) -> None:
    """The table."""
    show(f"Error of the best settings so far, mean and standard deviation of {REPEATS} repetitions (1 is least)", rows)
