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
"""Maps a batch to the terms of the loss, which are means over the batch's rows, and to further sums over these rows."""


class Validation:
    """Scores the validation rows of a fit, in batches that fit into memory."""

    def __init__(self, job: Job, autocast: Autocast = nullcontext) -> None:
        self.job, self.autocast = job, autocast
        self.parts = 1
        """Number of parts into which a batch is cut; two after memory was not enough."""

    def score(self, scored: Scored) -> tuple[dict[str, Any], dict[str, Any]]:
        """Score all validation rows in eval mode: return the mean per row of each loss term, and that of each further
        sum, such as a classifier's errors.

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
        """Return the loss terms and the further sums, added up over this worker's rows, and the number of rows."""
        job, terms, sums, rows = self.job, Totals(), Totals(), 0
        order = torch.arange(len(job.validation[0]))
        for part in batches(job.validation, order, job.scoring_rows, job.device, job.team):
            tensors, count = part.tensors, part.rows
            if not count:  # another worker's row, with weight 0: all workers need the names of the terms
                tensors = tuple(tensor[:1].to(job.device) for tensor in job.validation)
            parts = min(self.parts, len(tensors[0]))
            for piece in zip(*(tensor.tensor_split(parts) for tensor in tensors), strict=True):
                with self.autocast():
                    means, summed = scored(*piece)
                terms.add(means, len(piece[0]) if count else 0)
                sums.add(summed, 1 if count else 0)
            rows += count
        return terms, sums, rows
