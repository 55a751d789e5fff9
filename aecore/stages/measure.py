"""The measures of a study: everything that its report compares, alike for every variant and for the references."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from aecore.config.specs import MeasureSpec
from aecore.core.notes import Notes, left_out
from aecore.data.splits import Arrays
from aecore.data.stream import Stream
from aecore.evaluation.clusters import CLUSTER_MEASURES, cluster_agreement, fitted_rows, not_clustered
from aecore.evaluation.contraction import contraction
from aecore.evaluation.generative import likelihood_bounds, sample_distance
from aecore.evaluation.pictures import study_arrays
from aecore.evaluation.probes import (
    PROBE_MODULES,
    Labelled,
    Probe,
    labels_of,
    notes_on_accuracy,
    only_class,
    probe_of_few_labels,
    read_out,
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
        `robustness` by noise (levels, mse, accuracy), `contraction` (radius, ratio), and `notes` on measures that are
        left out or taken on a sample, if there are any; and arrays in `weights`: for each
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
    source = stack or layers[-1]
    curves: dict[str, Any] = {"history": source.config["history"]}
    notes = Notes(source.config.get("notes", {}))
    probe = None
    if labels is not None:
        predictions = [classify(result, prepare, sample.test.x, context.device) for result in classifiers]
        with side_by_side(*PROBE_MODULES, "sklearn.cluster") as threads:
            readout = _start_readout(threads, spec, codes, labels)
            probe = readout.probe
            metrics |= readout.scores(codes, labels)
            correct = _correct(readout, predictions, (codes.test, labels.test))
            metrics |= {f"{name}/accuracy": float(rows.mean()) for name, rows in correct.items()}
            arrays |= {f"correct/{name}": rows for name, rows in correct.items()}
            curves |= _label_curve(readout, predictions, (codes.test, labels.test))
            if "finetuned" in correct:
                metrics["val/finetuned_accuracy"] = classifiers[-1].metrics["best/accuracy"]
        notes |= readout.notes
    curves["robustness"] = robustness_curves(net, x, probe, sample.test.y)
    metrics |= mean_robustness(curves["robustness"])
    metrics |= unit_activity(net, codes.test)
    contracted, curves["contraction"] = contraction(net, x, codes.test, notes)
    metrics |= contracted
    if isinstance(spec.variant, Variational):
        metrics |= likelihood_bounds(net, spec.variant, x, notes)
        if judge is not None:
            metrics |= sample_distance(net, judge, prepare, sample, notes)
    if spec.pictures:
        y = sample.test.y if spec.classes else None
        arrays |= study_arrays(net, x, codes.test, y, isinstance(spec.variant, Variational))
    return Result(curves | {"notes": notes} if notes else curves, arrays, metrics)


class _Readout(NamedTuple):
    """The probes, neighbours and clusters that are computed from codes in threads, to predict the rows' classes."""

    probe: Probe | None
    """None where all training rows are of one class."""
    few: Sequence[tuple[int, Probe | None]]
    """For each number of labelled rows in the spec, how many there are, and the probe that is fitted to them; None
    where a class is missing among them."""
    nearest: Callable[[], np.ndarray] | None
    """Waits for whether test rows are classified right by their neighbours; see `read_out`."""
    clusters: Callable[[], dict[str, float]] | None
    """Waits for what `cluster_agreement` returns; None where it cannot be computed."""
    notes: Notes

    def scores(self, codes: BySplit, labels: BySplit) -> dict[str, float]:
        """Return the probe's accuracy on validation, and how well clusters agree with classes."""
        found = {f"cluster/{name}": value for name, value in self.clusters().items()} if self.clusters else {}
        if self.probe is not None:
            found["val/probe_accuracy"] = self.probe.accuracy((codes.validation, labels.validation))
        return found


def _start_readout(threads: Threads, spec: MeasureSpec, codes: BySplit, labels: BySplit) -> _Readout:
    """Start to read classes out of codes, all side by side."""
    test, rows = (codes.test, labels.test), len(labels.train)
    clusters = few = None
    probe, neighbours, notes = read_out(threads, codes, labels, spec.classes)
    if reason := not_clustered(labels, len(spec.classes)):
        notes |= left_out(reason, *CLUSTER_MEASURES)
    else:
        clusters = threads.start(cluster_agreement, codes.train[fitted_rows(labels.train)], test, len(spec.classes))
    if probe is None:
        reason = only_class(labels, spec.classes)
        notes |= left_out(reason, "finetuned/accuracy", "robust/accuracy", "accuracy by labels")
    else:
        few = [
            (count, probe_of_few_labels(threads, count, spec.seed, codes, labels)) if count < rows else (rows, probe)
            for count in spec.labels
        ]
        notes |= notes_on_accuracy(labels, "finetuned/accuracy") if len(few) else {}
        for count, fitted in few:
            if fitted is None:
                reason = f"{count:,} training rows do not hold all classes"
                notes |= left_out(reason, f"accuracy with {count:,} labels")
    return _Readout(probe, few or (), neighbours, clusters, notes)


def _correct(readout: _Readout, predictions: Sequence[np.ndarray], test: Labelled) -> dict[str, np.ndarray]:
    """Return whether each test row is classified right, (rows,), by the `probe`, by its neighbours (`knn`), and by the
    `finetuned` classifier with the most labels, which is the last one; empty where there is nothing to classify."""
    codes, truth = test
    if readout.probe is None or readout.nearest is None:
        return {}
    correct = {"probe": readout.probe.predict(codes) == truth, "knn": readout.nearest()}
    if predictions:
        correct["finetuned"] = predictions[-1] == truth
    return correct


def _label_curve(readout: _Readout, predictions: Sequence[np.ndarray], test: Labelled) -> dict[str, Any]:
    """Return as `labels` the test accuracy of the probe and of the finetuned classifiers by the number of labels, for
    the numbers with which each class has a label; empty if there are none.

    Args:
        predictions: class numbers of the test rows by each finetuned classifier.
    """
    whole = [number for number, (_, probe) in enumerate(readout.few) if probe is not None]
    if not whole:
        return {}
    probes = [probe for _, probe in readout.few if probe is not None]
    return {
        "labels": {
            "counts": [readout.few[number][0] for number in whole],
            "probe": [probe.accuracy(test) for probe in probes],
            "finetuned": [float((predictions[number] == test[1]).mean()) for number in whole if predictions],
        }
    }
