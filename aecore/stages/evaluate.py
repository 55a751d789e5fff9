"""The evaluation of one job: test scores and figures of the selected weights."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from torch import Tensor

from aecore.anomaly.scores import DEFAULT, AllScores
from aecore.config.specs import DetectorSpec, EvaluateSpec
from aecore.core.notes import Notes
from aecore.data.splits import Arrays
from aecore.data.stream import Stream
from aecore.evaluation import ranking
from aecore.evaluation.figures import detection
from aecore.evaluation.figures import model as figures
from aecore.evaluation.generative import likelihood_bounds
from aecore.evaluation.pictures import SHOWN_ROWS
from aecore.evaluation.probes import (
    PROBE_MODULES,
    accuracy_metrics,
    confusion,
    labels_of,
    notes_on_accuracy,
    read_out,
)
from aecore.evaluation.reconstruction import observed_count, reconstruction_mse
from aecore.evaluation.scoring import (
    TrainedStack,
    build_trained,
    classify,
    encode_splits,
    over_batches,
    over_prepared,
    to_numpy,
)
from aecore.evaluation.statistics import ranking_gain
from aecore.evaluation.threads import Threads, side_by_side
from aecore.evaluation.units import unit_images
from aecore.models.prepare import Prepare
from aecore.models.stack import Stack
from aecore.models.storage import Result
from aecore.stages.anomalies import detect, explain_strangest, known_rows, note_of_few, score_test_rows, test_anomalies
from aecore.stages.context import Context, all_test_rows, rows_in_memory
from aecore.stages.drawings import Pen, draw_variant, map_codes
from aecore.stages.rows import preprocessing
from aecore.variants import Variational

_UNIT_ROWS = 2048


def evaluate(
    spec: EvaluateSpec, context: Context, *, data: Arrays | Stream, layers: Sequence[Result] = (),
    finetuned: Result | None = None,
) -> Result:  # fmt: skip
    """Score the selected weights on the test split, once, and draw what they learned.

    Codes, reconstructions and units are those of the unsupervised model: the unrolled autoencoder where it was
    finetuned to reconstruct, else the pretrained layers, since a classifier has no decoder. Accuracy and reconstruction
    error count all test rows; of a streamed set, everything else is measured on the sample in memory.

    Returns:
        A result with metrics and figures; in `config` `notes` on measures that are left out or taken on a sample, if
        there are any.
    """
    notes = Notes()
    modules = ("sklearn.manifold", *PROBE_MODULES) if spec.pictures else ()
    with side_by_side(*modules) as threads, ThreadPoolExecutor(1) as thread:
        pen = Pen(thread)
        metrics: dict[str, float] = {}
        if spec.pictures:
            fits = {f"layer {number}": result.config for number, result in enumerate(layers, 1)}
            fits |= {} if finetuned is None else {"finetuning": finetuned.config}
            pen.draw("loss_curves", figures.loss_curves, fits)
        if finetuned is not None and spec.task == "classify":
            table = _confusion(spec, context, data, finetuned)
            metrics |= accuracy_metrics(table)
            if not isinstance(data, Stream) and (labels := labels_of(data)):
                notes |= notes_on_accuracy(labels, "test/accuracy", "test/error")
            if spec.pictures:
                pen.draw("confusion", figures.confusion, table, spec.classes)
        whole = finetuned if spec.task == "reconstruct" else None
        if whole or layers:
            stack = build_trained(whole, layers, context.device)
            if spec.anomalies != "none":
                metrics |= _evaluate_anomalies(spec, context, data, stack, _Tools(pen, threads, notes))
            metrics |= _evaluate_autoencoder(spec, context, data, stack, _Tools(pen, threads, notes))
        return Result({"notes": notes} if notes else {}, {}, metrics, pen.figures())


def _confusion(spec: EvaluateSpec, context: Context, data: Arrays | Stream, finetuned: Result) -> np.ndarray:
    """Count the pairs of true and predicted classes over all test rows, (classes, classes)."""
    prepare, classes = preprocessing(data, context.device), len(spec.classes)
    table = np.zeros((classes, classes), np.int64)
    for rows in all_test_rows(data, context):
        assert rows.y is not None
        table += confusion(rows.y, classify(finetuned, prepare, rows.x, context.device), classes)
    return table


class _Tools(NamedTuple):
    """What draws, what computes beside, and the notes to add to."""

    pen: Pen
    threads: Threads
    notes: Notes


def _evaluate_autoencoder(
    spec: EvaluateSpec, context: Context, data: Arrays | Stream, stack: TrainedStack, tools: _Tools
) -> dict[str, float]:
    """Score the unsupervised model and, where pictures are wanted, draw it and read classes out of its codes."""
    pen, threads, notes = tools
    sample, prepare = rows_in_memory(data), preprocessing(data, context.device)
    x = over_batches(prepare, sample.test.x, context.device)
    mse, reconstruction = _reconstruct(stack, x)
    metrics = {"test/reconstruction_mse": mse}
    if isinstance(data, Stream):
        metrics["test/reconstruction_mse"] = _streamed_mse(stack, prepare, data, context)
    if not spec.pictures:
        return metrics
    codes = encode_splits(stack, prepare, sample, context.device)
    inputs = to_numpy(x[:SHOWN_ROWS]).copy()
    pen.draw("reconstructions", figures.reconstructions, inputs, reconstruction, metrics["test/reconstruction_mse"])
    pen.draw("units", figures.units, unit_images(stack, prepare, sample.train.x[:_UNIT_ROWS], context.device))
    draw_variant(pen, spec, stack, x, codes.test)
    if isinstance(spec.variant, Variational) and list(stack)[-1].spec.stochastic:
        metrics |= likelihood_bounds(stack, spec.variant, x, notes)
    # threads start only now that torch, which has as many, has done its work
    names = spec.classes if spec.anomalies == "none" else ("normal", "anomaly")
    pen.draw("codes", map_codes(threads, codes, sample, names))
    labels = labels_of(sample)
    if labels is None:
        return metrics
    probe, neighbours, noted = read_out(threads, codes, labels, spec.classes)
    notes |= noted
    if probe is not None and neighbours is not None:
        metrics["probe/accuracy"] = probe.accuracy((codes.test, labels.test))
        metrics["knn/accuracy"] = float(neighbours().mean())
    return metrics


def _evaluate_anomalies(
    spec: EvaluateSpec, context: Context, data: Arrays | Stream, stack: TrainedStack, tools: _Tools
) -> dict[str, float]:
    """Measure how well the scores of a model rank the anomalies among the test rows, and draw it.

    The reference is the distance to nearest neighbours among the features, without a network.
    """
    train, validation = known_rows(context, data)
    all_scores = AllScores(stack, train, validation, spec.anomalies == "mixed")
    scores, anomaly = score_test_rows(all_scores, context, data), test_anomalies(context, data)
    score, pen = scores.pop(DEFAULT), tools.pen
    tools.notes.update(note_of_few(anomaly))
    if spec.pictures:
        ranked = detection.Ranked(score, anomaly)
        pen.draw("ranking", detection.ranking, ranked)
        pen.draw("scores", detection.histogram, ranked)
        strangest = explain_strangest(all_scores.default, score, context, data, spec.columns)
        pen.draw("strangest", detection.strangest, strangest)
    reference = detect(DetectorSpec(kind="knn", seed=0), context, data=data).weights["score"]
    added, other = ranking.rank(score, anomaly), ranking.rank(reference, anomaly)["auroc"]
    own = added["auroc"]
    difference = ranking_gain(own - other, anomaly)
    return {
        **ranking.measure(added, scores, anomaly), **ranking.interval(own, anomaly),
        "reference/auroc": float(other.mean()), "reference/difference": difference.mean,
        "reference/difference_low": difference.low, "reference/difference_high": difference.high,
    }  # fmt: skip


def _reconstruct(stack: Stack, x: Tensor) -> tuple[float, np.ndarray]:
    """Return the squared error per feature of rows `x`, and the reconstructions that are shown; the others are freed
    on return, since they take as much memory as `x`."""
    reconstruction = over_prepared(stack.reconstruct, x, stack)
    return reconstruction_mse(x, reconstruction), to_numpy(reconstruction[:SHOWN_ROWS]).copy()


def _streamed_mse(stack: Stack, prepare: Prepare, data: Stream, context: Context) -> float:
    """Return the squared error per feature over all test rows of a set that is larger than memory."""
    total, values = 0.0, 0
    size = stack.first.spec.scoring_rows
    for rows in all_test_rows(data, context):
        for start in range(0, len(rows.x), size):  # a whole chunk as floats, with its outputs, may take 100s of MB
            x = over_batches(prepare, rows.x[start : start + size], context.device)
            count = observed_count(x)
            total += reconstruction_mse(x, over_prepared(stack.reconstruct, x, stack)) * count
            values += count
    return total / values
