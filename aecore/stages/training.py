"""A training stage in two steps: it is prepared, which says what is to be fitted, and finished when that is done.

So several stages can be prepared, fitted as one and finished.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from aecore.models.storage import Result
from aecore.training.fit import fit
from aecore.training.groups import fit_all
from aecore.training.job import Fitted, Job


class Training(NamedTuple):
    """A training stage that is prepared."""

    job: Job
    """What is to be fitted."""
    finish: Callable[[Fitted], Result]
    """Makes the stage's result of the fitted model."""


def train(training: Training) -> Result:
    """Fit what was prepared and return the stage's result."""
    return training.finish(fit(training.job))


def train_as_one(trainings: Iterable[Training], everywhere: bool = False) -> list[Result | Exception]:
    """Return the result of each training, or the exception that it ended in.

    On a GPU, fits that differ only in numbers (seeds, learning rates, weights of terms, levels of noise) are trained as
    one; the others, and those for which that fails, are trained one after another. Each has the numbers that it has
    alone, up to rounding; what is random has the same distribution.

    Args:
        trainings: may be an iterator that prepares one after another; then rows that they share are held only once.
        everywhere: train as one on a CPU, too, where it gains nothing; for tests.
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
            results.append(error)
    return results


def curves(fitted: Fitted) -> dict[str, Any]:
    """Return what the config of a result says of its training."""
    return {"history": fitted.history, "best_epoch": fitted.best_epoch}


def summary(fitted: Fitted) -> dict[str, float]:
    """Return the metrics of a training: the validation scores of its best epoch, its epochs and its seconds."""
    best = fitted.history[fitted.best_epoch - 1]
    # named apart from the curves, whose last point is the last epoch's
    scores = {name.replace("val/", "best/"): value for name, value in best.items() if name.startswith("val/")}
    return {
        **scores,
        "best_epoch": fitted.best_epoch,
        "epochs": len(fitted.history),
        "train_seconds": sum(epoch["seconds"] for epoch in fitted.history),  # of all attempts
    }
