"""The score of validation rows after each epoch."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from aecore.core.types import Terms
from aecore.training.batches import batches
from aecore.training.job import Job
from aecore.training.memory import halve
from aecore.training.numerics import Autocast, own_random_state
from aecore.training.totals import Totals

Scored = Callable[..., tuple[Terms, Terms]]
"""(*batch) -> terms, which are means over its rows, and sums over its rows."""


class Validation:
    """The validation rows of a fit, and how they are scored."""

    def __init__(self, job: Job, autocast: Autocast = nullcontext) -> None:
        self.job, self.autocast = job, autocast
        self.parts = 1
        """Into how many parts a batch is cut; two after memory was not enough."""

    def score(self, scored: Scored) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the means of the terms and of the sums over all rows, in eval mode.

        Noise is the same at every call. A batch that does not fit into memory is cut in two, and so are all others from
        then on.

        Raises:
            MemoryError: not even half a batch fits.
        """
        job = self.job
        job.model.eval()
        while True:
            with own_random_state(job.device, job.seed + job.team.rank), torch.no_grad():
                try:
                    terms, sums, rows = self._totals(scored)
                    break
                except (MemoryError, RuntimeError) as error:
                    most, advice = min(job.scoring_rows, len(job.validation[0])), "lower the widths of the network"
                    self.parts = halve(error, self.parts, most, "validation rows", advice, can_be_cut=most > 1)
        return terms.means(rows, job.team), sums.means(rows, job.team)

    def _totals(self, scored: Scored) -> tuple[Totals, Totals, int]:
        """Return the sums of this worker's terms (times rows), its other sums, and its number of rows."""
        job, terms, sums, rows = self.job, Totals(), Totals(), 0
        order = torch.arange(len(job.validation[0]))
        for part in batches(job.validation, order, job.scoring_rows, job.device, job.team):
            tensors, count = part.tensors, part.rows
            if not count:  # a row of another worker's, counted as none: all workers need the names of the terms
                tensors = tuple(tensor[:1].to(job.device) for tensor in job.validation)
            parts = min(self.parts, len(tensors[0]))
            for piece in zip(*(tensor.tensor_split(parts) for tensor in tensors), strict=True):
                with self.autocast():
                    means, summed = scored(*piece)
                terms.add(means, len(piece[0]) if count else 0)
                sums.add(summed, 1 if count else 0)
            rows += count
        return terms, sums, rows
