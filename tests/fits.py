"""Fits of models and losses that tests and benchmarks write themselves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aecore.config.experiment import Fit
from aecore.core.types import Terms
from aecore.training.fit import fit
from aecore.training.job import Fitted, Job
from aecore.training.objective import Objective

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loss(Objective):
    """An objective that is a function of a batch."""

    terms: Callable[..., Terms]
    sums: Callable[..., tuple[Terms, Terms]] | None = None

    def __call__(self, x: Tensor, labels: Tensor | None = None) -> Terms:
        return self.terms(x) if labels is None else self.terms(x, labels)

    def scored(self, x: Tensor, labels: Tensor | None = None) -> tuple[Terms, Terms]:
        return self.sums(x) if self.sums is not None else (self(x, labels), {})


def job(
    model: nn.Module, terms: Callable[..., Terms], train: tuple[Tensor, ...], validation: tuple[Tensor, ...], spec: Fit,
    sums: Callable[..., tuple[Terms, Terms]] | None = None, **options: Any,
) -> Job:  # fmt: skip
    """Return a fit on the CPU, by default with seed 0."""
    objective = Loss(model, nn.Identity(), None, terms, sums)
    defaults: dict[str, Any] = {"seed": 0, "device": CPU}
    return Job(objective=objective, train=train, validation=validation, spec=spec, **defaults | options)


def fit_model(*arguments: Any, **options: Any) -> Fitted:
    """Fit a `job` of these arguments."""
    return fit(job(*arguments, **options))
