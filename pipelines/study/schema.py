"""What a study is made of: variants, settings, seeds and budget."""

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError, model_validator

from aecore.config.experiment import Experiment, Finetune, Fit
from aecore.core.errors import short_repr
from aecore.core.fingerprint import Frozen
from pipelines.study.trial import REFERENCES

if TYPE_CHECKING:
    pass


_ROW = r"\w[\w .:-]{0,99}"
"""What MLflow takes in a metric's name."""
_OVERRIDES = {"variant", "network", "pretrain", "finetune", "settings"}


class Range(Frozen):
    """Numbers to draw a setting from."""

    low: float
    high: float
    log: bool = False
    """Draw evenly on a logarithmic scale."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"settings: a range from {self.low:g} to {self.high:g} is empty; set low below high")
        return self


Settings = dict[str, list[Any] | Range]
_SETTINGS = TypeAdapter(Settings)


class Budget(Frozen):
    """What each trial may spend, the same for all."""

    epochs: PositiveInt = 40
    """Passes over the training rows of a trial's unsupervised training; a row with `pretrain` spends half of them layer
    by layer, in equal parts, and the rest on the whole."""
    settings: PositiveInt = 8
    """Settings that random and optuna try of each variant."""
    hours: PositiveFloat | None = None
    """Wall time after which no trial goes on; null sets no limit."""


class Labels(Frozen):
    """The supervised side of the comparison."""

    counts: tuple[PositiveInt, ...] = (100, 1000, 5000)
    """Labelled training rows of the label-efficiency curve; those the data have not are left out, all of them added."""
    fit: Fit = Fit(epochs=15)
    """Finetuning of each trained encoder with a softmax head."""


class Study(Frozen):
    """Which autoencoder should I use on my data, and does the difference mean anything?"""

    name: str = "study"
    """Title of the report."""
    base: Experiment = Experiment(pretrain=None, finetune=Finetune(task="reconstruct", batch_size=32), control=False)
    """What all trials share."""
    variants: dict[str, dict[str, Any]] = Field({"plain": {}}, min_length=1)
    """Rows of the comparison, by name: what each overrides of the base in `variant`, `network`, `pretrain` or
    `finetune`, and its own `settings`."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of weights, batches and noise; each row is trained with each."""
    settings: Settings = Field({})
    """Searched in every row, by dotted name: a list of values, or a range {low, high, log}."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """How settings are tried: all combinations, random ones, or by Optuna, which tries them with the first seed and
    then takes the best to the others."""
    scheduler: Literal["none", "asha"] = "none"
    """asha stops trials whose reconstruction lags (Li et al. 2020)."""
    choose: Literal["reconstruction", "probe"] = "reconstruction"
    """Which validation measure chooses a row's settings: squared error, or the linear probe's accuracy."""
    budget: Budget = Budget()
    labels: Labels = Labels()

    @model_validator(mode="after")
    def _can_be_compared(self) -> Self:
        if self.base.finetune is not None and self.base.finetune.task == "classify":
            raise ValueError("base.finetune.task: a study trains without labels; labels.fit is the supervised part")
        for row, override in self.variants.items():
            if not re.fullmatch(_ROW, row):
                raise ValueError(f"variants.{row}: metrics bear a row's name; use letters, digits, spaces and . - _ :")
            if row in REFERENCES:
                raise ValueError(f"variants.{row}: a reference of this name is there unasked; choose another name")
            if unknown := set(override) - _OVERRIDES:
                raise ValueError(
                    f"variants.{row}.{min(unknown)}: a row may differ in {', '.join(sorted(_OVERRIDES))}; "
                    "the rest must be equal for all, in base"
                )
        if self.scheduler == "asha" and self.choose == "probe":
            raise ValueError("scheduler: asha stops by reconstruction; set choose reconstruction or scheduler none")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} has one twice; name each once")
        spaces = [self.space(row) for row in self.variants]
        for name, values in (item for space in spaces for item in space.items()):
            if not re.match(r"(variant|network)(\.|$)|(pretrain|finetune)\.", name):
                raise ValueError(
                    f"settings.{name}: only fields of variant, network, pretrain and finetune are searched"
                )
            if name.endswith((".epochs", ".task")):
                raise ValueError(f"settings.{name}: equal for all trials; budget.epochs sets what each may spend")
            if values == []:
                raise ValueError(f"settings.{name}: no values to try; list some, or leave it out")
        if self.search == "grid" and any(isinstance(values, Range) for space in spaces for values in space.values()):
            raise ValueError("search: a grid needs lists of values, not ranges; list them or use random or optuna")
        return self

    def space(self, row: str) -> Settings:
        """What is searched in a row."""
        try:
            return {**self.settings, **_SETTINGS.validate_python(self.variants[row].get("settings", {}))}
        except ValidationError as error:
            raise ValueError(_told(f"variants.{row}.settings", error)) from None

    @property
    def choose_metric(self) -> str:
        """The metric of a trial that chooses a row's settings."""
        return "val/probe_accuracy" if self.choose == "probe" else "val/reconstruction_mse"


def _told(place: str, error: ValidationError) -> str:
    """One line of the first error, with the names of fields that lead to it."""
    found = error.errors(include_url=False)
    first = next((e for e in found if e["type"] == "value_error"), found[0])
    if first["type"] == "value_error":
        return f"{place}: {first['msg'].removeprefix('Value error, ')}"
    path = ".".join([place, *map(str, first["loc"])])
    return f"{path}: {first['msg']}, got {short_repr(first['input'])}"
