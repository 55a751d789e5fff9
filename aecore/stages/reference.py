"""The references that a trained autoencoder must beat: PCA and random weights."""

from math import prod
from typing import TYPE_CHECKING

from aecore.config.specs import ReferenceSpec
from aecore.core.fingerprint import derive_seed
from aecore.data.splits import Arrays
from aecore.data.stream import Stream
from aecore.evaluation.scoring import over_batches
from aecore.models.layers import Layer
from aecore.models.rebuild import get_weights
from aecore.models.stack import Stack
from aecore.models.storage import Result
from aecore.stages.context import Run, held
from aecore.stages.pretrain import _seeded
from aecore.stages.rows import prepared

if TYPE_CHECKING:
    pass


def reference(spec: ReferenceSpec, run: Run, *, data: Arrays | Stream) -> Result:
    """What a trained autoencoder must beat: PCA (as one linear layer), or the same stack with random weights."""
    seed = derive_seed(spec.seed, "finetune")  # the weights that training from scratch starts from
    with _seeded(seed):
        stack = Stack([Layer(layer) for layer in spec.layers])
    weights = get_weights(stack)
    if spec.kind == "pca":
        from sklearn.decomposition import PCA

        prepare = prepared(data, run.device)
        x = over_batches(prepare, held(data).train.x, run.device).flatten(1).cpu().numpy()
        pca = PCA(prod(spec.layers[0].code_shape), svd_solver="covariance_eigh").fit(x)
        axes, centre = pca.components_, pca.mean_
        weights = {
            "layers.0.encoder.affine.weight": axes, "layers.0.encoder.affine.bias": -axes @ centre,
            "layers.0.decoder.weight": axes.T, "layers.0.decoder.bias": centre,
        }  # fmt: skip
    config = {"layers": [layer.model_dump(mode="json") for layer in spec.layers], "history": []}
    return Result(config, weights, {})
