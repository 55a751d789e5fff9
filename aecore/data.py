"""Data sets: named ones and your own Parquet, to arrays in three splits.

`inspect` runs on the driver: streamed passes that learn the digest, the shape and the classes, check the values, and
keep nothing. `load` runs in a task: it reads the rows once, leaves uint8 as uint8, and splits them.
"""

import hashlib
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aecore import parquet
from aecore.config import Data
from aecore.errors import InputError
from aecore.fingerprint import row_ids
from aecore.specs import Facts, resolve_standardize

_SPLIT_SEED = 0
"""Splits belong to the data, not to the experiment: every seed and every variant sees the same ones."""


SPLITS = ("train", "validation", "test")
_LEAST = float(np.finfo(np.float32).tiny)
"""Spread of a feature whose reciprocal float32 still holds."""


class Split(NamedTuple):
    """Rows of one split."""

    x: np.ndarray
    """(rows, *shape), uint8 or float32, as read."""
    y: np.ndarray | None
    """(rows,) int64 class numbers."""


class Arrays(NamedTuple):
    """A data set in memory. What a layer reads is (x - shift) * scale."""

    train: Split
    validation: Split
    test: Split
    shift: np.ndarray
    """float32, () or *shape."""
    scale: np.ndarray
    """float32, () or *shape."""


class Shares(NamedTuple):
    """Shares of the rows that are not marked otherwise; what is left over is not used."""

    test: float
    validation: float
    train: float


class _Torchvision(NamedTuple):
    """A torchvision data set: where its files lie below `data.root`, and what is in them."""

    cls: str
    files: tuple[str, ...]
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    rows: tuple[int, int]
    """Of training and of test."""


