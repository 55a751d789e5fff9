"""The stages of one trial: what trains an autoencoder or fits a reference, and what measures it. Nothing runs here."""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from pydantic import ValidationError

from aecore.config.experiment import Dense, Experiment, Fit, overlay
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs, resolve, resolve_anomalies
from aecore.config.specs import (
    REVISION,
    DetectionSpec,
    DetectorSpec,
    FinetuneSpec,
    LoadSpec,
    MeasureSpec,
    Numerics,
    PretrainSpec,
    ReferenceSpec,
)
from aecore.core.errors import InputError
from aecore.evaluation.trial import Reference, trial_name
from aecore.models.spec import LayerSpec
from pipelines.graph.recipe import Stacked, load_stage
from pipelines.graph.stage import Inputs, Stage
from pipelines.study.schema import Study, first_problem

_JUDGE_FIT = Fit(epochs=10, batch_size=128)
_JUDGE_WIDTHS = (128, 64)


class Trained(NamedTuple):
    """An autoencoder, or a detector of anomalies, before it is measured."""

    data: Stage
    inputs: Inputs
    """The stages that train it, as inputs of further stages: `stack`, or `layers` that were only pretrained."""
    layers: tuple[LayerSpec, ...]
    """The layers of the classifiers that are finetuned from it."""
    experiment: Experiment | None
    """The experiment that trains it; None for a reference."""


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted name as a tree of fields."""
    fields: dict[str, Any] = {}
    for name, value in settings.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        fields = overlay(fields, value)
    return fields


def trained_stages(graph: Stacked) -> Trained:
    """Return the autoencoder of a study row: trained as a whole, or made of pretrained layers."""
    experiment = graph.experiment
    if graph.finetune is not None:
        assert isinstance(graph.finetune.spec, FinetuneSpec)
        return Trained(graph.data, {"stack": graph.finetune}, graph.finetune.spec.layers, experiment)
    dropout = {"dropout": experiment.network.dropout}
    specs = [layer.spec.layer for layer in graph.layers if isinstance(layer.spec, PretrainSpec)]
    layers = tuple(spec.model_copy(update=dropout) for spec in specs)
    return Trained(graph.data, {"layers": graph.layers}, layers, experiment)


def reference_stages(study: Study, kind: Reference, settings: Mapping[str, Any], seed: int, facts: Facts) -> Trained:
    """Return PCA of the code's width or the base's network with random weights, as an autoencoder to measure; in a
    study of anomalies one of scikit-learn's detectors."""
    network = {key: value for key, value in nested(settings).items() if key == "network"}
    try:
        base = Experiment.model_validate(overlay(study.base.model_dump(), network))
    except ValidationError as error:
        raise InputError(first_problem("settings", error)) from None
    experiment = resolve(base, facts)
    name, data = trial_name(kind, settings, seed), load_stage(experiment, facts)
    if kind != "random" and (kind != "pca" or facts.has_anomalies):
        detector = DetectorSpec(kind=kind, seed=seed if kind == "iforest" else 0)
        stage = Stage(f"{name}: fit", "anomalies.detect", detector, {"data": data})
        return Trained(data, {"detector": stage}, (), None)
    layers = tuple(layer_specs(experiment.network, experiment.data, facts))
    if kind == "pca":
        width = min(prod(layers[-1].code_shape), prod(facts.shape))
        layers = (
            LayerSpec(
                kind="dense", in_shape=facts.shape, code_shape=(width,), activation="linear", likelihood="gaussian",
                out_activation="linear", levels=0, dropout=0, normalization="none", tied=False,
                missing=layers[0].missing,
            ),
        )  # fmt: skip
    spec = ReferenceSpec(kind=kind, layers=layers, seed=0 if kind == "pca" else seed)
    stack = Stage(f"{name}: stack", "stages.reference", spec, {"data": data})
    return Trained(data, {"stack": stack}, layers, None)


def measuring_stage(study: Study, name: str, trained: Trained, seed: int, facts: Facts, numerics: Numerics) -> Stage:
    """Return the stage `name` that ends a trial."""
    if not facts.has_anomalies:
        return _measures(study, name, trained, seed, facts, numerics)
    spec = DetectionSpec(
        mixed=resolve_anomalies(study.base.data, facts) == "mixed", seed=seed,
        explained=trained.experiment is not None and seed == study.seeds[0], columns=facts.columns,
    )  # fmt: skip
    return Stage(name, "anomalies.measure", spec, {"data": trained.data, **trained.inputs})


def _measures(study: Study, name: str, trained: Trained, seed: int, facts: Facts, numerics: Numerics) -> Stage:
    """Return the stage `name` that measures an autoencoder; the classifiers that it needs are among its inputs."""
    data, variant = trained.data, trained.experiment.variant if trained.experiment else None
    assert isinstance(data.spec, LoadSpec)
    # the splits leave fewer rows than this for training; the stage takes a count that is too large as all training rows
    rows = min(facts.rows, data.spec.data.limit or facts.rows)
    counts = _label_counts(study, facts, rows)
    classifiers = [
        Stage(
            f"{name}: classify, {'all' if count is None else count} labels", "stages.finetune",
            _classifier_spec(trained.layers, facts, study.labels.fit, seed, numerics, count),
            {"data": data, **trained.inputs},
        )
        for count in ([*counts, None] if facts.can_classify else [])
    ]  # fmt: skip
    inputs: dict[str, Stage | tuple[Stage, ...]] = {
        "data": data, **trained.inputs, "classifiers": tuple(classifiers)
    }  # fmt: skip
    if variant is not None and variant.kind == "variational" and facts.can_classify:
        layers = layer_specs(Dense(widths=_JUDGE_WIDTHS, activation="relu"), data.spec.data, facts)
        judge = _classifier_spec(tuple(layers), facts, _JUDGE_FIT, 0, numerics, None)
        inputs["judge"] = Stage("judge of samples", "stages.finetune", judge, {"data": data})
    spec = MeasureSpec(
        variant=variant, classes=facts.classes, labels=(*counts, rows) if facts.can_classify else (), seed=seed,
        pictures=seed == study.seeds[0],
    )  # fmt: skip
    # results of this revision may lack the accuracy by which such a study chooses: earlier versions did not measure it
    revision = REVISION + 1 if study.choose == "finetuned" else REVISION
    return Stage(name, "evaluation.measure", spec, inputs, revision=revision)


def _label_counts(study: Study, facts: Facts, rows: int) -> list[int]:
    """Return the numbers of labelled rows, below half of all `rows`, that can hold a row of each class."""
    least = len(facts.classes)
    return [count for count in study.labels.counts if least <= count < 0.5 * rows] if facts.can_classify else []


def _classifier_spec(
    layers: tuple[LayerSpec, ...], facts: Facts, fit: Fit, seed: int, numerics: Numerics, labels: int | None
) -> FinetuneSpec:
    own = {"stochastic": False} | ({} if fit.dropout is None else {"dropout": fit.dropout})
    return FinetuneSpec(
        layers=tuple(layer.model_copy(update=own) for layer in layers), task="classify",
        classes=facts.classes, variant=None, fit=fit, seed=seed, numerics=numerics, labels=labels, served=False,
    )  # fmt: skip
