"""Missing values and categories: how they are read, trained with and scored, and what is refused."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from aecore.anomaly.reasons import Reasons
from aecore.anomaly.score import NeighbourScore, fit_score
from aecore.anomaly.scores import AllScores
from aecore.config.experiment import Data, Dense, Experiment, Finetune, Fit
from aecore.config.facts import Facts
from aecore.config.specs import EvaluateSpec, MeasureSpec, Numerics, ReferenceSpec
from aecore.core.errors import InputError
from aecore.core.fingerprint import canonical
from aecore.data.dataset import describe, identify, inspect, load, load_rows
from aecore.data.numbers import Moments
from aecore.data.splits import Arrays
from aecore.data.stream import Stream, open_stream
from aecore.evaluation.drift import drift_table
from aecore.evaluation.figures import model as figures
from aecore.evaluation.reconstruction import observed_mean, reconstruction_mse, row_errors
from aecore.evaluation.scoring import build_trained
from aecore.models import likelihood
from aecore.models.jacobian import squared_norm
from aecore.models.layers import Layer
from aecore.models.rebuild import build_prepare
from aecore.models.spec import LayerSpec
from aecore.models.stack import Stack
from aecore.models.storage import Result
from aecore.stages.context import Context
from aecore.stages.evaluate import evaluate
from aecore.stages.finetune import finetune, prepare
from aecore.stages.measure import measure
from aecore.stages.pretrain import pretrain_layer
from aecore.stages.reference import reference
from aecore.stages.rows import filled
from aecore.stages.training import train_as_one
from aecore.training import groups
from aecore.training.job import Job
from aecore.variants import Contractive, Denoising, Plain, Sparse, Variant, Variational
from pipelines.graph.recipe import Stacked, build
from tests.fits import job

ROWS = 300
BLOCKS = ((1, 4), (6, 8))
"""Where colour and size lie in a row of `people`."""


def people(gaps: bool = True, seed: int = 0) -> pd.DataFrame:
    """A table of numbers and texts that all follow one hidden number, of which a fifth is missing."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=ROWS)
    frame = pd.DataFrame(
        {
            "age": 40 + 9 * hidden + rng.normal(size=ROWS),
            "colour": np.where(hidden > 0.5, "red", np.where(hidden > -0.5, "green", "blue")),
            "income": -hidden + 0.1 * rng.normal(size=ROWS),
            "visits": pd.array((hidden + 4).round().astype(int), "Int64"),
            "size": np.where(hidden > 0, "small", "large"),
            "label": np.where(hidden > 0, "well", "sick"),
        }
    )
    for column in ("age", "colour", "visits") if gaps else ():
        frame.loc[rng.random(ROWS) < 0.2, column] = None
    return frame


def set_of(folder: Path, frame: pd.DataFrame | pa.Table, **fields: Any) -> Data:
    table = pa.Table.from_pandas(frame, preserve_index=False) if isinstance(frame, pd.DataFrame) else frame
    pq.write_table(table, folder / "data.parquet", row_group_size=50)
    return Data(name="parquet", path=str(folder / "data.parquet"), **fields)


def stages_of(data: Data, variant: Variant, facts: Facts, **fields: Any) -> Stacked:
    widths = (6, 3) if facts.shape == (8,) else (2, 1)
    fit: dict[str, Any] = {"epochs": 6, "lr": 1e-2, "batch_size": 32}
    fields |= {"pretrain": Fit(**fit), "finetune": Finetune(**fit), "network": Dense(widths=widths)}
    experiment = Experiment(data=data, variant=variant, **fields)
    return build(experiment, facts, Numerics())


def trained(graph: Any, arrays: Arrays | Stream) -> tuple[list[Result], Result]:
    layers: list[Result] = []
    for stage in graph.layers:
        layers.append(pretrain_layer(stage.spec, Context(), data=arrays, below=layers))
    return layers, finetune(graph.finetune.spec, Context(), data=arrays, layers=layers)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return set_of(tmp_path_factory.mktemp("people"), people(), missing="impute", labels=None, exclude=["label"])


