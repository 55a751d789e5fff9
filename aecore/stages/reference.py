"""The references that a trained autoencoder must beat: PCA and random weights."""

from math import prod

from aecore.config.specs import ReferenceSpec
from aecore.core.fingerprint import derive_seed
from aecore.data.splits import Arrays
from aecore.data.stream import Stream
from aecore.evaluation.scoring import over_batches
from aecore.models.layers import Layer
from aecore.models.rebuild import get_weights
from aecore.models.stack import Stack
from aecore.models.storage import Result
from aecore.stages.context import Context, rows_in_memory
from aecore.stages.rows import preprocessing
from aecore.training.numerics import own_random_state


def reference(spec: ReferenceSpec, context: Context, *, data: Arrays | Stream) -> Result:
    """Return an autoencoder to compare others with: PCA as one linear layer, or a stack with random weights."""
    seed = derive_seed(spec.seed, "finetune")  # random weights are those from which training from scratch starts
    with own_random_state(context.device, seed):
        stack = Stack([Layer(layer) for layer in spec.layers])
    weights = get_weights(stack)
    if spec.kind == "pca":
        from sklearn.decomposition import PCA

        prepare = preprocessing(data, context.device)
        rows = rows_in_memory(data).train.x
        x = over_batches(prepare, rows, context.device).flatten(1).cpu().numpy()
        pca = PCA(prod(spec.layers[0].code_shape), svd_solver="covariance_eigh").fit(x)
        axes, centre = pca.components_, pca.mean_
        weights = {
            "layers.0.encoder.affine.weight": axes, "layers.0.encoder.affine.bias": -axes @ centre,
            "layers.0.decoder.weight": axes.T, "layers.0.decoder.bias": centre,
        }  # fmt: skip
    config = {"layers": [layer.model_dump(mode="json") for layer in spec.layers], "history": []}
    return Result(config, weights, {})
