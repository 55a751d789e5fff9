"""Measures of a variational autoencoder as a model of the data: its likelihood bounds and its samples."""

import numpy as np
import torch
from torch import Tensor

from aecore.core.notes import Notes, left_out, sampled
from aecore.data.splits import Arrays
from aecore.evaluation.sampling import sample_rows
from aecore.evaluation.scoring import as_trained, fixed_noise, over_batches, over_prepared, precision_of, to_numpy
from aecore.models import generation
from aecore.models.prepare import Prepare
from aecore.models.rebuild import build_classifier
from aecore.models.stack import Stack
from aecore.models.storage import Result
from aecore.variants import Variational

_SAMPLES = 2000
_WEIGHTED_ROWS = 20_000
"""Most test rows whose importance-weighted bound is estimated: each is decoded 200 times."""


def likelihood_bounds(stack: Stack, variant: Variational, x: Tensor, notes: Notes) -> dict[str, float]:
    """Return the evidence lower bound of the preprocessed test rows `x` and its two parts in nats, and the number of
    active units. Rows with a Bernoulli likelihood also get the importance-weighted bound, of binarised rows; of very
    many rows a sample is used, which is added to `notes`."""
    with fixed_noise(x.device), torch.no_grad():
        binary = x
        if stack.input_spec.likelihood == "bernoulli":
            binary = torch.where(x.isnan(), x, torch.bernoulli(x.nan_to_num()))  # a missing value stays one
        bound = generation.bound(stack, binary if variant.binarize else x)
        metrics = {
            "vae/bound": -sum(bound.values()),
            "vae/reconstruction": bound["reconstruction"],
            "vae/kl": bound["kl"],
        }
        if len(x) > 1:
            metrics["vae/active_units"] = generation.active_units(stack, x)
        else:
            notes |= left_out("there is one test row", "vae/active_units")
        if stack.input_spec.likelihood == "bernoulli":
            rows = sample_rows(len(x), _WEIGHTED_ROWS)
            weighted = binary if len(rows) == len(x) else binary[torch.from_numpy(rows).to(x.device)]
            metrics["vae/iw_bound"] = generation.importance_weighted(stack, weighted)
            notes |= sampled(len(rows), len(x), "test", "vae/iw_bound")
    return metrics


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to two sets of features (rows, features): the
    squared distance of their means plus tr(A + B - 2 (A B)^(1/2)) of their covariances (Heusel et al. 2017, eq. 6)."""
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(covariance_a @ covariance_b).astype(complex)).real.sum()
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    return float(shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * roots)


def sample_distance(
    stack: Stack, judge: Result, prepare: Prepare, data: Arrays, notes: Notes
) -> dict[str, float]:  # fmt: skip
    """Return the Fréchet distance of samples from test rows in the code of `judge`, a classifier of the data, and as
    its floor the distance of training rows from test rows. One row has no covariance: then both are left out, which is
    added to `notes`."""
    device = prepare.shift.device
    classifier = build_classifier(judge).to(device).eval()

    def features(rows: Tensor) -> np.ndarray:
        with as_trained(precision_of(judge), device):
            return to_numpy(over_prepared(lambda part: classifier.encode(part).flatten(1).float(), rows, stack))

    count = min(_SAMPLES, len(data.test.x), len(data.train.x))
    if count < 2:
        notes |= left_out("there is one test row", "sample/frechet", "sample/frechet_floor")
        return {}
    test, train = (over_batches(prepare, split.x[:count], device) for split in (data.test, data.train))
    samples = generation.samples(stack, count)
    return {
        "sample/frechet": frechet(features(samples), features(test)),
        "sample/frechet_floor": frechet(features(train), features(test)),
    }
