"""Champion against challenger: two models on the same test rows."""

import numpy as np
import torch

from aecore.config.specs import ContestSpec
from aecore.data.splits import Arrays, Split, content_hashes
from aecore.data.stream import Stream
from aecore.evaluation.reconstruction import row_errors
from aecore.evaluation.scoring import over_batches
from aecore.evaluation.statistics import gain
from aecore.models.storage import Result
from aecore.serving.model import Model
from aecore.stages.context import Context, all_test_rows

Scores = dict[str, np.ndarray]
"""A score of each row, (rows,), by model: `champion`, where there is one, and `challenger`."""


def contest(
    spec: ContestSpec, context: Context, *, data: Arrays | Stream, challenger: Result, champion: Result | None = None,
    earlier: Result | None = None,
) -> Result:  # fmt: skip
    """Score both models on the test rows, row by row, and compare them in pairs: on all rows, on those that were test
    rows already when the champion was made (`frozen/`), and on those that came since (`newest/`).

    Args:
        champion: None where there is none yet.
        earlier: the result of the contest that the champion has won.

    Returns:
        Metrics of both models and their `difference` with a 95 % interval, positive where the challenger is better,
        each for all rows and again below `frozen/` and `newest/`; the `ids` (rows,) of the test rows in `weights`; in
        `config` the facts of the data and how they were split. Accuracies and their difference are shares of the rows.
        Reconstruction errors are squared errors per feature in the champion's units of the input; their difference is a
        share of the champion's error.
    """
    models = {"challenger": Model(challenger, context.device)}
    if champion is not None:
        models = {"champion": Model(champion, context.device), **models}
    scale = next(iter(models.values())).prepare.scale
    ids, parts = [], []
    for rows in all_test_rows(data, context):
        ids.append(content_hashes(rows.x))
        parts.append({name: _score(spec, model, rows, scale) for name, model in models.items()})
    known = np.concatenate(ids)
    scores = {name: np.concatenate([part[name] for part in parts]) for name in models}
    metrics = _compare(spec, scores, np.ones(len(known), bool), "")
    if earlier is not None:
        frozen = np.isin(known, earlier.weights["ids"])
        metrics |= _compare(spec, scores, frozen, "frozen/") | _compare(spec, scores, ~frozen, "newest/")
    config = {"facts": spec.facts.model_dump(mode="json"), "split": spec.split, "test": spec.test}
    return Result(config, {"ids": known}, metrics)


def _compare(spec: ContestSpec, scores: Scores, rows: np.ndarray, prefix: str) -> dict[str, float]:
    """Return the metrics of the rows that the mask `rows` (rows,) selects, named with `prefix`."""
    metrics = {"rows": float(rows.sum())}
    if rows.any():
        metrics |= {f"{name}/{spec.metric}": float(values[rows].mean()) for name, values in scores.items()}
    if rows.any() and "champion" in scores:
        better = (scores["challenger"] - scores["champion"])[rows]
        if spec.metric == "reconstruction":
            better = -better / max(float(scores["champion"].mean()), np.finfo(np.float32).tiny)
        found = gain(better)
        metrics |= {"difference": found.mean, "difference_low": found.low, "difference_high": found.high}
    return {prefix + name: value for name, value in metrics.items()}


def _score(spec: ContestSpec, model: Model, rows: Split, scale: torch.Tensor) -> np.ndarray:
    """Score each row, (rows,): whether its class is predicted, or its squared error per feature in units of `scale`,
    since the two models may have standardised the features differently."""
    if spec.metric == "accuracy":
        assert rows.y is not None
        return (model.measure(rows.x)["prediction"] == np.array(spec.facts.classes)[rows.y]).astype(np.float64)
    autoencoder, units = model.autoencoder, scale / model.prepare.scale
    assert autoencoder is not None

    def errors(raw: torch.Tensor) -> torch.Tensor:
        x = model.prepare(raw)
        return row_errors(x * units, autoencoder.reconstruct(x) * units)

    return over_batches(errors, rows.x, model.device, model.batch).cpu().numpy().astype(np.float64)
