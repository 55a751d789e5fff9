"""The finetuned model as MLflow serves it: raw rows in, a table out. It is loaded from safetensors and JSON alone."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from aecore.anomaly.reasons import Reason, Reasons
from aecore.anomaly.score import FittedScore, NeighbourScore
from aecore.config.facts import columns_of, has_no_names, nameless
from aecore.evaluation.reconstruction import row_errors
from aecore.evaluation.scoring import TrainedStack, as_trained, precision_of
from aecore.models import generation
from aecore.models.rebuild import build_autoencoder, build_classifier, build_prepare
from aecore.models.spec import LayerSpec
from aecore.models.storage import Result, load_weights
from aecore.serving.table import read_array, read_table, write_table


class Model:
    """The finetuned model behind its preprocessing; it reads raw rows (rows, *shape) as the data set holds them."""

    def __init__(self, result: Result, device: torch.device | None = None) -> None:
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device, self.classes = device, np.array(result.config["classes"])
        self.prepare = build_prepare(result).to(device)
        self.columns = columns_of(result.config)
        self.precision, autoencoder = precision_of(result), build_autoencoder(result)
        self.autoencoder = TrainedStack(autoencoder, self.precision, device) if autoencoder is not None else None
        self.classifier = build_classifier(result).to(device).eval() if result.config["task"] == "classify" else None
        self.batch = LayerSpec.model_validate(result.config["layers"][0]).scoring_rows
        self.errors = np.sort(result.weights.get("reference.error", np.empty(0, np.float32)))
        self.score: NeighbourScore | None = None
        if self.autoencoder is not None and (fitted := FittedScore.from_weights(result.weights)):
            self.score, self.usual_scores = NeighbourScore(self.autoencoder, fitted), fitted.scores

    def measure(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return `code` (rows, units) and the other columns of `predict` by name, each with one entry per row, without
        `reasons`, for which see `explain`."""
        with torch.inference_mode():
            parts = [self._measure(torch.tensor(rows[batch], device=self.device)) for batch in self._batches(rows)]
        columns = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
        if "prediction" in columns:
            columns["prediction"] = self.classes[columns["prediction"]]
        if self.score is not None:
            columns["anomaly_score"] = _percentage(self.usual_scores, columns["score"])
        elif len(self.errors):
            columns["anomaly_score"] = _percentage(self.errors, columns["reconstruction_mse"])
        return columns

    def explain(self, rows: np.ndarray, scores: np.ndarray) -> list[list[Reason]]:
        """Return for rows with these values of `score` the features that add most to it, the largest first. This takes
        about three times as long as the scores."""
        assert self.score is not None
        reasons = Reasons(self.score, self.prepare, self.columns)
        with torch.inference_mode():
            parts = [
                reasons.of(*(torch.tensor(array[batch], device=self.device) for array in (rows, scores)))
                for batch in self._batches(rows)
            ]
        return [row for part in parts for row in part]

    def _batches(self, rows: np.ndarray) -> list[slice]:
        """Divide rows; no rows are one batch."""
        return [slice(start, start + self.batch) for start in range(0, max(1, len(rows)), self.batch)]

    def _measure(self, raw: Tensor) -> dict[str, Tensor]:
        x = self.prepare(raw)
        columns = {}
        if self.classifier is not None:
            with as_trained(self.precision, self.device):
                code = self.classifier.encode(x).flatten(1)
                logits = self.classifier.head(code)
            best = logits.float().softmax(1).max(1)
            columns = {"code": code.float(), "prediction": best.indices, "probability": best.values}
        if self.autoencoder is not None:
            code = self.autoencoder.encode(x)
            columns.setdefault("code", code.flatten(1))
            columns["reconstruction_mse"] = row_errors(x, self.autoencoder.mean(code))
        if self.score is not None:
            columns["score"] = self.score.score(x)
        return columns

    def decode(self, code: np.ndarray) -> np.ndarray:
        """Return raw rows (rows, *shape): the reconstructions that an autoencoder's codes (rows, units) stand for."""
        assert self.classifier is None and self.autoencoder is not None
        shape = self.autoencoder.code_shape
        with torch.inference_mode():
            parts = torch.tensor(code, device=self.device).view(-1, *shape).split(self.batch)
            return self._raw(torch.cat([self.autoencoder.mean(part) for part in parts]))

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Return raw rows (count, *shape) drawn from the prior of a variational autoencoder."""
        assert self.classifier is None and self.autoencoder is not None
        with torch.inference_mode():
            return self._raw(generation.samples(self.autoencoder, count, seed))

    def _raw(self, x: Tensor) -> np.ndarray:
        """Return rows that the first layer reads as the data set holds them; float64 where a number was subtracted."""
        raw = self.prepare.inverse(x).cpu().numpy()
        offsets = self.columns.cell_offsets
        return raw.astype(np.float64) + np.array(offsets, np.float64) if offsets else raw

    def as_served(self, rows: np.ndarray) -> Any:
        """Return rows (rows, *shape) as `predict` is asked for them: a frame with names for a model of a table."""
        return write_table(rows, self.columns) if self.columns.features else rows

    def predict(self, rows: Any, params: dict | None = None) -> pd.DataFrame:
        """Return a table with one line per row; MLflow calls this, with `params` that the model has no use for.

        The columns are

        - `code`;
        - of a classifier `prediction`, a class, and `probability`, that of the class;
        - of an autoencoder, which may be the one that a classifier was finetuned from, `reconstruction_mse`, the
          squared error per feature;
        - of a model that keeps `anomaly.*` weights `score`, how strange the row is, see `NeighbourScore`;
        - `anomaly_score`, the percentage of the reference rows whose score is no larger or, where the model has no
          score, that are reconstructed no worse;
        - with a score `reasons`: for each row the features that add most to it, as records, see `Reason`.

        Args:
            rows: an array (rows, *shape); a model of a table also reads what `table.read_table` describes.

        Raises:
            InputError: columns are missing or unknown, or a value is not finite, of another kind or, for a model that
                was not trained with missing values, missing.
        """
        raw = (
            read_table(rows, self.columns)
            if self.columns.features
            else read_array(rows, self.columns.missing == "impute")
        )
        columns = self.measure(raw)
        table = pd.DataFrame({name: list(column) if column.ndim > 1 else column for name, column in columns.items()})
        if self.score is not None:
            reasons = self.explain(raw, columns["score"])
            table["reasons"] = [[reason._asdict() for reason in each] for each in reasons]
        return table


def _percentage(references: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each value the percentage of the references, in ascending order, that are no larger."""
    return (100 * np.searchsorted(references, values, side="right") / len(references)).astype(np.float32)


def _load_pyfunc(path: str) -> Model:
    """Load the model in the folder `path`. MLflow calls the function of this name in the module that loads a model."""
    config, weights = load_weights(Path(path))
    if has_no_names(config):
        warnings.warn(f"if its data were a table: {nameless('this model')}", stacklevel=2)
    return Model(Result(config, weights, {}))
