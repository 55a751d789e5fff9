"""What a pipeline is made of: pure functions of (spec, inputs).

Each takes a hashed spec and the results of the stages it stands on, and returns a `Result`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn

from aecore.config.specs import PretrainSpec
from aecore.core.fingerprint import derive_seed
from aecore.data.splits import Arrays
from aecore.data.stream import Stream
from aecore.models.layers import Layer
from aecore.models.rebuild import build_layer, get_weights
from aecore.models.storage import Result
from aecore.stages.context import Run
from aecore.stages.rows import _rows, prepared
from aecore.training.fit import Fitted
from aecore.training.objective import Objective


def pretrain_layer(spec: PretrainSpec, run: Run, *, data: Arrays | Stream, below: Sequence[Result] = ()) -> Result:
    """Train one layer by its variant's loss on the codes of the frozen layers below (Bengio et al. 2006).

    The codes are computed here, on this device, without noise or dropout; they never travel.
    """
    prepare = prepared(data, run.device)
    layers = [build_layer(result).to(run.device).eval() for result in below]
    read: nn.Module = nn.Sequential(prepare, *(layer.encoder for layer in layers)).requires_grad_(False)
    train, validation, read = _rows(data, read, run, prod(spec.layer.in_shape), labelled=False)
    seed = derive_seed(spec.seed, "pretrain", spec.number)
    with _seeded(seed):
        layer = Layer(spec.layer).to(run.device)

        fitted = run.fit(
            layer, Objective(layer, read, spec.variant), train, validation, spec.fit, seed=seed, device=run.device,
            precision=spec.numerics.precision, compile=spec.numerics.compile, report=run.report,
            scoring_rows=spec.layer.scoring_rows, team=run.team, checkpoints=run.checkpoints,
            parts=run.parts,
        )  # fmt: skip
    config = {"layer": spec.layer.model_dump(mode="json"), **_curves(fitted)}
    return Result(config, get_weights(layer), _summary(fitted))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds torch's global generators for a block and restores them after it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _curves(fitted: Fitted) -> dict[str, Any]:
    return {"history": fitted.history, "best_epoch": fitted.best_epoch}


def _summary(fitted: Fitted) -> dict[str, float]:
    best = fitted.history[fitted.best_epoch - 1]
    # named apart from the curves, whose last point is the last epoch's
    kept = {name.replace("val/", "best/"): value for name, value in best.items() if name.startswith("val/")}
    return {
        **kept,
        "best_epoch": fitted.best_epoch,
        "epochs": len(fitted.history),
        "train_seconds": sum(epoch["seconds"] for epoch in fitted.history),  # of all attempts
    }
