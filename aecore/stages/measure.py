"""The measures of a study: everything that its report compares, alike for every variant and for the references."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from aecore.config.specs import MeasureSpec
from aecore.data.splits import Arrays
from aecore.data.stream import Stream
from aecore.evaluation.clusters import cluster_agreement
from aecore.evaluation.contraction import contraction
from aecore.evaluation.generative import likelihood_bounds, sample_distance
from aecore.evaluation.pictures import study_arrays
from aecore.evaluation.probes import Probe, labels_of, linear_probe, nearest, probe_with_few_labels
from aecore.evaluation.reconstruction import reconstruction_errors
from aecore.evaluation.robustness import mean_robustness, robustness_curves
from aecore.evaluation.scoring import BySplit, build_trained, classify, encode_splits, over_batches
from aecore.evaluation.units import unit_activity
from aecore.models.storage import Result
from aecore.stages.context import Context, rows_in_memory
from aecore.stages.rows import preprocessing
from aecore.variants import Variational


def measure(
    spec: MeasureSpec, context: Context, *, data: Arrays | Stream, stack: Result | None = None,
    layers: Sequence[Result] = (), classifiers: Sequence[Result] = (), judge: Result | None = None,
) -> Result:  # fmt: skip
    """Measure one trained autoencoder on the test split; nothing is chosen by these measures.

    Args:
        stack: the autoencoder, where it was trained as a whole.
        layers: the autoencoder's layers, where they were only pretrained.
        classifiers: models finetuned from the autoencoder, one for each number of labelled rows in `spec.labels`.
        judge: a classifier of the data, in whose code samples are compared with real rows.

    Returns:
        A result with `metrics`; curves in `config`: `history` of training, `labels` (counts, probe, finetuned),
        `robustness` by noise (levels, mse, accuracy), `contraction` (radius, ratio); and arrays in `weights`: for each
        test row its squared error `sse` and whether it was classified right, `correct/...`, (rows,). With
        `spec.pictures` the arrays also hold `inputs`, `reconstructed`, `corrupted`, `restored`, `filters`, `codes`; of
        more rows and all units, to be shown in a plane, `map` with `map_labels`; and of a variational model `samples`
        and `manifold`.
    """
    prepare = preprocessing(data, context.device)
    sample = rows_in_memory(data)
    net = build_trained(stack, layers, context.device)
    x = over_batches(prepare, sample.test.x, context.device)
    codes = encode_splits(net, prepare, sample, context.device)
    labels = labels_of(sample)

    metrics, errors = reconstruction_errors(net, prepare, sample, x)
    arrays = {"sse": errors}
    curves: dict[str, Any] = {"history": (stack or layers[-1]).config["history"]}
    probe = None
    if labels is not None:
        probe = linear_probe((codes.train, labels.train), (codes.validation, labels.validation))
        predictions = [classify(result, prepare, sample.test.x, context.device) for result in classifiers]
        correct = _correct(probe, predictions, codes, labels)
        metrics["val/probe_accuracy"] = float((probe.predict(codes.validation) == labels.validation).mean())
        agreement = cluster_agreement(codes.train, (codes.test, labels.test), len(spec.classes))
        metrics |= {f"cluster/{name}": value for name, value in agreement.items()}
        metrics |= {f"{name}/accuracy": float(rows.mean()) for name, rows in correct.items()}
        arrays |= {f"correct/{name}": rows for name, rows in correct.items()}
        curves["labels"] = _label_curve(spec, metrics["probe/accuracy"], predictions, codes, labels)
    curves["robustness"] = robustness_curves(net, x, probe, sample.test.y)
    metrics |= mean_robustness(curves["robustness"])
    metrics |= unit_activity(net, codes.test)
    contracted, curves["contraction"] = contraction(net, x, codes.test)
    metrics |= contracted
    if isinstance(spec.variant, Variational):
        metrics |= likelihood_bounds(net, spec.variant, x)
        if judge is not None:
            metrics |= sample_distance(net, judge, prepare, sample, context.device)
    if spec.pictures:
        arrays |= study_arrays(net, x, codes.test, sample.test.y, isinstance(spec.variant, Variational))
    return Result(curves, arrays, metrics)


def _correct(probe: Probe, predictions: Sequence[np.ndarray], codes: BySplit, labels: BySplit) -> dict[str, np.ndarray]:
    """Return whether each test row is classified right, (rows,), by the `probe`, by its neighbours (`knn`), and by the
    `finetuned` classifier with the most labels, which is the last one."""
    correct = {
        "probe": probe.predict(codes.test) == labels.test,
        "knn": nearest((codes.train, labels.train), codes.test) == labels.test,
    }
    if predictions:
        correct["finetuned"] = predictions[-1] == labels.test
    return correct


def _label_curve(
    spec: MeasureSpec, accuracy: float, predictions: Sequence[np.ndarray], codes: BySplit, labels: BySplit
) -> dict[str, list[float]]:
    """Return the test accuracy of the probe and of the finetuned classifiers by the number of labels.

    Args:
        accuracy: test accuracy of the probe with all labels.
        predictions: class numbers of the test rows by each finetuned classifier.
    """
    rows = len(labels.train)
    return {
        "counts": [min(count, rows) for count in spec.labels],
        "probe": [
            probe_with_few_labels(count, spec.seed, codes, labels) if count < rows else accuracy
            for count in spec.labels
        ],
        "finetuned": [float((prediction == labels.test).mean()) for prediction in predictions],
    }
