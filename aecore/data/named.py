"""The named data sets: scikit-learn's digits and those of torchvision."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aecore.config.experiment import Data
from aecore.core.errors import InputError


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
