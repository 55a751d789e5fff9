"""The fields of a study's recipe, and the checks that its variants can be compared fairly."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_settings import NoDecode

from aecore.config.experiment import Experiment, Finetune, Fit, check_parts, read_paths
from aecore.core.errors import short_repr
from aecore.core.fingerprint import Frozen, Later
from aecore.evaluation.trial import ANOMALY_REFERENCES, REFERENCES, Reference

_ROW_NAME = r"\w[\w .:-]{0,99}"
"""Pattern of a study row's name: it becomes part of the names of metrics, and MLflow allows these characters there."""
_ROW_FIELDS = {"variant", "network", "pretrain", "finetune", "settings"}
LABELS_FIT = "labels.fit."
"""How the names of the settings begin that belong to the finetuning of the classifier."""
_SEARCHED_EPOCHS = ("pretrain.epochs", f"{LABELS_FIT}epochs")


class Range(Frozen):
    """An interval of numbers from which the values of a setting are drawn."""

    low: float
    high: float
    log: bool = False
    """Draw evenly on a logarithmic scale."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"settings: a range from {self.low:g} to {self.high:g} is empty; set low below high")
        return self


Settings = dict[str, list[Any] | Range]
"""The values to try for each setting, by the dotted name of its field."""
_SETTINGS = TypeAdapter(Settings)
_read_data = partial(read_paths, field="data")


class Budget(Frozen):
    """What each trial may spend; it is the same for all trials."""

    epochs: PositiveInt = 40
    """Passes over the training rows in a trial's unsupervised training. A study row with `pretrain` spends half of them
    layer by layer, in equal parts, and the rest on the whole network. Under `choose: finetuned` these are the most that
    a trial may spend."""
    steps: Annotated[PositiveInt | None, Later()] = None
    """Gradient steps of a trial's unsupervised training, in place of passes over the training rows: so sets of all
    sizes are trained equally long. `epochs` is then the number of parts in which they are taken. null sets none."""
    settings: PositiveInt = 8
    """Number of settings that the searches random and optuna try for each study row."""
    hours: PositiveFloat | None = None
    """Wall time in hours after which all trials are ended; null sets no limit."""
    cpu_hours: PositiveFloat | None = None
    """CPU-hours that the study may spend, all commands and attempts together: the CPUs that its trials hold, times
    hours. When they are spent no further trial begins, and the same command with more goes on; null sets no limit."""
    gpu_hours: PositiveFloat | None = None
    """GPU-hours that the study may spend, as `cpu_hours`; a share of a GPU counts as such."""

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        check_parts("budget", self.epochs, self.steps)
        return self

    @property
    def length(self) -> str:
        """How long a trial is trained, in words."""
        return f"{self.epochs} passes over the training rows" if self.steps is None else f"{self.steps:,} steps"

    def steps_of(self, epochs: int) -> int | None:
        """Return the steps that are taken in so many of the budget's epochs; None where the budget sets none."""
        return None if self.steps is None else self.steps * epochs // self.epochs


class Labels(Frozen):
    """The supervised part of the comparison."""

    counts: tuple[PositiveInt, ...] = (100, 1000, 5000)
    """Numbers of labelled training rows at which the label-efficiency curve is measured. Numbers that the data cannot
    supply, or that are fewer than the classes, are left out; training with all labels is always added, and is the only
    one for []."""
    fit: Fit = Fit(epochs=15)
    """How each trained encoder is finetuned with a softmax layer on top."""

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        check_parts("labels.fit", self.fit.epochs, self.fit.steps)
        return self


