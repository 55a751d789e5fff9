"""The measures of a study of anomalies: how well autoencoders and scikit-learn's detectors rank the test rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aecore.anomaly.detectors import fit_detector
from aecore.anomaly.reasons import Reasons
from aecore.anomaly.score import NeighbourScore, bounded
from aecore.anomaly.scores import DEFAULT, AllScores, Scores, with_ranks
from aecore.config.facts import TableColumns
from aecore.config.specs import DetectionSpec, DetectorSpec
from aecore.core.notes import Notes
from aecore.data.splits import Arrays
from aecore.data.stream import Stream
from aecore.evaluation import ranking
from aecore.evaluation.reconstruction import reconstruction_mse
from aecore.evaluation.scoring import build_trained, over_batches, over_prepared, to_numpy
from aecore.models.storage import Result
from aecore.stages.context import Context, all_test_rows, rows_in_memory
from aecore.stages.rows import filled, preprocessing

_FEW = 10
"""Fewer anomalies than this among the test rows are noted: one more or less moves the area by a tenth and more."""
EXPLAINED_ROWS = 12
"""The strangest test rows, which the report explains."""


def detect(spec: DetectorSpec, context: Context, *, data: Arrays | Stream) -> Result:
    """Fit one of scikit-learn's detectors to the training and validation rows, which the first layer would read, and
    return as `score` (rows,) how strange the test rows are."""
    prepare = preprocessing(data, context.device)
    known = bounded(filled(torch.cat(known_rows(context, data)), data)).flatten(1)
    score, notes = fit_detector(spec.kind, to_numpy(known), spec.seed)
    tests = (
        bounded(filled(over_batches(prepare, rows.x, context.device), data)).flatten(1)
        for rows in all_test_rows(data, context)
    )
    parts = [score(to_numpy(x)) for x in tests]
    config: dict[str, Any] = {"history": [], **({"notes": notes} if notes else {})}
    return Result(config, {"score": np.concatenate(parts).astype(np.float32)}, {})


def measure_detection(
    spec: DetectionSpec, context: Context, *, data: Arrays | Stream, stack: Result | None = None,
    layers: Sequence[Result] = (), detector: Result | None = None,
) -> Result:  # fmt: skip
    """Measure how well the scores of an autoencoder, or of a `detector`, rank the anomalies among the test rows first.

    Nothing is chosen by these measures, and no other label is used.

    Returns:
        A result with `test/auroc`, `test/average_precision` and `test/precision_at_n` of the default score; `auroc/...`
        of each other score of an autoencoder; `val/reconstruction_mse` of validation rows; in `weights` for each test
        row its `score`, whether it is an `anomaly`, and what it adds to each measure (see
        `aecore.evaluation.ranking`); in `config` the training's `history`, `strangest` rows with their reasons, and
        `notes`.
    """
    anomaly = test_anomalies(context, data)
    source = detector or stack or layers[-1]
    config: dict[str, Any] = {"history": source.config["history"]}
    notes = Notes(source.config.get("notes", {}))
    metrics: dict[str, float] = {}
    if detector is not None:
        scores = {DEFAULT: detector.weights["score"]}
    else:
        net = build_trained(stack, layers, context.device)
        train, validation = known_rows(context, data)
        all_scores = AllScores(net, train, validation, spec.mixed)
        scores = score_test_rows(all_scores, context, data)
        metrics["val/reconstruction_mse"] = reconstruction_mse(
            validation, over_prepared(net.reconstruct, validation, net)
        )
        if spec.explained:
            config["strangest"] = explain_strangest(all_scores.default, scores[DEFAULT], context, data, spec.columns)
    score = scores.pop(DEFAULT)
    added = ranking.rank(score, anomaly)
    metrics |= ranking.measure(added, scores, anomaly)
    arrays = {name: each.astype(np.float32) for name, each in added.items()}
    arrays |= {"score": score, "anomaly": anomaly.astype(np.uint8)}
    notes |= note_of_few(anomaly)
    return Result(config | ({"notes": notes} if notes else {}), arrays, metrics)


def note_of_few(anomaly: np.ndarray) -> Notes:
    """Return a note if test rows (rows,) hold so few anomalies that intervals over these are too narrow."""
    count = int(anomaly.sum())
    text = f"by {count} anomalies, which are too few to tell small differences from chance"
    return {"test/auroc": text.replace("1 anomalies, which are", "1 anomaly, which is")} if count < _FEW else {}


def score_test_rows(all_scores: AllScores, context: Context, data: Arrays | Stream) -> Scores:
    """Return all scores of the test rows of a data set, (rows,) by name."""
    prepare = preprocessing(data, context.device)
    parts = [all_scores(over_batches(prepare, rows.x, context.device)) for rows in all_test_rows(data, context)]
    return with_ranks({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def test_anomalies(context: Context, data: Arrays | Stream) -> np.ndarray:
    """Return whether each test row is an anomaly, (rows,)."""
    return np.concatenate([rows.y for rows in all_test_rows(data, context) if rows.y is not None]).astype(bool)


def explain_strangest(
    score: NeighbourScore, scores: np.ndarray, context: Context, data: Arrays | Stream, columns: TableColumns
) -> list[dict[str, Any]]:
    """Return the strangest test rows in memory, each with its number, score, whether it is an anomaly, and reasons.

    Args:
        scores: (rows,) of all test rows. Where only a sample of these is in memory, the sample is scored anew.
    """
    prepare, test = preprocessing(data, context.device), rows_in_memory(data).test
    if isinstance(data, Stream):
        scores = to_numpy(score.score(over_batches(prepare, test.x, context.device)))
    numbers = np.argsort(-scores, kind="stable")[:EXPLAINED_ROWS]
    raw, own = (torch.tensor(rows[numbers], device=context.device) for rows in (test.x, scores))
    reasons = Reasons(score, prepare, columns).of(raw, own)
    return [
        {
            "row": int(number), "score": float(scores[number]),
            "anomaly": None if test.y is None else bool(test.y[number]), "reasons": [r._asdict() for r in each],
        }
        for number, each in zip(numbers, reasons, strict=True)
    ]  # fmt: skip


def known_rows(context: Context, data: Arrays | Stream) -> tuple[Tensor, Tensor]:
    """Return the training and validation rows in memory as the first layer reads them."""
    prepare, arrays = preprocessing(data, context.device), rows_in_memory(data)
    train, validation = (over_batches(prepare, split.x, context.device) for split in (arrays.train, arrays.validation))
    return train, validation
