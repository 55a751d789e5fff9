"""Champion against challenger: two models on the same test rows."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from aecore.config.specs import ContestSpec
from aecore.data.splits import Arrays, Split, content_hashes
from aecore.data.stream import Stream
from aecore.evaluation.ranking import rank
from aecore.evaluation.reconstruction import row_errors
from aecore.evaluation.scoring import over_batches
from aecore.evaluation.statistics import Gain, gain, ranking_gain
from aecore.models.storage import Result
from aecore.serving.model import Model
from aecore.stages.context import Context, all_test_rows

Scores = dict[str, np.ndarray]
"""A score of each row, (rows,), by model: `champion`, where there is one, and `challenger`."""


class _Tested(NamedTuple):
    """Test rows and their scores."""

    ids: np.ndarray
    """(rows,) hashes of the rows' values."""
    anomaly: np.ndarray
    """(rows,) whether labels tell that the row is an anomaly."""
    scores: Scores

    def take(self, selected: np.ndarray) -> "_Tested":
        """Return the rows for which a mask (rows,) is true."""
        scores = {name: values[selected] for name, values in self.scores.items()}
        return _Tested(self.ids[selected], self.anomaly[selected], scores)


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
        Reconstruction errors are squared errors per feature in the champion's units of the input, of normal rows where
        labels tell anomalies; their difference is a share of the champion's error. The areas under the ROC curve and
        the average precisions are those of the rows compared; rows that are all of one kind have none.
    """
    models = {"challenger": challenger} if champion is None else {"champion": champion, "challenger": challenger}
    tested = _score_test_rows(spec, context, data, models)
    # a model is none the better for reconstructing anomalies
    compared = tested.take(~tested.anomaly) if spec.metric == "reconstruction" else tested
    unit = 1.0
    if spec.metric == "reconstruction" and champion is not None:
        unit = max(float(compared.scores["champion"].mean()), float(np.finfo(np.float32).tiny))
    metrics = _compare(spec, compared, unit)
    if earlier is not None:
        frozen = np.isin(compared.ids, earlier.weights["ids"])
        for name, selected in (("frozen", frozen), ("newest", ~frozen)):
            subset = _compare(spec, compared.take(selected), unit)
            metrics |= {f"{name}/{metric}": value for metric, value in subset.items()}
    config = {
        "facts": spec.facts.model_dump(mode="json"), "split": spec.split, "test": spec.test,
        "test_only": list(spec.test_only),
    }  # fmt: skip
    return Result(config, {"ids": tested.ids}, metrics)


def _score_test_rows(
    spec: ContestSpec, context: Context, data: Arrays | Stream, models: Mapping[str, Result]
) -> _Tested:  # fmt: skip
    """Score all test rows by each of the models; errors are in the units of the first one."""
    built = {name: Model(result, context.device) for name, result in models.items()}
    scale = next(iter(built.values())).prepare.scale
    parts = []
    for rows in all_test_rows(data, context):
        anomaly = np.zeros(len(rows.x), bool)
        if spec.facts.has_anomalies and rows.y is not None:
            anomaly = rows.y == 1
        scores = {name: _score(spec, model, rows, scale) for name, model in built.items()}
        parts.append(_Tested(content_hashes(rows.x), anomaly, scores))
    ids, anomaly = (np.concatenate(column) for column in zip(*(part[:2] for part in parts), strict=True))
    return _Tested(ids, anomaly, {name: np.concatenate([part.scores[name] for part in parts]) for name in models})


def _score(spec: ContestSpec, model: Model, rows: Split, scale: torch.Tensor) -> np.ndarray:
    """Score each row, (rows,): whether its class is predicted; how strange it is; or its squared error per feature in
    units of `scale`, since the two models may have standardised the features differently."""
    if spec.metric == "auroc":
        measured = model.measure(rows.x)
        # models of earlier versions have no score
        return measured.get("score", measured["reconstruction_mse"]).astype(np.float64)
    if spec.metric == "accuracy":
        assert rows.y is not None
        return (model.measure(rows.x)["prediction"] == np.array(spec.facts.classes)[rows.y]).astype(np.float64)
    autoencoder, units = model.autoencoder, scale / model.prepare.scale
    assert autoencoder is not None

    def errors(raw: torch.Tensor) -> torch.Tensor:
        x = model.prepare(raw)
        return row_errors(x * units, autoencoder.reconstruct(x) * units)

    return over_batches(errors, rows.x, model.device, model.batch).cpu().numpy().astype(np.float64)


def _compare(spec: ContestSpec, tested: _Tested, unit: float) -> dict[str, float]:
    """Return the metrics of test rows, with the difference of errors in units of `unit`."""
    metrics, values = {"rows": float(len(tested.ids))}, tested.scores
    if spec.metric == "auroc":
        metrics["anomalies"] = float(tested.anomaly.sum())
        if metrics["anomalies"] in (0, metrics["rows"]):
            return metrics
        ranked = {name: rank(each, tested.anomaly) for name, each in values.items()}
        metrics |= {
            f"{name}/average_precision": float(each["average_precision"].mean()) for name, each in ranked.items()
        }
        values = {name: each["auroc"] for name, each in ranked.items()}
    if len(tested.ids):
        metrics |= {f"{name}/{spec.metric}": float(each.mean()) for name, each in values.items()}
        if "champion" in values:
            found = _gain(spec, values["challenger"] - values["champion"], tested.anomaly, unit)
            metrics |= {"difference": found.mean, "difference_low": found.low, "difference_high": found.high}
    return metrics


def _gain(spec: ContestSpec, difference: np.ndarray, anomaly: np.ndarray, unit: float) -> Gain:
    """Return the challenger's gain, given by how much its values of the rows are larger than the champion's."""
    if spec.metric == "auroc":
        return ranking_gain(difference, anomaly)
    return gain(-difference / unit if spec.metric == "reconstruction" else difference)
