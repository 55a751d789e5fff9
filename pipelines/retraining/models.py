"""The two models that are compared: the champion, and the candidate that one day's data and recipe would make."""

import warnings
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from aecore.config.experiment import Experiment
from aecore.config.facts import Facts, TableColumns, columns_of, has_no_names, nameless
from aecore.config.specs import ContestSpec, DriftSpec, FinetuneSpec
from aecore.core.errors import InputError, join_names
from aecore.core.fingerprint import fingerprint
from aecore.core.types import describe_shape
from aecore.data.dataset import inspect
from aecore.data.labels import label_numbers
from aecore.models.spec import LayerSpec
from aecore.models.storage import Result
from pipelines.cluster.resources import Resources
from pipelines.graph.recipe import Stacked, build, from_parent
from pipelines.graph.stage import Finished, Known, Stage
from pipelines.retraining.rule import Metric, Rule

if TYPE_CHECKING:
    from pipelines.store.models import Version
    from pipelines.store.runs import Tracker

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
"""Aliases of a registered model in MLflow: the best version, the one that it replaced, and the one compared last."""
COLUMNS = "columns"
"""Tag of a version with the number of its table's columns, which it reads by name; other versions lack it."""


@dataclass(frozen=True)
class Champion:
    """The version of a registered model that is the champion, with the stages that made this version."""

    name: str
    """models:/NAME@champion."""
    number: str
    """The number of its version in MLflow's registry."""
    finetune: Finished
    """The stage that trained the champion."""
    contest: Finished
    """The contest stage that made this version the champion."""
    model: Result
    """The result of `finetune`."""
    contest_result: Result
    """The result of `contest`: ids of that day's test rows and, in `config`, the facts about that day's data."""


@dataclass(frozen=True)
class Candidate:
    """The model that the data and the recipe of one day would make, before it is trained."""

    facts: Facts
    graph: Stacked
    spec: FinetuneSpec
    """The specification of the stage that trains the model."""
    identity: str
    """Hash of the data and the recipe, which does not depend on who is champion."""

    @property
    def finetune(self) -> Stage:
        """The stage that trains the model."""
        assert self.graph.finetune is not None
        return self.graph.finetune


def load_champion(model: str, version: "Version", tracker: "Tracker") -> Champion:
    """Load the champion and the results of the stages that trained and compared it.

    Raises:
        InputError: the version was not made champion by this command, or its artifacts are lost.
    """
    from pipelines.store.errors import LostResultError

    name = f"models:/{model}@{CHAMPION}"

    def load(title: str, tag: str) -> tuple[Finished, Result]:
        if not (key := version.tags.get(tag)):
            raise InputError(
                f"model: {name}, version {version.number} was not made champion by jobs.retrain, so it is not known "
                "which rows it was trained on; delete the alias, or name another --model"
            )
        try:
            if not (run_id := tracker.find(key)):
                raise LostResultError("no such run in this MLflow experiment")
            return Finished(title, "", Known(key=key)), tracker.restore(run_id)
        except LostResultError as error:
            raise InputError(
                f"model: the results behind {name}, version {version.number} are lost ({error}); set "
                "MLFLOW_EXPERIMENT_NAME to the experiment that it was trained in, use --rollback, or delete the alias"
            ) from error

    finetune, result = load("champion", "stage.key")
    contest, contest_result = load("earlier contest", "contest.key")
    return Champion(name, version.number, finetune, contest, result, contest_result)


def known_columns(model: str, version: "Version | None", tracker: "Tracker | None") -> TableColumns | None:
    """Return the columns that the champion, `version`, was trained on; empty where it knows no names, None where there
    is no champion."""
    if version is None or tracker is None:
        return None
    if COLUMNS not in version.tags:  # then nothing has to be loaded on days without new data
        return TableColumns()
    return columns_of(load_champion(model, version, tracker).model.config)


def column_tag(candidate: Candidate) -> dict[str, str]:
    """Return the tag by which `known_columns` recognises a model of a table."""
    return {COLUMNS: str(len(names))} if (names := candidate.facts.columns.features) else {}


def candidate_of(
    experiment: Experiment, day: date, rule: Rule, resources: Resources, like: TableColumns | None
) -> Candidate:
    """Inspect the data of a day and build the stages that would train on them; nothing runs.

    Columns of a table are read in the order of `like`, the columns of the champion: then both models read the same
    rows, and the ids of the test rows, which are hashes of their values, stay the same.

    Raises an InputError where the data cannot be used, or the experiment does not fit them.
    """
    path: Any = experiment.data.path
    if path is not None:
        dated = [part.replace("{date}", day.isoformat()) for part in ([path] if isinstance(path, str) else path)]
        data = experiment.data.model_copy(update={"path": dated[0] if isinstance(path, str) else tuple(dated)})
        experiment = experiment.model_copy(update={"data": data})
    facts = inspect(experiment.data, like)
    graph = build(experiment, facts, resources.numerics)
    assert graph.finetune is not None and isinstance(graph.finetune.spec, FinetuneSpec)
    return Candidate(facts, graph, graph.finetune.spec, fingerprint("retrain", graph.finetune.key, rule.warm_start))


