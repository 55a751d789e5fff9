"""Decodes encoded images to the pixels that a viewer shows, and refuses images that one array of bytes cannot hold.

This module imports Pillow, which takes some time; so those who use it import it where they need it.

A viewer turns a picture upright as its EXIF data say, looks colours up in the palette and mixes inks (CMYK) to colours.
Refused are images whose pixels are partly transparent, have more than 8 bits per channel or further channels, and
files with several pictures. Embedded colour profiles are not applied.
"""

import io
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

from aecore.data.files import short_reason

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that Pillow may try; for some other formats Pillow starts programs."""
_GREY_MODES = ("1", "L", "LA")
_ORIENTATION, _BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL = 274, 258, 277
"""Numbers of tags of the TIFF 6.0 specification, which EXIF uses too."""
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip
"""How an image is turned upright, by its EXIF orientation (EXIF 2.32, section 4.6.4)."""
_PNG_BIT_DEPTH = 24
"""Position of the byte in a PNG file that holds the bits per channel (PNG specification, section 11.2.1)."""


class ImageError(ValueError):
    """An image that cannot be used; the message says why and what to store in its place."""


class Header(NamedTuple):
    """The facts about an image that its header tells, without a look at the pixels."""

    colour: bool
    """Whether the image is stored with colours, even if all of them should be grey."""
    turned: bool
    """Whether the pixels are stored in another orientation than a viewer shows them in."""


def read_header(raw: bytes | None) -> Header | None:
    """Read an image's header, in some hundredths of a millisecond. Return None if it is not readable, which `decode`
    explains."""
    try:
        with Image.open(io.BytesIO(raw or b""), formats=_FORMATS) as image:
            # Pillow decodes a PNG without EXIF data before its pixels to look behind them; it turns a TIFF by itself
            skipped = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
            return Header(image.mode not in _GREY_MODES, not skipped and _orientation(image) > 1)
    except Exception:  # on damaged bytes Pillow raises almost anything
        return None


def decode(raw: bytes | None, channels: int | None) -> np.ndarray:
    """Decode an image to (channels, height, width) uint8.

    Args:
        channels: 1 or 3. Grey images can be given 3 channels, but colour images are not made grey; None keeps what the
            image has.

    Raises:
        ImageError: the image is missing or damaged, or a viewer shows more than such an array can hold.
    """
    if not raw:
        reason = "the image has no bytes; store images in the file, not as paths"
        raise ImageError(reason if raw is None else "the image is empty (0 bytes); replace it or drop the row")
    try:
        with Image.open(io.BytesIO(raw), formats=_FORMATS) as image:
            _check_depth(image, raw)
            channels = channels or (1 if image.mode in _GREY_MODES else 3)
            if channels == 1 and image.mode not in _GREY_MODES:
                raise ImageError("the image has colour, the set's first ones are grey; store all images as RGB")
            image.load()
            if _is_transparent(image, raw):
                raise ImageError(
                    "the image is partly transparent, so its look depends on what is behind it; paste it on a "
                    "background and store it without alpha, or store arrays (height, width, 4)"
                )
            image.info.pop("transparency", None)  # nothing is transparent; Pillow would warn in converting
            turn = _TURNS.get(_orientation(image))
            upright = image if turn is None else image.transpose(turn)
            pixels = np.asarray(upright.convert("L" if channels == 1 else "RGB"))
    except ImageError:
        raise
    except Exception as error:  # on damaged bytes Pillow raises almost anything
        if isinstance(error, Image.DecompressionBombError):
            raise ImageError("the image has more pixels than are read, 179 million; scale it down or cut it") from error
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"formats are {', '.join(_FORMATS)}" if unknown else short_reason(error)
        raise ImageError(f"not a readable image ({reason}); replace it") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _check_depth(image: Image.Image, raw: bytes) -> None:
    """Raise an ImageError if an image has bits, channels or frames that Pillow would drop without a word."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = raw[_PNG_BIT_DEPTH] if image.format == "PNG" else max(tags.get(_BITS_PER_SAMPLE, (8,)))
    if image.mode[0] in "IF" or bits > 8:
        has = f"the mode {image.mode}" if image.mode[0] in "IF" else f"{bits} bits per channel"
        raise ImageError(f"the image has {has}; store 8 bits per channel, or arrays of numbers")
    channels = len(image.getbands())
    if (stored := tags.get(_SAMPLES_PER_PIXEL, channels)) > channels:
        raise ImageError(
            f"the image has {stored} channels, and viewers show {channels}; store arrays (height, width, {stored})"
        )
    # the second picture of a phone's JPEG (format MPO) is a preview or depth map that viewers don't show
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise ImageError(f"the image is an animation or has pages, {frames} in all; store the one that counts")


def _is_transparent(image: Image.Image, raw: bytes) -> bool:
    """Say whether some pixel of a loaded image is not fully opaque."""
    if not image.has_transparency_data:
        return False
    key = image.info.get("transparency")
    if image.format == "PNG" and image.mode == "L" and isinstance(key, int):
        # Pillow stretches grey values of 2 and 4 bits to 8, but not the value that stands for transparent
        image.info["transparency"] = key * 255 // (2 ** raw[_PNG_BIT_DEPTH] - 1)
    return image.convert("RGBA").getchannel("A").tobytes().count(255) < image.width * image.height


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 to 8, where 1 is upright; viewers ignore damaged EXIF data."""
    with suppress(Exception):  # Pillow raises almost anything
        value = image.getexif().get(_ORIENTATION)
        return value if value in _TURNS else 1
    return 1
