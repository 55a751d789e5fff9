"""The choices that change the numbers of an experiment. All of them are hashed into the keys of the stages.

The text under a field is its text in `--help`.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)  # fmt: skip
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

from aecore.core.errors import short_repr
from aecore.core.fingerprint import Frozen, Later, Unhashed
from aecore.core.types import Activation, LikelihoodKind, Task
from aecore.variants import Plain, Variant


def overlay(lower: Any, upper: Any) -> Any:
    """Lay the settings `upper` over the settings `lower`, key by key.

    Where both are mappings of a different `kind`, such as two variants, `upper` replaces `lower` as a whole.
    """
    if not (isinstance(lower, Mapping) and isinstance(upper, Mapping)):
        return upper
    if upper.get("kind", lower.get("kind")) != lower.get("kind"):
        return dict(upper)
    return {**lower, **{key: overlay(lower.get(key), value) for key, value in upper.items()}}


def _read_list(value: Any) -> Any:
    """Return text in square brackets as a list, as a command line or a variable of the environment writes it; other
    values as they are."""
    if not (isinstance(value, str) and value.startswith("[") and value.endswith("]")):
        return value
    try:
        return json.loads(value)
    except ValueError:  # without quotation marks, as in [a.parquet, b.parquet]
        return [part.strip().strip("'") for part in value[1:-1].split(",")]


def read_paths(value: Any, field: str = "data.path") -> Any:
    """Return one path as text and several as a tuple, with home folders in place of `~` and `~user`.

    Text in square brackets is a list, as a command line or a variable of the environment writes it. A list of one path
    is that path.

    Args:
        field: What names the paths, for the message.
    """
    value = _read_list(value)
    if value is None or isinstance(value, str):
        return value and _at_home(value)
    if not isinstance(value, list | tuple) or not all(isinstance(path, str) for path in value):
        raise ValueError(
            f"{field}: name a file or folder, or several as [a.parquet, b.parquet], numbers and dates in quotes, not "
            f"{short_repr(value)}"
        )
    paths = tuple(_at_home(path) for path in value if path)
    return paths if len(paths) > 1 else next(iter(paths), None)


def _read_names(value: Any) -> Any:
    """Return names of classes as a tuple of texts, each once; a single name may be given without a list, and as a
    number."""
    value = _read_list(value)
    if value is None or value == [""]:
        return ()
    if value == "":  # as of a variable that the shell does not know: without anomalies this is another experiment
        raise ValueError("data.anomaly: the value is empty; write the label of anomalies, or leave data.anomaly out")
    return tuple(dict.fromkeys(map(str, value if isinstance(value, list | tuple) else [value])))


def _read_contamination(value: Any) -> Any:
    """Return `clean`, `mixed` or a share as a number, which a command line writes as text."""
    with suppress(TypeError, ValueError):
        value = float(value)
    if value not in ("clean", "mixed") and not (isinstance(value, float) and 0 < value < 0.5):
        raise ValueError(
            f"data.contamination: write clean, mixed or a share above 0 and below 0.5, not {short_repr(value)}"
        )
    return value


def _at_home(path: Any) -> Any:
    """Replace `~` and `~user` at the start of a path by the home folder."""
    return os.path.expanduser(path) if isinstance(path, str | Path) else path


class Data(Frozen):
    """The examples, and how they are split into training, validation and test rows."""

    name: Literal["digits", "mnist", "fashion_mnist", "kmnist", "emnist", "cifar10", "svhn", "parquet"] = "digits"
    """Data set: scikit-learn's bundled digits, one of torchvision's sets, or your own Parquet."""
    root: Annotated[Path, Unhashed(), BeforeValidator(_at_home)] = Path("data")
    """Folder of the torchvision sets. A set is downloaded there on first use; a copy that is there is used as it is."""
    # NoDecode: a single path may hold commas and brackets, which pydantic-settings would take for a list
    path: Annotated[str | tuple[str, ...] | None, Unhashed(), NoDecode, BeforeValidator(read_paths)] = None
    """Parquet file, folder, pattern ("data/2026-*/*.parquet", ** for folders at any depth) or object-store URI, or
    several of these, [a.parquet, b.parquet]; only for data.name parquet, which needs it."""
    column: str | None = None
    """Parquet column with the images or feature vectors; null looks for it."""
    labels: str | None = "auto"
    """Parquet column with the labels, in any case; auto looks for label, labels, target, class or y and, with
    data.anomaly, for anomaly or outlier. null ignores the labels of any data set: such columns are then not read, but y
    beside a column x is a feature."""
    exclude: Annotated[tuple[str, ...], Unhashed()] = ()
    """Parquet columns that are not read, such as the numbers of customers or rows."""
    validation: Annotated[float, Field(gt=0)] = 0.15
    """Training rows that are set aside to choose the best epoch and settings by: a share if below 1, else a number of
    rows."""
    test: Annotated[float, Field(gt=0)] = 0.2
    """Rows that are set aside for the one final test if the data have no test split: a share if below 1, else a number
    of rows."""
    split: Literal["drawn", "content"] = "drawn"
    """How rows are split for which the data name no split: drawn splits at random, stratified by label; content splits
    by a hash of a row's values, so that a row and its copies stay in the same split when the data grow."""
    anomaly: Annotated[tuple[str, ...], Later(), NoDecode, BeforeValidator(_read_names)] = ()
    """Value of the labels that marks anomalies, or several, [fraud, fault]. All other rows are normal, labels tell
    nothing else, and no training sees them; the test rows are scored."""
    contamination: Annotated[Literal["clean", "mixed"] | float, Later(), BeforeValidator(_read_contamination)] = "clean"
    """Anomalies among the training and validation rows, with data.anomaly: none (clean), as many as the data have
    (mixed), or this share of the rows."""
    missing: Annotated[Literal["refuse", "impute"], Later()] = "refuse"
    """What becomes of missing values in a table: refuse ends the job; impute reads the training rows' median instead,
    and leaves the feature out of the row's loss and score."""
    categories: Annotated[NonNegativeInt, Unhashed()] = 50
    """Most different values of a text column of a table that is read as a feature, one-hot; columns with more are left
    out, and 0 leaves out all of them."""
    limit: PositiveInt | None = None
    """Number of training rows to use, drawn at random and stratified by label; null uses all."""
    likelihood: Literal["auto", LikelihoodKind] = "auto"
    """Reconstruction term: gaussian is the squared error, bernoulli the cross-entropy of values in [0, 1],
    continuous_bernoulli normalises that to a likelihood of grey values, and categorical is the cross-entropy over the
    256 levels of each colour value. auto is bernoulli for grey images, categorical for colour images and gaussian for
    other data."""
    standardize: Literal["auto"] | bool = "auto"
    """Whether each feature is scaled to zero mean and unit variance over the training rows; auto does so for vectors of
    floating-point features with the gaussian likelihood."""
    in_memory: Literal["auto", "always", "never"] = "auto"
    """Whether the rows are held in memory (always) or read from Parquet in every epoch and shuffled within windows of
    32 MB (never). auto holds them unless they are Parquet with more than 2 GB of values."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.name == "parquet" and not self.path:
            raise ValueError("data.path is missing: name a Parquet file, folder or URI")
        if self.name != "parquet" and self.path is not None:
            raise ValueError(f"data.path is for data.name parquet, not {self.name}: add --data.name parquet")
        if self.name != "parquet" and self.exclude:
            raise ValueError(f"data.exclude is for data.name parquet, not {self.name}: leave it out")
        if self.name != "parquet" and self.missing == "impute":
            raise ValueError(f"data.missing: impute is for data.name parquet, as {self.name} has no missing values")
        if self.name != "parquet" and self.in_memory == "never":
            raise ValueError(
                f"data.in_memory: never needs data.name parquet, as {self.name} is always held in memory; use auto"
            )
        if self.split == "content" and self.test >= 1:
            raise ValueError(
                f"data.test: {self.test:g} rows are not the same ones when the data grow, as data.split content "
                "promises; give a share below 1"
            )
        if self.anomaly and self.labels is None:
            raise ValueError("data.anomaly: labels mark the anomalies, but data.labels is null; leave one of them out")
        if self.contamination != "clean" and not self.anomaly:
            raise ValueError(
                "data.contamination: only data.anomaly says which rows are anomalies; add --data.anomaly VALUE"
            )
        return self


def share_of_features(value: Any) -> float | None:
    """Return the share of the number of features that a width such as 0.5x stands for; None for any other value."""
    is_share = isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?x", value)
    return float(value[:-1]) if is_share else None


_UNITS = TypeAdapter(PositiveInt)


def _read_width(value: Any) -> int | str:
    """Return the width of a dense layer: a number of units, or a share of the number of features as text."""
    if 0 < (share_of_features(value) or 0) < math.inf:
        return str(value)
    try:
        return _UNITS.validate_python(value)
    except ValidationError:
        message = "Input should be a whole number above 0, or a share of the number of features such as 0.5x"
        raise PydanticCustomError("width", message) from None


def _refuse_share(value: Any) -> Any:
    if isinstance(value, str) and value.endswith("x"):
        raise PydanticCustomError("share", "Only network.kind dense takes shares of the number of features")
    return value


Width = Annotated[int | str, BeforeValidator(_read_width)]
Units = Annotated[PositiveInt, BeforeValidator(_refuse_share)]


class _Network(Frozen):
    activation: Activation = "elu"
    """Activation of every encoder layer. Unlike relu, elu leaves no unit without a gradient."""
    code_activation: Activation | None = None
    """Activation of the last layer, the bottleneck. null takes the one that the variant needs (linear for variational,
    sigmoid for sparse with kl), else network.activation."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each layer's outputs that are set to 0 in training."""
    normalization: Literal["none", "batch", "layer"] = "none"
    """Normalisation before the activation of each encoder layer."""
    tied: bool = False
    """Whether each decoder layer uses the transposed weights of its encoder layer."""