@pytest.fixture(scope="module")
def rows(data: Data) -> tuple[Facts, Arrays]:
    facts = inspect(data)
    return facts, load(data, facts)


def test_rows_hold_one_hot_texts_and_nan(data: Data, rows: tuple[Facts, Arrays]) -> None:
    facts, _ = rows
    columns = facts.columns
    assert columns.features == ("age", "colour", "income", "visits", "size") and facts.shape == (8,)
    assert columns.categories == ((), ("blue", "green", "red"), (), (), ("large", "small"))
    assert columns.owners == (0, 1, 1, 1, 2, 3, 4, 4) and columns.blocks == BLOCKS
    assert columns.cells[:4] == ("age", "colour = blue", "colour = green", "colour = red")
    x, frame = load_rows(data, facts).x, people()
    np.testing.assert_array_equal(x[:, 0], frame.age.astype(np.float32))
    np.testing.assert_array_equal(x[:, 5], frame.visits.astype("Float32").to_numpy(np.float32, na_value=np.nan))
    for place, text in enumerate(columns.categories[1], 1):
        expected = np.where(frame.colour.isna(), np.nan, frame.colour == text)
        np.testing.assert_array_equal(x[:, place], expected.astype(np.float32))
    assert "one-hot: colour (3 texts), size (2 texts)" in describe(data, facts)


def test_scaling_and_fill_count_what_is_observed(rows: tuple[Facts, Arrays]) -> None:
    _, arrays = rows
    x, numbers = arrays.train.x.astype(np.float64), [0, 4, 5]
    np.testing.assert_allclose(arrays.shift[numbers], np.nanmean(x, 0)[numbers], rtol=1e-6)
    np.testing.assert_allclose(1 / arrays.scale[numbers], np.nanstd(x, 0)[numbers], rtol=1e-6)
    assert arrays.fill is not None
    np.testing.assert_allclose(arrays.fill[numbers], np.nanmedian(x, 0)[numbers], rtol=1e-6)
    for start, stop in BLOCKS:
        assert not arrays.shift[start:stop].any() and (arrays.scale[start:stop] == 1).all()
        np.testing.assert_allclose(arrays.fill[start:stop], np.nanmean(x, 0)[start:stop], rtol=1e-6)


