"""The features that make a row strange, by name and value."""

from collections.abc import Sequence
from math import floor, log10, prod
from typing import NamedTuple

import numpy as np
import torch

from aecore.anomaly.score import NeighbourScore
from aecore.config.facts import TableColumns
from aecore.core.types import Shape
from aecore.models.prepare import Prepare

REASONS = 3
"""Most features that are named for a row."""
_DIGITS = 6


class Reason(NamedTuple):
    """A feature that makes a row strange."""

    feature: str
    value: str
    """What the row has; `missing` where it has nothing."""
    expected: str
    """What the references that are alike otherwise have, on average; of a category the most frequent text, and the
    share of them that has it."""
    contribution: float
    """What the feature adds to the row's score."""


class Reasons:
    """Explains rows by the names and units of the data."""

    def __init__(self, score: NeighbourScore, prepare: Prepare, columns: TableColumns) -> None:
        self.score, self.prepare, self.columns = score, prepare, columns

    def of(self, raw: torch.Tensor, scores: torch.Tensor) -> list[list[Reason]]:
        """Return for raw rows (rows, *shape) with these scores the features that add most, the largest first; features
        that add nothing are left out. A category is one feature: what its values add is summed."""
        explanation = self.score.explain(self.prepare(raw), scores)
        expected = _doubles(self.prepare.inverse(explanation.expected.view_as(raw)))
        values, parts = _doubles(raw), _doubles(explanation.contributions)
        owners = np.array(self.columns.owners or range(values.shape[1]))
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        parts = np.add.reduceat(parts, starts, 1)
        places = [slice(*ends) for ends in zip(starts, [*starts[1:], len(owners)], strict=True)]
        names = feature_names(self.columns, raw.shape[1:])
        order = np.argsort(-parts, 1, kind="stable")[:, :REASONS]
        return [
            [
                Reason(names[n], self._shown(n, v[places[n]]), self._shown(n, e[places[n]], mean=True), p[n])
                for n in chosen
                if p[n] > 0
            ]
            for chosen, v, e, p in zip(order.tolist(), values, expected, parts.tolist(), strict=True)
        ]

    def _shown(self, number: int, cells: np.ndarray, mean: bool = False) -> str:
        """Return what a row, or a mean of rows, holds of a feature as text: a number in the units of the data, or the
        most frequent text, with its share in a mean: else the row's own text may seem to be what is strange in it."""
        if not np.isfinite(cells).all():
            return "missing"
        texts = self.columns.categories[number] if self.columns.categories else ()
        if texts:
            text = texts[int(cells.argmax())]
            return f"{text} ({100 * cells.max():.0f} %)" if mean else text
        return _number(cells[0], self.columns.offsets[number] if self.columns.offsets else 0)


def feature_names(columns: TableColumns, shape: Shape) -> Sequence[str]:
    """Return the names of the features of a row; those without a name are called by their place in the row, from 0."""
    if columns.features:
        return columns.features
    if len(shape) == 1:
        return [f"feature {n}" for n in range(shape[0])]
    return [f"pixel {', '.join(map(str, np.unravel_index(n, shape)))}" for n in range(prod(shape))]


def _number(value: float, offset: float) -> str:
    """Return a number plus what was subtracted from it, with the six digits of the number that float32 holds."""
    decimals = _DIGITS - 1 - floor(log10(abs(value))) if value else 0
    return repr(round(float(value + offset), decimals)).removesuffix(".0")


def _doubles(values: torch.Tensor) -> np.ndarray:
    """Return values (rows, *shape) as an array (rows, cells) of double precision."""
    return values.flatten(1).cpu().numpy().astype(np.float64)
