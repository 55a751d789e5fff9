"""A training stage in two steps: preparing it returns the job to fit, and finishing it makes the result of the fit.

So several stages can be prepared, fitted together as one and finished.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from aecore.core.errors import without_frames
from aecore.models.storage import Result
from aecore.training.fit import fit
from aecore.training.groups import fit_all
from aecore.training.job import Fitted, Job


class Training(NamedTuple):
    """A prepared training stage: the job to fit, and the function that makes the stage's result."""

    job: Job
    """The fit, with the model that it trains."""
    finish: Callable[[Fitted], Result]
    """Makes the stage's result of the fitted model."""


def train(training: Training) -> Result:
    """Train the model of a prepared stage and return the stage's result."""
    return training.finish(fit(training.job))


def train_as_one(trainings: Iterable[Training], everywhere: bool = False) -> list[Result | Exception]:
    """Return the result of each training, or the exception that it ended in.

    On a GPU, fits that differ only in numbers (seeds, learning rates, weights of terms, levels of noise) are trained
    together as one; other fits, and fits for which that fails, are trained one after another. Each fit has the numbers
    that it would have alone, up to rounding; its noise has the same distribution.

    Args:
        trainings: may be an iterator that prepares one after another; then rows that they share are held only once.
        everywhere: train several fits as one on a CPU as well, where that gains nothing; for tests.
    """
    finishes: list[Callable[[Fitted], Result]] = []

    def jobs() -> Iterator[Job]:
        for training in trainings:
            finishes.append(training.finish)
            yield training.job

    results: list[Result | Exception] = []
    for number, outcome in enumerate(fit_all(jobs(), everywhere)):
        try:
            results.append(outcome if isinstance(outcome, Exception) else finishes[number](outcome))
        except Exception as error:
            results.append(without_frames(error))
    return results


def curves(fitted: Fitted) -> dict[str, Any]:
    """Return the record of a training for its result's config: the metrics of each epoch, and the best epoch."""
    return {"history": fitted.history, "best_epoch": fitted.best_epoch}


def summary(fitted: Fitted) -> dict[str, float]:
    """Return the metrics of a training: the best epoch and its validation scores, the number of epochs, the seconds."""
    best = fitted.history[fitted.best_epoch - 1]
    # not named val/ as the curves are, since these end with the scores of the last epoch
    scores = {name.replace("val/", "best/"): value for name, value in best.items() if name.startswith("val/")}
    return {
        **scores,
        "best_epoch": fitted.best_epoch,
        "epochs": len(fitted.history),
        "train_seconds": sum(epoch["seconds"] for epoch in fitted.history),  # of all attempts
    }
