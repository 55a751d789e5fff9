"""Further scores of how strange a row is to an autoencoder, to compare the default one with. No label is used."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from aecore.anomaly.neighbours import References, most_references
from aecore.anomaly.score import NeighbourScore, bounded, fit_score
from aecore.evaluation.sampling import sample_rows
from aecore.evaluation.scoring import TrainedStack, fixed_noise, over_prepared, to_numpy
from aecore.models.divergences import kl_to_prior

DEFAULT = "neighbours"
"""Name of the default score among the others."""
_BOUND_SAMPLES = 10
Scores = dict[str, np.ndarray]
"""Scores of rows, (rows,), by name."""


class AllScores:
    """All scores of an autoencoder, fitted to prepared rows of training and validation.

    - `neighbours`: the default score, see `NeighbourScore`;
    - `error`: the squared residual, per feature in units of its variance over validation rows;
    - `code_neighbours`: the mean distance to the five nearest codes of the references;
    - `code_distance`: the Mahalanobis distance of the code from those of the references, with a shrunk covariance
      (Ledoit & Wolf 2004);
    - `bound`: of a variational autoencoder the negative evidence lower bound, in nats.

    Args:
        mixed: whether some of the rows may be anomalies.
    """

    def __init__(self, stack: TrainedStack, train: Tensor, validation: Tensor, mixed: bool) -> None:
        from sklearn.covariance import LedoitWolf

        self.stack = stack
        self.default = NeighbourScore(stack, fit_score(stack, train, validation, mixed))
        rows = torch.cat([train, validation])
        rows = rows[torch.from_numpy(sample_rows(len(rows), most_references(rows[0].numel()))).to(rows.device)]
        codes = self._codes(rows)
        self._codes_known, self._covariance = References(codes), LedoitWolf().fit(to_numpy(codes))

    def __call__(self, x: Tensor) -> Scores:
        """Score prepared rows."""
        x = bounded(x)
        codes, vectors = self._codes(x), self.default.vectors(x)
        error = vectors[:, vectors.shape[1] // 2 :].square().nanmean(1)
        scores = {
            DEFAULT: to_numpy(self.default.references.nearest(vectors).mean_distance()),
            "error": to_numpy(error.nan_to_num()),
            "code_neighbours": to_numpy(self._codes_known.nearest(codes).mean_distance()),
            "code_distance": self._covariance.mahalanobis(to_numpy(codes)).astype(np.float32),
        }
        if list(self.stack)[-1].spec.stochastic:
            scores["bound"] = to_numpy(over_prepared(lambda rows: negative_bound(self.stack, rows), x, self.stack))
        return scores

    def _codes(self, x: Tensor) -> Float[Tensor, "rows units"]:
        return over_prepared(lambda rows: self.stack.encode(rows).flatten(1), x, self.stack)


def with_ranks(scores: Scores) -> Scores:
    """Add `ranks`, the sum of the ranks by `error` and by `code_neighbours` among these rows, in shares of the rows."""
    from scipy.stats import rankdata

    ranks = [rankdata(scores[name]) / len(scores[name]) for name in ("error", "code_neighbours")]
    return {**scores, "ranks": np.add(*ranks)}


def negative_bound(stack: TrainedStack, x: Tensor) -> Float[Tensor, " rows"]:
    """Return the negative evidence lower bound of each prepared row in nats, with ten samples of the code each, whose
    noise is the same at every call (Kingma & Welling 2014, eq. 7)."""
    mean, log_variance = stack.posterior(x)
    loss = torch.func.vmap(lambda code, row: stack.reconstruction_loss(code[None], row[None]))
    with fixed_noise(x.device):
        noise = torch.randn(_BOUND_SAMPLES, *mean.shape[1:], device=x.device)
    parts = [loss(mean + (0.5 * log_variance).exp() * each, x) for each in noise]
    return torch.stack(parts).mean(0) + kl_to_prior(mean, log_variance)