class Study(Frozen):
    """Compares variants of autoencoders on your data, and tells which differences are more than chance."""

    name: str = "study"
    """Title of the report."""
    base: Experiment = Experiment(pretrain=None, finetune=Finetune(task="reconstruct", batch_size=32), control=False)
    """The experiment that all trials share."""
    # NoDecode: a single path may hold commas and brackets, which pydantic-settings would take for a list
    data: Annotated[str | tuple[str, ...] | None, Later(), NoDecode, BeforeValidator(_read_data)] = None
    """Parquet sets to study side by side: a folder, each file or folder in which is a set, a pattern, each match of
    which is one, or a list of such, [a.parquet, b.parquet]; base.data then holds what they have in common. null studies
    base.data alone."""
    variants: dict[str, dict[str, Any]] = Field({"plain": {}}, min_length=1)
    """The study rows, by name: what is compared. Each sets fields that differ from the base, in `variant`, `network`,
    `pretrain` or `finetune`, and may have `settings` of its own."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of weights, batches and noise; each study row is trained once with each seed."""
    settings: Settings = Field({})
    """Fields that are searched in every study row, by dotted name: a list of values, or a range {low, high, log}."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """How settings are chosen: all combinations, random draws, or by Optuna, which searches with the first seed; the
    best settings are then trained with the other seeds."""
    scheduler: Literal["none", "asha", "race"] = "none"
    """asha stops trials early whose reconstruction error lags behind (Li et al. 2020). race adds seeds in rounds; a
    study row that is worse than the best one, by the statistics of the report, gets no further seeds."""
    choose: Literal["reconstruction", "probe", "finetuned"] = "reconstruction"
    """The validation measure by which a study row's best settings are chosen: the squared reconstruction error, the
    accuracy of a linear probe, or (finetuned) the accuracy of the classifier that is finetuned with all labels. Under
    finetuned `labels.fit` and `pretrain.epochs` can be searched as well, a row may have `finetune: null`, so that its
    classifier starts from the pretrained layers, and the settings of the reference `random` are searched too."""
    budget: Budget = Budget()
    labels: Labels = Labels()

    @model_validator(mode="before")
    @classmethod
    def _let_data_name_the_sets(cls, values: Any) -> Any:
        """Let `base.data` be Parquet at the paths of `data`, until each set takes its own path."""
        if not isinstance(values, Mapping) or not (paths := _read_data(values.get("data"))):
            return values
        base = _plain(values.get("base", cls.model_fields["base"].default))
        data = _plain(base.get("data", {})) if isinstance(base, Mapping) else None
        if not isinstance(base, Mapping) or not isinstance(data, Mapping):
            return values  # no tree of fields, which pydantic then says
        if data.get("path") is not None and read_paths(data["path"]) != paths:
            raise ValueError("base.data.path: data names the sets of the study already; leave one of the two out")
        if (name := data.get("name", "digits")) not in ("digits", "parquet"):  # digits may be the default
            raise ValueError(
                f"base.data.name: {short_repr(name)}, but data names sets of Parquet; leave one of the two out"
            )
        return {**values, "base": {**base, "data": {**data, "name": "parquet", "path": paths}}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.base.finetune is not None and self.base.finetune.task == "classify":
            raise ValueError("base.finetune.task: a study trains without labels; labels.fit is the supervised part")
        _check_steps("base", self.base.model_dump(include={"pretrain", "finetune"}))
        for row, override in self.variants.items():
            _check_row(row, override, self.references)
            _check_steps(f"variants.{row}", override)
        if self.scheduler == "asha" and self.choose != "reconstruction":
            raise ValueError("scheduler: asha stops by reconstruction; set choose reconstruction or scheduler none")
        if self.scheduler == "asha" and self.data:
            raise ValueError("scheduler: asha compares errors, which differ between sets of data; set none or race")
        if self.scheduler == "race" and self.base.data.anomaly:
            raise ValueError(
                "scheduler: race drops rows by test rows, and labels of anomalies drop none; set none, or leave "
                "base.data.anomaly out"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} lists a seed twice; name each once")
        spaces = [self.space(row) for row in self.variants]
        if self.scheduler == "race" and any(spaces):
            # dropping rows by test rows is the verdict itself, made early; settings may not be chosen so
            raise ValueError(
                "scheduler: race drops whole rows, so each row needs one choice of settings; leave settings out, or "
                "set scheduler none or asha"
            )
        if self.scheduler == "race" and len(self.seeds) < 3:
            raise ValueError("seeds: a race needs three or more; name more, or set scheduler none")
        for name, values in (item for space in spaces for item in space.items()):
            _check_setting(name, values, self.choose == "finetuned")
        if self.search == "grid" and any(isinstance(values, Range) for space in spaces for values in space.values()):
            raise ValueError("search: a grid needs lists of values, not ranges; list them or use random or optuna")
        if self.choose == "finetuned":
            self._check_that_rows_try_as_many()
        return self

    def _check_that_rows_try_as_many(self) -> None:
        counts = {row: self.settings_tried(row) for row in self.variants}
        fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        if counts[fewest] < counts[most]:
            raise ValueError(
                f"variants.{fewest}: the search tries {counts[fewest]} of its settings, but {counts[most]} of row "
                f"{most}; under choose finetuned give each row as many"
            )

    def settings_tried(self, row: str) -> int:
        """Return how many settings the search tries in a study row; one without a search."""
        space = self.space(row)
        if space and self.search != "grid":
            return self.budget.settings
        return prod(len(values) for values in space.values() if isinstance(values, list))

    def space(self, row: str) -> Settings:
        """Return the settings that are searched in a study row: those of the study, and those of the row itself. Of the
        reference `random` the network and the classifier are searched, and that only under `choose: finetuned`."""
        if row not in self.variants:
            searched = row == "random" and self.choose == "finetuned"
            own = ("network.", LABELS_FIT)
            return {name: v for name, v in self.settings.items() if searched and f"{name}.".startswith(own)}
        try:
            return {**self.settings, **_SETTINGS.validate_python(self.variants[row].get("settings", {}))}
        except ValidationError as error:
            raise ValueError(first_problem(f"variants.{row}.settings", error)) from None

    def contains(self, row: str, settings: Mapping[str, Any]) -> bool:
        """Return whether these settings are among those that are searched in a study row."""
        space = self.space(row)

        def has(values: list[Any] | Range, value: Any) -> bool:
            return value in values if isinstance(values, list) else values.low <= value <= values.high

        return settings.keys() == space.keys() and all(has(space[name], value) for name, value in settings.items())

    @property
    def references(self) -> tuple[Reference, ...]:
        """The study rows that the study contains besides its variants."""
        return ANOMALY_REFERENCES if self.base.data.anomaly else REFERENCES

    @property
    def choose_metric(self) -> str:
        """The name of the metric by which a study row's best settings are chosen."""
        accuracies = {"probe": "val/probe_accuracy", "finetuned": "val/finetuned_accuracy"}
        return accuracies.get(self.choose, "val/reconstruction_mse")

    @property
    def chooses_highest(self) -> bool:
        """Whether more is better by the metric by which settings are chosen."""
        return self.choose != "reconstruction"

    @property
    def searched_rows(self) -> list[str]:
        """The study rows of which settings are searched, references included."""
        return [row for row in (*self.variants, *self.references) if self.space(row)]


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value