def test_moments_over_batches_are_those_of_all_observed_rows() -> None:
    rng = np.random.default_rng(1)
    x = np.where(rng.random((60, 4)) < 0.4, np.nan, rng.normal(5, 2, (60, 4)))
    x[:20, 0] = np.nan
    moments = Moments()
    for part in np.split(x, [20, 33]):
        moments.add(part)
    np.testing.assert_allclose(moments.mean, np.nanmean(x, 0))
    np.testing.assert_allclose(moments.deviation, np.nanstd(x, 0))


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli", "continuous_bernoulli"])
def test_the_loss_leaves_missing_values_out(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(5, 4, generator=generator, requires_grad=True)
    target = torch.rand(5, 4, generator=generator)
    missing = torch.rand(5, 4, generator=generator) < 0.4
    loss = likelihood.reconstruction_loss(kind, out, target.masked_fill(missing, torch.nan), missing=True)
    values = [  # the sum by hand: one value at a time
        likelihood.reconstruction_loss(kind, out[i, j].view(1, 1), target[i, j].view(1, 1))
        for i in range(5) for j in range(4) if not missing[i, j]
    ]  # fmt: skip
    assert float(loss.detach()) == pytest.approx(float(torch.stack(values).detach().sum()) / 5, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, out)
    assert ((gradient == 0) == missing).all()
    whole = [likelihood.reconstruction_loss(kind, out, target, missing=absent) for absent in (False, True)]
    assert torch.equal(*whole)


def test_a_category_adds_its_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    out, numbers = torch.randn(6, 8, generator=generator), torch.randn(6, 3, generator=generator)
    colour, size = torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([1, 0, 0, 1, 1, 0])
    parts = [numbers[:, :1], F.one_hot(colour, 3), numbers[:, 1:], F.one_hot(size, 2)]
    target = torch.cat([part.float() for part in parts], 1)
    squares = (out[:, [0, 4, 5]] - numbers).square().sum()
    sizes = F.cross_entropy(out[:, 6:], size, reduction="sum")
    expected = (squares + F.cross_entropy(out[:, 1:4], colour, reduction="sum") + sizes) / 6
    assert torch.allclose(likelihood.reconstruction_loss("gaussian", out, target, BLOCKS), expected)
    target[:2, 1:4] = torch.nan
    expected = (squares + F.cross_entropy(out[2:, 1:4], colour[2:], reduction="sum") + sizes) / 6
    assert torch.allclose(likelihood.reconstruction_loss("gaussian", out, target, BLOCKS, missing=True), expected)
    mean = likelihood.mean("gaussian", out, BLOCKS)
    assert torch.allclose(mean[:, 1:4], out[:, 1:4].softmax(1)) and torch.equal(mean[:, 4:6], out[:, 4:6])


def test_errors_are_means_over_observed_values() -> None:
    x, output = torch.tensor([[1.0, torch.nan, 3.0], [0.0, 2.0, torch.nan]]), torch.zeros(2, 3)
    assert row_errors(x, output).tolist() == [5.0, 2.0]
    assert reconstruction_mse(x, output) == (1 + 9 + 4) / 4
    assert observed_mean(x).tolist() == [0.5, 2.0, 3.0]
    full = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(row_errors(full, full.roll(1)), (full - full.roll(1)).square().mean(1))
    assert torch.equal(observed_mean(full), full.mean(0))


VARIANTS: tuple[Variant, ...] = (
    Plain(), Sparse(), Denoising(), Denoising(noise="salt_and_pepper"), Contractive(), Variational(),
)  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: str(variant).replace(" ", "-"))
def test_every_variant_learns_from_rows_with_gaps(variant: Variant, data: Data, rows: tuple[Facts, Arrays]) -> None:
    facts, arrays = rows
    graph = stages_of(data, variant, facts)
    layers, result = trained(graph, arrays)
    fill = result.weights["layers.0.encoder.fill"]
    assert arrays.fill is not None
    np.testing.assert_allclose(fill, (arrays.fill - arrays.shift) * arrays.scale, atol=1e-6)
    np.testing.assert_array_equal(layers[0].weights["encoder.fill"], fill)
    assert "layers.1.encoder.fill" not in result.weights  # codes have no gaps
    first, last = (result.config["history"][epoch]["val/reconstruction"] for epoch in (0, -1))
    assert last < first
    spec = MeasureSpec(variant=variant, classes=(), labels=(), seed=0, pictures=True)
    measured = measure(spec, Context(), data=arrays, stack=result)
    assert graph.evaluate is not None and isinstance(graph.evaluate.spec, EvaluateSpec)
    scoring = graph.evaluate.spec.model_copy(update={"pictures": False})
    scored = evaluate(scoring, Context(), data=arrays, layers=layers, finetuned=result)
    assert np.isfinite([*measured.metrics.values(), *scored.metrics.values()]).all()
    assert measured.metrics["test/unexplained"] < 0.9 and np.isfinite(measured.weights["sse"]).all()
    assert np.isfinite(result.weights["reference.mean"]).all() and (result.weights["reference.std"] > 0).all()


def test_anomalies_are_scored_in_rows_with_gaps(data: Data, rows: tuple[Facts, Arrays]) -> None:
    facts, arrays = rows
    result = trained(stages_of(data, Variational(), facts), arrays)[1]
    stack = build_trained(result, (), torch.device("cpu"))
    train, validation, test = (
        (torch.tensor(split.x) - torch.tensor(arrays.shift)) * torch.tensor(arrays.scale) for split in arrays[:3]
    )
    scores = AllScores(stack, train, validation, mixed=False)(test)
    assert "bound" in scores and all(np.isfinite(each).all() for each in scores.values())
    reasons = Reasons(
        NeighbourScore(stack, fit_score(stack, train, validation, False)), build_prepare(result), facts.columns
    )
    raw = torch.tensor(arrays.test.x[:4])
    named = {reason.feature for row in reasons.of(raw, torch.tensor(scores["neighbours"][:4])) for reason in row}
    assert named <= {*facts.columns.features}