def resolve_metric(rule: Rule, candidate: Candidate, champion: Champion | None) -> Metric:
    """Return the measure by which the models are compared; raise an InputError where a model lacks this measure."""
    classifies, has_anomalies = candidate.spec.task == "classify", candidate.facts.has_anomalies
    if rule.metric == "auroc" and not has_anomalies:
        raise InputError(
            "metric: auroc needs labels that mark anomalies; name them with --data.anomaly, or use "
            f"{'accuracy' if classifies else 'reconstruction'}"
        )
    if rule.metric == "accuracy" and not classifies:
        raise InputError("metric: accuracy needs a model that classifies, this one reconstructs; use reconstruction")
    if rule.metric == "auroc" or (rule.metric == "auto" and has_anomalies):
        return "auroc"
    if rule.metric != "reconstruction":
        return "accuracy" if classifies else "reconstruction"
    has_autoencoder = champion is None or champion.model.config["autoencoder"]
    if classifies and not (candidate.graph.layers and has_autoencoder):
        raise InputError("metric: reconstruction needs an autoencoder, and nothing was pretrained; use accuracy")
    return "reconstruction"


def check_schema(candidate: Candidate, champion: Champion) -> None:
    """Raise an InputError where data or task are not of the champion's kind, so that the models cannot be compared."""
    before, name, remedy = champion.contest_result.config, champion.name, "correct that, or name another --model"
    facts, known = candidate.facts, Facts.model_validate(before["facts"])
    if facts.shape != known.shape:
        own, before_it = describe_shape(facts.shape), describe_shape(known.shape)
        raise InputError(f"data: the rows are {own}, those of {name} {before_it}; {remedy}")
    own_columns, its_columns = facts.columns.features, columns_of(champion.model.config).features
    if own_columns and has_no_names(champion.model.config):
        warnings.warn(nameless(name), stacklevel=2)
    if its_columns not in ((), own_columns):  # it has become champion since the data were read
        raise InputError(f"data: the columns were read in another order than {name} reads them; run the command again")
    if facts.columns.missing == "impute" and not LayerSpec.model_validate(champion.model.config["layers"][0]).missing:
        raise InputError(f"data.missing: {name} was trained with refuse, and cannot read a row with a gap; {remedy}")
    if facts.levels != known.levels:
        kinds = ["bytes" if levels else "floats" for levels in (facts.levels, known.levels)]
        raise InputError(f"data: values are {kinds[0]}, those of {name} {kinds[1]}; {remedy}")
    task, known_task = candidate.spec.task, champion.model.config["task"]
    label = columns_of(champion.model.config).label
    without = not facts.classes and not facts.has_anomalies
    if task != known_task and label and without and candidate.graph.experiment.data.labels is not None:
        raise InputError(
            f"data.labels: the data have no labels, but {name} was trained on those in column {label}; add it, or name "
            "the column of labels with --data.labels"
        )
    if task != known_task:
        raise InputError(f"finetune.task: {name} was trained to {known_task}, this model to {task}; {remedy}")
    if missing := [label for label in known.classes if label not in (facts.classes or facts.labels)]:
        raise InputError(f"data: no row has the classes {join_names(missing)} any more, which {name} knows; {remedy}")
    data = candidate.graph.experiment.data
    if (data.split, data.test) != (before["split"], before["test"]):
        raise InputError(
            f"data.test: {data.test:g}, but the test rows of {name} were cut by {before['test']:g} "
            f"({before['split']}), so that it would be tested on rows of its training; {remedy}"
        )
    # without labels nobody knows what the champion was trained on
    labels = known.labels or known.classes or facts.labels
    trained = {*labels} - {*before.get("test_only", ())}
    if leaked := [label for label in _test_only(candidate) if label in trained]:
        raise InputError(
            f"data.anomaly: all rows with the label {join_names(leaked)} are test rows now, but {name} may have been "
            "trained on some of them; use --data.contamination mixed, or name another --model"
        )


def _test_only(candidate: Candidate) -> tuple[str, ...]:
    """Return the labels whose rows are never in training: those of anomalies, where training rows are clean."""
    data = candidate.graph.experiment.data
    if not data.anomaly or data.contamination != "clean":
        return ()
    return tuple(label for label, anomalous in label_numbers(data, candidate.facts).items() if anomalous)


def start_from_champion(candidate: Candidate, champion: Champion) -> Candidate:
    """Return the candidate without pretraining: its finetuning starts from the champion's weights.

    Raises an InputError where the two networks differ in more than dropout.
    """
    known = [LayerSpec.model_validate({**layer, "dropout": 0}) for layer in champion.model.config["layers"]]
    if known != [layer.model_copy(update={"dropout": 0}) for layer in candidate.spec.layers]:
        raise InputError(f"warm_start: the network is not that of {champion.name}; leave warm_start out once")
    return replace(candidate, graph=from_parent(candidate.graph, champion.finetune))


def drift_stage(candidate: Candidate, champion: Champion, rule: Rule) -> Stage:
    """Return the stage that compares the day's new rows with those that the champion was trained on."""
    # in a mixed set anomalies are as frequent among the reference rows as among the new ones
    normal_only = candidate.facts.has_anomalies and candidate.graph.experiment.data.contamination != "mixed"
    spec = DriftSpec(classes=candidate.facts.classes, threshold=rule.drift_effect, normal_only=normal_only)
    inputs = {"data": candidate.graph.data, "champion": champion.finetune, "earlier": champion.contest}
    return Stage("drift", "drift.drift", spec, inputs)


def contest_stage(candidate: Candidate, champion: Champion | None, metric: Metric) -> Stage:
    """Return the stage that compares the candidate with the champion, or scores only the candidate where there is no
    champion yet."""
    data = candidate.graph.experiment.data
    spec = ContestSpec(
        metric=metric, facts=candidate.facts, split=data.split, test=data.test, test_only=_test_only(candidate)
    )
    inputs: dict[str, Stage] = {"data": candidate.graph.data, "challenger": candidate.finetune}
    if champion:
        inputs |= {"champion": champion.finetune, "earlier": champion.contest}
    return Stage("contest", "contest.contest", spec, inputs)
