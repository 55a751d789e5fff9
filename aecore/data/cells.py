"""Decodes the cells of a Parquet column to arrays: encoded images, tensors and lists of numbers."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from math import prod

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aecore.core.errors import shorten

Decoder = Callable[[pa.Array, int | None], np.ndarray]
"""Turns a column into an array (rows, *shape). The second argument is the mode to which encoded images are converted,
grey ("L") or colour ("RGB"); None takes the mode of the first image."""
_CHANNEL_NAMES = ("c", "channel", "channels", "band", "bands")
"""Names of a tensor's axis, in lower case, that mark it as the channels."""
_MAX_COLOURS = 4
"""Most channels that are taken for those of a picture, not for its height or width, whatever its shape."""
_TYPE_LENGTH = 60
"""Most characters of a type's name in a message."""


class CellError(ValueError):
    """A cell that cannot be decoded. `offset` counts from the first row of the column that was decoded."""

    def __init__(self, offset: int, message: str) -> None:
        super().__init__(message)
        self.offset = offset


def find_decoder(kind: pa.DataType, missing: bool = False) -> Decoder | None:
    """Return the function that decodes a column of this type, or None if the type is neither images nor vectors.

    The decoder raises a CellError for a cell that it cannot decode.

    Args:
        missing: values inside a list may be missing, and are then NaN.
    """
    if is_encoded(kind):
        return lambda array, channels: _decode_images(encoded_images(array), channels)
    if _is_spark_vector(kind):
        return lambda array, _: _spark_vectors(array)
    if isinstance(kind, pa.FixedShapeTensorType) and is_number(kind.value_type):
        return lambda array, _: _channels_first(_tensors(array, missing), _axis_names(array.type))
    inner = kind
    while _is_list(inner):
        inner = inner.value_type
    if inner is not kind and is_number(inner):
        return lambda array, _: _channels_first(_lists(array, missing))
    return None


def is_encoded(kind: pa.DataType) -> bool:
    """Say whether a column of this type holds encoded images: bytes, or a struct with a field `bytes`."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    kind = plain_type(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def encoded_images(array: pa.Array) -> list[bytes | None]:
    """Return the bytes of each image in a column of encoded images."""
    return (array.field("bytes") if pa.types.is_struct(array.type) else array).to_pylist()


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type as which single values of a type are read: without dictionary or view, decimal numbers as
    double and half floats as float."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_float16(kind):  # for which Arrow lacks many functions
        return pa.float32()
    return pa.float64() if pa.types.is_decimal(kind) else kind


def plain(array: pa.Array) -> pa.Array:
    """Return a column of single values as its `plain_type`; whole decimal numbers as integers, if these hold them."""
    kind = plain_type(array.type)
    if array.type == kind:
        return array
    decimals = exact_decimals(array)
    if decimals is not None and decimals.type.scale == 0:
        with suppress(pa.ArrowInvalid):  # of numbers that are too large
            return decimals.cast(pa.int64())
    return array.cast(kind)


def exact_decimals(array: pa.Array) -> pa.Array | None:
    """Return a column of decimal numbers as decimal256, for which Arrow has the most functions; None for others."""
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    return array.cast(kind).cast(pa.decimal256(76, kind.scale)) if pa.types.is_decimal(kind) else None


def is_number(kind: pa.DataType) -> bool:
    """Say whether a cell of this type is a single number or truth value."""
    kind = plain_type(kind)
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def is_text(kind: pa.DataType) -> bool:
    """Say whether a cell of this type is text."""
    kind = plain_type(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def short_type(kind: pa.DataType) -> str:
    """Return Arrow's name of a type; of a long one with many parts, the first ones."""
    name = str(kind)
    if len(name) <= _TYPE_LENGTH:
        return name
    parts, _, _ = name[:_TYPE_LENGTH].rpartition(", ")
    return f"{parts}, ...{'>' * (parts.count('<') - parts.count('>'))}" if parts else shorten(name, _TYPE_LENGTH)


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
        or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    )  # fmt: skip


def _decode_images(encoded: Iterable[bytes | None], channels: int | None) -> np.ndarray:
    """Decode images to (rows, channels, height, width) uint8."""
    from aecore.data.images import ImageError, decode  # imports Pillow

    images: list[np.ndarray] = []
    for offset, raw in enumerate(encoded):
        try:
            pixels = decode(raw, channels)
        except ImageError as error:
            raise CellError(offset, str(error)) from error
        channels = len(pixels)
        if images and pixels.shape != images[0].shape:
            raise CellError(
                offset, f"the image has the shape {pixels.shape}, those before it {images[0].shape}; resize it"
            )
        images.append(pixels)
    return np.stack(images)


