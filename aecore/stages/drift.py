"""Whether new test rows are like those that the champion was trained on."""

from math import prod

import numpy as np

from aecore.config.facts import columns_of
from aecore.config.specs import DriftSpec
from aecore.data.splits import Arrays, content_hashes
from aecore.data.stream import Stream
from aecore.evaluation.drift import LISTED, as_csv, drift_table, summary, title
from aecore.evaluation.figures import model as figures
from aecore.evaluation.scoring import over_batches
from aecore.models.storage import Result, Weights
from aecore.serving.model import Model
from aecore.stages.context import Context, all_test_rows, rows_in_memory

_MOST_ROWS, _FEWEST_ROWS, _MOST_VALUES = 20_000, 500, 2**26
"""Most new rows that are compared, how many are whatever their width, and the most values that more than these may
have, which take 256 MB."""


def drift(spec: DriftSpec, context: Context, *, data: Arrays | Stream, champion: Result, earlier: Result) -> Result:
    """Compare the test rows that came since the champion was made with the reference of its training, that is with
    validation rows of its day; the champion was trained on neither. `evaluation.drift.drift_table` says how. Where
    labels tell anomalies, and validation has none or few of them, only the normal ones of the new rows are compared.

    Args:
        earlier: the result of the contest that the champion has won, with the ids of the test rows of that day.

    Returns:
        A result with `drift/...` metrics; in `config` the `table` as CSV, the findings in `words` and whether anything
        has `drifted`; and a figure.
    """
    kind = "normal test row" if spec.normal_only else "test row"
    new = _measure_new_rows(spec, context, data, Model(champion, context.device), earlier.weights["ids"])
    if not new:
        metrics = {"drift/rows": 0.0, "drift/drifted": 0.0}
        config = {"table": as_csv([]), "words": f"no {kind} is newer than the model", "drifted": False}
        return Result(config, {}, metrics)
    features = columns_of(champion.config).cells
    table = drift_table(new, champion.weights, earlier.config["facts"]["classes"], spec.threshold, features)
    drifted = [row for row in table if row["drifted"]]
    rows = len(new["x"])
    metrics = {
        "drift/rows": float(rows),
        "drift/drifted": float(bool(drifted)),
        "drift/largest_effect": max(row["effect"] for row in table),
    }
    for row in table:
        if row["class"] == "all" and row["quantity"] in ("error", "unknown classes"):
            metrics[f"drift/{row['quantity'].replace(' ', '_')}_effect"] = row["effect"]
    errors = (champion.weights["reference.error"], new["error"]) if "error" in new else None
    effects = [(title(row), row["effect"], row["drifted"]) for row in table]
    picture = figures.drift(errors, effects, spec.threshold)
    words = summary(drifted, rows, f"{kind}s")
    if len(table) > LISTED:
        words += f"; the table lists {LISTED:,} of {len(table):,} comparisons, those with drift and the largest effects"
    config = {"table": as_csv(table), "words": words, "drifted": bool(drifted)}
    return Result(config, {}, metrics, {"drift": picture})


def _measure_new_rows(
    spec: DriftSpec, context: Context, data: Arrays | Stream, model: Model, seen: np.ndarray
) -> Weights:
    """Measure the test rows whose ids are not among `seen`, of which `spec` may leave out anomalies; at most the first
    20,000, or fewer of very many features. Return by name `code` (rows, units), `x` (rows, features) and, where there
    are any, `error` and `class`, (rows,); nothing if no row is new."""
    parts: list[Weights] = []
    rows, most = 0, min(_MOST_ROWS, max(_FEWEST_ROWS, _MOST_VALUES // prod(rows_in_memory(data).test.x.shape[1:])))
    for part in all_test_rows(data, context):
        new = ~np.isin(content_hashes(part.x), seen)
        if spec.normal_only and part.y is not None:
            new &= part.y == 0
        fresh = np.flatnonzero(new)[: most - rows]
        if not len(fresh):
            continue
        rows += len(fresh)
        raw = part.x[fresh]
        measured = model.measure(raw)
        x = over_batches(model.prepare, raw, model.device).flatten(1).cpu().numpy()
        values = {"code": measured["code"], "x": x}
        if "reconstruction_mse" in measured:
            values["error"] = measured["reconstruction_mse"]
        if part.y is not None and spec.classes:  # labels that only tell anomalies are no classes
            values["class"] = np.array(spec.classes)[part.y[fresh]]
        parts.append(values)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
