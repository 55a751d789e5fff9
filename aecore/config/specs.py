"""What the stages are made of: an experiment, worked out against the data it meets.

Nothing here imports torch, so that a driver which only builds the graph stays small.
"""

from typing import Literal

from aecore.config.experiment import Data, Fit
from aecore.config.facts import Facts
from aecore.core.fingerprint import Frozen
from aecore.core.types import Precision, Task
from aecore.models.spec import LayerSpec
from aecore.variants import Variant

REVISION = 2
"""Part of every stage's key: raise it when a change in this package alters what a stage returns."""


class Numerics(Frozen):
    """The choices of how to compute that reach the numbers, and so the hash."""

    precision: Precision = "fp32"
    compile: bool = False


class PretrainSpec(Frozen):
    """Identity of one layer's pretraining."""

    number: int
    layer: LayerSpec
    variant: Variant
    fit: Fit
    seed: int
    numerics: Numerics


class FinetuneSpec(Frozen):
    """Identity of a finetuning; from a trained stack or, where it stands on none, from random weights."""

    layers: tuple[LayerSpec, ...]
    task: Task
    classes: tuple[str, ...]
    variant: Variant | None
    """Loss of the unrolled autoencoder; None to classify."""
    fit: Fit
    seed: int
    numerics: Numerics
    labels: int | None = None
    """Labelled training rows, stratified (classify only); None is all."""
    served: bool = True
    """The result is a model to be served, with what that needs: see `stages.finetune`."""


class ReferenceSpec(Frozen):
    """Identity of a reference: PCA, as one linear layer, or a stack with random weights."""

    kind: Literal["pca", "random"]
    layers: tuple[LayerSpec, ...]
    seed: int


class EvaluateSpec(Frozen):
    """Identity of an evaluation."""

    task: Task | None
    """What the finetuned model does; None where only pretrained layers are evaluated."""
    classes: tuple[str, ...]
    pictures: bool
    """Draw figures and measure codes; a control needs neither."""
    variant: Variant | None = None
    """The variant that trained the autoencoder, where there is one: it decides on some of the figures."""


class MeasureSpec(Frozen):
    """Identity of the measures that a study compares."""

    variant: Variant | None
    """None for a reference."""
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    """Labelled rows of each point of the label-efficiency curve."""
    seed: int
    """Of the rows that are labelled; noise and samples have seeds of their own, the same for all."""
    pictures: bool
    """Also keep pictures, maps and codes for the report."""


class LoadSpec(Frozen):
    """Identity of the data: what was asked for, and what was found."""

    data: Data
    facts: Facts


class ContestSpec(Frozen):
    """Identity of a contest of two models on the same rows."""

    metric: Literal["accuracy", "reconstruction"]
    facts: Facts
    split: str
    test: float
    """How the test rows were cut."""


class DriftSpec(Frozen):
    """Identity of a comparison of new rows with those that a model was trained on."""

    classes: tuple[str, ...]
    """Names of the new rows' classes."""
    threshold: float
    """Effect size from which on a difference is drift: the largest gap between two distributions, from 0 to 1."""