class Dense(_Network):
    """Fully connected layers."""

    kind: Literal["dense"] = "dense"
    widths: Annotated[tuple[Width, ...], Field(min_length=1)] = (48, 32, 16)
    """Number of units of each layer, from the data to the bottleneck, or their share of the number of features: 0.5x
    is half as many units as features, 4x four times as many."""
    max_width: Annotated[PositiveInt | None, Later()] = None
    """Largest width that such a share gives; null sets none."""


class Conv(_Network):
    """Strided convolutions, which the decoder transposes. Dense layers may follow them."""

    kind: Literal["conv"] = "conv"
    widths: Annotated[tuple[Units, ...], Field(min_length=1)] = (16, 32)
    """Number of channels of each convolutional layer, from the data on."""
    dense: tuple[Units, ...] = ()
    """Number of units of each dense layer behind the convolutional ones of conv; none by default."""
    kernel: PositiveInt = 3
    """Side of the convolution's kernel, in pixels."""
    stride: PositiveInt = 2
    """Step of the convolution's kernel, in pixels."""


Network = Annotated[Dense | Conv, Field(discriminator="kind")]


class Fit(Frozen):
    """The settings of one run of the training loop."""

    epochs: PositiveInt = 20
    """Largest number of passes over the training rows."""
    steps: Annotated[PositiveInt | None, Later()] = None
    """Number of gradient steps of the whole training, in place of passes over the training rows: epochs is then the
    number of parts, after each of which the validation rows are scored."""
    batch_size: PositiveInt = 64
    """Number of rows per step; under steps, all rows where there are fewer."""
    lr: PositiveFloat = 1e-3
    """Learning rate of Adam, at its peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Coefficient of decoupled weight decay (AdamW); 0 is plain Adam."""
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    """Learning rate over time: constant, falling to 0 as a cosine, or (plateau) halved after 3 epochs without a better
    validation loss."""
    warmup: NonNegativeInt = 0
    """Number of epochs in which the learning rate rises linearly from 0 to lr."""
    clip: PositiveFloat | None = None
    """Norm to which larger gradients are scaled down; null leaves them as they are."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of each layer's outputs that are set to 0 in this training; null takes network.dropout."""
    patience: PositiveInt | None = None
    """Number of epochs without a better validation score (error of a classifier, else loss) after which training stops;
    null trains for all epochs. The weights of the best epoch are used in either case."""


