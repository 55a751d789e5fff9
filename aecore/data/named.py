"""The named data sets: scikit-learn's digits and those of torchvision.

Functions raise an InputError if a file is missing and cannot be downloaded, or is damaged.
"""

import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aecore.config.experiment import Data
from aecore.config.facts import Facts
from aecore.core.errors import InputError
from aecore.data.files import short_reason
from aecore.data.splits import Rows


class _TorchvisionSet(NamedTuple):
    """A torchvision data set: its class, its files below `data.root`, and its shape, classes and numbers of rows."""

    class_name: str
    files: tuple[str, ...]
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    rows: tuple[int, int]
    """Numbers of training and of test rows."""


def _idx(folder: str, *stems: str) -> tuple[str, ...]:
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    return tuple(f"{folder}/raw/{stem}-{kind}" for stem in stems or ("train", "t10k") for kind in kinds)


_DIGITS = tuple("0123456789")
_GREY, _COLOUR = (1, 28, 28), (3, 32, 32)
_CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
_KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BALANCED = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt")
"""EMNIST's balanced split: digits and letters, those whose two cases look alike merged (Cohen et al. 2017)."""
_EMNIST_FILES = _idx("EMNIST", "emnist-balanced-train", "emnist-balanced-test")
_CIFAR_FILES = tuple(f"cifar-10-batches-py/{n}" for n in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"))
_SVHN_FILES = ("train_32x32.mat", "test_32x32.mat")
_TORCHVISION_SETS = {
    "mnist": _TorchvisionSet("MNIST", _idx("MNIST"), _GREY, _DIGITS, (60_000, 10_000)),
    "fashion_mnist": _TorchvisionSet("FashionMNIST", _idx("FashionMNIST"), _GREY, _CLOTHES, (60_000, 10_000)),
    "kmnist": _TorchvisionSet("KMNIST", _idx("KMNIST"), _GREY, _KANA, (60_000, 10_000)),
    "emnist": _TorchvisionSet("EMNIST", _EMNIST_FILES, _GREY, _BALANCED, (112_800, 18_800)),
    "cifar10": _TorchvisionSet("CIFAR10", _CIFAR_FILES, _COLOUR, _OBJECTS, (50_000, 10_000)),
    "svhn": _TorchvisionSet("SVHN", _SVHN_FILES, _COLOUR, _DIGITS, (73_257, 26_032)),
}


def identify(data: Data) -> Facts:
    """Return digest, shape, classes and number of rows; download the set first where that is needed."""
    if data.name == "digits":
        return Facts(digest=_digest([_digits_file()]), shape=(1, 8, 8), levels=17, classes=_DIGITS, rows=1_797)
    named = _TORCHVISION_SETS[data.name]
    files = [data.root / name for name in named.files]
    if not all(file.is_file() for file in files):
        _download(data, named)
    return Facts(digest=_digest(files), shape=named.shape, levels=256, classes=named.classes, rows=sum(named.rows))


def split_marks(data: Data) -> np.ndarray | None:
    """Return the split that the set names for each row, (rows,), without reading the rows; None if it names none."""
    return None if data.name == "digits" else np.repeat(["train", "test"], _TORCHVISION_SETS[data.name].rows)


def load_labels(data: Data) -> np.ndarray:
    """Read the class numbers of all rows, (rows,), without the images where these lie in other files."""
    labels = None
    if data.name != "digits" and (files := _TORCHVISION_SETS[data.name].files)[0].endswith("ubyte"):
        labels = np.concatenate([_read_idx(data.root / name) for name in files[1::2]]).astype(np.int64)
    else:
        labels = load(data).y
    assert labels is not None, "all named sets have labels"
    return labels


def load(data: Data) -> Rows:
    """Read all rows of a set that `identify` has downloaded."""
    if data.name == "digits":
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return Rows(bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int64), None)
    named = _TORCHVISION_SETS[data.name]
    if named.files[0].endswith("ubyte"):
        # read without torchvision, whose import takes longer than training a layer
        xs = [_read_idx(data.root / name) for name in named.files[0::2]]
        ys = [_read_idx(data.root / name) for name in named.files[1::2]]
        if named.class_name == "EMNIST":  # its images are stored transposed
            xs = [x.transpose(0, 2, 1) for x in xs]
    else:
        import torchvision

        make = getattr(torchvision.datasets, named.class_name)
        sets = [make(str(data.root), **arguments) for arguments in _part_arguments(named)]
        xs = [np.asarray(part.data) for part in sets]
        ys = [np.asarray(part.labels if named.class_name == "SVHN" else part.targets) for part in sets]
        if named.class_name == "CIFAR10":  # stored as (rows, height, width, channels)
            xs = [x.transpose(0, 3, 1, 2) for x in xs]
    marks = np.repeat(["train", "test"], [len(x) for x in xs])
    x = np.ascontiguousarray(np.concatenate(xs)).reshape(-1, *named.shape)
    return Rows(x, np.concatenate(ys).astype(np.int64), marks)


def _digits_file() -> Path:
    """Return the path of scikit-learn's file of digits, without importing scikit-learn, which takes seconds."""
    spec = find_spec("sklearn")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _download(data: Data, named: _TorchvisionSet) -> None:
    import torchvision

    try:
        for arguments in _part_arguments(named):
            getattr(torchvision.datasets, named.class_name)(str(data.root), download=True, **arguments)
    except Exception as error:  # urllib, SSL, OSError, torchvision's RuntimeError: the remedy is the same for all
        missing = [name for name in named.files if not (data.root / name).is_file()]
        raise InputError(
            f"data.root: {data.name} is not complete in {data.root} and could not be downloaded "
            f"({short_reason(error)}); put {', '.join(missing)} there, or set --data.root to a folder that has them"
        ) from error


def _part_arguments(named: _TorchvisionSet) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments with which torchvision's class reads the training and the test part."""
    if named.class_name == "SVHN":
        return {"split": "train"}, {"split": "test"}
    extra = {"split": "balanced"} if named.class_name == "EMNIST" else {}
    return {"train": True, **extra}, {"train": False, **extra}


def _read_idx(file: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes: a magic number whose last byte is the rank, big-endian sizes, the values."""
    raw = file.read_bytes()
    rank = raw[3]
    sizes = np.frombuffer(raw, ">i4", rank, 4)
    if len(raw) != 4 + 4 * rank + sizes.prod(dtype=np.int64):
        raise InputError(f"data.root: {file} is truncated or damaged; delete it so that it is downloaded again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(sizes)
