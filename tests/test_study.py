"""Planning a study: its rows, settings, seeds and budgets, and the stages that its trials share. Nothing runs."""

from math import prod
from typing import Any

import pytest
from pydantic import ValidationError

from aecore.config.experiment import Dense
from aecore.config.facts import Facts
from aecore.config.specs import FinetuneSpec, MeasureSpec, Numerics, PretrainSpec, ReferenceSpec
from aecore.core.errors import InputError
from jobs.compare import _describe
from pipelines.graph.description import describe_experiment
from pipelines.study.plan import TrialPlan, experiment_of, plan_trials, settings_to_try, shared_stages
from pipelines.study.schema import Study
from pipelines.study.sets import StudySet, key_of

FACTS = Facts(digest="d", shape=(1, 8, 8), levels=17, classes=tuple("0123456789"), rows=1797)
ALL = {
    "plain": {},
    "stacked": {"pretrain": {}},
    "sparse": {"variant": {"kind": "sparse"}},
    "denoising": {"variant": {"kind": "denoising"}},
    "contractive": {"variant": {"kind": "contractive"}},
    "variational": {"variant": {"kind": "variational"}},
}


def alone(study: Study) -> StudySet:
    return StudySet("", study, FACTS, Numerics())


def planned(facts: Facts = FACTS, **fields: Any) -> list[TrialPlan]:
    return plan_trials(Study.model_validate({"variants": ALL, **fields}), facts, Numerics())


SUPERVISED: dict[str, Any] = {
    "choose": "finetuned",
    "variants": {
        "SDAE": {"variant": {"kind": "denoising"}, "pretrain": {}, "finetune": None},
        "SAE": {"pretrain": {}, "finetune": None},
    },
    "settings": {
        "network.widths": [[32, 16], [48, 32, 16]],
        "pretrain.epochs": [4, 8],
        "pretrain.lr": [1e-3],
        "labels.fit.lr": [1e-3, 2e-3],
        "labels.fit.epochs": [3, 6],
        "labels.fit.dropout": [0.25],
    },
    "seeds": (0,),
    "budget": {"epochs": 24},
    "labels": {"counts": []},
}
"""Layers are pretrained, then a classifier is finetuned; its validation accuracy chooses."""


def classifiers(plan: TrialPlan) -> list[FinetuneSpec]:
    specs = [stage.spec for stage in plan.stages().values()]
    return [spec for spec in specs if isinstance(spec, FinetuneSpec) and spec.task == "classify"]


def unsupervised_epochs(plan: TrialPlan) -> int:
    specs = [stage.spec for stage in plan.stages().values()]
    layers = sum(spec.fit.epochs for spec in specs if isinstance(spec, PretrainSpec))
    return layers + sum(s.fit.epochs for s in specs if isinstance(s, FinetuneSpec) and s.task == "reconstruct")


def test_every_row_has_every_seed_and_the_references_are_added() -> None:
    plans = planned(seeds=(3, 4))
    rows = (*ALL, "pca", "random")
    assert [(plan.row, plan.seed) for plan in plans] == [(row, seed) for row in rows for seed in (3, 4)]
    assert len({plan.stage.key for plan in plans}) == len(plans)
    assert {plan.kind for plan in plans} == {*ALL, "pca", "random"} - {"stacked"}


@pytest.mark.parametrize("epochs", [4, 40, 41])
def test_budgets_are_equal_by_construction(epochs: int) -> None:
    plans = planned(budget={"epochs": epochs})
    assert {unsupervised_epochs(plan) for plan in plans if plan.kind not in ("pca", "random")} == {epochs}
    assert {unsupervised_epochs(plan) for plan in plans if plan.kind in ("pca", "random")} == {0}
    supervised = {
        tuple(
            sorted(
                (s.spec.labels or 0, s.spec.fit.epochs)
                for s in plan.stages().values()
                if isinstance(s.spec, FinetuneSpec) and s.spec.task == "classify" and "judge" not in s.name
            )
        )
        for plan in plans
    }
    assert len(supervised) == 1


