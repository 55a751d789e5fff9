"""The references that an autoencoder must beat at finding anomalies, all from scikit-learn."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from aecore.anomaly.neighbours import NEIGHBOURS, REFERENCE_ROWS
from aecore.core.notes import Notes, sampled
from aecore.core.types import Detector
from aecore.evaluation.sampling import sample_rows

_LOF_NEIGHBOURS, _VARIANCE = 20, 0.9
"""Number of neighbours of Breunig et al. (2000) and scikit-learn, and the share of the variance that PCA keeps."""
Score = Callable[[np.ndarray], np.ndarray]
"""Returns how strange rows (rows, features) are, (rows,)."""


class FittedDetector(NamedTuple):
    """A detector that is fitted to rows, and notes on the fit."""

    score: Score
    notes: Notes


def fit_detector(kind: Detector, rows: np.ndarray, seed: int) -> FittedDetector:
    """Fit a detector to rows (rows, features) without labels.

    - `knn`: mean distance to the 5 nearest rows (Ramaswamy et al. 2000);
    - `iforest`: isolation forest (Liu et al. 2008);
    - `lof`: local outlier factor with 20 neighbours (Breunig et al. 2000);
    - `pca`: squared error behind the components that hold 90 % of the variance.

    The distances of `knn` and `lof` are to a sample of the rows where these are very many, of the same size as for an
    autoencoder's score.
    """
    chosen = sample_rows(len(rows), REFERENCE_ROWS) if kind in ("knn", "lof") else np.arange(len(rows))
    notes = sampled(len(chosen), len(rows), "training and validation", kind)
    score_of = {"iforest": _forest, "knn": _neighbours, "lof": _lof, "pca": _pca}[kind]
    return FittedDetector(score_of(rows[chosen], seed), notes)


def _neighbours(rows: np.ndarray, seed: int) -> Score:
    from sklearn.neighbors import NearestNeighbors

    known = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(rows))).fit(rows)
    return lambda x: known.kneighbors(x)[0].mean(1)


def _forest(rows: np.ndarray, seed: int) -> Score:
    from sklearn.ensemble import IsolationForest

    forest = IsolationForest(random_state=seed % 2**32).fit(rows)
    return lambda x: -forest.score_samples(x)


def _lof(rows: np.ndarray, seed: int) -> Score:
    from sklearn.neighbors import LocalOutlierFactor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of equal rows, which it handles by a least distance
        factor = LocalOutlierFactor(min(_LOF_NEIGHBOURS, len(rows) - 1), novelty=True).fit(rows)
    return lambda x: -factor.score_samples(x)


def _pca(rows: np.ndarray, seed: int) -> Score:
    from sklearn.decomposition import PCA

    with np.errstate(invalid="ignore"):  # where all rows are equal, no component has a share of the variance
        pca = PCA(_VARIANCE, svd_solver="full").fit(rows)
    return lambda x: np.square(x - pca.inverse_transform(pca.transform(x))).sum(1)
