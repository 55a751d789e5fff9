"""The references that a trained autoencoder must beat: PCA and random weights."""

from math import prod
from typing import Any

import numpy as np

from aecore.config.specs import ReferenceSpec
from aecore.core.fingerprint import derive_seed
from aecore.core.notes import Notes
from aecore.data.splits import Arrays
from aecore.data.stream import Stream
from aecore.evaluation.scoring import over_batches
from aecore.models.layers import Layer
from aecore.models.rebuild import get_weights
from aecore.models.stack import Stack
from aecore.models.storage import Result
from aecore.stages.context import Context, rows_in_memory
from aecore.stages.rows import filled, preprocessing, set_fill
from aecore.training.numerics import own_random_state

_FEW_FEATURES, _EXACT_SIDE = 2048, 4096
"""PCA works on the covariance up to this many features, or as many as rows; it is exact up to this many rows or
features, whichever are fewer: a matrix of so many rows and columns takes 64 MB, and half a minute to solve."""


def reference(spec: ReferenceSpec, context: Context, *, data: Arrays | Stream) -> Result:
    """Return an autoencoder to compare others with: PCA as one linear layer, or a stack with random weights."""
    seed = derive_seed(spec.seed, "finetune")  # random weights are those from which training from scratch starts
    with own_random_state(context.device, seed):
        stack = Stack([Layer(layer) for layer in spec.layers])
    set_fill(stack.first.encoder, data)
    weights = get_weights(stack)
    config: dict[str, Any] = {"layers": [layer.model_dump(mode="json") for layer in spec.layers], "history": []}
    if spec.kind == "pca":
        prepare = preprocessing(data, context.device)
        rows = rows_in_memory(data).train.x
        x = filled(over_batches(prepare, rows, context.device), data).flatten(1).cpu().numpy()
        axes, centre, notes = _principal_axes(x, prod(spec.layers[0].code_shape))
        config |= {"notes": notes} if notes else {}
        weights |= {
            "layers.0.encoder.affine.weight": axes, "layers.0.encoder.affine.bias": -axes @ centre,
            "layers.0.decoder.weight": axes.T, "layers.0.decoder.bias": centre,
        }  # fmt: skip
    return Result(config, weights, {})


def _principal_axes(x: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, Notes]:
    """Return the first `width` principal axes (width, features) of rows `x` (rows, features), their mean (features,),
    and notes.

    The solver follows the shape, so that memory stays in proportion to `x`: the covariance where features are few,
    the singular values of `x` where rows are, and a randomised method (Halko et al. 2011) where both are many. There
    are no more axes than rows or features; further ones are zero, and so are their codes.
    """
    from sklearn.decomposition import PCA

    rows, features = x.shape
    count, notes = min(width, rows, features), Notes()
    if min(rows, features) > _EXACT_SIDE:
        pca = PCA(count, svd_solver="randomized", random_state=0)
        notes["PCA"] = f"computed by a randomised method, since {rows:,} rows of {features:,} features are many"
    else:
        pca = PCA(count, svd_solver="covariance_eigh" if features <= max(rows, _FEW_FEATURES) else "full")
    pca.fit(x)
    if count < width:
        notes["PCA"] = f"{count:,} of {width:,} units are used, since {rows:,} training rows have no more axes"
    axes = np.concatenate([pca.components_, np.zeros((width - count, features), pca.components_.dtype)])
    return axes, pca.mean_, notes
