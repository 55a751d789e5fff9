"""The specs of the stages: an experiment, resolved against its data, in the parts that each stage depends on.

A spec is hashed into its stage's key. This module does not import torch, so that a driver that only builds the graph
stays small.
"""

from typing import Annotated, Literal

from aecore.config.experiment import Data, Fit
from aecore.config.facts import Facts, TableColumns
from aecore.core.fingerprint import Frozen, Later, Unhashed
from aecore.core.types import Detector, Precision, Task
from aecore.models.spec import LayerSpec
from aecore.variants import Variant

REVISION = 2
"""Part of every stage's key. Raise it when a change in this package alters what a stage returns."""


Anomalies = Literal["none", "clean", "mixed"]
"""Whether rows are scored for how strange they are, by references that are normal rows (clean) or may be anomalies
(mixed)."""


class Numerics(Frozen):
    """The choices of how to compute that alter the numbers, and are therefore hashed."""

    precision: Precision = "fp32"
    """Arithmetic of training: fp32, tf32 (CUDA only), or bf16 autocast."""
    compile: bool = False
    """Whether the loss is compiled with torch.compile."""


class PretrainSpec(Frozen):
    """The pretraining of one layer."""

    number: int
    """Place of the layer in the stack; layer 1 reads the data."""
    layer: LayerSpec
    variant: Variant
    fit: Fit
    seed: int
    numerics: Numerics


class FinetuneSpec(Frozen):
    """The finetuning of a stack. It starts from the weights of its input stages or, without any, from random
    weights."""

    layers: tuple[LayerSpec, ...]
    task: Task
    classes: tuple[str, ...]
    variant: Variant | None
    """The variant whose loss trains the unrolled autoencoder; None for a classifier."""
    fit: Fit
    seed: int
    numerics: Numerics
    labels: int | None = None
    """Number of labelled training rows that a classifier uses, stratified by label; None uses all."""
    served: bool = True
    """Whether the result is a model to be served, with the reference and the example that this needs."""
    columns: Annotated[TableColumns, Unhashed()] = TableColumns()
    """The columns of a table, which the model keeps so that rows are matched to them by name. The key of the data
    covers them."""
    anomalies: Annotated[Anomalies, Later()] = "none"
    """Whether the model keeps reference rows, to score how strange other rows are."""


class ReferenceSpec(Frozen):
    """A reference to compare autoencoders with: PCA as one linear layer, or a stack with random weights."""

    kind: Literal["pca", "random"]
    layers: tuple[LayerSpec, ...]
    seed: int


class EvaluateSpec(Frozen):
    """The evaluation of an experiment's model on the test rows."""

    task: Task | None
    """Task of the finetuned model; None if only pretrained layers are evaluated."""
    classes: tuple[str, ...]
    pictures: bool
    """Whether figures are drawn and codes are measured; a control needs neither."""
    variant: Variant | None = None
    """The variant that trained the autoencoder, which decides on some of the figures; None without an autoencoder."""
    anomalies: Annotated[Anomalies, Later()] = "none"
    """Whether test rows are scored, and ranked by their labels, which tell which of them are anomalies."""
    columns: Annotated[TableColumns, Unhashed()] = TableColumns()
    """The columns of a table, by whose names rows are explained."""


class MeasureSpec(Frozen):
    """The measures by which a study compares autoencoders."""

    variant: Variant | None
    """The variant that trained the autoencoder; None for a reference."""
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    """Number of labelled rows for each point of the label-efficiency curve."""
    seed: int
    """Seed of the choice of labelled rows. Noise and samples have seeds of their own, the same for all autoencoders."""
    pictures: bool
    """Whether images, maps and codes for the report are returned as well."""


class DetectorSpec(Frozen):
    """A reference for finding anomalies: one of scikit-learn's detectors."""

    kind: Detector
    seed: int
    """Seed of the isolation forest; 0 for the others, which draw nothing."""


class DetectionSpec(Frozen):
    """How well an autoencoder, or a reference, tells the anomalies among the test rows."""

    mixed: bool
    """Whether training rows may be anomalies."""
    seed: int
    """Seed of the trial. It tells the trials of a reference apart, and changes nothing."""
    explained: bool
    """Whether the strangest rows are explained for the report."""
    columns: Annotated[TableColumns, Unhashed()] = TableColumns()
    """The columns of a table, by whose names rows are explained."""


class LoadSpec(Frozen):
    """The reading of a data set: the user's choices, and the facts that the driver learned about it."""

    data: Data
    facts: Facts


class ContestSpec(Frozen):
    """The comparison of two models, a champion and a challenger, on the same test rows."""

    metric: Literal["accuracy", "reconstruction", "auroc"]
    facts: Facts
    split: str
    """How test rows were chosen: `data.split`."""
    test: float
    """How many test rows were chosen: `data.test`."""
    test_only: Annotated[tuple[str, ...], Later()] = ()
    """The labels whose rows are never in training: those of anomalies, where training rows are clean."""


class DriftSpec(Frozen):
    """The comparison of new rows with the reference rows of a model."""

    classes: tuple[str, ...]
    """Names of the classes of the new rows."""
    threshold: float
    """Smallest effect size that counts as drift. An effect size is the largest gap between two distributions, from 0 to
    1."""
    normal_only: Annotated[bool, Later()] = False
    """Whether anomalies among the new rows are left out, since the reference rows are normal."""