def test_gaps_are_drawn() -> None:
    x = np.where(np.random.default_rng(0).random((12, 8)) < 0.3, np.nan, 1.5)
    assert figures.reconstructions(x, np.zeros((12, 8)), 2.25).startswith(b"\x89PNG")


def test_fits_with_gaps_are_trained_as_one(data: Data, rows: tuple[Facts, Arrays]) -> None:
    facts, arrays = rows
    graphs = [stages_of(data, Plain(), facts, seed=seed) for seed in range(2)]
    specs: list[Any] = [graph.finetune.spec for graph in graphs if graph.finetune is not None]
    alone = [finetune(spec, Context(), data=arrays) for spec in specs]
    for one, two in zip(alone, train_as_one([prepare(s, Context(), data=arrays) for s in specs], True), strict=True):
        assert isinstance(two, Result)
        for epoch, other in zip(one.config["history"], two.config["history"], strict=True):
            assert epoch["val/reconstruction"] == pytest.approx(other["val/reconstruction"], rel=1e-4)


def test_references_read_filled_rows(rows: tuple[Facts, Arrays]) -> None:
    facts, arrays = rows
    layer = LayerSpec(
        kind="dense", in_shape=facts.shape, code_shape=(3,), activation="linear", likelihood="gaussian", levels=0,
        out_activation="linear", dropout=0, normalization="none", tied=False, missing=True,
    )  # fmt: skip
    pca = reference(ReferenceSpec(kind="pca", layers=(layer,), seed=0), Context(), data=arrays)
    x = filled((torch.tensor(arrays.train.x) - torch.tensor(arrays.shift)) * torch.tensor(arrays.scale), arrays)
    assert x.isfinite().all()
    np.testing.assert_allclose(pca.weights["layers.0.decoder.bias"], x.mean(0), atol=1e-6)
    spec = MeasureSpec(variant=None, classes=(), labels=(), seed=0, pictures=False)
    assert np.isfinite([*measure(spec, Context(), data=arrays, stack=pca).metrics.values()]).all()


@pytest.mark.parametrize("variant", [Plain(), Variational()])
def test_a_stream_has_the_facts_and_scaling_of_memory(variant: Variant, data: Data, rows: tuple[Facts, Arrays]) -> None:
    facts, arrays = rows
    streamed = data.model_copy(update={"in_memory": "never"})
    assert inspect(streamed) == facts
    stream = open_stream(streamed, facts)
    sample = stream.sample
    assert sample.fill is not None and arrays.fill is not None
    everything = np.concatenate([split.x for split in sample[:3]])
    assert len(everything) == ROWS and np.isnan(everything).sum() == sum(np.isnan(s.x).sum() for s in arrays[:3])
    np.testing.assert_allclose(sample.fill, np.where(sample.scale == 1, np.nanmean(sample.train.x, 0, np.float64),
                               np.nanmedian(sample.train.x, 0)), rtol=1e-5)  # fmt: skip
    graph = stages_of(streamed, variant, facts)
    layers, result = trained(graph, stream)
    assert isinstance(graph.evaluate.spec, EvaluateSpec)
    scoring = graph.evaluate.spec.model_copy(update={"pictures": False})
    scored = evaluate(scoring, Context(), data=stream, layers=layers, finetuned=result)
    x = build_prepare(result)(torch.tensor(sample.test.x))  # the sample of so few rows has all of them
    expected = reconstruction_mse(x, build_trained(result, [], torch.device("cpu")).reconstruct(x).detach())
    assert scored.metrics["test/reconstruction_mse"] == pytest.approx(expected, rel=1e-4)
    assert np.isfinite([*result.metrics.values(), *scored.metrics.values()]).all()


def test_a_missing_value_stays_missing_where_rows_are_drawn() -> None:
    spec = LayerSpec(
        kind="dense", in_shape=(4,), code_shape=(2,), activation="linear", likelihood="bernoulli", levels=0,
        out_activation="linear", dropout=0, normalization="none", tied=False, stochastic=True, missing=True,
    )  # fmt: skip
    layer, x = Layer(spec), torch.tensor([[1.0, torch.nan, 0.0, 1.0], [torch.nan, 0.0, 1.0, 1.0]])
    layer.encoder.fill.fill_(0.5)
    torch.manual_seed(0)
    drawn = Variational(binarize=True).loss(layer, x)
    torch.manual_seed(0)
    torch.rand_like(x)  # zeros and ones are drawn as they are
    assert drawn == Variational(binarize=False).loss(layer, x)


