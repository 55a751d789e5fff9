"""Encoded images and arrays of pictures: each is read as a viewer shows it, or refused with file, column and row."""

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aecore.config.experiment import Data, Dense
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.core.errors import InputError
from aecore.core.types import Shape, describe_shape
from aecore.data import parquet
from aecore.models.storage import Result
from aecore.serving.encoding import adapt_data

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
# areas of whole blocks, which JPEG keeps to a few grey levels
COLOUR = np.zeros((32, 48, 3), np.uint8)
COLOUR[:16, :, 0], COLOUR[16:, :16, 1], COLOUR[16:, 16:] = 200, 150, (30, 60, 220)
HALF = np.full(COLOUR.shape[:2], 255, np.uint8)
HALF[:16] = 0
OPAQUE = np.full(COLOUR.shape[:2], 255, np.uint8)


FINE: dict[str, Any] = {"quality": 95, "subsampling": 0}


def encode(pixels: np.ndarray | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    image.save(buffer, form, **options)
    return buffer.getvalue()


def with_alpha(alpha: np.ndarray, form: str = "PNG", colour: np.ndarray = COLOUR, **options: Any) -> bytes:
    return encode(np.dstack([colour, alpha]), form, **options)


def oriented(orientation: Any, form: str) -> bytes:
    """Store COLOUR such that a viewer that heeds the orientation shows it as it is."""
    stored = {
        2: COLOUR[:, ::-1], 3: COLOUR[::-1, ::-1], 4: COLOUR[::-1], 5: COLOUR.transpose(1, 0, 2),
        6: np.rot90(COLOUR, 1), 7: COLOUR[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(COLOUR, -1),
    }.get(orientation, COLOUR)  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": FINE}.get(form, {})
    return encode(np.ascontiguousarray(stored), form, exif=exif, **options)


def palette(**options: Any) -> Image.Image:
    image = Image.fromarray((COLOUR.sum(2) % 3).astype(np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 150, 90])
    image.info.update(options)
    return image


PALETTE = np.asarray(palette().convert("RGB"))


def png(depth: int, colour_type: int, lines: np.ndarray, key: bytes = b"") -> bytes:
    """Write a PNG from packed lines (height, bytes), as Pillow does not for all bit depths."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    width = lines.shape[1] * 8 // (depth * samples)
    header = struct.pack(">IIBBBBB", width, len(lines), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    chunks = [(b"IHDR", header), *([(b"tRNS", key)] if key else []), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def tiff(pixels: np.ndarray, photometric: int, extra: tuple[int, ...] = ()) -> bytes:
    """Write an uncompressed TIFF of (height, width, channels), as Pillow does not for many bits or channels."""
    height, width, channels = pixels.shape
    bits = 8 * pixels.itemsize
    tags: list[tuple[int, tuple[int, ...]]] = [
        (256, (width,)), (257, (height,)), (258, (bits,) * channels), (259, (1,)), (262, (photometric,)), (273, (8,)),
        (277, (channels,)), (278, (height,)), (279, (pixels.nbytes,)), *([(338, extra)] if extra else []),
    ]  # fmt: skip
    start = 8 + pixels.nbytes
    entries, values = b"", b""
    values_at = start + 2 + 12 * len(tags) + 4
    for tag, numbers in tags:
        packed = struct.pack(f"<{len(numbers)}H", *numbers)
        field = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", values_at + len(values))
        values += packed if len(packed) > 4 else b""
        entries += struct.pack("<HHI", tag, 3, len(numbers)) + field
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return struct.pack("<2sHI", b"II", 42, start) + pixels.tobytes() + directory + values


def frames(form: str, count: int = 3, **options: Any) -> bytes:
    images = [Image.fromarray(np.roll(COLOUR, n, 1)) for n in range(count)]
    return encode(images[0], form, save_all=True, append_images=images[1:], **options)


def unpacked(bits: int) -> np.ndarray:
    return RNG.integers(0, 2**bits, (6, 8), dtype=np.uint8)


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    return np.packbits((values[..., None] >> np.arange(bits)[::-1]) & 1, axis=None).reshape(len(values), -1)


ONE, TWO, FOUR = unpacked(1), unpacked(2), unpacked(4)
TWO[0, 0], FOUR[0, 0] = 1, 7
TWO[TWO == 3], FOUR[FOUR == 9] = 0, 0

READ: dict[str, tuple[bytes, np.ndarray]] = {
    # wrong before: as stored, except of TIFF
    **{f"{form} {n}": (oriented(n, form), COLOUR) for form in ("JPEG", "PNG", "WEBP", "TIFF") for n in range(1, 9)},
    **{f"no orientation {n}": (oriented(n, "PNG"), COLOUR) for n in (0, 9, 255)},
    "damaged EXIF": (encode(COLOUR, "PNG", exif=b"Exif\0\0II*\0\xff\xff"), COLOUR),
    "a phone's second picture": (frames("MPO", 2, **FINE), COLOUR),
    # right before
    "1 bit": (png(1, 0, packed(ONE, 1)), ONE * 255),
    "2 bits": (png(2, 0, packed(TWO, 2)), TWO * 85),
    "4 bits": (png(4, 0, packed(FOUR, 4)), FOUR * 17),
    "1 bit TIFF": (encode(Image.fromarray(ONE * 255).convert("1"), "TIFF"), ONE * 255),
    "grey JPEG": (encode(np.full((8, 8), 77, np.uint8), "JPEG"), np.full((8, 8), 77)),
    "palette": (encode(palette()), PALETTE),
    "palette GIF": (encode(palette(), "GIF"), PALETTE),
    "palette BMP": (encode(palette(), "BMP"), PALETTE),
    "palette with opaque entries": (encode(palette(), transparency=b"\xff\xff\xff"), PALETTE),
    "palette with an unused transparent entry": (encode(palette(), transparency=bytes([255] * 3 + [0])), PALETTE),
    "opaque LA": (encode(np.dstack([GREY, np.full_like(GREY, 255)])), GREY),
    "opaque RGBA": (with_alpha(OPAQUE), COLOUR),
    "opaque WEBP": (with_alpha(OPAQUE, "WEBP", lossless=True, exact=True), COLOUR),
    "opaque TIFF": (with_alpha(OPAQUE, "TIFF"), COLOUR),
    "a key that no pixel has": (encode(COLOUR, transparency=(1, 2, 3)), COLOUR),
    "a key of 2 bits that no pixel has": (png(2, 0, packed(TWO, 2), b"\0\3"), TWO * 85),
    "a key of 4 bits that no pixel has": (png(4, 0, packed(FOUR, 4), b"\0\x09"), FOUR * 17),
    "CMYK JPEG": (encode(Image.fromarray(COLOUR).convert("CMYK"), "JPEG", quality=95), COLOUR),
    "CMYK TIFF": (encode(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"), COLOUR),
    "YCbCr TIFF": (encode(Image.fromarray(COLOUR).convert("YCbCr"), "TIFF"), COLOUR),
    "LAB TIFF": (tiff(np.full((6, 8, 3), (138, 81, 70), np.uint8), 8), np.full((6, 8, 3), (255, 0, 0), np.uint8)),
    "RGB TIFF": (tiff(COLOUR, 2), COLOUR),
    "RGB BMP": (encode(COLOUR, "BMP"), COLOUR),
}
LOSSY = {"JPEG": 12, "MPO": 12, "phone": 12, "CMYK": 12, "YCbCr": 3, "LAB": 6}
"""Largest difference in grey levels, by a word of the case; others are exact."""

DEPTH = "; store 8 bits per channel, or arrays of numbers"
ALPHA = "the image is partly transparent, .* store it without alpha"
FRAMES = "animation or has pages, 3 in all; store the one that counts"
DAMAGED = "not a readable image .*replace it"
REFUSED: dict[str, tuple[bytes | None, str]] = {
    # taken before without a word: alpha, further bits and channels were dropped, and the first frame read
    "RGBA": (with_alpha(HALF), ALPHA),
    "RGBA of one level": (with_alpha(np.full_like(OPAQUE, 128)), ALPHA),
    "RGBA of 254": (with_alpha(OPAQUE - np.eye(32, 48, dtype=np.uint8)), ALPHA),
    "LA": (encode(np.dstack([GREY, GREY])), ALPHA),
    "palette of levels": (encode(palette(), transparency=b"\xff\x80\xff"), ALPHA),
    "palette with a transparent entry": (encode(palette(), transparency=1), ALPHA),
    "GIF with a transparent entry": (encode(palette(transparency=1), "GIF", transparency=1), ALPHA),
    "WEBP": (with_alpha(HALF, "WEBP"), ALPHA),
    "TIFF": (with_alpha(HALF, "TIFF"), ALPHA),
    "premultiplied TIFF": (tiff(np.dstack([COLOUR, HALF]), 2, (1,)), ALPHA),
    "a key of RGB": (encode(COLOUR, transparency=(200, 0, 0)), ALPHA),
    "a key of grey": (encode(GREY, transparency=int(GREY[0, 0])), ALPHA),
    "a key of 1 bit": (png(1, 0, packed(ONE, 1), b"\0\1"), ALPHA),
    "a key of 2 bits": (png(2, 0, packed(TWO, 2), b"\0\1"), ALPHA),
    "a key of 4 bits": (png(4, 0, packed(FOUR, 4), b"\0\7"), ALPHA),
    "RGB PNG of 16 bits": (
        png(16, 2, RNG.integers(0, 256, (6, 48), dtype=np.uint8)),
        f"has 16 bits per channel{DEPTH}",
    ),
    "RGBA PNG of 16 bits": (png(16, 6, np.full((6, 64), 255, np.uint8)), f"has 16 bits per channel{DEPTH}"),
    "LA PNG of 16 bits": (png(16, 4, np.full((6, 32), 255, np.uint8)), f"has 16 bits per channel{DEPTH}"),
    "RGB TIFF of 16 bits": (tiff(COLOUR.astype(np.uint16), 2), f"has 16 bits per channel{DEPTH}"),
    "TIFF with infrared": (
        tiff(np.dstack([COLOUR, HALF]), 2, (0,)),
        r"has 4 channels, and viewers show 3; store arrays \(height, width, 4\)",
    ),
    "TIFF of 5 channels": (tiff(np.dstack([COLOUR, HALF, HALF]), 2, (0, 0)), "has 5 channels, and viewers show 3"),
    "animated GIF": (frames("GIF"), FRAMES),
    "animated PNG": (frames("PNG"), FRAMES),
    "animated WEBP": (frames("WEBP"), FRAMES),
    "pages of a TIFF": (frames("TIFF"), FRAMES),
    # refused before too
    "grey PNG of 16 bits": (encode(GREY.astype(np.uint16)), f"has the mode I;16{DEPTH}"),
    "grey TIFF of 16 bits": (encode(GREY.astype(np.uint16), "TIFF"), f"has the mode I;16{DEPTH}"),
    "integers of 32 bits": (encode(GREY.astype(np.int32), "TIFF"), f"has the mode I{DEPTH}"),
    "floats": (encode(GREY.astype(np.float32), "TIFF"), f"has the mode F{DEPTH}"),
    "13 channels": (tiff(np.zeros((4, 4, 13), np.uint8), 1, (0,) * 12), DAMAGED),
    "another format": (encode(COLOUR, "PPM"), r"formats are PNG, JPEG, WEBP, GIF, BMP, TIFF\)"),
    "no bytes": (None, "the image has no bytes; store images in the file, not as paths"),
    "zero bytes": (b"", r"the image is empty \(0 bytes\); replace it or drop the row"),
    **{
        f"truncated {form}": (raw[: len(raw) * 2 // 3], DAMAGED)
        for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
        for raw in [encode(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8), form)]
    },
}


def table(column: pa.Array, path: Path) -> Data:
    pq.write_table(pa.table({"image": column}), path / "data.parquet", row_group_size=4)
    return Data(name="parquet", path=str(path / "data.parquet"))


def images(raws: list[bytes | None], path: Path) -> Data:
    return table(pa.array([{"bytes": raw, "path": "a path"} for raw in raws], STRUCT), path)


def rows(data: Data) -> tuple[Facts, np.ndarray]:
    facts = parquet.identify(data)
    x = parquet.load(data, facts).x
    assert x.shape[1:] == facts.shape
    return facts, x


@pytest.mark.parametrize("case", READ)
def test_an_image_is_read_as_a_viewer_shows_it(case: str, tmp_path: Path) -> None:
    raw, shown = READ[case]
    expected = shown[None] if shown.ndim == 2 else shown.transpose(2, 0, 1)
    other = encode(255 - shown.astype(np.uint8))
    facts, x = rows(images([raw, other], tmp_path))
    assert facts.shape == expected.shape and facts.levels == 256 and x.dtype == np.uint8
    most = next((most for word, most in LOSSY.items() if word in case), 0)
    assert abs(x[0].astype(int) - expected).max() <= most


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("row", [0, 5])
def test_an_image_that_is_more_than_bytes_hold_is_refused(case: str, row: int, tmp_path: Path) -> None:
    raw, message = REFUSED[case]
    good = [encode(COLOUR) for _ in range(6)]
    data = images([*good[:row], raw, *good[row + 1 :]], tmp_path)
    with pytest.raises(InputError, match=rf"data\.parquet column image row {row}: .*{message}"):
        rows(data)


GREYS = {
    "grey": encode(COLOUR[..., 0]),
    "grey JPEG": encode(np.zeros((32, 48), np.uint8), "JPEG"),
    "1 bit": encode(Image.fromarray(COLOUR[..., 0]).convert("1")),
    "opaque LA": encode(np.dstack([COLOUR[..., 0], OPAQUE])),
}
COLOURS = {
    "RGB": encode(COLOUR), "palette": encode(palette()), "opaque RGBA": with_alpha(OPAQUE),
    "CMYK": encode(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("grey", GREYS)
@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("place", [0, 1, 9])
def test_one_image_in_colour_makes_all_of_them_colour(grey: str, colour: str, place: int, tmp_path: Path) -> None:
    """Before, the first image decided, and a grey one made all images grey."""
    raws: list[bytes | None] = [GREYS[grey]] * 9
    data = images([*raws[:place], COLOURS[colour], *raws[place:]], tmp_path)
    if place:
        with pytest.warns(UserWarning, match=f"image row {place}: the image has colour, those before it are grey; all"):
            facts, x = rows(data)
    else:
        facts, x = rows(data)
    assert facts.shape == (3, 32, 48)
    assert np.array_equal(x[place], (PALETTE if colour == "palette" else COLOUR).transpose(2, 0, 1))
    others = np.delete(x, place, 0)
    assert (others == others[:, :1]).all()


def test_images_that_are_all_grey_stay_grey(tmp_path: Path) -> None:
    facts, _ = rows(images([*GREYS.values()], tmp_path))
    assert facts.shape == (1, 32, 48)


def test_colour_behind_the_headers_that_are_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_MAX_HEADERS", 4)
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 2)
    with pytest.raises(InputError, match="image row 9: the image has colour, the set's first ones are grey; store all"):
        rows(images([*[GREYS["grey"]] * 9, COLOURS["RGB"]], tmp_path))


def test_only_a_set_with_turned_images_has_another_digest(tmp_path: Path) -> None:
    """Results of earlier versions, which left them lying, must not be restored; results of other sets stay valid."""
    for orientation, same in ((1, True), (3, False)):
        data = table(pa.array([encode(COLOUR), oriented(orientation, "JPEG")]), tmp_path)
        file_digest = hashlib.sha256((tmp_path / "data.parquet").read_bytes()).digest()
        before = hashlib.sha256(file_digest + b"('image',) None None").hexdigest()
        assert (parquet.identify(data).digest == before) == same


ARRAYS: list[tuple[Shape, list[str] | None, Shape | str]] = [
    # right before
    ((28, 28), None, (1, 28, 28)),
    ((8, 6), None, (1, 8, 6)),
    ((28, 28, 1), None, (1, 28, 28)),
    ((1, 28, 28), None, (1, 28, 28)),
    ((32, 32, 3), None, (3, 32, 32)),
    ((3, 32, 32), None, (3, 32, 32)),
    ((20, 30, 3), None, (3, 20, 30)),
    ((3, 20, 30), None, (3, 20, 30)),
    ((1, 1, 50), None, (1, 1, 50)),
    ((4, 16, 16), None, (4, 16, 16)),
    ((13, 16, 16), None, (13, 16, 16)),
    ((200, 16, 16), None, (200, 16, 16)),
    ((2, 20, 30), None, (2, 20, 30)),
    ((9, 20, 30), None, (9, 20, 30)),
    ((2, 16, 24), ["C", "H", "W"], (2, 16, 24)),
    # wrong before: the height was taken for the channels
    ((3, 3, 1), None, (1, 3, 3)),
    ((16, 16, 2), None, (2, 16, 16)),
    ((16, 16, 4), None, (4, 16, 16)),
    ((16, 16, 13), None, (13, 16, 16)),
    ((16, 16, 200), None, (200, 16, 16)),
    ((3, 3, 200), None, (200, 3, 3)),
    ((20, 30, 2), None, (2, 20, 30)),
    ((20, 30, 4), None, (4, 20, 30)),
    ((20, 30, 9), None, (9, 20, 30)),
    ((12, 16, 13), ["H", "W", "C"], (13, 12, 16)),
    ((12, 16, 13), ["y", "x", "Band"], (13, 12, 16)),
    ((12, 5, 16), ["h", "channels", "w"], (5, 12, 16)),
    # taken for channels first before, which nothing tells
    ((8, 8, 8), None, "8 x 8 x 8 values may be a picture with channels first or last; name the axes"),
    ((3, 3, 3), None, "3 x 3 x 3 values"),
    ((12, 16, 13), None, "12 x 16 x 13 values"),
    ((13, 12, 16), None, "13 x 12 x 16 values"),
    ((3, 16, 3), None, "3 x 16 x 3 values"),
]


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize(
    ("shape", "names", "expected"),
    ARRAYS,
    ids=["x".join(map(str, s)) + " ".join(["", *(n or [])]) for s, n, _ in ARRAYS],
)
def test_the_channels_of_arrays(
    shape: Shape, names: list[str] | None, expected: Shape | str, kind: type, tmp_path: Path
) -> None:
    x: np.ndarray = RNG.integers(0, 256, (6, *shape)).astype(kind)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(x, dim_names=names)
    columns = [tensors] if names else [tensors, pa.array(x.tolist(), pa_lists(shape, kind)), pa.array(x.tolist())]
    for column in columns:
        data = table(column, tmp_path)
        if isinstance(expected, str):
            with pytest.raises(InputError, match=f"data.parquet column image row 0: {expected}"):
                rows(data)
            continue
        facts, read = rows(data)
        assert facts.shape == expected
        moved = x[:, None] if x.ndim == 3 else np.moveaxis(x, 1 + shape.index(expected[0]), 1)
        assert np.array_equal(read, moved)


def pa_lists(shape: Shape, kind: type) -> pa.DataType:
    inner = pa.from_numpy_dtype(kind)
    for size in reversed(shape):
        inner = pa.list_(inner, size)
    return inner


def test_names_of_axes_follow_a_permutation(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (6, 12, 16, 13), dtype=np.uint8)
    stored = np.ascontiguousarray(x.transpose(0, 3, 1, 2))  # channels first in memory, seen with channels last
    kind = pa.fixed_shape_tensor(pa.uint8(), (13, 12, 16), dim_names=["C", "H", "W"], permutation=[1, 2, 0])
    flat = pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), 13 * 12 * 16)
    facts, read = rows(table(pa.ExtensionArray.from_storage(kind, flat), tmp_path))
    assert facts.shape == (13, 12, 16) and np.array_equal(read, stored)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 8, 8), "images of 8 x 8 pixels with 3 channels"),
        ((1, 28, 28), "images of 28 x 28 pixels with 1 channel"),
        ((13, 12, 16), "images of 12 x 16 pixels (height x width) with 13 channels"),
        ((30,), "vectors of 30 features"),
        ((1,), "vectors of 1 feature"),
    ],
)
def test_a_shape_in_words(shape: Shape, words: str) -> None:
    assert describe_shape(shape) == words


PARQUET = Data(name="parquet", path="x")


def facts(shape: Shape) -> Facts:
    return Facts(digest="d", shape=shape, levels=256, classes=(), rows=9)


@pytest.mark.parametrize(
    ("own", "read", "remedy"),
    [
        (
            (1, 8, 8),
            (3, 8, 8),
            "with 1 channel, but models:/m/1 reads images of 8 x 8 pixels with 3 channels; store them in c",
        ),
        ((3, 8, 8), (1, 8, 8), "store them in grey"),
        ((3, 9, 8), (3, 8, 8), "resize the images to 8 x 8$"),
        ((3, 9, 8), (1, 8, 8), "resize the images to 8 x 8 and store them in grey"),
        ((4, 8, 8), (3, 8, 8), "name data like those that it was trained on"),
        ((30,), (31,), "vectors of 30 features, but models:/m/1 reads vectors of 31 features; name data like"),
    ],
)
def test_encoding_says_what_to_do_with_images_of_another_shape(own: Shape, read: Shape, remedy: str) -> None:
    [layer] = layer_specs(Dense(widths=(4,)), PARQUET, facts(read))
    result = Result({"layers": [layer.model_dump(mode="json")]}, {"prepare.scale": np.array(1 / 255)}, {})
    with pytest.raises(InputError, match=remedy):
        adapt_data(result, PARQUET, facts(own), "models:/m/1")
