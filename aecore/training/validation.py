"""The score of validation rows after each epoch."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aecore.core.types import Terms
from aecore.training.batches import batches
from aecore.training.job import Job
from aecore.training.memory import halve
from aecore.training.precision import Autocast
from aecore.training.randomness import own_random_state
from aecore.training.team import ALONE, Team
from aecore.training.totals import Totals

Scored = Callable[..., tuple[Terms, Terms]]
"""(*batch) -> terms, which are means over its rows, and sums over its rows."""


@dataclass(kw_only=True)
class Validation:
    """Validation rows, and how they are scored."""

    rows: tuple[Tensor, ...]
    device: torch.device
    seed: int = 0
    """Noise is the same at every score with the same seed."""
    batch_size: int = 2048
    autocast: Autocast = nullcontext
    team: Team = ALONE
    parts: int = 1
    """Into how many parts a batch is cut; two after memory was not enough."""

    def score(self, model: nn.Module, scored: Scored) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the means of the terms and of the sums over all rows, in eval mode.

        A batch that does not fit into memory is cut in two, and so are all others from then on.

        Raises:
            MemoryError: not even half a batch fits.
        """
        model.eval()
        while True:
            with own_random_state(self.device, self.seed + self.team.rank), torch.no_grad():
                try:
                    (terms, sums), rows = self._totals(scored)
                    break
                except (MemoryError, RuntimeError) as error:
                    most, advice = min(self.batch_size, len(self.rows[0])), "lower the widths of the network"
                    self.parts = halve(error, self.parts, most, "validation rows", advice, can_be_cut=most > 1)
        return terms.means(rows, self.team), sums.means(rows, self.team)

    def _totals(self, scored: Scored) -> tuple[tuple[Totals, Totals], int]:
        """Return the sums of this worker's terms (times rows) and sums, and its number of rows."""
        terms, sums, rows = Totals(), Totals(), 0
        order = torch.arange(len(self.rows[0]))
        for part in batches(self.rows, order, self.batch_size, self.device, self.team):
            tensors, count = part.tensors, part.rows
            if not count:  # a row of another worker's, counted as none: all workers need the names of the terms
                tensors = tuple(tensor[:1].to(self.device) for tensor in self.rows)
            parts = min(self.parts, len(tensors[0]))
            for piece in zip(*(tensor.tensor_split(parts) for tensor in tensors), strict=True):
                with self.autocast():
                    means, summed = scored(*piece)
                terms.add(means, len(piece[0]) if count else 0)
                sums.add(summed, 1 if count else 0)
            rows += count
        return (terms, sums), rows


def validation_of(job: Job, autocast: Autocast) -> Validation:
    """Return the validation of a fit."""
    return Validation(
        rows=job.validation, device=job.device, seed=job.seed, batch_size=job.scoring_rows, autocast=autocast,
        team=job.team,
    )  # fmt: skip
