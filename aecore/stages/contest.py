"""Champion against challenger: two models on the same test rows."""

import numpy as np
import torch

from aecore.config.specs import ContestSpec
from aecore.data.splits import Arrays, Split, row_ids
from aecore.data.stream import Stream
from aecore.evaluation import metrics
from aecore.evaluation.statistics import gain
from aecore.models.storage import Result
from aecore.serving.model import Model
from aecore.stages.context import Run, all_test_rows


def contest(
    spec: ContestSpec, run: Run, *, data: Arrays | Stream, challenger: Result, champion: Result | None = None,
    earlier: Result | None = None,
) -> Result:  # fmt: skip
    """Score both models on the test rows, row by row, and compare them, paired: on all rows, on those that were test
    rows already when the champion was made (frozen), and on those that came since (newest).

    Args:
        champion: None where there is none yet.
        earlier: the contest that the champion has won.

    Returns:
        Metrics of both models and their `difference`, positive where the challenger is better, each also below
        `frozen/` and `newest/`; `ids` (rows,) of the test rows in `weights`; in `config` what the data were like.
        A difference of accuracies is one of shares; one of reconstruction errors, squared, a feature, in the champion's
        units of the input, is a share of the champion's.
    """
    models = {
        name: Model(result, run.device)
        for name, result in (("champion", champion), ("challenger", challenger))
        if result is not None
    }
    scale = models["champion" if champion else "challenger"].prepare.scale
    scored: dict[str, list[np.ndarray]] = {name: [] for name in models}
    seen: list[np.ndarray] = []
    for rows in all_test_rows(data, run):
        seen.append(row_ids(rows.x))
        for name, model in models.items():
            scored[name].append(_scores(spec, model, rows, scale))
    ids = np.concatenate(seen)
    scores = {name: np.concatenate(parts) for name, parts in scored.items()}
    if earlier is None:
        parts = {"": np.ones(len(ids), bool)}
    else:
        frozen = np.isin(ids, earlier.weights["ids"])
        parts = {"": frozen | True, "frozen/": frozen, "newest/": ~frozen}
    found: dict[str, float] = {}
    for prefix, own in parts.items():
        found[f"{prefix}rows"] = float(own.sum())
        if own.any():
            found |= {f"{prefix}{name}/{spec.metric}": float(values[own].mean()) for name, values in scores.items()}
        if champion and own.any():
            better = (scores["challenger"] - scores["champion"])[own]
            if spec.metric == "reconstruction":
                better = -better / max(float(scores["champion"].mean()), np.finfo(np.float32).tiny)
            _, *interval = gain(better)
            names = ("difference", "difference_low", "difference_high")
            found |= {prefix + name: value for name, value in zip(names, interval, strict=True)}
    config = {"facts": spec.facts.model_dump(mode="json"), "split": spec.split, "test": spec.test}
    return Result(config, {"ids": ids}, found)


def _scores(spec: ContestSpec, model: Model, rows: Split, scale: torch.Tensor) -> np.ndarray:
    """Of each row (rows,): whether its class is the one predicted, or its squared error a feature in units of `scale`,
    since each model may be trained on features that were standardised another day."""
    if spec.metric == "accuracy":
        assert rows.y is not None
        return (model.measure(rows.x)["prediction"] == np.array(spec.facts.classes)[rows.y]).astype(np.float64)
    autoencoder, units = model.autoencoder, scale / model.prepare.scale
    assert autoencoder is not None

    def errors(raw: torch.Tensor) -> torch.Tensor:
        x = model.prepare(raw)
        return metrics.row_errors(x * units, autoencoder.reconstruct(x) * units)

    return metrics.over_batches(errors, rows.x, model.device, model.batch).cpu().numpy().astype(np.float64)