def unsupervised_steps(plan: TrialPlan) -> int:
    specs = [stage.spec for stage in plan.stages().values()]
    trained = [spec.fit for spec in specs if isinstance(spec, PretrainSpec)]
    trained += [spec.fit for spec in specs if isinstance(spec, FinetuneSpec) and spec.task == "reconstruct"]
    assert all(fit.steps is not None and fit.steps >= fit.epochs for fit in trained)
    return sum(fit.steps or 0 for fit in trained)


@pytest.mark.parametrize(("epochs", "steps"), [(4, 4), (5, 6), (11, 12), (40, 1000), (41, 9999)])
def test_budgets_of_steps_are_equal_by_construction(epochs: int, steps: int) -> None:
    plans = [plan for plan in planned(budget={"epochs": epochs, "steps": steps}) if plan.kind not in ("pca", "random")]
    assert {unsupervised_steps(plan) for plan in plans} == {steps}
    assert {unsupervised_epochs(plan) for plan in plans} == {epochs}
    assert {spec.fit.steps for plan in plans for spec in classifiers(plan)} == {None}


def test_layers_get_their_share_of_the_steps() -> None:
    rows = {
        "layers": {"pretrain": {}, "finetune": None},
        "both": {"pretrain": {}},
        "short": {"pretrain": {"epochs": 2}},
    }
    plans = planned(choose="finetuned", variants=rows, seeds=(0,), budget={"epochs": 25, "steps": 250})
    steps = {plan.row: unsupervised_steps(plan) for plan in plans if plan.row in rows}
    assert steps == {"layers": 240, "both": 250, "short": 60 + 130}


def test_texts_say_steps_where_the_budget_sets_them() -> None:
    budgets: tuple[dict[str, int], ...] = ({"epochs": 20}, {"epochs": 20, "steps": 4000})
    epochs, steps = (Study.model_validate({"budget": budget}) for budget in budgets)
    assert (epochs.budget.length, steps.budget.length) == ("20 passes over the training rows", "4,000 steps")
    assert _describe(epochs, [alone(epochs)]).about.endswith("; 20 epochs per trial.")
    assert _describe(steps, [alone(steps)]).about.endswith("; 4,000 steps per trial.")
    trained = [describe_experiment(experiment_of(study, "plain", {}, 0)) for study in (epochs, steps)]
    assert ["20 epochs, lr" in trained[0], "4,000 steps, lr" in trained[1]] == [True, True]


def test_the_key_of_a_study_without_steps_is_that_of_earlier_versions() -> None:
    # of the version before there were steps, shares of features and anomalies
    key = "41f5c40fba1d1f9ff2daffa348891885d93200011220d99dfbb028a78e66959c"
    study = Study.model_validate({"variants": ALL, "budget": {"epochs": 40}})
    assert key_of(study, [alone(study)]) == key
    others: list[dict[str, Any]] = [
        {"budget": {"steps": 400}},
        {"labels": {"fit": {"steps": 400}}},
        {"base": {"network": {"kind": "dense", "max_width": 9}}},
    ]
    studies = [Study.model_validate({"variants": ALL, **fields}) for fields in others]
    assert key not in {key_of(study, [alone(study)]) for study in studies}


def test_a_stacked_row_differs_in_one_field() -> None:
    study = Study.model_validate({"variants": ALL})
    plain, stacked = (experiment_of(study, row, {}, 0).model_dump() for row in ("plain", "stacked"))
    assert {name for name in plain if plain[name] != stacked[name]} == {"pretrain", "finetune"}
    same = ("batch_size", "lr", "schedule", "weight_decay")
    assert all(stacked["pretrain"][name] == plain["finetune"][name] for name in same)
    # finetuning has fewer epochs, by as many as the layers have; nothing else differs
    assert {**stacked["finetune"], "epochs": 40} == plain["finetune"]


def test_pca_has_the_width_of_the_code_and_of_the_data_at_most() -> None:
    noisy = {"denoising": {"variant": {"kind": "denoising"}}}
    for widths, expected in (((48, 16), 16), ((200,), 64)):
        (pca,) = [
            plan
            for plan in planned(base={"network": {"kind": "dense", "widths": widths}}, variants=noisy, seeds=(0,))
            if plan.row == "pca"
        ]
        (spec,) = [s.spec for s in pca.stages().values() if isinstance(s.spec, ReferenceSpec)]
        assert prod(spec.layers[0].code_shape) == expected


