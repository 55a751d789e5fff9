"""The choices that change the numbers: the whole tree is hashed into the keys of the stages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as _model_validator

from aecore.core.fingerprint import Frozen, Unhashed
from aecore.core.types import Activation, LikelihoodKind, Task
from aecore.variants import Plain, Variant


def overlay(lower: Any, upper: Any) -> Any:
    """`upper` over `lower`, key by key; another `kind` takes nothing of what lies below it."""
    if not (isinstance(lower, Mapping) and isinstance(upper, Mapping)):
        return upper
    if upper.get("kind", lower.get("kind")) != lower.get("kind"):
        return dict(upper)
    return {**lower, **{key: overlay(lower.get(key), value) for key, value in upper.items()}}


class Data(Frozen):
    """Which examples, and how they are split."""

    name: Literal["digits", "mnist", "fashion_mnist", "kmnist", "emnist", "cifar10", "svhn", "parquet"] = "digits"
    """Data set: scikit-learn's bundled digits, one of torchvision's, or your own Parquet."""
    root: Annotated[Path, Unhashed()] = Path("data")
    """Folder of the torchvision sets; downloaded there on first use, an existing copy is used as it is."""
    path: Annotated[str | None, Unhashed()] = None
    """Parquet file, folder or URI (parquet only)."""
    column: str | None = None
    """Parquet column of images or feature vectors; null finds it."""
    labels: str | None = "auto"
    """Parquet column of labels; auto takes label, labels, target, class or y; null ignores labels, of any set."""
    validation: Annotated[float, Field(gt=0)] = 0.15
    """Training rows set aside to choose by: a share below 1, else a number of rows."""
    test: Annotated[float, Field(gt=0)] = 0.2
    """Rows set aside for the one final test where the data bring no test split: a share below 1, else a number."""
    split: Literal["drawn", "content"] = "drawn"
    """Rows that the data do not mark are cut at random, stratified by label (drawn), or by a hash of their own values
    (content): a row and its copies then stay in their split however the data grow."""
    limit: PositiveInt | None = None
    """Use only this many training rows, drawn at random, stratified by label; null uses all."""
    likelihood: Literal["auto", LikelihoodKind] = "auto"
    """Reconstruction term: gaussian is squared error, bernoulli is cross-entropy on [0, 1], continuous_bernoulli makes
    that a likelihood of grey values, categorical is 256-way cross-entropy a channel; auto follows the data (grey images
    bernoulli, colour categorical, others gaussian)."""
    standardize: Literal["auto"] | bool = "auto"
    """Zero mean and unit variance a feature, fitted on the training rows; auto does so for feature vectors."""

    in_memory: Literal["auto", "always", "never"] = "auto"
    """Hold the rows in memory (always), or read them anew from Parquet each epoch, shuffled within windows of 32 MB
    (never); auto streams Parquet of more than 2 GB of values."""

    @_model_validator(mode="after")
    def _path_belongs_to_parquet(self) -> Self:
        if self.name == "parquet" and not self.path:
            raise ValueError("data.path is missing: name a Parquet file, folder or URI")
        if self.name != "parquet" and self.path is not None:
            raise ValueError(f"data.path belongs to data.name parquet, not {self.name}: add --data.name parquet")
        if self.name != "parquet" and self.in_memory == "never":
            raise ValueError(f"data.in_memory: never needs data.name parquet, {self.name} is held in memory; use auto")
        if self.split == "content" and self.test >= 1:
            raise ValueError(f"data.test: {self.test:g} rows are not the same ones when the data grow; give a share")
        return self


class _Network(Frozen):
    activation: Activation = "elu"
    """Activation of every encoder layer; elu, unlike relu, leaves no unit dead."""
    code_activation: Activation | None = None
    """Activation of the last, the bottleneck; null takes the variant's (variational linear, sparse kl sigmoid), else
    `activation`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each layer's outputs dropped while training."""
    normalization: Literal["none", "batch", "layer"] = "none"
    """Normalisation before each encoder activation."""
    tied: bool = False
    """Decoder weights are the transposed encoder weights."""


class Dense(_Network):
    """Fully connected layers."""

    kind: Literal["dense"] = "dense"
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (48, 32, 16)
    """Units of each layer, from the data to the bottleneck."""


class Conv(_Network):
    """Strided convolutions, transposed back; dense layers may follow them."""

    kind: Literal["conv"] = "conv"
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (16, 32)
    """Channels of each convolutional layer."""
    dense: tuple[PositiveInt, ...] = ()
    """Units of the dense layers behind the convolutional ones."""
    kernel: PositiveInt = 3
    """Side of the kernel, pixels."""
    stride: PositiveInt = 2
    """Step of the kernel, pixels."""


Network = Annotated[Dense | Conv, Field(discriminator="kind")]


class Fit(Frozen):
    """One run of the training loop."""

    epochs: PositiveInt = 20
    """Passes over the training rows, at most."""
    batch_size: PositiveInt = 64
    """Rows a step."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of Adam."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (AdamW); 0 is plain Adam."""
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    """Learning rate over time: constant, cosine down to 0, or halved after 3 epochs without a better validation."""
    warmup: NonNegativeInt = 0
    """Epochs of linear warm-up."""
    clip: PositiveFloat | None = None
    """Largest norm of the gradient; null does not clip."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of each layer's outputs dropped in this fit; null takes the network's."""
    patience: PositiveInt | None = None
    """Stop after so many epochs without a better validation; null never does. The best weights are kept either way."""


class Finetune(Fit):
    """Finetuning of the whole stack, all weights free."""

    task: Literal["auto", Task] = "auto"
    """classify puts a softmax head on the code; reconstruct trains the unrolled autoencoder by the variant's loss;
    auto classifies where there are labels."""


class Experiment(Frozen):
    """Everything that decides the numbers. The defaults are the embedded experiment: scikit-learn's digits."""

    data: Data = Data()
    network: Network = Dense()
    variant: Variant = Plain()
    pretrain: Fit | None = Fit(epochs=50, batch_size=32, lr=2e-3)
    """Greedy layer-wise pretraining; null starts from random weights."""
    finetune: Finetune | None = Finetune(epochs=50, batch_size=32)
    """Finetuning of the whole stack; null leaves the pretrained layers as they are."""
    control: bool = True
    """Also finetune the same network from random weights, to see what pretraining is worth."""
    seed: int = 0
    """Seed of weights, batches and noise; the splits do not depend on it."""

    @_model_validator(mode="after")
    def _something_to_train(self) -> Self:
        if self.pretrain is None and self.finetune is None:
            raise ValueError("pretrain and finetune are both null: nothing to train; set one of them")
        return self
