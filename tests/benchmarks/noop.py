"""Stages that compute nothing, for `tests.benchmarks.scale`: they sleep and return what a real stage has returned once.

`record` runs one small study with the real functions and keeps a result of each kind of stage. In the workers of the
fake cluster `function` stands for each function of `aecore.stages` (see `noop_hook`). The numbers of a result are moved
by `error`, a smooth function of two settings with noise, so that there is something to search, to race and to judge.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aecore.core.fingerprint import fingerprint
from aecore.models.storage import Result, load_weights, save_weights

AS_ONE = 1 / 16
"""What a further fit that is trained along adds to the time of one: 32 as one take three times as long, as on a GPU."""
PARTS = {"classify": 0.2, "measure": 0.1, "reference": 0.02}
"""Seconds of stages beside those of the training that NOOP_SECONDS gives, as a share of them."""
BEST = {"lr": 3e-3, "weight_decay": 1e-4}
"""Where `error` is least."""
NOISE = 0.05
KINDS = ("plain", "sparse", "denoising", "contractive", "variational")


def error(lr: float, weight_decay: float, kind: str, seed: int, noise: float = NOISE) -> float:
    """The error of a trial as a multiple of the least: one more at a decade of learning rate from the best, a half more
    at two decades of weight decay, some for the variant, and noise that the seed decides."""
    rate, decay = math.log10(lr / BEST["lr"]), math.log10(max(weight_decay, 1e-12) / BEST["weight_decay"])
    random = np.random.default_rng([seed, abs(hash((round(lr, 12), round(weight_decay, 12)))) % 2**32])
    return max(0.1, 1 + rate**2 + decay**2 / 8 + 0.05 * KINDS.index(kind) + noise * float(random.normal()))


class Prepared(NamedTuple):
    """A training stage that has been prepared."""

    name: str
    spec: Any
    context: Any
    inputs: dict[str, Any]


def record(stages: Iterable[Any], load: Callable[[Any], Any], folder: Path) -> None:
    """Compute stages with their real functions and save the first result of each kind of stage below `folder`.

    Args:
        stages: `pipelines.graph.stage.Stage`s.
        load: Reads the rows of a stage's `LoadSpec`.
    """
    from pipelines.execution.compute import inputs_of

    results: dict[str, Any] = {}

    def result(stage: Any) -> Any:
        if stage.key in results:
            return results[stage.key]
        if not stage.inputs:
            found = load(stage.spec)
        else:
            from aecore.stages.context import Context

            inputs = inputs_of(stage, [result(parent) for parent in stage.parents()])
            found = stage.function()(stage.spec, Context(), **inputs)
            place = folder / kind_of(stage.function().__name__, stage.spec)
            if not place.exists():
                save_weights(place, {**found.config, "metrics": found.metrics}, found.weights)
        results[stage.key] = found
        return found

    for stage in stages:
        result(stage)


def kind_of(name: str, spec: Any) -> str:
    """The kind of a stage: stages of a kind have results of the same parts."""
    variant = getattr(spec, "variant", None)
    parts = [name, getattr(spec, "task", ""), getattr(spec, "kind", ""), variant.kind if variant else "none"]
    return "-".join(filter(None, [*parts, "pictures" if getattr(spec, "pictures", False) else ""]))


@cache
def recorded(kind: str) -> Result:
    """The result that was recorded for a kind of stage, else for one of the same function."""
    folder = Path(os.environ["NOOP_RESULTS"])
    place = next(iter([folder / kind] * (folder / kind).exists() or sorted(folder.glob(f"{kind.split('-')[0]}*"))))
    config, weights = load_weights(place)
    return Result(config, weights, config.pop("metrics"))


def function(module: str, name: str) -> Callable[..., Any]:
    """What stands for a function of `aecore.stages`."""
    if name == "prepare":
        return partial(prepare, {"pretrain": "pretrain_layer"}.get(module, module))
    if name == "train_as_one":
        return lambda trainings, everywhere=False: compute(list(trainings))
    return partial(alone, name)


def prepare(name: str, spec: Any, context: Any, **inputs: Any) -> Prepared:
    """The first half of a training stage."""
    return Prepared(name, spec, context, inputs)


def alone(name: str, spec: Any, context: Any, **inputs: Any) -> Result:
    """A stage by itself."""
    return compute([Prepared(name, spec, context, inputs)])[0]


def compute(works: list[Prepared]) -> list[Result]:
    """Sleep as long as these stages would take as one, epoch by epoch; note it; return their results."""
    first, began = works[0], time.time()
    share = PARTS.get(getattr(first.spec, "task", first.name), PARTS.get(first.name, 1.0))
    seconds = float(os.environ["NOOP_SECONDS"]) * share * (1 + AS_ONE * (len(works) - 1))
    results = [outcome(work) for work in works]
    fit = getattr(first.spec, "fit", None)
    epochs = fit.epochs if fit else 0
    for epoch in range(epochs):
        time.sleep(seconds / epochs)
        for work, result in zip(works, results, strict=True):
            work.context.report(epoch + 1, {**result.config["history"][epoch], "time": time.time()})
    if not epochs:
        time.sleep(seconds)
    for result in results if epochs else ():
        result.metrics["train_seconds"] = seconds / len(works)
    note(works, results, began)
    return results


def outcome(work: Prepared) -> Result:
    """The recorded result of such a stage, its numbers moved by the error of the trial."""
    result = recorded(kind_of(work.name, work.spec))
    before = [one for value in work.inputs.values() for one in (value if isinstance(value, list) else [value])]
    before = [one.config["noop"] for one in before if isinstance(one, Result)]
    identity = fingerprint(work.name, work.spec, [one["identity"] for one in before])
    fit, variant = getattr(work.spec, "fit", None), getattr(work.spec, "variant", None)
    times = next((one["error"] for one in before), 1.0)
    if fit and variant:
        times = error(fit.lr, fit.weight_decay, variant.kind, work.spec.seed)
    metrics = moved(result.metrics, times)
    history = [moved(epoch, times) for epoch in result.config.get("history", ())]
    if fit:
        history = [history[min(number, len(history) - 1)] for number in range(fit.epochs)]
        metrics["epochs"] = fit.epochs
    weights = dict(result.weights)
    if "sse" in weights:
        random = np.random.default_rng(int(identity[:8], 16))
        weights["sse"] = (weights["sse"] * times * random.uniform(0.9, 1.1, weights["sse"].shape)).astype("float32")
    config = {**result.config, "noop": {"identity": identity, "error": times}}
    return Result(config | ({"history": history} if "history" in config else {}), weights, metrics)


def moved(metrics: Mapping[str, float], times: float) -> dict[str, float]:
    """Metrics with errors of reconstruction that are so many times as large."""
    return {n: value * times if n.endswith(("_mse", "reconstruction")) else value for n, value in metrics.items()}


def note(works: list[Prepared], results: list[Result], began: float) -> None:
    """Append a line of JSON about a call that returns."""
    first = works[0]
    line = {
        "kind": first.name, "task": getattr(first.spec, "task", ""), "began": began, "ended": time.time(),
        "process": os.getpid(), "trials": [result.config["noop"]["identity"][:16] for result in results],
        "errors": [result.metrics.get("val/reconstruction_mse") for result in results],
    }  # fmt: skip
    with open(os.environ["NOOP_NOTES"], "a") as file:
        file.write(json.dumps(line) + "\n")
