"""The finetuned model as MLflow serves it: raw rows in, a table out. Loaded from safetensors and JSON alone."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from aecore import stages
from aecore.networks import Classifier, Stack
from aecore.storage import Result, load_weights


class Model:
    """Raw rows (rows, *shape), as the data set holds them, to one table row each."""

    def __init__(self, result: Result) -> None:
        self.classes = np.array(result.config["classes"])
        self.prepare = stages.build_prepare(result)
        self.task = result.config["task"]
        self.net: Classifier | Stack
        self.net = (stages.build_classifier if self.task == "classify" else stages.build_stack)(result)
        self.net.eval()

    def predict(self, rows: np.ndarray, params: dict | None = None) -> pd.DataFrame:
        """Columns `prediction` and `probability` (of that class) of a classifier, `reconstruction_mse` (a feature) of
        an autoencoder, and `code` of either."""
        with torch.inference_mode():
            x = self.prepare(torch.tensor(np.asarray(rows)))
            code = self.net.encode(x).flatten(1)
            if isinstance(self.net, Classifier):
                best = self.net(x).softmax(1).max(1)
                table = {"prediction": self.classes[best.indices.numpy()], "probability": best.values.numpy()}
            else:
                error = (self.net.mean(self.net.encode(x)) - x).square().flatten(1).mean(1)
                table = {"reconstruction_mse": error.numpy()}
        return pd.DataFrame({**table, "code": list(code.numpy())})


def _load_pyfunc(path: str) -> Model:
    config, weights = load_weights(Path(path))
    return Model(Result(config, weights, {}))
