"""The reference rows nearest to other rows, where values may be missing."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

NEIGHBOURS = 5
"""Number of nearest references whose distances are averaged. With 1 a single anomaly among the references hides others
like it; 10 ranks slightly worse on clean rows."""
REFERENCE_ROWS, _REFERENCE_VALUES = 10_000, 2**24
"""Most reference rows, and most values of all of them together (64 MB)."""
_CANDIDATES = 2
"""The search rounds, so that twice as many rows as are needed are then compared exactly."""
_CHUNK_VALUES = 2**24
"""Values of the largest array that a search makes at once."""


class Nearest(NamedTuple):
    """The references nearest to each of some rows, the nearest first."""

    distances: Float[Tensor, "rows neighbours"]
    numbers: Int[Tensor, "rows neighbours"]

    def mean_distance(self) -> Float[Tensor, " rows"]:
        """Return the mean of the distances of each row."""
        return self.distances.mean(1)


class References:
    """Reference rows in which the nearest ones of other rows are looked for, by Euclidean distance.

    A missing value of a row, NaN, is left out: the squared distance over the values that it has is scaled up to all
    values (Dixon 1979). Where a reference lacks a value, the squared difference is the one that is expected of the
    references that have it. If it were left out as well, the nearest references of a row with a strange value would be
    those that lack the value, however few they are, and nothing would be strange in it.
    """

    def __init__(self, rows: Float[Tensor, "references values"]) -> None:
        self.rows = rows
        self._centre, self._filled, self._unknown = rows.nanmean(0).nan_to_num(), rows, None
        if (missing := rows.isnan()).any():
            variance = (rows - self._centre).square().nanmean(0).nan_to_num()
            self._filled = torch.where(missing, self._centre, rows)
            self._unknown = torch.where(missing, variance, 0)

    def nearest(self, rows: Float[Tensor, "rows values"], own: Int[Tensor, " rows"] | None = None) -> Nearest:
        """Return the nearest references of each row.

        Args:
            own: number of the reference that a row is itself, which is left out.
        """
        others = len(self.rows) - (own is not None)
        count = max(1, min(NEIGHBOURS, others))
        size = max(1, _CHUNK_VALUES // max(len(self.rows), _CANDIDATES * NEIGHBOURS * rows.shape[1]))
        parts = []
        for start in range(0, max(1, len(rows)), size):
            part = rows[start : start + size]
            places = self._order(part)
            if own is not None:
                places[torch.arange(len(part), device=part.device), own[start : start + size]] = torch.inf
            candidates = places.topk(max(1, min(_CANDIDATES * count, others)), 1, largest=False).indices
            exact, order = self._exact(part, candidates).sort(1)
            parts.append((exact[:, :count].sqrt(), candidates.gather(1, order[:, :count])))
        return Nearest(*map(torch.cat, zip(*parts, strict=True)))

    def mean(self, nearest: Nearest) -> Float[Tensor, "rows values"]:
        """Return the mean of the nearest references of each row, and of all references where these lack a value."""
        mean = self.rows[nearest.numbers].nanmean(1)
        return torch.where(mean.isnan(), self._centre, mean)

    def _exact(self, rows: Tensor, numbers: Tensor) -> Float[Tensor, "rows neighbours"]:
        """Return the squared distances of rows from some references each."""
        squares = (rows[:, None] - self._filled[numbers]).square()
        if self._unknown is not None:
            squares += self._unknown[numbers]
        known = torch.isfinite(squares)
        return squares.nansum(2) * squares.shape[2] / known.sum(2).clamp(min=1)

    def _order(self, rows: Tensor) -> Float[Tensor, "rows references"]:
        """Return numbers by which the references of each row have the order of their distances, up to rounding.

        They are squared distances without what is the same for all references of a row. Each pass over so large an
        array costs as much as the search in it.
        """
        observed = torch.isfinite(rows)
        squares = self._filled.square() + (0 if self._unknown is None else self._unknown)
        if observed.all():
            return torch.addmm(squares.sum(1), rows, self._filled.T, alpha=-2)
        return torch.cat([observed.float(), -2 * rows.nan_to_num()], 1) @ torch.cat([squares, self._filled], 1).T


def most_references(values: int) -> int:
    """Return the most reference rows of this number of values each."""
    return max(NEIGHBOURS + 1, min(REFERENCE_ROWS, _REFERENCE_VALUES // values))
