"""Few of a kind: rare classes in splits and subsets, and measures that cannot be made. Nothing fails after training."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from aecore.config.experiment import Data, Dense, Experiment, Finetune, Fit
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs, resolve
from aecore.config.specs import EvaluateSpec, FinetuneSpec, MeasureSpec, Numerics
from aecore.core.errors import InputError
from aecore.core.fingerprint import fingerprint
from aecore.core.notes import describe, left_out
from aecore.data.dataset import inspect, load
from aecore.data.splits import Arrays, Split, missing_classes, split_off, split_rows
from aecore.evaluation.drift import drift_table
from aecore.evaluation.sampling import first_rows, sample_rows
from aecore.models.storage import Result
from aecore.stages.context import Context
from aecore.stages.evaluate import evaluate
from aecore.stages.finetune import finetune
from aecore.stages.measure import measure
from aecore.variants import Plain, Variational
from pipelines.reporting.report import About
from pipelines.reporting.report import write as write_report
from pipelines.study.plan import plan_trials, warn_of_labels
from pipelines.study.schema import Labels, Study
from tests.here import run_here
from tests.test_report import text, trial
from tests.test_stages import VARIANTS, pretrain

ACCURACIES = {"probe/accuracy", "knn/accuracy"}
CLUSTERS = {"cluster/nmi", "cluster/ari", "cluster/accuracy"}


def labels_of_sizes(*sizes: int) -> np.ndarray:
    """Return class numbers, class 0 `sizes[0]` times and so on, in random order."""
    return np.random.default_rng(3).permutation(np.repeat(np.arange(len(sizes)), sizes))


DRAWS: dict[str, tuple[tuple[int, ...], float, bool]] = {
    "five rare rows, labelled subset of 100": ((1275, 5), 100, True),
    "one rare row, labelled subset of 100": ((999, 1), 100, True),
    "three rare classes, subset of 10": ((500, 1, 2, 3), 10, True),
    "as many rows as classes": ((40, 30, 20, 10, 1), 5, True),
    "a rare class in a test of 20 %": ((400, 2), 0.2, False),
    "five pairs": ((90, 2, 2, 2, 2, 2), 0.15, False),
    "a part of two rows": ((30, 2), 2, False),
    "all but few are drawn": ((300, 2), 0.99, False),
    "all but two are drawn": ((30, 2), 30, False),
}  # before, each of these left a class out


@pytest.mark.parametrize("case", DRAWS)
def test_each_class_is_in_each_part(case: str) -> None:
    sizes, size, subset = DRAWS[case]
    labels = labels_of_sizes(*sizes)
    rest, drawn = split_off(np.arange(len(labels)), labels, size, "data.test", subset=subset)
    assert sorted([*rest, *drawn]) == list(range(len(labels)))
    assert len(drawn) == (size if size >= 1 else round(size * len(labels)))
    assert {*labels[drawn]} == {*labels}
    assert subset or {*labels[rest]} == {*labels}
    assert (np.diff(drawn) > 0).all() and (np.diff(rest) > 0).all()


def drawn_before(rows: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw rows as it was done before rare classes were looked after."""
    order = np.random.default_rng(seed).permutation(rows)
    by_class = np.argsort(labels[order], kind="stable")
    sizes = np.bincount(labels[order])
    places = np.empty(len(rows))
    places[by_class] = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes if size])
    return np.sort(order[np.argsort(places, kind="stable")][:count])


@pytest.mark.parametrize("seed", range(30))
def test_rows_are_drawn_as_before_where_no_class_was_missing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, rng.integers(2, 6), size=rng.integers(20, 200))
    labels = np.where(rng.random(len(labels)) < 0.1, 0, labels)
    rows = np.sort(rng.permutation(len(labels))[: len(labels) - 5])
    for count in range(1, len(rows)):
        drawn = drawn_before(rows, labels, count, seed)
        rest = np.setdiff1d(rows, drawn)
        found = [split_off(rows, labels, count, "", seed, subset)[1] for subset in (True, False)]
        if {*labels[drawn]} == {*labels[rows]}:
            assert np.array_equal(found[0], drawn)
        shared = {label for label in labels[rows] if (labels[rows] == label).sum() > 1}
        if shared <= {*labels[drawn]} and shared <= {*labels[rest]}:
            assert np.array_equal(found[1], drawn)