def check_parts(field: str, epochs: int, steps: int | None) -> None:
    """Raise a ValueError if training of so many steps cannot be cut into so many parts.

    Args:
        field: dotted path of the settings that hold the two numbers.
    """
    if steps is not None and epochs > steps:
        raise ValueError(
            f"{field}.epochs: {steps} steps cannot be cut into {epochs} parts; raise {field}.steps or lower "
            f"{field}.epochs"
        )


class Finetune(Fit):
    """The settings of the finetuning, which trains all weights of the stack."""

    task: Literal["auto", Task] = "auto"
    """What the stack is finetuned for: classify puts a softmax head on the code, reconstruct trains the unrolled
    autoencoder with the variant's loss. auto classifies if the training rows have labels of two classes or more."""


class Experiment(Frozen):
    """All choices that the numbers depend on. The defaults are the embedded experiment on scikit-learn's digits."""

    data: Data = Data()
    network: Network = Dense()
    variant: Variant = Plain()
    pretrain: Fit | None = Fit(epochs=50, batch_size=32, lr=2e-3)
    """Greedy layer-wise pretraining; null starts from random weights instead."""
    finetune: Finetune | None = Finetune(epochs=50, batch_size=32)
    """Finetuning of the whole stack; null leaves the pretrained layers as they are."""
    control: bool = True
    """Whether the same network is also finetuned from random weights, to show what pretraining is worth."""
    seed: int = 0
    """Seed of initial weights, batches and noise. The splits of the data do not depend on it."""

    @model_validator(mode="after")
    def _check_that_something_trains(self) -> Self:
        if self.pretrain is None and self.finetune is None:
            raise ValueError("pretrain and finetune are both null: nothing to train; set one of them")
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        for name, fit in (("pretrain", self.pretrain), ("finetune", self.finetune)):
            if fit is not None:
                check_parts(name, fit.epochs, fit.steps)
        return self
