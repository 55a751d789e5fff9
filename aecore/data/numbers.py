"""What becomes of a table's numbers when they are cast to float32, which holds seven decimal digits.

Where values are large beside their differences, such as times in seconds since 1970, the cast would lose the
differences. A number near the values is then subtracted before it, in double precision.
"""

from collections.abc import Sequence

import numpy as np

from aecore.data.values import shifted

_ROUNDING = 2.0**-24
"""Largest relative error of a number that is rounded to float32."""
_TOLERANCE = 1e-3
"""Largest rounding error that is harmless, as a share of a feature's standard deviation."""
_LARGEST_WHOLE = 2.0**24
"""Up to this number float32 holds all whole numbers."""


def find_offsets(columns: Sequence[np.ndarray]) -> tuple[int | float, ...]:
    """Return the number to subtract from each feature before it becomes float32: its median if float32 would otherwise
    lose the differences between its values, else 0; an empty tuple if all are 0.

    Args:
        columns: some values of each feature, (rows,), as they are in the file.
    """
    offsets = tuple(_offset(values) for values in columns)
    return offsets if any(offsets) else ()


def _offset(values: np.ndarray) -> int | float:
    if values.dtype.kind not in "iuf" or values.dtype.itemsize < 4 or not np.isfinite(values).all():
        return 0
    median = np.sort(values)[len(values) // 2].item()
    with np.errstate(over="ignore", invalid="ignore"):
        largest, spread = float(np.abs(values.astype(np.float64)).max()), shifted(values, median).std()
    is_lost = largest * _ROUNDING > _TOLERANCE * spread if spread else largest > _LARGEST_WHOLE
    return median if is_lost else 0


class Spread:
    """The lowest and highest value of each feature as they are in the files, the spread of its values, and the largest
    error that their cast to float32 makes. Rows are added in batches."""

    def __init__(self) -> None:
        self.low, self.high = np.array(np.inf), np.array(-np.inf)
        self.error = np.array(0.0)
        self._count, self._mean, self._squares = 0, np.array(0.0), np.array(0.0)

    def add(self, x: np.ndarray) -> None:
        """Add rows x (rows, *shape), finite, in the precision in which they were read."""
        self.low, self.high = np.minimum(self.low, x.min(0)), np.maximum(self.high, x.max(0))
        if x.dtype.itemsize < 4 or x.dtype == np.float32:
            return  # float32 holds these values as they are
        values = x.astype(np.float64)
        self.error = np.maximum(self.error, np.abs(values.astype(np.float32) - values).max(0))
        mean, count = values.mean(0), self._count + len(x)
        difference = mean - self._mean  # batches are merged as in Chan et al. 1983, eq. 2.1
        self._squares = self._squares + np.square(values - mean).sum(0)
        self._squares = self._squares + difference**2 * self._count * len(x) / count
        self._mean, self._count = self._mean + difference * len(x) / count, count

    @property
    def constant(self) -> np.ndarray:
        """Whether all rows have the same value, for each feature (*shape,)."""
        return np.asarray(self.low == self.high)

    def lost(self, names: Sequence[str]) -> str | None:
        """Say which feature has values that float32 does not tell apart, if there is one, and what to do.

        Args:
            names: the names of the columns; one for all features, or one for each.
        """
        spread = np.sqrt(self._squares / max(1, self._count))
        lost = np.atleast_1d((self.error > _TOLERANCE * spread) & ~self.constant).ravel()
        if not lost.any():
            return None
        first = int(lost.argmax())
        feature = names[first] if len(names) > 1 else f"{names[0]}{f', number {first}' if lost.size > 1 else ''}"
        mean, deviation = (float(np.atleast_1d(values).ravel()[first]) for values in (self._mean, spread))
        return (
            f"data.path: the values of {feature} differ by about {deviation:.2g} around {mean:.6g}, which 32 bits do "
            "not tell apart; subtract a number near them before you write the file, or scale them"
        )
