"""Sets that are read from disk while they train: they give the same rows as in memory, each once per epoch."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aecore.config.experiment import Data, Dense, Experiment, Finetune, Fit
from aecore.config.facts import Facts
from aecore.config.resolve import resolve_in_memory
from aecore.config.specs import MeasureSpec, Numerics
from aecore.core.errors import InputError
from aecore.data.dataset import inspect, load
from aecore.data.splits import SPLITS, Arrays, Split
from aecore.data.stream import Shuffled, Stream, open_stream, read_in_turn
from aecore.models.storage import Result
from aecore.stages.context import Context
from aecore.stages.measure import measure
from pipelines.graph.recipe import Stacked, build


def write(path: Path, rows: int = 3000, group: int = 500, marks: list[str] | None = None, files: int = 3) -> Data:
    """Write a set whose first feature is the row's number, by default in three files of several row groups."""
    rng = np.random.default_rng(0)
    x = np.concatenate([np.arange(rows)[:, None], rng.normal(2, 3, size=(rows, 7))], 1).astype(np.float32)
    columns = {"x": pa.FixedSizeListArray.from_arrays(x.ravel(), 8), "label": pa.array(np.arange(rows) % 3)}
    if marks:
        columns["split"] = pa.array(marks)
    table = pa.table(columns)
    path.mkdir()
    for n in range(files):
        part = table.slice(n * rows // files, (n + 1) * rows // files - n * rows // files)
        pq.write_table(part, path / f"{n}.parquet", row_group_size=group)
    return Data(name="parquet", path=str(path), in_memory="never")


def open_data(data: Data) -> Stream:
    return open_stream(data, inspect(data))


def numbers(stream: Stream, split: str) -> list[int]:
    return [int(n) for rows in read_in_turn(stream.reader(split), stream.pieces) for n in rows.x[:, 0]]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pieces and batches so small that a small set has many of them."""
    monkeypatch.setattr("aecore.data.sets.PIECE_BYTES", 300 * 32)
    monkeypatch.setattr("aecore.data.parquet.BATCH_BYTES", 100 * 32)


@pytest.mark.usefixtures("small_pieces")
def test_every_row_is_in_one_split_and_always_in_the_same(tmp_path: Path) -> None:
    stream = open_data(write(tmp_path / "set"))
    assert len(stream.pieces) > 5
    rows_of = {split: numbers(stream, split) for split in SPLITS}
    assert sorted(n for rows in rows_of.values() for n in rows) == list(range(3000))
    assert {split: stream.row_count(split) for split in SPLITS} == {split: len(rows) for split, rows in rows_of.items()}
    # 20 % test, then 15 % of the rest, up to four standard deviations of a draw
    assert len(rows_of["test"]) == pytest.approx(600, abs=90)
    assert len(rows_of["validation"]) == pytest.approx(360, abs=75)
    assert rows_of["test"][:6] == [2, 4, 6, 32, 33, 41]
    # other row groups move no row to another split
    assert numbers(open_data(write(tmp_path / "other", group=77)), "test") == rows_of["test"]


@pytest.mark.usefixtures("small_pieces")
def test_marks_and_limit_are_respected(tmp_path: Path) -> None:
    marks = ["test" if n % 10 == 0 else "train" for n in range(3000)]
    data = write(tmp_path / "set", marks=marks).model_copy(update={"validation": 270.0, "limit": 1000})
    stream = open_data(data)
    assert numbers(stream, "test") == list(range(0, 3000, 10))
    assert stream.row_count("validation") == pytest.approx(270, abs=65)
    assert stream.row_count("train") == pytest.approx(1000, abs=110)


@pytest.mark.usefixtures("small_pieces")
def test_split_by_content_rows_stay_where_they_are_as_the_data_grow(tmp_path: Path) -> None:
    few, many = (write(tmp_path / str(n), n) for n in (1200, 3000))  # other files and pieces, other numbers of rows
    rows_of: dict[str, dict[str, set[int]]] = {}
    for name, data in (("few", few), ("many", many)):
        data = data.model_copy(update={"split": "content"})
        stream = open_data(data)
        rows_of[name] = {split: set(numbers(stream, split)) for split in SPLITS}
        in_memory = load(data.model_copy(update={"in_memory": "always"}), inspect(data))
        for split, rows in zip(SPLITS, in_memory, strict=False):
            assert isinstance(rows, Split) and set(rows.x[:, 0]) == rows_of[name][split]
            assert stream.row_count(split) == len(rows_of[name][split])
    assert sum(len(rows) for rows in rows_of["many"].values()) == 3000
    assert len(rows_of["many"]["test"]) == pytest.approx(600, abs=90)
    for split in SPLITS:
        assert {n for n in rows_of["many"][split] if n < 1200} == rows_of["few"][split]


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "set", marks=["train"] * 3000)
    facts = inspect(data)
    with pytest.raises(InputError, match="no row is left for test"):
        open_stream(data.model_copy(update={"test": 1e-9}), facts)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_epoch_has_every_training_row_once(tmp_path: Path, workers: int) -> None:
    stream = open_data(write(tmp_path / "set"))
    rows = Shuffled(stream, labelled=True, window=400 * 32)
    epochs = [[list(rows.batches(64, seed, r, workers)) for r in range(workers)] for seed in (1, 1, 2)]
    seen = [[[b[0][:, 0] for b, _ in worker if b] for worker in epoch] for epoch in epochs]
    orders = [np.concatenate([np.concatenate(worker) for worker in epoch]) for epoch in seen]
    for order in orders:
        assert sorted(order) == numbers(stream, "train")
    if workers == 1:  # a change of this order changes the weights of every streamed training
        assert orders[0][:6].tolist() == [70, 2072, 2063, 2309, 2078, 2003]
    assert (orders[0] == orders[1]).all()
    assert (orders[0] != orders[2]).any()
    for step in zip(*epochs[0], strict=True):  # all workers take each step, and their shares make a whole
        assert sum(share for _, share in step) == pytest.approx(1)
        for batch, share in step:
            assert (share > 0) == bool(batch)
            assert not batch or (batch[0][:, 0] % 3 == batch[1]).all()


@pytest.mark.usefixtures("small_pieces")
def test_rows_are_mixed_within_windows(tmp_path: Path) -> None:
    rows = Shuffled(open_data(write(tmp_path / "set")), window=400 * 32)
    first = np.concatenate([batch[0][:, 0] for batch, _ in rows.batches(64, 0)])[:256]
    assert np.abs(np.diff(first)).mean() > 50
    assert len({int(n) // 250 for n in first}) > 1


@pytest.mark.usefixtures("small_pieces")
def test_standardised_as_in_memory(tmp_path: Path) -> None:
    data = write(tmp_path / "set")
    facts = inspect(data)
    stream = open_stream(data, facts)
    x = np.concatenate([rows.x for rows in read_in_turn(stream.reader("train"), stream.pieces)]).astype(np.float64)
    np.testing.assert_allclose(stream.shift, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stream.scale, 1 / x.std(0), rtol=1e-6)


def images(path: Path, digits: tuple[Facts, Arrays]) -> Data:
    """Write the digits four times to one Parquet file, each time in another shade."""
    rows = [digits[1].train, digits[1].validation, digits[1].test]
    x = np.concatenate([r.x for r in rows])
    x, y = np.concatenate([15 * x + n for n in range(4)]), np.concatenate([r.y for r in rows if r.y is not None] * 4)
    kind = pa.fixed_shape_tensor(pa.uint8(), (8, 8))
    column = pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(x[:, 0].ravel(), 64))
    pq.write_table(pa.table({"image": column, "label": y}), path, row_group_size=700)
    return Data(name="parquet", path=str(path))


def run(graph: Stacked, data: Arrays | Stream) -> tuple[list[Result], Result, Result]:
    layers: list[Result] = []
    for stage in graph.layers:
        layers.append(stage.function()(stage.spec, Context(), data=data, below=layers))
    assert graph.finetune is not None
    tuned = graph.finetune.function()(graph.finetune.spec, Context(), data=data, layers=layers)
    scored = graph.evaluate.function()(graph.evaluate.spec, Context(), data=data, layers=layers, finetuned=tuned)
    return layers, tuned, scored


def test_trains_as_well_as_in_memory(
    tmp_path: Path, digits: tuple[Facts, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aecore.data.sets.PIECE_BYTES", 700 * 64)
    monkeypatch.setattr(
        "aecore.data.stream.SAMPLE_BYTES", {"train": 500 * 64, "validation": 300 * 64, "test": 200 * 64}
    )
    data = images(tmp_path / "digits.parquet", digits)
    facts = inspect(data)
    results = {}
    for mode in ("always", "never"):
        experiment = Experiment(
            data=data.model_copy(update={"in_memory": mode}), network=Dense(widths=(32, 16)),
            pretrain=Fit(epochs=5), finetune=Finetune(epochs=6),
        )  # fmt: skip
        graph = build(experiment, facts, Numerics())
        rows = load(graph.experiment.data, facts) if mode == "always" else open_stream(graph.experiment.data, facts)
        results[mode] = run(graph, rows)
        if isinstance(rows, Stream):
            assert len(rows.sample.test.x) == 200 < rows.row_count("test")
            table = results[mode][2].metrics
            half = (table["test/accuracy_high"] - table["test/accuracy_low"]) / 2
            # the interval is that of all test rows, not of the sample
            p = table["test/accuracy"]
            assert half == pytest.approx(1.96 * np.sqrt(p * (1 - p) / rows.row_count("test")), rel=0.1)
    for name, tolerance in (("test/accuracy", 0.03), ("test/reconstruction_mse", 0.1)):
        in_memory, streamed = (results[mode][2].metrics[name] for mode in ("always", "never"))
        assert streamed == pytest.approx(in_memory, rel=tolerance), name


def test_the_same_bits_again(tmp_path: Path, digits: tuple[Facts, Arrays]) -> None:
    data = images(tmp_path / "digits.parquet", digits).model_copy(update={"in_memory": "never"})
    facts = inspect(data)
    graph = build(Experiment(data=data, pretrain=Fit(epochs=2), finetune=Finetune(epochs=1)), facts, Numerics())
    stream = open_stream(data, facts)
    layer = graph.layers[0]
    first, again = (layer.function()(layer.spec, Context(), data=stream) for _ in range(2))
    assert all((first.weights[name] == again.weights[name]).all() for name in first.weights)
    spec = MeasureSpec(variant=None, classes=facts.classes, labels=(), seed=0, pictures=False)
    assert measure(spec, Context(), data=stream, layers=[first]).metrics["probe/accuracy"] > 0.5


def test_auto_streams_only_large_parquet(tmp_path: Path) -> None:
    data = write(tmp_path / "set").model_copy(update={"in_memory": "auto"})
    facts = inspect(data)
    assert resolve_in_memory(data, facts) == "always"
    assert resolve_in_memory(data, facts.model_copy(update={"rows": 10**8})) == "never"
    assert resolve_in_memory(Data(name="mnist"), facts.model_copy(update={"rows": 10**8})) == "always"
    with pytest.raises(ValueError, match="never needs"):
        Data(in_memory="never")


@pytest.mark.long
def test_reading_waits_for_no_cpu() -> None:
    """A streamed study hung where its trials held all CPUs, since Ray Data's own tasks waited for one."""
    script = """
        import numpy as np, ray
        from aecore.data.splits import Split
        from pipelines.cluster.reading import spread

        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)

        @ray.remote(num_cpus=1)
        def rows():
            read = lambda piece: iter([Split(np.full((3, 2), piece, np.float32), None)])
            return np.concatenate([part.x[:, 0] for part in spread(read, [4, 7])]).tolist()

        print(ray.get(rows.remote(), timeout=60))
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[4.0, 4.0, 4.0, 7.0, 7.0, 7.0]"