def test_random_weights_are_those_that_training_starts_from() -> None:
    plans = {plan.row: plan for plan in planned(seeds=(5,))}
    (random,) = [s.spec for s in plans["random"].stages().values() if isinstance(s.spec, ReferenceSpec)]
    (plain,) = [
        s.spec for s in plans["plain"].stages().values()
        if isinstance(s.spec, FinetuneSpec) and s.spec.task == "reconstruct"
    ]  # fmt: skip
    assert (random.layers, random.seed) == (plain.layers, plain.seed)


def test_numbers_of_labels_that_the_data_cannot_supply_are_left_out() -> None:
    (spec, *_) = [plan.stage.spec for plan in planned(labels={"counts": (100, 1000, 5000)})]
    assert isinstance(spec, MeasureSpec) and spec.labels == (100, 1797)
    (bare, *_) = planned(FACTS.model_copy(update={"classes": ()}))
    assert isinstance(bare.stage.spec, MeasureSpec) and bare.stage.spec.labels == ()
    assert not [s for s in bare.stages().values() if isinstance(s.spec, FinetuneSpec) and s.spec.task == "classify"]


def test_a_grid_has_every_combination_and_random_draws_are_reproducible() -> None:
    settings = {"finetune.lr": [1e-3, 2e-3], "network.dropout": [0, 0.1, 0.2]}
    study = Study.model_validate({"variants": {"plain": {}}, "settings": settings})
    assert len(settings_to_try(study, "plain")) == 6
    own = {"plain": {}, "denoising": {"variant": {"kind": "denoising"}, "settings": {"variant.level": [0.1, 0.5]}}}
    plans = planned(variants=own, seeds=(0,))
    tried = [plan.settings for plan in plans if plan.row == "denoising"]
    assert tried == [{"variant.level": 0.1}, {"variant.level": 0.5}]
    drawn = Study.model_validate(
        {"search": "random", "settings": {"finetune.lr": {"low": 1e-4, "high": 1e-2, "log": True}}}
    )
    assert settings_to_try(drawn, "plain") == settings_to_try(drawn, "plain")
    values = [s["finetune.lr"] for s in settings_to_try(drawn, "plain")]
    assert len(set(values)) == 8 and all(1e-4 <= value <= 1e-2 for value in values)


def test_trials_share_the_stages_in_which_they_do_not_differ() -> None:
    plans = planned(
        variants={"stacked": {"pretrain": {"lr": 1e-3}, "settings": {"finetune.lr": [1e-3, 2e-3, 3e-3]}}, "plain": {}},
        seeds=(0,),
    )
    common = [stage.name for stage in shared_stages(plans)]
    assert [name for name in common if "layer" in name] == [
        "stacked finetune.lr=0.001 seed=0: layer 1",
        "stacked finetune.lr=0.001 seed=0: layer 2",
        "stacked finetune.lr=0.001 seed=0: layer 3",
    ]
    assert not [name for name in common if name.startswith(("plain", "stacked finetune.lr=0.002"))]


def test_adding_a_seed_leaves_the_other_trials_as_they_are() -> None:
    before, after = planned(seeds=(0, 1)), planned(seeds=(0, 1, 2))
    keys = {plan.stage.key for plan in before}
    assert {plan.seed for plan in after if plan.stage.key not in keys} == {2}


def test_all_layers_of_a_convolutional_network_share_the_budget() -> None:
    conv = {"kind": "conv", "widths": (2, 4), "dense": (8,)}
    (row, *_) = planned(base={"network": conv}, variants={"stacked": {"pretrain": {}}}, budget={"epochs": 12})
    assert unsupervised_epochs(row) == 12
    assert len([s for s in row.stages().values() if isinstance(s.spec, PretrainSpec)]) == 3
    assert isinstance(experiment_of(Study(), "plain", {}, 0).network, Dense)


