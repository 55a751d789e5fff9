"""What is known of a data set before any of it is held in memory."""

from aecore.core.fingerprint import Frozen
from aecore.core.types import Shape


class Facts(Frozen):
    """What the driver learns of a data set without keeping any of it."""

    digest: str
    """SHA-256 of the bytes."""
    shape: Shape
    """(channels, height, width) of an image, (features,) of a vector."""
    levels: int
    """Integer values 0 .. levels - 1 that a pixel can take; 0 for floating-point data."""
    classes: tuple[str, ...]
    """Names of the classes; empty without labels."""
    rows: int
    """Rows in all."""
