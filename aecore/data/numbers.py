"""What becomes of a table's numbers when they are cast to float32, which holds seven decimal digits.

Where values are large beside their differences, such as times in seconds since 1970, the cast would lose the
differences. A number near the values is then subtracted before it, in double precision.
"""

from collections.abc import Sequence

import numpy as np

from aecore.data.values import shifted

_ROUNDING, _ROUNDING_64 = 2.0**-24, 2.0**-53
"""Largest relative errors of a number that is rounded to float32 and to float64."""
_TOLERANCE = 1e-3
"""Largest rounding error that is harmless, as a share of a feature's standard deviation."""
_LARGEST_WHOLE, _LARGEST_EXACT = 2.0**24, 2.0**53
"""Up to these numbers float32 and float64 hold all whole numbers."""
SMALLEST_SPREAD = float(np.finfo(np.float32).tiny)
"""The reciprocal of a smaller standard deviation is infinite in float32."""


def find_offsets(columns: Sequence[np.ndarray]) -> tuple[int | float, ...]:
    """Return the number to subtract from each feature before it becomes float32: its median if float32 would otherwise
    lose the differences between its values, or between the middle half of them, as a few zeros among times make the
    others' differences look small; else 0. The tuple is empty if all are 0.

    Args:
        columns: some values of each feature, (rows,), as they are in the file.
    """
    offsets = tuple(_offset(values) for values in columns)
    return offsets if any(offsets) else ()


def is_too_fine(values: np.ndarray) -> bool:
    """Say whether values (rows,), which are written with more digits, differ by less than float64 tells apart."""
    return bool(np.abs(values).max() * _ROUNDING_64 > _TOLERANCE * values.std())


def _offset(values: np.ndarray) -> int | float:
    if values.dtype.kind not in "iuf" or values.dtype.itemsize < 4 or not len(values) or not np.isfinite(values).all():
        return 0
    ordered, count = np.sort(values), len(values)
    median = ordered[count // 2].item()
    with np.errstate(over="ignore", invalid="ignore"):
        largest, spread = float(np.abs(values.astype(np.float64)).max()), shifted(values, median).std()
        middle = float(np.diff(shifted(ordered[[count // 4, 3 * count // 4]], median))[0])
    is_lost = largest * _ROUNDING > _TOLERANCE * spread if spread else largest > _LARGEST_WHOLE
    is_lost |= middle > 0 and abs(median) * _ROUNDING > _TOLERANCE * middle
    return median if is_lost else 0


class Moments:
    """Mean and spread of each feature over the rows in which it is not missing. Rows are added in batches, which are
    merged as in Chan et al. 1983, eq. 2.1."""

    def __init__(self) -> None:
        self.mean, self.squares = np.array(0.0), np.array(0.0)
        self.count: int | np.ndarray = 0
        """Rows in which a feature is not missing: one number for all features, or (*shape,)."""

    def add(self, values: np.ndarray) -> None:
        """Add rows (rows, *shape), float64."""
        mean, count = values.mean(0), len(values)
        deviations = values - mean
        if np.isnan(mean).any():
            observed = ~np.isnan(values)
            count = observed.sum(0)
            mean = np.where(observed, values, 0).sum(0) / np.maximum(count, 1)
            deviations = np.where(observed, values - mean, 0)
        total, difference = self.count + count, mean - self.mean
        divisor = np.maximum(total, 1)
        self.squares = self.squares + (np.square(deviations).sum(0) + difference**2 * self.count * count / divisor)
        self.mean, self.count = self.mean + difference * count / divisor, total

    @property
    def deviation(self) -> np.ndarray:
        """The standard deviation of each feature, (*shape,)."""
        return np.sqrt(self.squares / np.maximum(self.count, 1))


class Spread:
    """The lowest and highest value of each feature as they are in the files, the spread of its values, and the largest
    error that their cast to float32 makes. Rows are added in batches."""

    def __init__(self) -> None:
        self.low, self.high = np.empty(0), np.empty(0)
        self.error = np.array(0.0)
        self._moments = Moments()

    def add(self, x: np.ndarray) -> None:
        """Add rows x (rows, *shape), finite or missing, in the precision in which they were read."""
        # in the type of x, as large integers are no float64; a missing value is neither lowest nor highest
        low, high = np.fmin.reduce(x), np.fmax.reduce(x)
        self.low = np.fmin(self.low, low) if self.low.size else low
        self.high = np.fmax(self.high, high) if self.high.size else high
        if x.dtype.itemsize < 4 or x.dtype == np.float32:
            return  # float32 holds these values as they are
        values = x.astype(np.float64)
        error = np.abs(values.astype(np.float32) - values)
        if x.dtype.kind in "iu":  # what the cast to float64 has rounded does not show in the difference
            error = np.where(np.abs(values) < _LARGEST_EXACT, error, np.abs(values) * _ROUNDING)
        self.error = np.fmax(self.error, np.fmax.reduce(error))
        self._moments.add(values)

    @property
    def constant(self) -> np.ndarray:
        """Whether all rows have the same value, for each feature (*shape,)."""
        return np.asarray(self.low == self.high)

    @property
    def absent(self) -> np.ndarray:
        """Whether no row has a value, for each feature (*shape,)."""
        return np.asarray(self.low != self.low)

    def lost(self, names: Sequence[str]) -> str | None:
        """Say which feature has values that float32 does not tell apart, if there is one, and what to do.

        Args:
            names: the names of the columns; one for all features, or one for each.
        """
        if self.low.dtype.kind in "iu":  # the difference of large integers is no float64, and may need all 64 bits
            half_range = (self.high.astype(np.uint64) - self.low.astype(np.uint64)) / 2
        else:
            half_range = self.high / 2 - self.low / 2
        spread = self._moments.deviation
        lost = np.atleast_1d((self.error > _TOLERANCE * spread) | (half_range < SMALLEST_SPREAD))
        lost = (lost & ~self.constant).ravel()
        if not lost.any():
            return None
        first = int(lost.argmax())
        feature = names[first] if len(names) > 1 else f"{names[0]}{f', number {first}' if lost.size > 1 else ''}"
        middle, width, deviation = (
            float(np.broadcast_to(values, self.low.shape).ravel()[first])
            for values in (self.low / 2 + self.high / 2, half_range, spread)
        )
        return (
            f"data.path: the values of {feature} differ by about {deviation or width:.2g} around {middle:.6g}, which "
            "32 bits do not tell apart; subtract a number near them before you write the file, or scale them"
        )