def _check_row(row: str, override: dict[str, Any], references: Sequence[str]) -> None:
    if not re.fullmatch(_ROW_NAME, row):
        raise ValueError(
            f"variants.{row}: the names of metrics contain a row's name; use letters, digits, spaces and . - _ :"
        )
    if row in references:
        raise ValueError(f"variants.{row}: every study has a reference of this name; choose another name")
    if unknown := set(override) - _ROW_FIELDS:
        raise ValueError(
            f"variants.{row}.{min(unknown)}: a row may differ in {', '.join(sorted(_ROW_FIELDS))}; "
            "the rest must be equal for all, in base"
        )


def _check_steps(path: str, override: Mapping[str, Any]) -> None:
    for name in ("pretrain", "finetune"):
        fit = override.get(name)
        if isinstance(fit, Mapping) and fit.get("steps") is not None:
            raise ValueError(f"{path}.{name}.steps: equal for all trials; set budget.steps instead")


def _check_setting(name: str, values: list[Any] | Range, finetuned: bool) -> None:
    """Check a setting to search; `finetuned` says whether settings are chosen by the finetuned classifier."""
    if not re.match(r"(variant|network)(\.|$)|(pretrain|finetune|labels\.fit)\.", name):
        raise ValueError(
            f"settings.{name}: only fields of variant, network, pretrain, finetune and labels.fit can be searched"
        )
    if name.startswith(LABELS_FIT) and not finetuned:
        raise ValueError(f"settings.{name}: equal for all trials; set choose finetuned to search it")
    if name.endswith((".epochs", ".steps", ".task")) and not (finetuned and name in _SEARCHED_EPOCHS):
        raise ValueError(
            f"settings.{name}: equal for all trials; budget.epochs and budget.steps set how long each may train"
        )
    if name.endswith((".epochs", ".batch_size")) and isinstance(values, Range):
        raise ValueError(f"settings.{name}: a range has fractions between its ends; list whole numbers instead")
    if values == []:
        raise ValueError(f"settings.{name}: no values to try; list some, or leave it out")


def first_problem(path: str, error: ValidationError) -> str:
    """Describe pydantic's first error in one line that begins with the dotted path of the field.

    Errors raised by our own checks come first: among the errors of a union they say more than those about types.

    Args:
        path: dotted path of the value that was validated.
    """
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "value_error"), errors[0])
    if first["type"] == "value_error":
        return f"{path}: {first['msg'].removeprefix('Value error, ')}"
    return f"{'.'.join([path, *map(str, first['loc'])])}: {first['msg']}, got {short_repr(first['input'])}"
