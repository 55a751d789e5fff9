"""Whether codes form clusters that agree with the classes."""

import numpy as np

from aecore.evaluation.probes import Labelled, confusion
from aecore.evaluation.sampling import first_rows
from aecore.evaluation.scoring import BySplit

_FITTED_ROWS = 20_000
CLUSTER_MEASURES = ("cluster/nmi", "cluster/ari", "cluster/accuracy")
"""The names under which a study knows what `cluster_agreement` returns."""


def not_clustered(labels: BySplit, count: int) -> str:
    """Say in words why `count` clusters cannot be compared with the classes; empty if they can."""
    if (labels.test == labels.test[0]).all():
        return "all test rows are of one class"
    rows = min(len(labels.train), _FITTED_ROWS)
    return f"{rows:,} training rows cannot form {count:,} clusters" if rows < count else ""


def fitted_rows(labels: np.ndarray) -> np.ndarray:
    """Return the numbers of the training rows to whose codes clusters are fitted: the first 20,000, if each class is
    among them. Only this is what the class numbers `labels` (rows,) are used for."""
    return first_rows(labels, len(labels), _FITTED_ROWS)


def cluster_agreement(train: np.ndarray, test: Labelled, count: int) -> dict[str, float]:
    """Fit `count` k-means clusters to training codes and compare the clusters of the test codes with the classes.

    Returns:
        Normalised mutual information `nmi`, adjusted Rand index `ari`, and `accuracy` under the best one-to-one naming
        of clusters by classes (the Hungarian method; Xie et al. 2016, eq. 10).
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    codes, truth = test
    clusters = KMeans(count, n_init=3, random_state=0).fit(train[:_FITTED_ROWS]).predict(codes)
    table = confusion(truth, clusters, count)
    matched = table[linear_sum_assignment(-table)].sum()
    return {
        "nmi": float(normalized_mutual_info_score(truth, clusters)),
        "ari": float(adjusted_rand_score(truth, clusters)),
        "accuracy": float(matched / len(clusters)),
    }