def _lists(array: pa.Array, missing: bool) -> np.ndarray:
    """Decode nested lists of numbers to (rows, *sizes); sizes that the type does not fix must be equal in all rows."""
    shape = [len(array)]
    while _is_list(array.type):
        if pa.types.is_fixed_size_list(array.type):
            size = array.type.list_size
        else:
            lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
            size = int(lengths[0]) if len(lengths) else 0
            if (lengths != size).any():
                offset = int((lengths != size).argmax()) // prod(shape[1:])
                raise CellError(offset, "the list has another length than those before it; make all equally long")
        shape.append(size)
        array = array.flatten()
        if _is_list(array.type):
            _refuse_missing(array, prod(shape[1:]))
    return _numbers(array, shape[1:], missing).reshape(shape)


def _is_spark_vector(kind: pa.DataType) -> bool:
    """Say whether a type is that of Spark ML's vectors: dense ones have values, sparse ones also indices and a size."""
    fields = {"type", "size", "indices", "values"}
    return pa.types.is_struct(kind) and {field.name for field in kind} == fields and _is_list(kind.field("values").type)


def _spark_vectors(array: pa.StructArray) -> np.ndarray:
    """Decode Spark ML's vectors, dense or sparse, to (rows, size)."""
    rows: list[np.ndarray] = []
    for offset, cell in enumerate(array.to_pylist()):
        values = np.array(cell["values"], np.float64)
        if cell["size"] is not None:  # a sparse vector
            row = np.zeros(cell["size"])
            row[cell["indices"]] = values
            values = row
        if rows and len(values) != len(rows[0]):
            raise CellError(offset, "the vector has another length than those before it; make all equally long")
        rows.append(values)
    return np.stack(rows)


def _tensors(array: pa.ExtensionArray, missing: bool) -> np.ndarray:
    """Decode fixed-shape tensors to (rows, *shape), with axes in the order that the type names."""
    kind, values = array.type, array.storage.flatten()
    x = _numbers(values, kind.shape, missing).reshape(len(array), *kind.shape)
    return x.transpose(0, *(axis + 1 for axis in kind.permutation)) if kind.permutation else x


def _numbers(values: pa.Array, shape: Sequence[int], missing: bool) -> np.ndarray:
    """Return the numbers inside lists, (values,), in the type in which they are written, or with NaN for those that are
    missing. Bytes have no value for that.

    Args:
        shape: the shape of a row.
    """
    is_vector = len(shape) == 1 and not pa.types.is_uint8(plain_type(values.type))
    if missing and is_vector and values.null_count:
        return plain(values).cast(pa.float64()).to_numpy(zero_copy_only=False, writable=True)
    _refuse_missing(values, prod(shape), ", or train with --data.missing impute" if is_vector else "")
    return plain(values).to_numpy(zero_copy_only=False)


def _refuse_missing(values: pa.Array, values_per_row: int, way_out: str = "") -> None:
    if values.null_count:
        offset = int(values.is_null().to_numpy(zero_copy_only=False).argmax()) // values_per_row
        raise CellError(offset, f"a value inside the list is missing; fill it or drop the row{way_out}")


def _axis_names(kind: pa.FixedShapeTensorType) -> list[str]:
    """Return the names of a tensor's axes in lower case, in the order in which `_tensors` returns them."""
    names = [name.lower() for name in kind.dim_names or ()]
    return [names[axis] for axis in kind.permutation] if names and kind.permutation else names


def _channels_first(x: np.ndarray, names: Sequence[str] = ()) -> np.ndarray:
    """Turn (rows, height, width[, channels]) into (rows, channels, height, width), and leave vectors as they are.

    Args:
        names: names of the axes after the first, if they have any.
    """
    if x.ndim == 3:
        return x[:, None]
    if x.ndim != 4 or not x.size:
        return x
    axis = next((axis for axis, name in enumerate(names) if name in _CHANNEL_NAMES), None)
    axis = _channel_axis(*x.shape[1:]) if axis is None else axis
    return np.ascontiguousarray(np.moveaxis(x, axis + 1, 1)) if axis else x


def _channel_axis(first: int, middle: int, last: int) -> int:
    """Return which of three axes are the channels of a picture: the first (0) or the last (2).

    That is the axis without which the picture is a square, else the one that is as short as colours are, else the one
    that is less than half as long as both others.

    Raises:
        CellError: both axes or none answer this description.
    """
    signs = (
        (middle == last > 1, first == middle > 1),
        (first <= _MAX_COLOURS, last <= _MAX_COLOURS),
        (2 * first < min(middle, last), 2 * last < min(first, middle)),
    )
    for is_first, is_last in signs:
        if is_first != is_last:
            return 0 if is_first else 2
    raise CellError(
        0, f"{first} x {middle} x {last} values may be a picture with channels first or last; name the axes, as in "
        'pyarrow.fixed_shape_tensor(type, shape, dim_names=["C", "H", "W"])'
    )  # fmt: skip