def test_a_class_of_one_row_stays_in_training() -> None:
    facts = Facts(digest="", shape=(3,), levels=0, classes=("a", "b", "c"), rows=60)
    labels = labels_of_sizes(56, 3, 1)
    train, validation, test = split_rows(Data(), facts, 60, labels, None, None)
    assert [np.bincount(labels[rows], minlength=3)[1:].tolist() for rows in (train, validation, test)] == [
        [1, 1],
        [1, 0],
        [1, 0],
    ]
    limited = split_rows(Data(limit=5), facts, 60, labels, None, None)[0]
    assert len(limited) == 5 and {*labels[limited]} == {0, 1, 2}
    assert missing_classes(facts.classes, *(labels[rows] for rows in (train, validation, test))) == (
        "no validation row is of class c, no test row is of class c"
    )


def arrays(train: list[int], validation: list[int], test: list[int]) -> Arrays:
    """Return rows of eight features whose mean is twice the class number; the lists tell the rows of each class."""
    rng = np.random.default_rng(0)
    splits = []
    for sizes in (train, validation, test):
        y = np.repeat(np.arange(len(sizes)), sizes)
        splits.append(Split((rng.normal(size=(len(y), 8)) + 2 * y[:, None]).astype(np.float32), y))
    one, two, three = splits
    return Arrays(one, two, three, np.zeros((), np.float32), np.ones((), np.float32))


EVALUATIONS: dict[str, tuple[Arrays, set[str], str]] = {
    # rows by class in training, validation and test; which measures are left out; what the notes say
    "three of each": (arrays([30, 30], [5, 5], [9, 9]), set(), ""),
    "training of one class": (
        arrays([300], [50], [60, 40]), ACCURACIES, "left out, since all 300 training rows are of class a",
    ),
    "training and test of one class": (
        arrays([0, 60], [0, 9], [0, 9]), ACCURACIES | CLUSTERS, "all 60 training rows are of class b",
    ),
    "test of one class": (arrays([30, 30], [5, 5], [9]), CLUSTERS, "all test rows are of one class"),
    "validation of one class": (arrays([30, 30], [5], [9, 9]), set(), ""),
    "a class of one row": (arrays([60, 1], [9], [9]), CLUSTERS, "all test rows are of one class"),
    "a class that only test has": (arrays([30, 30], [5, 5], [9, 9, 4]), set(), "counts as wrong 4 of 22 test rows"),
    "a class that only validation has": (arrays([30, 30], [5, 5, 5], [9, 9]), set(), ""),
    "one row of test": (arrays([30, 30], [5, 5], [1]), CLUSTERS, "all test rows are of one class"),
    "two rows of test": (arrays([30, 30], [5, 5], [1, 1]), set(), ""),
    "three rows of each": (arrays([2, 1], [1, 1], [2, 1]), set(), ""),
    "fewer training rows than classes": (arrays([1, 1], [1, 1], [1, 1, 1]), CLUSTERS, "2 training rows cannot form 3"),
}  # fmt: skip


def tuning(data: Arrays, classes: tuple[str, ...], variant: Any, task: str, labels: int | None = None) -> FinetuneSpec:
    facts = Facts(digest="", shape=(8,), levels=0, classes=classes, rows=len(data.train.x))
    layers = tuple(layer_specs(Dense(widths=(6, 4)), Data(), facts))
    if task == "reconstruct":
        layers = (layers[0], variant.build(layers[1], 2))
    return FinetuneSpec.model_validate(
        {
            "layers": layers, "task": task, "classes": classes if task == "classify" else (), "seed": 0,
            "variant": variant if task == "reconstruct" else None, "fit": {"epochs": 1}, "numerics": {},
            "labels": labels,
        }
    )  # fmt: skip


FEW = [
    pytest.param(
        case, variant, id=f"{case}-{variant.kind}",
        marks=[] if variant.kind == "plain" or "of test" in case else pytest.mark.long,
    )
    for case in EVALUATIONS
    for variant in (Plain(), Variational())
]  # fmt: skip
"""Each case with both kinds of variants. Of test rows a variational one needs more than others do."""


def classes_of(data: Arrays) -> tuple[str, ...]:
    return tuple("abc"[: 1 + max(split.y.max() for split in data[:3] if split.y is not None)])


