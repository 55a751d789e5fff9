"""The measures of a study: everything that its report compares, alike for every variant and for the references."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from aecore.config.specs import MeasureSpec
from aecore.data.splits import Arrays
from aecore.data.stream import Stream
from aecore.evaluation.clusters import cluster_agreement
from aecore.evaluation.contraction import contraction
from aecore.evaluation.generative import likelihood_bounds, sample_distance
from aecore.evaluation.pictures import study_arrays
from aecore.evaluation.probes import (
    PROBE_MODULES,
    Labelled,
    Probe,
    labels_of,
    linear_probe,
    nearest,
    probe_of_few_labels,
)
from aecore.evaluation.reconstruction import reconstruction_errors
from aecore.evaluation.robustness import mean_robustness, robustness_curves
from aecore.evaluation.scoring import BySplit, build_trained, classify, encode_splits, over_batches
from aecore.evaluation.threads import Threads, side_by_side
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
        classifiers: models finetuned from the autoencoder, one for each number of labelled rows in `spec.labels`, the
            last of which is all; `val/finetuned_accuracy` is the last one's.
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
        predictions = [classify(result, prepare, sample.test.x, context.device) for result in classifiers]
        test = codes.test, labels.test
        with side_by_side(*PROBE_MODULES, "sklearn.cluster") as threads:
            readout = _start_readout(threads, spec, codes, labels)
            probe, correct = readout.probe, _correct(readout, predictions, test)
            metrics["val/probe_accuracy"] = probe.accuracy((codes.validation, labels.validation))
            metrics |= {f"cluster/{name}": value for name, value in readout.clusters().items()}
            metrics |= {f"{name}/accuracy": float(rows.mean()) for name, rows in correct.items()}
            arrays |= {f"correct/{name}": rows for name, rows in correct.items()}
            curves["labels"] = _label_curve(readout, predictions, test)
            if classifiers:
                metrics["val/finetuned_accuracy"] = classifiers[-1].metrics["best/accuracy"]
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


class _Readout(NamedTuple):
    """The probes, neighbours and clusters that are computed from codes in threads, to predict the rows' classes."""

    probe: Probe
    few: Sequence[tuple[int, Probe]]
    """For each number of labelled rows in the spec, how many there are, and the probe that is fitted to them."""
    nearest: Callable[[], np.ndarray]
    """Waits for the class numbers (rows,) of the test rows by their neighbours."""
    clusters: Callable[[], dict[str, float]]
    """Waits for what `cluster_agreement` returns."""


def _start_readout(threads: Threads, spec: MeasureSpec, codes: BySplit, labels: BySplit) -> _Readout:
    """Start to read classes out of codes, all side by side."""
    train, test, rows = (codes.train, labels.train), (codes.test, labels.test), len(labels.train)
    probe = linear_probe(threads, train, (codes.validation, labels.validation))
    clusters = threads.start(cluster_agreement, codes.train, test, len(spec.classes))
    few = [
        (count, probe_of_few_labels(threads, count, spec.seed, codes, labels)) if count < rows else (rows, probe)
        for count in spec.labels
    ]
    return _Readout(probe, few, nearest(threads, train, codes.test), clusters)


def _correct(readout: _Readout, predictions: Sequence[np.ndarray], test: Labelled) -> dict[str, np.ndarray]:
    """Return whether each test row is classified right, (rows,), by the `probe`, by its neighbours (`knn`), and by the
    `finetuned` classifier with the most labels, which is the last one."""
    codes, truth = test
    correct = {"probe": readout.probe.predict(codes) == truth, "knn": readout.nearest() == truth}
    if predictions:
        correct["finetuned"] = predictions[-1] == truth
    return correct


def _label_curve(readout: _Readout, predictions: Sequence[np.ndarray], test: Labelled) -> dict[str, list[float]]:
    """Return the test accuracy of the probe and of the finetuned classifiers by the number of labels.

    Args:
        predictions: class numbers of the test rows by each finetuned classifier.
    """
    return {
        "counts": [count for count, _ in readout.few],
        "probe": [probe.accuracy(test) for _, probe in readout.few],
        "finetuned": [float((prediction == test[1]).mean()) for prediction in predictions],
    }
