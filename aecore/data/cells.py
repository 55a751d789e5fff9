"""Decodes the cells of a Parquet column to arrays: encoded images, tensors and lists of numbers."""

import io
from collections.abc import Callable
from math import prod

import numpy as np
import pyarrow as pa

from aecore.core.errors import shorten
from aecore.data.files import short_reason

Decoder = Callable[[pa.Array, str | None], np.ndarray]
"""Turns a column into an array (rows, *shape). The second argument is the mode to which encoded images are converted,
grey ("L") or colour ("RGB"); None takes the mode of the first image."""
_LONGEST_TYPE = 60
"""Most characters of a type's name in a message."""
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that Pillow may try; for some other formats Pillow starts programs."""


class CellError(ValueError):
    """A cell that cannot be decoded. `offset` counts from the first row of the column that was decoded."""

    def __init__(self, offset: int, message: str) -> None:
        super().__init__(message)
        self.offset = offset


def find_decoder(kind: pa.DataType) -> Decoder | None:
    """Return the function that decodes a column of this type, or None if the type is neither images nor vectors.

    The decoder raises a CellError for a cell that it cannot decode.
    """
    if is_encoded(kind):
        nested = pa.types.is_struct(kind)
        return lambda array, mode: _decode_images((array.field("bytes") if nested else array).to_pylist(), mode)
    if isinstance(kind, pa.FixedShapeTensorType) and is_number(kind.value_type):
        return lambda array, mode: _channels_first(_tensors(array))
    inner = kind
    while _is_list(inner):
        inner = inner.value_type
    if inner is not kind and is_number(inner):
        return lambda array, mode: _channels_first(_lists(array))
    return None


def is_encoded(kind: pa.DataType) -> bool:
    """Say whether a column of this type holds encoded images: bytes, or a struct with a field `bytes`."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_number(kind: pa.DataType) -> bool:
    """Say whether a cell of this type is a single number or truth value."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def short_type(kind: pa.DataType) -> str:
    """Return Arrow's name of a type; of a long one with many parts, the first ones."""
    name = str(kind)
    if len(name) <= _LONGEST_TYPE:
        return name
    parts, _, _ = name[:_LONGEST_TYPE].rpartition(", ")
    return f"{parts}, ...{'>' * (parts.count('<') - parts.count('>'))}" if parts else shorten(name, _LONGEST_TYPE)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _decode_images(encoded: list[bytes | None], mode: str | None) -> np.ndarray:
    """Decode images to (rows, channels, height, width) uint8."""
    from PIL import Image, UnidentifiedImageError

    images: list[np.ndarray] = []
    for offset, raw in enumerate(encoded):
        if raw is None:
            raise CellError(offset, "the image has no bytes; store images in the file, not as paths")
        try:
            with Image.open(io.BytesIO(raw), formats=_IMAGE_FORMATS) as image:
                if image.mode[0] in "IF":  # Pillow would clip the values
                    raise CellError(offset, f"the image has the mode {image.mode}; store 8 bits per channel")
                mode = mode or ("L" if image.mode in ("1", "L", "LA") else "RGB")
                pixels = np.asarray(image.convert(mode))
        except CellError:
            raise
        except Exception as error:  # on damaged bytes Pillow raises almost anything
            unknown = isinstance(error, UnidentifiedImageError)
            reason = ", ".join(_IMAGE_FORMATS) if unknown else short_reason(error)
            raise CellError(offset, f"not a readable image ({reason}); replace it") from error
        pixels = pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
        if images and pixels.shape != images[0].shape:
            raise CellError(
                offset, f"the image has the shape {pixels.shape}, those before it {images[0].shape}; resize it"
            )
        images.append(pixels)
    return np.stack(images)


def _lists(array: pa.Array) -> np.ndarray:
    """Decode nested lists of numbers to (rows, *sizes); sizes that the type does not fix must be equal in all rows."""
    shape = [len(array)]
    while _is_list(array.type):
        if pa.types.is_fixed_size_list(array.type):
            size = array.type.list_size
        else:
            lengths = np.diff(array.offsets.to_numpy())
            size = int(lengths[0]) if len(lengths) else 0
            if (lengths != size).any():
                offset = int((lengths != size).argmax()) // prod(shape[1:])
                raise CellError(offset, "the list has another length than those before it; make all equally long")
        shape.append(size)
        array = array.flatten()
        _refuse_missing(array, prod(shape[1:]))
    return array.to_numpy(zero_copy_only=False).reshape(shape)


def _tensors(array: pa.ExtensionArray) -> np.ndarray:
    """Decode fixed-shape tensors to (rows, *shape), with axes in the order that the type names."""
    kind, values = array.type, array.storage.flatten()
    _refuse_missing(values, prod(kind.shape))
    x = values.to_numpy(zero_copy_only=False).reshape(len(array), *kind.shape)
    return x.transpose(0, *(axis + 1 for axis in kind.permutation)) if kind.permutation else x


def _refuse_missing(values: pa.Array, values_per_row: int) -> None:
    if values.null_count:
        offset = int(values.is_null().to_numpy(zero_copy_only=False).argmax()) // values_per_row
        raise CellError(offset, "a value inside the list is missing; fill it or drop the row")


def _channels_first(x: np.ndarray) -> np.ndarray:
    """Turn (rows, height, width[, channels]) into (rows, channels, height, width), and leave vectors as they are."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x