def test_fits_hold_the_same_rows_with_gaps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(groups, "fit", jobs.append)
    x = torch.tensor([[1.0, torch.nan], [2.0, 3.0], [torch.nan, 0.0]])
    model = torch.nn.Linear(2, 2)
    groups.fit_all(job(model, lambda rows: {"mse": rows.sum()}, (x.clone(),), (x[:2].clone(),), Fit()) for _ in "ab")
    first, second = ((*each.in_memory, *each.validation) for each in jobs)
    assert all(one is other for one, other in zip(first, second, strict=True)) and len(first) == 2


def test_without_gaps_impute_gives_the_numbers_of_refuse(tmp_path: Path) -> None:
    numbers = people(gaps=False).drop(columns=["colour", "size", "label"])
    results = []
    for missing in ("refuse", "impute"):
        data = set_of(tmp_path, numbers, missing=missing)
        facts = inspect(data)
        results.append(trained(stages_of(data, Plain(), facts), load(data, facts))[1])
    refused, imputed = (result.weights for result in results)
    assert imputed.keys() - refused.keys() == {"layers.0.encoder.fill"}
    assert all(np.array_equal(imputed[name], value) for name, value in refused.items())
    assert results[0].metrics.keys() == results[1].metrics.keys()


def test_tables_without_gaps_and_text_are_as_before(tmp_path: Path) -> None:
    data = set_of(tmp_path, people(gaps=False).drop(columns=["colour", "size"]))
    facts = inspect(data)
    graph = stages_of(data, Plain(), facts)
    assert load(data, facts).fill is None
    layer = canonical(graph.layers[0].spec)["layer"]
    assert "missing" not in layer and "blocks" not in layer and "missing" not in canonical(data)
    # the digest is that of the file and of the names of columns, as in earlier versions
    digest = hashlib.sha256(hashlib.sha256((tmp_path / "data.parquet").read_bytes()).digest())
    digest.update(f"{('age', 'income', 'visits')} label None".encode())
    assert facts.digest == digest.hexdigest()


def test_the_jacobian_is_taken_at_the_filled_row() -> None:
    spec = LayerSpec(
        kind="dense", in_shape=(5,), code_shape=(3,), activation="tanh", likelihood="gaussian", levels=0,
        out_activation="linear", dropout=0, normalization="none", tied=False, missing=True,
    )  # fmt: skip
    torch.manual_seed(0)
    layer = Layer(spec)
    layer.encoder.fill.copy_(torch.randn(5))
    x = torch.randn(4, 5)
    full = torch.where(torch.rand(4, 5) < 0.4, layer.encoder.fill, x)
    gaps = torch.where(full == layer.encoder.fill, torch.nan, x)
    assert torch.equal(layer.encode(gaps), layer.encode(full))
    expected = torch.func.vmap(torch.func.jacrev(lambda row: layer.encode(row[None])[0]))(full).square().sum((1, 2))
    for model in (layer, Stack([layer])):  # in closed form and by backward passes
        assert torch.allclose(squared_norm(model, gaps, None), expected, rtol=1e-4)


def test_vectors_may_have_gaps_inside(tmp_path: Path) -> None:
    values: list[list[Any]] = [[1.0, None, 3.0], [float("nan"), 2.0, 1.0], [0.5, 1.5, 2.5], [4.0, 3.0, 2.0]]
    values = [[value and value + row for value in values[row % 4]] for row in range(80)]
    kinds = (pa.list_(pa.float32()), pa.list_(pa.float32(), 3), pa.large_list(pa.float64()))
    for kind in kinds:
        data = set_of(tmp_path, pa.table({"x": pa.array(values, kind)}), missing="impute")
        x = load_rows(data, inspect(data)).x
        np.testing.assert_array_equal(x, np.array(values, np.float32))
    assert 0 < np.isnan(x).mean() < 0.5
    facts = inspect(data)
    result = trained(stages_of(data, Plain(), facts), load(data, facts))[1]
    assert np.isfinite([*result.metrics.values()]).all() and facts.columns.missing == "impute"


