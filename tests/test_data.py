from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from aecore.config.experiment import Data
from aecore.config.facts import Facts
from aecore.core.errors import InputError
from aecore.data.dataset import inspect, load
from aecore.data.splits import (
    Arrays,
    Shares,
    assign_splits,
    content_hashes,
    positions_by_content,
    positions_by_number,
    split_off,
    split_shares,
)


def test_digits_are_scikit_learns(digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = digits
    assert (facts.shape, facts.levels, len(facts.classes), facts.rows) == ((1, 8, 8), 17, 10, 1797)
    every = np.concatenate([split.x for split in arrays[:3]])
    assert every.dtype == np.uint8
    assert sorted(every.reshape(1797, 64).sum(1)) == sorted(load_digits().data.sum(1))
    assert arrays.scale == np.float32(1 / 16)


def test_splits_are_disjoint_stratified_and_the_same_again(digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = digits
    assert [len(split.x) for split in arrays[:3]] == [1222, 216, 359]
    again = load(Data(), facts)
    for one, two in zip(arrays[:3], again[:3], strict=True):
        assert np.array_equal(one.x, two.x)
        assert one.y is not None
        assert np.bincount(one.y).min() > 0.08 * len(one.y)


def test_drawn_splits_are_the_ones_that_finished_runs_have() -> None:
    # a change of these values moves rows between the splits of every user
    rows = np.arange(20)
    assert split_off(rows, rows % 3, 0.3, "data.test")[1].tolist() == [2, 3, 4, 6, 11, 19]
    assert split_off(rows, None, 5, "data.test")[1].tolist() == [2, 4, 6, 13, 19]
    rest, drawn = split_off(rows, rows % 3, 4, "data.test", seed=7)
    assert drawn.tolist() == [3, 8, 12, 13] and sorted([*rest, *drawn]) == rows.tolist()


def test_rows_that_are_split_one_by_one_stay_where_finished_runs_have_them() -> None:
    assert positions_by_number(5, 3).tolist() == [0.3273257642181258, 0.17386786595968287, 0.771546556331567]
    shares = split_shares(Data(split="content"), np.zeros(3, int), 20)
    assert shares == Shares(test=0.2, validation=0.12, train=0.6799999999999999)
    assert split_shares(Data(limit=5, validation=4), np.array([10, 0, 6]), 20) == Shares(0, 0.4, 0.5)
    positions = positions_by_content(content_hashes(np.arange(20, dtype=np.uint8)[:, None]))
    assert assign_splits(shares, positions, None).tolist() == [
        1,
        0,
        0,
        1,
        0,
        0,
        0,
        2,
        0,
        1,
        0,
        0,
        0,
        0,
        0,
        1,
        0,
        2,
        1,
        0,
    ]
    marks = np.array(["train"] * 7 + ["test"] * 2)
    assert assign_splits(shares, positions_by_number(0, 9), marks).tolist() == [0, 0, 2, 0, 2, 0, 2, 2, 2]


def test_limit_takes_only_training_rows_and_keeps_the_classes(digits: tuple[Facts, Arrays]) -> None:
    facts, arrays = digits
    few = load(Data(limit=100), facts)
    assert few.train.y is not None and sorted(np.bincount(few.train.y)) == [10] * 10
    assert np.array_equal(few.test.x, arrays.test.x)


def test_copies_share_a_split_and_marks_stay(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    columns = {"x": [*x.tolist(), *x.tolist()], "split": ["train"] * 500 + ["test"] * 100}
    data = Data(name="parquet", path=str(tmp_path / "x.parquet"), split="content", limit=200)
    pq.write_table(pa.table({"x": columns["x"]}), tmp_path / "x.parquet")
    facts = inspect(data)  # warns of no copies across splits
    arrays = load(data, facts)
    sets = [{tuple(row) for row in split.x} for split in arrays[:3]]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert len(arrays.train.x) == pytest.approx(200, abs=50) and len(arrays.test.x) == pytest.approx(120, abs=50)
    pq.write_table(pa.table({"x": columns["x"][:300] + (9 * x).tolist(), "split": columns["split"]}), data.path)
    assert len(load(data, inspect(data)).test.x) == 100


def test_a_number_of_test_rows_is_no_share_of_growing_data() -> None:
    with pytest.raises(ValueError, match=r"data.test: 500 rows are not the same ones when the data grow"):
        Data(split="content", test=500)
    digits = Data(split="content")
    assert len(load(digits, inspect(digits)).test.x) == pytest.approx(360, abs=70)


def test_labels_can_be_ignored() -> None:
    data = Data(labels=None)
    facts = inspect(data)
    assert facts.classes == () and load(data, facts).train.y is None


@pytest.mark.parametrize("field", ["validation", "test"])
def test_more_rows_than_there_are(field: str) -> None:
    with pytest.raises(InputError, match=f"data.{field}: 2000 rows requested, but there are only 1797; request fewer"):
        inspect(Data.model_validate({field: 2000}))


def test_a_split_that_leaves_nothing(digits: tuple[Facts, Arrays]) -> None:
    with pytest.raises(InputError, match=r"data.validation: 1700 of 1438 rows leaves a split empty"):
        load(Data(validation=1700), digits[0])


def test_real_mnist(mnist_root: Path) -> None:
    data = Data(name="mnist", root=mnist_root, validation=10000)
    facts = inspect(data)
    arrays = load(data, facts)
    assert [len(split.x) for split in arrays[:3]] == [50_000, 10_000, 10_000]
    train = np.concatenate([arrays.train.x, arrays.validation.x])
    assert train.dtype == np.uint8
    assert train.mean() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert train.std() / 255 == pytest.approx(0.3081, abs=1e-4)
    assert arrays.test.y is not None and arrays.test.y[:5].tolist() == [7, 2, 1, 0, 4]


def write_idx(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    file.write_bytes(header + values.astype(np.uint8).tobytes())


def write_mnist(root: Path, name: str = "MNIST", prefix: tuple[str, str] = ("train", "t10k")) -> None:
    rng = np.random.default_rng(0)
    for stem, rows in zip(prefix, (400, 100), strict=True):
        write_idx(root / name / "raw" / f"{stem}-images-idx3-ubyte", rng.integers(0, 256, (rows, 28, 28)))
        write_idx(root / name / "raw" / f"{stem}-labels-idx1-ubyte", np.arange(rows) % 10)


@pytest.mark.parametrize(
    ("name", "folder", "stems"),
    [
        ("mnist", "MNIST", ("train", "t10k")),
        ("fashion_mnist", "FashionMNIST", ("train", "t10k")),
        ("kmnist", "KMNIST", ("train", "t10k")),
        ("emnist", "EMNIST", ("emnist-balanced-train", "emnist-balanced-test")),
    ],
)
def test_idx_sets_are_read_as_torchvision_reads_them(
    tmp_path: Path, name: str, folder: str, stems: tuple[str, str]
) -> None:
    import torchvision

    write_mnist(tmp_path, folder, stems)
    data = Data.model_validate({"name": name, "root": tmp_path, "validation": 50})
    arrays = load(data, inspect(data))
    extra = {"split": "balanced"} if name == "emnist" else {}
    theirs = getattr(torchvision.datasets, folder)(str(tmp_path), train=False, **extra).data.numpy()
    assert np.array_equal(arrays.test.x[:, 0], theirs.transpose(0, 2, 1) if name == "emnist" else theirs)
    assert len(arrays.train.x) == 350


def test_a_missing_set_says_where_to_put_which_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def offline(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "KMNIST", offline)
    with pytest.raises(InputError) as error:
        inspect(Data(name="kmnist", root=tmp_path))
    assert "\n" not in str(error.value)
    for part in ("data.root", "no network", str(tmp_path), "KMNIST/raw/t10k-labels-idx1-ubyte"):
        assert part in str(error.value)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    data = Data(name="mnist", root=tmp_path)
    with pytest.raises(InputError, match="train-images-idx3-ubyte is truncated"):
        load(data, inspect(data))


def test_the_digest_is_the_one_that_finished_runs_have(tmp_path: Path) -> None:
    for stem, rows in (("train", 12), ("t10k", 8)):
        write_idx(tmp_path / "MNIST" / "raw" / f"{stem}-images-idx3-ubyte", np.arange(rows * 784).reshape(rows, 28, 28))
        write_idx(tmp_path / "MNIST" / "raw" / f"{stem}-labels-idx1-ubyte", np.arange(rows) % 10)
    digest = inspect(Data(name="mnist", root=tmp_path)).digest
    # a change of this value forks every finished stage of every user
    assert digest == "673f19bed0ad149b752b834ea8e90c9e319d246975648c8f9ef0e25e9c5b00f3"


def test_other_bytes_other_digest(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = Data(name="mnist", root=tmp_path)
    before = inspect(data).digest
    assert inspect(data).digest == before
    write_idx(tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", np.ones(100))
    assert inspect(data).digest != before


def test_colour_sets_come_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    class Cifar:
        def __init__(self, root: str, train: bool = True) -> None:
            rows = 100 if train else 20
            self.data = np.arange(rows * 32 * 32 * 3, dtype=np.uint8).reshape(rows, 32, 32, 3)
            self.targets = [n % 10 for n in range(rows)]

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / name).write_bytes(b"stands for the real one")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    data = Data(name="cifar10", root=tmp_path)
    arrays = load(data, inspect(data))
    assert arrays.test.x.shape == (20, 3, 32, 32)
    assert np.array_equal(arrays.test.x[0, :, 0, 1], Cifar("", False).data[0, 0, 1])
