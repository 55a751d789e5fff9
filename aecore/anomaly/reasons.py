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
    """What the references that are alike otherwise have, on average."""
    contribution: float
    """What the feature adds to the row's score."""


class Reasons:
    """Explains rows by the names and units of the data."""

    def __init__(self, score: NeighbourScore, prepare: Prepare, columns: TableColumns) -> None:
        self.score, self.prepare, self.columns = score, prepare, columns

    def of(self, raw: torch.Tensor, scores: torch.Tensor) -> list[list[Reason]]:
        """Return for raw rows (rows, *shape) with these scores the features that add most, the largest first."""
        explanation = self.score.explain(self.prepare(raw), scores)
        expected = self.prepare.inverse(explanation.expected.view_as(raw)).flatten(1).cpu().numpy().astype(np.float64)
        values = raw.flatten(1).cpu().numpy().astype(np.float64)
        offsets = np.array(self.columns.cell_offsets or [0.0] * values.shape[1])
        parts, names = explanation.contributions.cpu().numpy(), feature_names(self.columns, raw.shape[1:])
        order = np.argsort(-parts, 1, kind="stable")[:, :REASONS]
        return [
            [
                Reason(names[n], _shown(value[n], offsets[n]), _shown(usual[n], offsets[n]), float(part[n]))
                for n in chosen
            ]
            for chosen, value, usual, part in zip(order, values, expected, parts, strict=True)
        ]  # fmt: skip


def feature_names(columns: TableColumns, shape: Shape) -> Sequence[str]:
    """Return the names of the features of a row; those without a name are called by their place in the row, from 0."""
    if columns.features:
        return columns.cells
    if len(shape) == 1:
        return [f"feature {n}" for n in range(shape[0])]
    return [f"pixel {', '.join(map(str, np.unravel_index(n, shape)))}" for n in range(prod(shape))]


def _shown(value: float, offset: float) -> str:
    """Return a number plus what was subtracted from it, with the six digits of the number that float32 holds."""
    if not np.isfinite(value):
        return "missing"
    decimals = _DIGITS - 1 - floor(log10(abs(value))) if value else 0
    return repr(round(float(value + offset), decimals)).removesuffix(".0")
