"""The data sets of a study: one, or several side by side, each of which has all the study's trials."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from aecore.config.experiment import overlay
from aecore.config.facts import Facts
from aecore.config.specs import LoadSpec, Numerics
from aecore.core.errors import InputError
from aecore.core.fingerprint import fingerprint, later_defaults
from aecore.core.types import describe_shape
from aecore.data import dataset
from aecore.data.collection import find_sets
from aecore.evaluation.trial import in_set
from pipelines.study.plan import TrialPlan, largest_settings, plan_trial, plan_trials, warn_of_labels
from pipelines.study.schema import Study

_TOLD = 3
"""Most sets of which each is told in several lines."""


class StudySet(NamedTuple):
    """A data set of a study, with the study as it is on this set alone."""

    name: str
    """Empty where the study has only its `base.data`."""
    study: Study
    """The study without `data`; its `base.data` is the set."""
    facts: Facts
    numerics: Numerics

    def plan(self, row: str, settings: dict[str, Any], seed: int) -> TrialPlan:
        """Return the plan of one trial on this set; its stages have the keys that they have in a study of it alone. The
        warnings of plans are those that `inspect` has shown."""
        with warnings.catch_warnings(action="ignore"):
            return plan_trial(self.study, row, settings, seed, self.facts, self.numerics).of_set(self.name)

    def plans(self) -> list[TrialPlan]:
        """Return the plans of all trials on this set; see `plan_trials`."""
        with warnings.catch_warnings(action="ignore"):
            return [plan.of_set(self.name) for plan in plan_trials(self.study, self.facts, self.numerics)]

    def largest(self, row: str) -> TrialPlan:
        """Return a trial of a row with the largest values of its settings."""
        return self.plan(row, largest_settings(self.study, row, self.facts), self.study.seeds[0])

    def load_spec(self) -> LoadSpec:
        """Return how the rows of the set are read."""
        stages = self.largest(next(iter(self.study.variants))).stages().values()
        return next(stage.spec for stage in stages if isinstance(stage.spec, LoadSpec))

    def about(self) -> list[str]:
        """Say in a few lines which rows and columns of the set are read."""
        return dataset.describe(self.study.base.data, self.facts)

    def summary(self) -> str:
        """Say in a few words how large the set is."""
        return f"{self.facts.rows:,} rows, {describe_shape(self.facts.shape)}"


def inspect(study: Study, numerics: Numerics) -> list[StudySet]:
    """Return the data sets of a study, after reading all of them once and planning all trials.

    Raises:
        InputError: A set cannot be read, or the study does not fit it; or two sets are the same. With several sets the
            message names the set, and so do warnings.
    """
    sets: dict[str, StudySet] = {}
    for name, one in _studies(study).items():
        with _naming(name):
            found = StudySet(name, one, dataset.inspect(one.base.data), numerics)
            warn_of_labels(one, found.facts)
            plan_trials(one, found.facts, numerics)
        same = sets.setdefault(found.facts.digest, found)
        if same is not found:
            raise InputError(f"data: {same.name} and {name} are the same rows; leave one of them out")
    return list(sets.values())


def key_of(study: Study, sets: Sequence[StudySet]) -> str:
    """Return the key of a study's run. A study that gets another seed, another row or a larger budget of hours stays
    the same study, and so the same MLflow run; so does one whose folder of data sets gets another set."""
    changeable = {
        "seeds": True, "variants": True, "budget": {"cpu_hours": True, "gpu_hours": True},
        # the digest says which columns are read; the folder and files that were named are part of the key
        "base": {"data": {"exclude": True, "categories": True}},
    }  # fmt: skip
    config = study.model_dump(mode="json", exclude=overlay(later_defaults(study), changeable))
    return fingerprint("compare", sets[0].facts.digest if study.data is None else "", config)


def digest_of(sets: Sequence[StudySet]) -> str:
    """Return the digest of the data of a study: that of its set, or one of all."""
    digests = {one.name: one.facts.digest for one in sets}
    return digests.get("") or fingerprint(digests)


def are_many(sets: Sequence[StudySet]) -> bool:
    """Return whether there are so many data sets that each is told of in a line."""
    return len(sets) > _TOLD


def describe(sets: Sequence[StudySet]) -> list[str]:
    """Say which rows and columns of the data sets are read: in a few lines each, or in one where there are many."""
    many = are_many(sets)
    return [in_set(one.name, line) for one in sets for line in ([one.summary()] if many else one.about())]


def _studies(study: Study) -> dict[str, Study]:
    """Return by the name of each data set the study as it is on this set alone."""
    if study.data is None:
        return {"": study}
    return {name: _on(study, path) for name, path in find_sets(study.data).items()}


def _on(study: Study, path: str) -> Study:
    data = study.base.data.model_copy(update={"path": path})
    return study.model_copy(update={"data": None, "base": study.base.model_copy(update={"data": data})})


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Let the messages of errors and warnings in the block begin with the name of a data set, if there are several."""
    if not name:
        yield
        return
    with warnings.catch_warnings(record=True, action="always") as caught:
        try:
            yield
        except InputError as error:
            raise InputError(f"data: {in_set(name, str(error))}") from error
    for text, category in dict.fromkeys((str(one.message), one.category) for one in caught):
        warnings.warn(in_set(name, text), category, stacklevel=3)