def _idx(folder: str, stems: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{folder}/raw/{stem}-{kind}" for stem in stems for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))


_DIGITS = tuple("0123456789")
_GREY = (1, 28, 28)
_CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
_KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SETS = {
    "mnist": _Torchvision("MNIST", _idx("MNIST", ("train", "t10k")), _GREY, _DIGITS, (60_000, 10_000)),
    "fashion_mnist": _Torchvision(
        "FashionMNIST", _idx("FashionMNIST", ("train", "t10k")), _GREY, _CLOTHES, (60_000, 10_000)
    ),
    "kmnist": _Torchvision("KMNIST", _idx("KMNIST", ("train", "t10k")), _GREY, _KANA, (60_000, 10_000)),
    # the balanced split: digits and letters, those whose two cases look alike merged (Cohen et al. 2017)
    "emnist": _Torchvision(
        "EMNIST",
        _idx("EMNIST", ("emnist-balanced-train", "emnist-balanced-test")),
        _GREY,
        tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"),
        (112_800, 18_800),
    ),
    "cifar10": _Torchvision(
        "CIFAR10",
        tuple(f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")),
        (3, 32, 32),
        _OBJECTS,
        (50_000, 10_000),
    ),
    "svhn": _Torchvision("SVHN", ("train_32x32.mat", "test_32x32.mat"), (3, 32, 32), _DIGITS, (73_257, 26_032)),
}


def inspect(data: Data) -> Facts:
    """Digest, shape and classes of a data set, downloading it first where that is needed.

    Raises:
        InputError: the data are missing, unreadable, not of the form that the README describes, or cannot be split.
    """
    y = ids = None
    facts = identify(data)
    marks = np.repeat(["train", "test"], _SETS[data.name].rows) if data.name in _SETS else None
    for field, size in (("validation", data.validation), ("test", data.test)):
        if size >= facts.rows:
            raise InputError(f"data.{field}: {size:g} rows asked for, the data have {facts.rows}; ask for fewer")
    if data.name == "parquet":
        found = parquet.survey(data, facts)
        if found is None:
            return facts
        ids, y, marks = found
        parquet.give_back()
    if ids is None and data.split == "content":
        return facts  # which is which shows when the rows are read
    train, _, test = _split(data, facts, y, marks, ids, facts.rows)
    if ids is not None and (copies := np.isin(ids[test], ids[train]).sum()):
        warnings.warn(
            f"data.path: {copies} of the {len(test)} test rows are equal to training rows, so that the test rewards "
            "memory too; drop the copies",
            stacklevel=2,
        )
    return facts


def identify(data: Data) -> Facts:
    """What `inspect` learns, of data that need not be fit to train on.

    Raises:
        InputError: the data are missing, unreadable, or not of the form that the README describes.
    """
    if data.name == "parquet":
        facts = parquet.inspect(data)
    elif data.name == "digits":
        facts = Facts(digest=_digest([_digits_file()]), shape=(1, 8, 8), levels=17, classes=_DIGITS, rows=1_797)
    else:
        named = _SETS[data.name]
        files = [data.root / name for name in named.files]
        if not all(file.is_file() for file in files):
            _download(data, named)
        facts = Facts(digest=_digest(files), shape=named.shape, levels=256, classes=named.classes, rows=sum(named.rows))
    return facts if data.labels is not None else facts.model_copy(update={"classes": ()})


def load(data: Data, facts: Facts) -> Arrays:
    """Read and split the rows; standardisation is fitted on the training rows alone.

    Raises:
        InputError: a row cannot be read, or a split would be empty.
    """
    x, y, marks = rows(data, facts)
    ids = row_ids(x) if data.split == "content" else None
    train, validation, test = (
        Split(x[rows], None if y is None else y[rows]) for rows in _split(data, facts, y, marks, ids, len(x))
    )
    return Arrays(train, validation, test, *scaling(data, facts, [train.x]))


def rows(data: Data, facts: Facts) -> parquet.Rows:
    """All rows in their order.

    Raises:
        InputError: a row cannot be read.
    """
    if data.name == "parquet":
        x, y, marks = parquet.load(data, facts)
    elif data.name == "digits":
        from sklearn.datasets import load_digits

        bunch = load_digits()
        x, y, marks = bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int64), None
    else:
        x, y, marks = _load_torchvision(data, _SETS[data.name])
    return parquet.Rows(x, None if data.labels is None else y, marks)


def scaling(data: Data, facts: Facts, chunks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`shift` and `scale` of `Arrays`, from training rows that come in chunks (Chan et al. 1983, eq. 2.1); these are
    read only where features are standardised."""
    if not resolve_standardize(data, facts):
        return np.zeros((), np.float32), np.asarray(1 / (facts.levels - 1) if facts.levels else 1, np.float32)
    count, mean, squares = 0, np.zeros(facts.shape), np.zeros(facts.shape)
    for chunk in chunks:
        values = chunk.astype(np.float64)
        centre = values.mean(0)
        apart, total = centre - mean, count + len(values)
        squares += np.square(values - centre).sum(0) + apart**2 * count * len(values) / total
        mean, count = mean + apart * len(values) / total, total
    spread = np.sqrt(squares / count)
    # a constant feature carries nothing: left at zero instead of divided by zero
    return mean.astype(np.float32), (1 / np.where(spread > _LEAST, spread, 1)).astype(np.float32)


def _split(
    data: Data, facts: Facts, y: np.ndarray | None, marks: np.ndarray | None, ids: np.ndarray | None, rows: int
) -> tuple[np.ndarray, ...]:
    """Row numbers of train, validation and test.

    Args:
        marks: what the data say of each row ("train", "validation", "test"), or None.
        ids: of each row, where its content decides.

    Raises:
        InputError: a split would be empty, or training would have fewer rows than there are classes.
    """
    everything = np.arange(rows)
    if marks is not None and not (marks == "train").any():
        raise InputError("split: no row is marked train; mark some, or drop the column and let data.test cut them")
    if data.split == "content":
        assert ids is not None
        found = place(shares(data, count_marks(marks), rows), content(ids), marks)
        train, validation, test = (everything[found == number] for number in range(len(SPLITS)))
        refuse_empty([len(train), len(validation), len(test)])
    else:
        if marks is None:
            train, test = cut(everything, y, data.test, "data.test")
        else:
            train, test = everything[marks == "train"], everything[marks == "test"]
            if not len(test):
                train, test = cut(train, y, data.test, "data.test")
        if marks is not None and (marks == "validation").any():
            validation = everything[marks == "validation"]
        else:
            train, validation = cut(train, y, data.validation, "data.validation")
        if data.limit is not None and data.limit < len(train):
            _, train = cut(train, y, data.limit, "data.limit")
    if len(train) < max(2, len(facts.classes)):
        raise InputError(
            f"data: of {rows} rows {len(train)} are left to train on, fewer than "
            f"{f'the {len(facts.classes)} classes' if facts.classes else 'two'}; bring more, or cut off fewer "
            f"(data.test, data.validation, data.limit){', or --data.labels null' if facts.classes else ''}"
        )
    return train, validation, test


def cut(
    rows: np.ndarray, y: np.ndarray | None, size: float, field: str, seed: int = _SPLIT_SEED
) -> tuple[np.ndarray, np.ndarray]:
    """Cut `size` (a share below 1, else a number) off `rows`, stratified by label where each class has enough.

    Args:
        rows: row numbers, (rows,).
        y: the labels of all rows that the numbers may name, or None.
        field: the config field that asks, for the message.

    Returns:
        The rest and what was cut off, each in order.

    Raises:
        InputError: one of them would be empty.
    """
    count = int(size if size >= 1 else round(size * len(rows)))
    if not 0 < count < len(rows):
        raise InputError(f"{field}: {size:g} of {len(rows)} rows leaves a split empty; choose another size")
    shuffled = np.random.default_rng(seed).permutation(rows)
    if y is None:
        return np.sort(shuffled[count:]), np.sort(shuffled[:count])
    # spread each class evenly over the order, so that any prefix holds it in proportion
    labels = y[shuffled]
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    rank = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes if size])
    place = np.empty(len(rows))
    place[order] = rank
    even = shuffled[np.argsort(place, kind="stable")]
    return np.sort(even[count:]), np.sort(even[:count])


def shares(data: Data, marked: np.ndarray, rows: int) -> Shares:
    """Of a set that is split row by row. As by `cut`, test and validation are cut off the training rows where none are
    marked, then the limit.

    Args:
        marked: rows that are marked as of each of `SPLITS`, (3,).
    """
    train = marked[0] if marked.any() else rows
    parts = {"test": 0.0, "validation": 0.0}
    for name, size in (("test", data.test), ("validation", data.validation)):
        if not marked[SPLITS.index(name)]:
            share = size if size < 1 else size / max(train, 1)
            parts[name] = share * (1 - parts["test"] if name == "validation" and size < 1 else 1)
    rest = 1 - sum(parts.values())
    limit = rest if data.limit is None else min(rest, data.limit / max(train, 1))
    return Shares(parts["test"], parts["validation"], limit)


def place(shares: Shares, numbers: np.ndarray, marks: np.ndarray | None) -> np.ndarray:
    """Which of `SPLITS` each row is in, by its number in [0, 1) and what it is marked as; 3 is none."""
    drawn = np.array([2, 1, 0, 3])[np.searchsorted(np.cumsum(shares), numbers, side="right")]
    if marks is None:
        return drawn
    marked = np.array([SPLITS.index(mark) for mark in marks])
    return np.where(marked == 0, drawn, marked)


def content(ids: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each row, by its `row_ids`."""
    return (ids >> np.uint64(11)) / 2.0**53


def count_marks(marks: np.ndarray | None) -> np.ndarray:
    """Rows that are marked as of each of `SPLITS`, (3,)."""
    return np.array([0 if marks is None else int((marks == split).sum()) for split in SPLITS])


def refuse_empty(counts: Iterable[int]) -> None:
    """Raises an InputError where one of `SPLITS` has no rows."""
    for split, count in zip(SPLITS, counts, strict=True):
        if not count:
            raise InputError(f"data: no row is left for {split}; choose other sizes, or mark some rows {split}")


def _digits_file() -> Path:
    # found without importing scikit-learn, which takes seconds
    from importlib.util import find_spec

    spec = find_spec("sklearn")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _download(data: Data, named: _Torchvision) -> None:
    import torchvision

    try:
        for part in _parts(named):
            getattr(torchvision.datasets, named.cls)(str(data.root), download=True, **part)
    except Exception as error:  # urllib, SSL, OSError, torchvision's RuntimeError: all end in the same advice
        missing = [name for name in named.files if not (data.root / name).is_file()]
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"data.root: {data.name} is not complete in {data.root} and could not be downloaded ({reason}); "
            f"put {', '.join(missing)} there, or set --data.root to a folder that has them"
        ) from error


def _parts(named: _Torchvision) -> tuple[dict, dict]:
    if named.cls == "SVHN":
        return {"split": "train"}, {"split": "test"}
    extra = {"split": "balanced"} if named.cls == "EMNIST" else {}
    return {"train": True, **extra}, {"train": False, **extra}


def _load_torchvision(data: Data, named: _Torchvision) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if named.files[0].endswith("ubyte"):
        # torchvision's own files, read without its import, which takes longer than training a layer
        xs = [_read_idx(data.root / name) for name in named.files[0::2]]
        ys = [_read_idx(data.root / name) for name in named.files[1::2]]
        if named.cls == "EMNIST":  # stored on its side
            xs = [x.transpose(0, 2, 1) for x in xs]
    else:
        import torchvision

        sets = [getattr(torchvision.datasets, named.cls)(str(data.root), **part) for part in _parts(named)]
        xs = [np.asarray(s.data) for s in sets]
        ys = [np.asarray(s.labels if named.cls == "SVHN" else s.targets) for s in sets]
        if named.cls == "CIFAR10":  # rows, height, width, channels
            xs = [x.transpose(0, 3, 1, 2) for x in xs]
    marks = np.repeat(["train", "test"], [len(x) for x in xs])
    x = np.ascontiguousarray(np.concatenate(xs)).reshape(-1, *named.shape)
    return x, np.concatenate(ys).astype(np.int64), marks


def _read_idx(file: Path) -> np.ndarray:
    """An IDX file of unsigned bytes: a magic number whose last byte is the rank, big-endian sizes, the values."""
    raw = file.read_bytes()
    rank = raw[3]
    sizes = np.frombuffer(raw, ">i4", rank, 4)
    if len(raw) != 4 + 4 * rank + sizes.prod(dtype=np.int64):
        raise InputError(f"data.root: {file} is truncated or damaged; delete it to download it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(sizes)
