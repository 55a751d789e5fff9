"""Optuna as a study configures it against random search, on the errors of `tests.benchmarks.noop`."""

import math
import random
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from tests.benchmarks.noop import NOISE, error
from tests.benchmarks.tables import show

SPACE = {"lr": (1e-4, 1e-1), "weight_decay": (1e-6, 1e-2)}
COUNTS, IN_FLIGHT, REPEATS = (8, 16, 33, 66, 100), (1, 8, 32), 10
Settings = dict[str, float]
Tell = Callable[[str, float], None]


def optuna(seed: int) -> tuple[Callable[[str], Settings], Tell]:
    """The next settings, and how to tell of an error, from the searcher that `pipelines.study.search` makes."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    space = {name: tune.loguniform(*bounds) for name, bounds in SPACE.items()}
    search = OptunaSearch(space, metric="chosen", mode="min", seed=seed)

    def ask(name: str) -> Settings:
        settings: Any = search.suggest(name)
        return settings

    return ask, lambda name, value: search.on_trial_complete(name, {"chosen": value})


def drawn(seed: int) -> tuple[Callable[[str], Settings], Tell]:
    """Random search: draws as `pipelines.study.plan` makes them."""
    generator = random.Random(seed)

    def ask(name: str) -> Settings:
        bounds = {setting: (math.log(low), math.log(high)) for setting, (low, high) in SPACE.items()}
        return {setting: math.exp(generator.uniform(*logs)) for setting, logs in bounds.items()}

    return ask, lambda name, value: None


def best_so_far(search: tuple[Callable[[str], Settings], Tell], seed: int, in_flight: int) -> list[float]:
    """The error, without its noise, of the settings that look best after each trial that ends.

    Args:
        in_flight: how many trials run at once; they end in random order.
    """
    ask, tell = search
    flying: dict[str, Settings] = {}
    best, started, order = list[tuple[float, float]](), 0, random.Random(seed)
    while len(best) < max(COUNTS):
        while len(flying) < in_flight and started < max(COUNTS):
            flying[str(started)] = ask(str(started))
            started += 1
        name = order.choice(sorted(flying))
        settings = flying.pop(name)
        value, true = (error(kind="plain", seed=seed, noise=noise, **settings) for noise in (NOISE, 0.0))
        tell(name, value)
        best.append(min([(value, true), *best[-1:]]))
    return [true for _, true in best]


def compare_searches() -> list[dict[str, Any]]:
    """Mean and spread of the error of the best settings over ten repetitions, by how many trials have ended."""
    import logging

    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    __import__("optuna").logging.set_verbosity(30)
    rows = []
    for name, search in (("random", drawn), ("Optuna", optuna)):
        for in_flight in IN_FLIGHT if search is optuna else IN_FLIGHT[:1]:
            found = [best_so_far(search(seed), seed, in_flight) for seed in range(REPEATS)]
            each = {count: [best[count - 1] for best in found] for count in COUNTS}
            spread = {f"after {count}": f"{mean(of):.3f} ± {stdev(of):.3f}" for count, of in each.items()}
            rows.append({"search": name, "in flight": in_flight, **spread})
    return rows


def show_search(rows: list[dict[str, Any]]) -> None:
    """The table."""
    show(f"Error of the best settings so far, mean and standard deviation of {REPEATS} repetitions (1 is least)", rows)