@pytest.mark.parametrize(("case", "variant"), FEW)
def test_what_cannot_be_evaluated_is_left_out_and_said(case: str, variant: Any) -> None:
    data, missing, words = EVALUATIONS[case]
    classes = classes_of(data)
    stack = finetune(tuning(data, classes, variant, "reconstruct"), Context(), data=data)
    spec = EvaluateSpec(task="reconstruct", classes=classes, pictures=True, variant=variant)
    found = evaluate(spec, Context(), data=data, finetuned=stack)
    assert ACCURACIES - found.metrics.keys() == ACCURACIES & missing
    assert {"codes", "reconstructions", "units"} <= found.figures.keys()
    assert all(np.isfinite(value) for value in found.metrics.values())
    classifier = finetune(tuning(data, classes, variant, "classify"), Context(), data=data, stack=stack)
    bare = spec.model_copy(update={"task": "classify", "variant": None})
    judged = evaluate(bare, Context(), data=data, finetuned=classifier)
    assert 0 <= judged.metrics["test/accuracy"] <= 1
    if missing.isdisjoint(ACCURACIES):
        assert found.config.get("notes", {}).keys() <= ACCURACIES | {"vae/active_units"}
    else:
        assert words in " ".join(describe(found.config["notes"]))


@pytest.mark.parametrize("rows", [1, 2, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "variant",
    [one if one in (Plain, Variational) else pytest.param(one, marks=pytest.mark.long) for one in VARIANTS],
    ids=lambda one: one.__name__,
)
def test_few_images_are_drawn(rows: int, variant: Any, digits: tuple[Facts, Arrays]) -> None:
    facts, data = digits
    data = data._replace(test=data.test.take(np.arange(rows)))
    specs = layer_specs(Dense(widths=(6, 2)), Data(), facts)
    layers = pretrain(data, specs, variant(), epochs=1)
    spec = EvaluateSpec(task=None, classes=facts.classes, pictures=True, variant=variant())
    found = evaluate(spec, Context(), data=data, layers=layers)
    assert {"codes", "reconstructions", "units"} <= found.figures.keys()
    assert ("interpolation" in found.figures) == (variant is Variational and rows > 1)
    assert 0 <= found.metrics["probe/accuracy"] <= 1


@pytest.mark.parametrize(("case", "variant"), FEW)
def test_what_cannot_be_measured_is_left_out_and_said(case: str, variant: Any) -> None:
    data, missing, words = EVALUATIONS[case]
    classes = classes_of(data)
    stack = finetune(tuning(data, classes, variant, "reconstruct"), Context(), data=data)
    classifier = finetune(tuning(data, classes, variant, "classify"), Context(), data=data, stack=stack)
    spec = MeasureSpec(variant=variant, classes=classes, labels=(len(data.train.x),), seed=0, pictures=True)
    found = measure(spec, Context(), data=data, stack=stack, classifiers=[classifier], judge=classifier)
    absent = (ACCURACIES | CLUSTERS) - found.metrics.keys()
    assert absent == missing
    readable = missing.isdisjoint(ACCURACIES)
    for name in ("finetuned/accuracy", "robust/accuracy", "val/probe_accuracy", "val/finetuned_accuracy"):
        assert (name in found.metrics) == readable
    assert ("labels" in found.config) == readable and ("correct/probe" in found.weights) == readable
    assert absent <= found.config.get("notes", {}).keys()
    assert words in " ".join(describe(found.config.get("notes", {}))) and ("notes" in found.config) >= bool(words)
    assert {"sse", "map", "map_labels"} <= found.weights.keys()
    finite = {name: value for name, value in found.metrics.items() if name != "test/unexplained"}
    assert np.isfinite(list(finite.values())).all()


def test_a_number_of_labels_that_cannot_hold_each_class_is_left_out() -> None:
    data = arrays([900, 20, 8], [50, 5, 5], [60, 10, 10])
    classes = classes_of(data)
    stack = finetune(tuning(data, classes, Plain(), "reconstruct"), Context(), data=data)
    counts = (1, 2, 3, 100, 928)
    classifiers = [
        finetune(tuning(data, classes, Plain(), "classify", count), Context(), data=data, stack=stack)
        for count in counts
    ]
    spec = MeasureSpec(variant=Plain(), classes=classes, labels=counts, seed=0, pictures=False)
    found = measure(spec, Context(), data=data, stack=stack, classifiers=classifiers)
    assert found.config["labels"]["counts"] == [3, 100, 928]
    assert len(found.config["labels"]["probe"]) == len(found.config["labels"]["finetuned"]) == 3
    assert describe(found.config["notes"]) == [
        "accuracy with 1 labels: left out, since 1 training rows do not hold all classes",
        "accuracy with 2 labels: left out, since 2 training rows do not hold all classes",
    ]


TABLES: dict[str, tuple[list[int], list[int], list[int], int, str]] = {
    # labels in training, validation and test; how many classes training has; what is said
    "normal rows only": ([0] * 60, [0] * 9, [0] * 9 + [1] * 5, 1, "no training row is of class 1"),
    "a class only in test": ([0] * 40 + [1] * 20, [0, 1], [0, 1, 2], 2, "no training row is of class 2, no validation"),
    "a class only in validation": ([0] * 40 + [1] * 20, [0, 1, 2], [0, 1], 2, "no training row is of class 2, no test"),
    "a class of one row": ([0] * 40 + [1] * 20 + [2], [0, 1], [0, 1], 3, "no validation row is of class 2, no test"),
    "each class everywhere": ([0, 1] * 30, [0, 1], [0, 1], 2, ""),
}


def parquet(folder: Path, train: list[int], validation: list[int], test: list[int]) -> Data:
    y = np.array(train + validation + test)
    x = np.random.default_rng(1).normal(size=(len(y), 5)).astype(np.float32)
    marks = ["train"] * len(train) + ["validation"] * len(validation) + ["test"] * len(test)
    table = pd.DataFrame(x, columns=list("pqrst")).assign(label=y, split=marks)
    table.to_parquet(folder / "rows.parquet", index=False)
    return Data(name="parquet", path=str(folder / "rows.parquet"))


@pytest.mark.parametrize("case", TABLES)
def test_classes_that_a_split_lacks_are_told_before_training(case: str, tmp_path: Path) -> None:
    *rows, trained, words = TABLES[case]
    data = parquet(tmp_path, *rows)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        facts = inspect(data)
    assert facts.trained_classes == trained
    assert fingerprint(facts) == fingerprint(facts.model_copy(update={"trained_classes": None}))
    assert [words in str(one.message) for one in told if "row is of class" in str(one.message)] == [True] * bool(words)
    experiment = Experiment(data=data, network=Dense(widths=(4, 2)), finetune=Finetune(epochs=1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        finetuning = resolve(experiment, facts).finetune
    assert finetuning is not None and finetuning.task == ("reconstruct" if trained == 1 else "classify")
    assert any("auto takes reconstruct" in str(one.message) for one in told) == (trained == 1)
    if trained == 1:
        with pytest.raises(InputError, match=r"finetune\.task: classify needs training rows of two classes"):
            resolve(experiment.model_copy(update={"finetune": Finetune(task="classify")}), facts)


def rare(folder: Path, rows: int, count: int) -> Data:
    """Write a table with `count` rows of a rare class."""
    y = np.zeros(rows, int)
    y[np.random.default_rng(20).choice(rows, count, replace=False)] = 1
    x = np.random.default_rng(21).normal(size=(rows, 6)) + 4 * y[:, None]
    pd.DataFrame(x, columns=list("pqrstu")).assign(label=y).to_parquet(folder / "rare.parquet", index=False)
    return Data(name="parquet", path=str(folder / "rare.parquet"))


def study_of(data: Data, **fields: Any) -> Study:
    base = Experiment(
        data=data, network=Dense(widths=(4, 2)), pretrain=None, finetune=Finetune(task="reconstruct"), control=False
    )
    values: dict[str, Any] = {
        "seeds": (0,),
        "budget": {"epochs": 1},
        "labels": Labels(counts=(1, 20), fit=Fit(epochs=1)),
    }
    return Study(base=base, **values | fields)


def test_a_study_of_a_rare_class_is_measured(tmp_path: Path, tracker: Any) -> None:
    data = rare(tmp_path, 400, 4)
    facts = inspect(data)
    with pytest.warns(UserWarning, match="labels.counts: 1 labelled rows cannot hold each of the 2 classes; left out"):
        warn_of_labels(study_of(data), facts)
    plans = plan_trials(study_of(data), facts, Numerics())
    split = load(data, facts)
    assert [np.bincount(one.y)[1] for one in split[:3] if one.y is not None] == [2, 1, 1]
    parent = tracker.client.create_run(tracker.experiment_id).info.run_id
    for plan in plans:
        found = run_here(plan.stage, tracker, parent)
        assert found.config["labels"]["counts"] == [20, len(split.train.x)]
        assert found.metrics.keys() >= ACCURACIES | CLUSTERS


def test_a_study_of_one_class_is_measured_without_labels(tmp_path: Path, tracker: Any) -> None:
    with pytest.warns(UserWarning, match="no training row is of class 1"):
        facts = inspect(data := parquet(tmp_path, [0] * 60, [0] * 9, [0] * 9 + [1] * 5))
    study = study_of(data)
    with pytest.raises(InputError, match="choose: probe needs labels, but all training rows are of one class"):
        plan_trials(study.model_copy(update={"choose": "probe"}), facts, Numerics())
    plan = plan_trials(study, facts, Numerics())[0]
    assert plan.stage.inputs["classifiers"] == ()
    parent = tracker.client.create_run(tracker.experiment_id).info.run_id
    found = run_here(plan.stage, tracker, parent)
    assert found.metrics.keys() >= CLUSTERS and ACCURACIES.isdisjoint(found.metrics)
    notes = tracker.client.get_run(tracker.find(plan.stage.key)).data.tags["notes"]
    assert "knn/accuracy" in notes and "left out, since all 60 training rows are of class 0" in notes


@pytest.mark.parametrize("lacking", ["one row", "one seed", "all rows"])
def test_a_report_shows_what_is_left_out(lacking: str, tmp_path: Path) -> None:
    """A measure that some trials lack breaks no table, verdict or figure."""
    trials = [
        trial(row, seed, "pca" if row == "pca" else "plain") for row in ("plain", "other", "pca") for seed in (0, 1)
    ]

    def is_lacking(one: Any) -> bool:
        return lacking == "all rows" or (one.row == "other" and (lacking == "one row" or one.seed == 1))

    def without(one: Any) -> Any:
        metrics = {name: value for name, value in one.metrics.items() if "accuracy" not in name and "nmi" not in name}
        arrays = {name: values for name, values in one.arrays.items() if not name.startswith("correct/")}
        notes = left_out("all 60 training rows are of class a", "probe/accuracy")
        curves = {name: value for name, value in one.curves.items() if name != "labels"} | {"notes": notes}
        return one._replace(metrics=metrics, arrays=arrays, curves=curves)

    trials = [without(one) if is_lacking(one) else one for one in trials]
    about = About("few of a kind", "val/reconstruction_mse", {}, ("a", "b"))
    report = write_report(trials, about, tmp_path, lambda one: one)
    note = "probe/accuracy: left out, since all 60 training rows are of class a"
    assert report.notes == [note if lacking == "all rows" else f"{note} (rows: other)"]
    assert report.notes[0] in text(report.files[0])
    assert ("probe/accuracy" in report.means) == (lacking != "all rows")
    assert "test/reconstruction_mse" in report.verdicts


@pytest.mark.parametrize(
    ("labels", "most", "right"),
    [
        (np.zeros(50, int), 10, "first"),
        (None, 10, "first"),
        (np.arange(50) % 2, 10, "first"),
        (np.arange(50) // 25, 10, "each class"),
        (np.arange(50) // 49, 10, "each class"),
        (np.arange(5), 10, "all"),
    ],
    ids=["one class", "no labels", "mixed", "sorted by class", "one rare row at the end", "few rows"],
)
def test_the_first_rows_hold_each_class(labels: np.ndarray | None, most: int, right: str) -> None:
    rows = first_rows(labels, 50 if labels is None else len(labels), most)
    if right == "each class":
        assert labels is not None and len(rows) == most and {*labels[rows]} == {*labels}
    else:
        assert rows.tolist() == list(range(most if right == "first" else 5))
    assert labels is None or {*labels[sample_rows(len(labels), most, labels)]} == {*labels}


@pytest.mark.parametrize("new", [1, 2, 5])
@pytest.mark.parametrize("old", [1, 2, 50])
def test_drift_of_few_rows_is_a_table_of_numbers(new: int, old: int) -> None:
    rng = np.random.default_rng(0)
    reference = {
        "reference.code": rng.normal(size=(old, 2)), "reference.error": rng.random(old),
        "reference.label": np.zeros(old, int), "reference.mean": np.zeros(3), "reference.std": np.ones(3),
    }  # fmt: skip
    rows = {"code": rng.normal(size=(new, 2)), "x": rng.normal(size=(new, 3)), "error": rng.random(new)}
    table = drift_table(rows | {"class": np.array(["b"] * new)}, reference, ["a", "b"], 0.2)
    assert np.isfinite([row["effect"] for row in table]).all()
    assert all(np.isfinite(row["p"]) for row in table if row["test"] != "share")
    assert ("feature 0" in {row["quantity"] for row in table}) == (min(new, old) > 1)


def test_notes_on_the_same_reason_are_one_line() -> None:
    assert describe(left_out("x", "b", "a") | {"c": "taken on 2 of 3 test rows"}) == [
        "a, b: left out, since x",
        "c: taken on 2 of 3 test rows",
    ]
    assert describe({}) == [] and Result({}, {}, {}).config.get("notes") is None