def test_layers_are_pretrained_and_then_a_classifier_is_finetuned() -> None:
    plans = [plan for plan in planned(**SUPERVISED) if plan.row == "SDAE"]
    assert len(plans) == 16
    for plan in plans:
        layers = plan.stage.inputs["layers"]
        assert isinstance(layers, tuple) and plan.trained is layers[-1] and "stack" not in plan.stage.inputs
        assert len(layers) == len(plan.settings["network.widths"])
        assert unsupervised_epochs(plan) == plan.settings["pretrain.epochs"] * len(layers)
        (spec,) = classifiers(plan)  # no few labels
        assert (spec.labels, spec.variant) == (None, None) and {layer.dropout for layer in spec.layers} == {0.25}
        fit = {name.removeprefix("labels.fit."): value for name, value in plan.settings.items() if "labels" in name}
        assert {name: getattr(spec.fit, name) for name in fit} == fit
        assert all(s.spec.fit.lr == 1e-3 for s in layers if isinstance(s.spec, PretrainSpec))


def test_the_control_of_a_supervised_search_is_searched_too() -> None:
    plans = planned(**SUPERVISED)
    names = {plan.row: set(plan.settings) for plan in plans}
    assert names["random"] == {"network.widths", "labels.fit.lr", "labels.fit.epochs", "labels.fit.dropout"}
    assert names["pca"] == set() and len([plan for plan in plans if plan.row == "random"]) == 8
    for plan in (plan for plan in plans if plan.row == "random"):
        (reference,) = [s.spec for s in plan.stages().values() if isinstance(s.spec, ReferenceSpec)]
        widths = plan.settings["network.widths"]
        assert [layer.code_shape for layer in reference.layers] == [(width,) for width in widths]
        (spec,) = classifiers(plan)
        assert spec.fit.lr == plan.settings["labels.fit.lr"]
    # its trials are as long as others, so each is no fixed reference; PCA is not searched
    assert {plan.row for plan in plans if plan.is_fixed_reference} == {"pca"}
    assert not [plan for plan in plans if plan.row == "pca" and plan.settings]
    for search in ("random", "optuna"):
        study = Study.model_validate({**SUPERVISED, "search": search, "budget": {"epochs": 24, "settings": 5}})
        assert study.searched_rows == ["SDAE", "SAE", "random"]
        assert {study.settings_tried(row) for row in study.searched_rows} == {5}
    assert Study.model_validate({"settings": {"network.dropout": [0.1]}}).searched_rows == ["plain"]


def test_by_default_layers_alone_spend_the_budget_and_half_of_it_beside_the_whole() -> None:
    rows = {
        "layers": {"pretrain": {}, "finetune": None},
        "both": {"pretrain": {}},
        "short": {"pretrain": {"epochs": 2}},
    }
    plans = planned(choose="finetuned", variants=rows, seeds=(0,), budget={"epochs": 25})
    epochs = {plan.row: unsupervised_epochs(plan) for plan in plans}
    # three layers: 3 * 8; 3 * 4 and the rest; what a short pretraining leaves is not spent on the whole
    assert epochs == {"layers": 24, "both": 25, "short": 6 + 13, "pca": 0, "random": 0}