def test_times_with_gaps_keep_their_differences(tmp_path: Path) -> None:
    times = pa.array([None if n % 7 == 3 else 1_795_000_000_000_000_000 + n for n in range(ROWS)])
    data = set_of(tmp_path, pa.table({"time": times, "a": people(gaps=False).age}), missing="impute")
    facts = inspect(data)
    x = load_rows(data, facts).x[:, 0]
    assert facts.columns.offsets[0] and (np.isnan(x) == [n % 7 == 3 for n in range(ROWS)]).all()
    assert set(np.diff(x[np.isfinite(x)]).tolist()) <= {1.0, 2.0}


def test_drift_compares_features_where_they_are_observed() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    x[rng.random((200, 3)) < 0.5] = np.nan
    x[:, 1] += 2
    x[1:, 2] = np.nan  # of one row no mean is compared
    known = {"mean": np.zeros(3), "std": np.ones(3), "code": np.zeros((300, 1)), "observed": np.array([150, 300, 300])}
    table = drift_table(
        {"code": np.zeros((200, 1)), "x": x}, {f"reference.{name}": value for name, value in known.items()}, (), 0.2
    )
    found = {row["quantity"]: row for row in table}
    assert "feature 2" not in found and found["feature 1"]["drifted"] and not found["feature 0"]["drifted"]
    assert found["feature 0"]["rows"] == np.isfinite(x[:, 0]).sum() and found["feature 0"]["reference_rows"] == 150


def column(name: str, values: Any) -> pa.Table:
    frame = people(gaps=False).drop(columns=["colour", "size"])
    return pa.Table.from_pandas(frame, preserve_index=False).append_column(name, [values])


