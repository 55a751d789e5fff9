"""The finetuned model as MLflow serves it: raw rows in, a table out. Loaded from safetensors and JSON alone."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from aecore.evaluation.reconstruction import row_errors
from aecore.models import generation
from aecore.models.classifier import Classifier
from aecore.models.rebuild import build_autoencoder, build_classifier, build_prepare, build_stack
from aecore.models.spec import LayerSpec
from aecore.models.stack import Stack
from aecore.models.storage import Result, load_weights


class Model:
    """Raw rows (rows, *shape), as the data set holds them, to one table row each."""

    def __init__(self, result: Result, device: torch.device | None = None) -> None:
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device, self.classes = device, np.array(result.config["classes"])
        self.prepare = build_prepare(result).to(device)
        self.task = result.config["task"]
        self.net: Classifier | Stack
        self.net = (build_classifier if self.task == "classify" else build_stack)(result)
        self.net.to(device).eval()
        self.autoencoder = self.net if isinstance(self.net, Stack) else build_autoencoder(result)
        if self.autoencoder is not None:
            self.autoencoder.to(device).eval()
        self.batch = LayerSpec.model_validate(result.config["layers"][0]).scoring_rows
        self.errors = np.sort(result.weights.get("reference.error", np.empty(0, np.float32)))

    def measure(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What `predict` returns, by column, `code` as one array (rows, units)."""
        with torch.inference_mode():
            cuts = [slice(start, start + self.batch) for start in range(0, max(1, len(rows)), self.batch)]
            parts = [self._measure(torch.tensor(rows[cut], device=self.device)) for cut in cuts]
        found = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
        if "prediction" in found:
            found["prediction"] = self.classes[found["prediction"]]
        if len(self.errors):
            below = np.searchsorted(self.errors, found["reconstruction_mse"], side="right")
            found["anomaly_score"] = (100 * below / len(self.errors)).astype(np.float32)
        return found

    def _measure(self, raw: Tensor) -> dict[str, Tensor]:
        x = self.prepare(raw)
        code = self.net.encode(x)
        found = {"code": code.flatten(1)}
        if isinstance(self.net, Classifier):
            best = self.net.head(code.flatten(1)).softmax(1).max(1)
            found |= {"prediction": best.indices, "probability": best.values}
        if self.autoencoder is not None:
            own = code if self.autoencoder is self.net else self.autoencoder.encode(x)
            found["reconstruction_mse"] = row_errors(x, self.autoencoder.mean(own))
        return found

    def decode(self, code: np.ndarray) -> np.ndarray:
        """Reconstructions (rows, *shape) of codes (rows, units), as the data set holds them; of an autoencoder."""
        assert isinstance(self.net, Stack)
        shape = self.net.code_shape
        with torch.inference_mode():
            parts = torch.tensor(code, device=self.device).view(-1, *shape).split(self.batch)
            return torch.cat([self.prepare.inverse(self.net.mean(part)) for part in parts]).cpu().numpy()

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Rows (count, *shape) as the data set holds them, drawn from the prior of a variational autoencoder."""
        assert isinstance(self.net, Stack)
        with torch.inference_mode():
            return self.prepare.inverse(generation.samples(self.net, count, seed)).cpu().numpy()

    def predict(self, rows: np.ndarray, params: dict | None = None) -> pd.DataFrame:
        """Columns `code`, of a classifier `prediction` and `probability` of that class, of an autoencoder (a classifier
        has the one that it was finetuned from) `reconstruction_mse`, a feature, and `anomaly_score`: percent of the
        reference rows that are reconstructed no worse."""
        found = self.measure(np.asarray(rows))
        return pd.DataFrame({name: list(column) if column.ndim > 1 else column for name, column in found.items()})


def _load_pyfunc(path: str) -> Model:
    config, weights = load_weights(Path(path))
    return Model(Result(config, weights, {}))