def test_the_same_trial_is_measured_again_where_the_classifier_chooses() -> None:
    before, after = (planned(choose=choose, seeds=(0,)) for choose in ("reconstruction", "finetuned"))
    for one, other in zip(before, after, strict=True):
        assert one.stage.key != other.stage.key
        assert one.stages().keys() - {one.stage.key} == other.stages().keys() - {other.stage.key}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variants": {"pca": {}}}, r"variants\.pca: every study has a reference of this name; choose another name"),
        ({"variants": {"a": {"data": {"limit": 5}}}}, r"variants\.a\.data: a row may differ in finetune, network,"),
        ({"variants": {}}, "at least 1 item"),
        ({"base": {"finetune": {"task": "classify"}}}, r"base\.finetune\.task: a study trains without labels"),
        ({"scheduler": "asha", "choose": "probe"}, "asha stops by reconstruction"),
        ({"scheduler": "asha", "choose": "finetuned"}, "asha stops by reconstruction"),
        ({"settings": {"labels.fit.lr": [1]}}, r"settings\.labels\.fit\.lr: equal for all .* set choose finetuned"),
        ({"settings": {"pretrain.epochs": [1]}}, r"settings\.pretrain\.epochs: equal for all trials; budget"),
        ({"choose": "finetuned", "settings": {"finetune.epochs": [1]}}, r"finetune\.epochs: equal for all trials"),
        ({"settings": {"labels.counts": [1]}}, r"settings\.labels\.counts: only fields of"),
        ({"settings": {"finetune.steps": [1]}}, r"finetune\.steps: equal for all trials; budget.epochs and budget.st"),
        ({"choose": "finetuned", "settings": {"labels.fit.steps": [1]}}, r"labels\.fit\.steps: equal for all trials"),
        ({"budget": {"epochs": 9, "steps": 8}}, r"budget\.epochs: 8 steps cannot be cut into 9 parts; raise budget\."),
        (
            {"labels": {"fit": {"steps": 8}}},
            r"labels\.fit\.epochs: 8 steps cannot be cut into 20 parts; raise labels\.",
        ),
        ({"base": {"finetune": {"steps": 99}}}, r"base\.finetune\.steps: equal for all trials; set budget\.steps"),
        (
            {"variants": {"a": {"pretrain": {"steps": 99}}}},
            r"variants\.a\.pretrain\.steps: equal for all trials; set bu",
        ),
        (
            {"choose": "finetuned", "search": "random", "settings": {"pretrain.epochs": {"low": 1, "high": 9}}},
            r"settings\.pretrain\.epochs: a range has fractions between its ends; list whole numbers",
        ),
        (
            {"choose": "finetuned", "variants": {"a": {"settings": {"finetune.lr": [1, 2]}}, "b": {}}},
            r"variants\.b: the search tries 1 of its settings, but 2 of row a; under choose finetuned give each row",
        ),
        ({"settings": {"finetune.lr": {"low": 1, "high": 2}}}, "a grid needs lists of values"),
        ({"search": "random", "settings": {"finetune.lr": {"low": 2, "high": 1}}}, "a range from 2 to 1 is empty"),
        ({"seeds": ()}, "at least 1 item"),
    ],
)
def test_studies_whose_rows_cannot_be_compared_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Study.model_validate(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variants": {"a": {"variant": {"kind": "sparse", "weigth": 1}}}},
         r"variants\.a\.variant\.sparse\.weigth: Extra"),
        ({"variants": {"a": {}}, "settings": {"variant.level": [1]}}, r"variants\.a\.variant\.plain\.level: Extra"),
        ({"variants": {"a": {"variant": {"kind": "sparse", "penalty": "kl"}, "network": {"code_activation": "elu"}}}},
         r"variants\.a: variant\.penalty: kl needs codes in \(0, 1\)"),
        ({"variants": {"stacked": {"pretrain": {}}}, "budget": {"epochs": 3}}, "allow at least 4"),
        ({"variants": {"a": {"finetune": None, "pretrain": {}}}}, r"variants\.a\.finetune: null, .* choose finetuned"),
        ({**SUPERVISED, "variants": {"a": {"finetune": None}}, "settings": {}}, r"a: pretrain and finetune are both"),
        ({**SUPERVISED, "budget": {"epochs": 2}, "settings": {}}, "2 are fewer than the 3 layers of row SDAE"),
        ({**SUPERVISED, "budget": {"epochs": 23}},
         r"variants\.SDAE: pretrain\.epochs 8 with 3 layers is more than budget\.epochs 23 allows, 7 per layer; raise"),
        # found before Optuna has tried anything, and where the random draws leave it out
        ({**SUPERVISED, "budget": {"epochs": 23, "settings": 1}, "search": "optuna"}, "epochs 8 with 3 layers"),
        ({**SUPERVISED, "budget": {"epochs": 23, "settings": 1}, "search": "random"}, "epochs 8 with 3 layers"),
        ({"choose": "finetuned", "variants": {"a": {"pretrain": {"epochs": 9}}}}, "6 per layer, as the whole"),
        ({"choose": "finetuned", "settings": {"labels.fit.rate": [1]}}, r"settings\.labels\.fit\.rate: Extra"),
        ({"choose": "finetuned", "facts": FACTS.model_copy(update={"classes": ()})}, "choose: finetuned needs labels"),
        ({"choose": "probe", "facts": FACTS.model_copy(update={"classes": ()})}, "choose: probe needs labels"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_the_data_are_refused_before_anything_runs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(**fields)
