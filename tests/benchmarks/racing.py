"""python -m tests.benchmarks.racing [--replays 100] [--values FILE]

What racing keeps and what it saves. The default study is trained with ten seeds, without Ray and MLflow; FILE keeps its
values per test row for the next time. A replay draws a new study from these: seeds from the normal distribution with
the mean and covariance that the ten seeds have, jointly over study rows and test rows, and test rows with replacement.
On each replay the full study and the race are judged as the report judges them, in closed form, and their winner sets
are compared. `steady` says how often the full study itself finds its most frequent winner set: a race cannot know what
the full study finds where that is a matter of luck.

Synthetic studies of eight rows without references are replayed, too. Their gaps are in standard deviations of a row
over seeds, of which seeds have 0.7 in common.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from aecore.config.experiment import overlay
from aecore.config.specs import LoadSpec, Numerics
from aecore.data.dataset import inspect
from aecore.evaluation.racing import GOALS, Goal, drop, rounds
from aecore.evaluation.statistics import compare
from aecore.evaluation.trial import REFERENCES
from aecore.evaluation.verdicts import judge
from aecore.stages.context import Context
from pipelines.execution.compute import inputs_of, load_rows, stages_below
from pipelines.graph.stage import Stage
from pipelines.study.plan import plan_trials
from pipelines.study.schema import Study
from tests.benchmarks.tables import last, show
from tests.benchmarks.timeline import ROOT

TRAINED_SEEDS, PLANNED = 10, (3, 5, 10)
GAPS = {
    "eight equal rows": (0, 0, 0, 0, 0, 0, 0, 0),
    "three equal, five far behind": (0, 0, 0, 6, 8, 10, 15, 20),
    "three equal, five behind": (0, 0, 0, 2, 3, 4, 5, 6),
    "one ahead by 5": (0, 5, 5, 5, 6, 8, 10, 15),
    "one ahead by 2": (0, 2, 2, 2, 3, 4, 5, 6),
    "a ladder of steps of 1": (0, 1, 2, 3, 4, 5, 6, 7),
}
Values = dict[str, np.ndarray]
"""For each study row its values, (seeds, test rows)."""
Draw = Callable[[np.random.Generator, int], Values]
"""Draws the values of a replay with so many seeds."""


class Race(NamedTuple):
    """What a race has found on one replay, and what it has spent."""

    best: frozenset[str]
    dropped: frozenset[str]
    trials: int


def trained(path: Path | None) -> Values:
    """Return the values of the default study with ten seeds, by "points:row"; read from `path` or trained."""
    if path and path.exists():
        return dict(np.load(path))
    torch.set_num_threads(1)
    recipe = yaml.safe_load((ROOT / "jobs/recipes/study_digits.yaml").read_text())
    recipe = overlay(recipe, {"seeds": list(range(TRAINED_SEEDS)), "labels": {"counts": []}})
    study = Study.model_validate(overlay(Study().model_dump(), recipe))
    values: dict[str, list[np.ndarray]] = {}
    results: dict[str, Any] = {}
    for plan in plan_trials(study, inspect(study.base.data), Numerics()):
        for stage in [*stages_below(plan.stage), plan.stage]:
            results[stage.key] = results.get(stage.key) or _computed(stage, results)
        for goal in GOALS.values():
            values.setdefault(f"{goal.points}:{plan.row}", []).append(results[plan.stage.key].weights[goal.points])
        print(plan.name, flush=True)
    arrays = {name: np.stack(rows).astype(np.float64) for name, rows in values.items()}
    if path:
        np.savez_compressed(path, allow_pickle=False, **arrays)
    return arrays


def _computed(stage: Stage, results: Mapping[str, Any]) -> Any:
    if isinstance(stage.spec, LoadSpec):
        return load_rows(stage.spec)
    inputs = inputs_of(stage, [results[parent.key] for parent in stage.parents()])
    return stage.function()(stage.spec, Context(), **inputs)


def resampled(values: Values) -> Draw:
    """Return what draws replays of a trained study."""
    table = np.stack(list(values.values()))
    mean = table.mean(1, keepdims=True)
    deviations = (table - mean) / np.sqrt(table.shape[1] - 1)

    def draw(rng: np.random.Generator, seeds: int) -> Values:
        points = rng.integers(table.shape[2], size=table.shape[2])
        weights = rng.normal(size=(seeds, table.shape[1]))
        return dict(zip(values, mean[:, :, points] + weights @ deviations[:, :, points], strict=True))

    return draw


def synthetic(gaps: tuple[int, ...]) -> Draw:
    """Return what draws studies of rows that are behind by these gaps; test rows spread as much as seeds."""

    def draw(rng: np.random.Generator, seeds: int) -> Values:
        common = 0.7 * rng.normal(size=(seeds, 1)) + 3 * rng.normal(size=100)
        return {
            f"row{n}": common - gap + rng.normal(size=(seeds, 1)) + rng.normal(size=100) + rng.normal(size=(seeds, 100))
            for n, gap in enumerate(gaps)
        }

    return draw


def winners(values: Values, goal: Goal, dropped: frozenset[str] = frozenset()) -> frozenset[str]:
    """Return the winner set as the report finds it; dropped rows count as worse."""
    pairs = compare(values, replicates=0, ratios=goal.ratios)
    means = {row: float(np.nanmean(array)) for row, array in values.items() if row not in dropped}
    return frozenset(judge(means, pairs, goal.higher).best) if len(means) > 1 else frozenset(means)


def race(values: Values, goal: Goal, planned: int) -> Race:
    """Race on a replay. The references have the seeds that the last row in the race has."""
    racers = [row for row in values if row not in REFERENCES]
    seen = {row: np.empty((0, array.shape[1])) for row, array in values.items()}
    dropped: frozenset[str] = frozenset()
    trials = done = 0
    for seeds in rounds(range(planned)):
        done += len(seeds)
        for row, array in values.items():
            new = np.full((len(seeds), array.shape[1]), np.nan) if row in dropped else array[list(seeds)]
            seen[row] = np.vstack([seen[row], new])
        trials += len(seeds) * (len(racers) - len(dropped))
        if done < planned:
            now = drop({row: seen[row] for row in racers}, goal, planned, dropped)
            dropped |= {one.row for one in now}
        if len(racers) - len(dropped) == 1:
            break
    return Race(winners(seen, goal, dropped), dropped, trials)


def replayed(draw: Draw, goal: Goal, planned: int, replays: int) -> dict[str, Any]:
    """Return a line of the table: how often race and full study agree, and what the race spends, in percent."""
    full: list[frozenset[str]] = []
    races: list[Race] = []
    count = 0
    for number in range(replays):
        values = draw(np.random.default_rng([planned, number]), planned)
        count = planned * sum(row not in REFERENCES for row in values)
        full.append(winners(values, goal))
        races.append(race(values, goal, planned))
    pairs = list(zip(full, races, strict=True))
    shares: dict[str, Any] = {
        "agree": np.mean([best == one.best for best, one in pairs]),
        "steady": Counter(full).most_common(1)[0][1] / replays,
        "a winner was dropped": np.mean([bool(best & one.dropped) for best, one in pairs]),
        "trials": np.mean([one.trials / count for one in races]),
        "trials, most": max(one.trials / count for one in races),
    }
    winner = "/".join(f"{size}" for size in sorted({len(best) for best in full}))
    return {"seeds": planned, "winners": winner} | {f"{k} %": round(100 * float(v)) for k, v in shares.items()}


def cases(values: Values) -> Iterator[tuple[str, Draw, Goal]]:
    """Yield the studies that are replayed: the trained one by each measure, and the synthetic ones."""
    for choose, goal in GOALS.items():
        rows = {name.partition(":")[2]: rows for name, rows in values.items() if name.startswith(f"{goal.points}:")}
        yield f"digits, {choose}", resampled(rows), goal
        if choose == "reconstruction":
            close = {name: array for name, array in rows.items() if name != "overcomplete"}
            yield f"digits, {choose}, without the winner", resampled(close), goal
    for name, gaps in GAPS.items():
        yield name, synthetic(gaps), Goal("", "", True, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replays", type=int, default=100)
    parser.add_argument("--values", type=Path, help="file (.npz) to keep the trained study's values in")
    args = parser.parse_args()
    start = time.monotonic()
    lines = []
    for name, draw, goal in cases(trained(args.values)):
        for planned in PLANNED:
            lines.append({"study": name} | replayed(draw, goal, planned, args.replays))
            print(lines[-1], flush=True)
    show(f"{args.replays} replays each", lines)
    last({"replays": lines, "seconds": time.monotonic() - start})


if __name__ == "__main__":
    main()