PIXELS = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((ROWS, 4, 4), np.float32))
REFUSED: dict[str, tuple[pa.Table, dict[str, Any], str]] = {
    "a gap in a number": (
        column("b", pa.array([None, *range(ROWS - 1)])), {},
        "column b row 0: the value is missing; fill it or drop the row, or train with --data.missing impute, or train "
        "without the column: --data.exclude [b]",
    ),
    "a gap in a text": (
        column("b", pa.array([None, "x", "y"] * (ROWS // 3))), {}, "column b row 0: the value is missing; fill it or d",
    ),
    "NaN": (
        column("b", pa.array([*np.arange(ROWS - 1.0), np.nan])), {},
        "column b row 299: the value is not finite, or too large for 32 bits; correct it or drop the row, or train "
        "with --data.missing impute",
    ),
    "infinite": (
        column("b", pa.array([*np.arange(ROWS - 1.0), np.inf])), {"missing": "impute"},
        "column b row 299: the value is not finite, or too large for 32 bits; correct it or drop the row",
    ),
    "no value": (
        column("my b", pa.array([None] * ROWS, pa.float64())), {"missing": "impute"},
        "data.path: column my b has no value in any row; leave it out with --data.exclude '[\"my b\"]'",
    ),
    "no value in training": (
        column("b", pa.array([1.0, *[None] * (ROWS - 1)], pa.float64())).append_column(
            "split", [["test", "validation", *["train"] * (ROWS - 2)]]
        ), {"missing": "impute"}, "data.path: column b has no value in the training rows; leave it out with --data.ex",
    ),
    "an empty row": (
        pa.table({"a": [1.0, None] * 30, "b": [2.0, None] * 30}), {"missing": "impute"},
        "column a row 1: no value of the row is known; drop it",
    ),
    "a gap in a vector": (
        pa.table({"x": [[1.0, None]] * 20}), {},
        "a value inside the list is missing; fill it or drop the row, or train with --data.missing impute",
    ),
    "a gap in bytes": (
        pa.table({"x": pa.array([[1, None]] * 20, pa.list_(pa.uint8()))}), {"missing": "impute"},
        "a value inside the list is missing; fill it or drop the row",
    ),
    "a vector without values": (
        pa.table({"x": [[1.0, None], [2.0, None]] * 20}), {"missing": "impute"},
        "data.path: feature 1 of the vectors has no value in any row; leave it out of them",
    ),
    "pictures": (
        pa.table({"x": PIXELS}), {"missing": "impute"},
        "data.missing: impute is for tables and for vectors of floating-point numbers, not for pictures and bytes; use",
    ),
    "text and bernoulli": (
        pa.table({"a": [0.0, 1.0] * 30, "b": ["x", "y"] * 30}), {"likelihood": "bernoulli"},
        "data.likelihood: bernoulli does not suit a table with columns of text, whose term is a cross-entropy; use ga",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_ends_in_one_line(case: str, tmp_path: Path) -> None:
    table, fields, message = REFUSED[case]
    data = set_of(tmp_path, table, **fields)
    with pytest.raises(InputError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        facts = inspect(data)
        load(data, facts)
        build(Experiment(data=data), facts, Numerics())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_named_sets_have_nothing_to_impute() -> None:
    with pytest.raises(
        ValueError, match=r"data.missing: impute is for data.name parquet, as digits has no missing val"
    ):
        Data(missing="impute")


def test_text_with_many_values_is_left_out_and_counted(tmp_path: Path) -> None:
    frame = people(gaps=False).assign(
        one="x", name=[f"n{n}" for n in range(ROWS)], empty=pa.array([None] * ROWS, pa.string())
    )
    frame["empty"] = frame["empty"].astype("string[pyarrow]")
    data = set_of(tmp_path, frame)
    facts = inspect(data)
    left_out = (
        "left out: one (all rows have one text), name (300 different texts, more than data.categories), empty (it has "
        "no values)"
    )
    assert left_out in describe(data, facts) and "name" not in facts.columns.features
    none = data.model_copy(update={"categories": 0})
    assert inspect(none).columns.features == ("age", "income", "visits")


def test_files_may_differ_in_text_that_is_left_out(tmp_path: Path) -> None:
    frame = people(gaps=False)
    frame.assign(note=[f"n{n}" for n in range(ROWS)]).to_parquet(tmp_path / "0.parquet")
    frame = people(gaps=False, seed=1)
    frame.to_parquet(tmp_path / "1.parquet")
    data = Data(name="parquet", path=str(tmp_path))
    assert inspect(data).columns.features == ("age", "colour", "income", "visits", "size")
    frame.drop(columns="colour").to_parquet(tmp_path / "2.parquet")
    facts = identify(data)
    assert facts.columns.features == ("age", "income", "visits", "size")
    assert "left out: colour (not in all files), note (not in all files)" in describe(data, facts)
    frame.assign(size=1).to_parquet(tmp_path / "2.parquet")
    with pytest.raises(InputError, match=r"column size holds int64 in .*2.parquet, but (large_)?string in"):
        inspect(data)


def test_later_data_are_read_as_for_the_model(data: Data, rows: tuple[Facts, Arrays], tmp_path: Path) -> None:
    like = rows[0].columns
    later = people(seed=1)[["size", "colour", "visits", "income", "age"]]
    later["colour"] = later["colour"].replace("red", "mauve")
    later = set_of(tmp_path, later.assign(extra="text"), missing="impute")
    with pytest.warns(
        UserWarning, match="the model was trained without 'mauve' in column colour; such values count as"
    ):
        facts = inspect(later, like)
    assert facts.columns.features == like.features and facts.columns.categories == like.categories
    frame, x = people(seed=1), load_rows(later, facts).x
    assert np.array_equal(np.isnan(x[:, 1]), frame.colour.isna() | (frame.colour == "red"))
    # a model that was trained without text, or by an earlier version, leaves it out
    numbers = identify(later.model_copy(update={"categories": 0})).columns
    assert numbers.features == ("visits", "income", "age")
    assert identify(later, numbers).columns.features == numbers.features
    with pytest.raises(
        InputError, match=r"column colour holds int64, but the model was trained on .*; write it as text"
    ):
        identify(set_of(tmp_path, people().assign(colour=1), missing="impute", labels=None), like)
