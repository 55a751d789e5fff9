"""The facts of a data set that are known before any of its rows are held in memory."""

from math import prod

from aecore.core.fingerprint import Frozen
from aecore.core.types import Shape


class Facts(Frozen):
    """Shape, values, classes and size of a data set, which the driver learns without holding its rows in memory."""

    digest: str
    """SHA-256 over the files of the data set and, for Parquet, over the names of the columns that are read and a mark
    if images are turned upright."""
    shape: Shape
    """Shape of one row: (channels, height, width) of an image, (features,) of a vector."""
    levels: int
    """Number of integer values, from 0 to levels - 1, that a pixel can take; 0 for floating-point data."""
    classes: tuple[str, ...]
    """Names of the classes; empty for data without labels."""
    rows: int
    """Number of rows of all splits together."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory: uint8 pixels, or float32 values."""
        return prod(self.shape) * (1 if self.levels else 4)
