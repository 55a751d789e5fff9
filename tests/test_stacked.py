"""The graph of an experiment: what shares a key, and what does not."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from aecore.config.experiment import Experiment
from aecore.config.facts import Facts
from aecore.config.specs import Numerics
from aecore.core.errors import InputError
from pipelines.graph.recipe import Stacked, build

FACTS = Facts(digest="d", shape=(1, 8, 8), levels=17, classes=tuple("0123456789"), rows=1797)


def graph(facts: Facts = FACTS, numerics: Numerics | None = None, **fields: Any) -> Stacked:
    if "network" in fields:
        fields["network"] = {"kind": "dense", **fields["network"]}
    return build(Experiment.model_validate(fields), facts, numerics or Numerics())


def keys(stacked: Stacked) -> dict[str, str]:
    return {stage.name: stage.key for stage in stacked.kept()}


def changed(**fields: Any) -> set[str]:
    """The stages that a change gives another key."""
    before, after = keys(graph()), keys(graph(**fields))
    return {name for name in after if before.get(name) != after[name]}


TUNING = {"finetune", "evaluate", "control", "evaluate control"}
LAYERS = {"layer 1", "layer 2", "layer 3"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, set()),
        ({"finetune": {"epochs": 50, "batch_size": 32, "lr": 5e-4}}, TUNING),
        ({"network": {"widths": (48, 32, 16, 8)}}, {"layer 4"} | TUNING),
        ({"network": {"widths": (48, 24, 16)}}, {"layer 2", "layer 3"} | TUNING),
        ({"network": {"code_activation": "linear"}}, {"layer 3"} | TUNING),
        ({"pretrain": {"epochs": 7}}, LAYERS | {"finetune", "evaluate"}),
        ({"variant": {"kind": "denoising"}}, LAYERS | {"finetune", "evaluate"}),
        ({"seed": 1}, LAYERS | TUNING),
        ({"data": {"limit": 500}}, LAYERS | TUNING),
        ({"data": {"root": Path("/elsewhere")}}, set()),
        ({"control": False}, set()),
    ],
)
def test_what_a_change_recomputes(fields: dict[str, Any], expected: set[str]) -> None:
    assert changed(**fields) == expected


def test_other_bytes_or_other_precision_recompute_everything() -> None:
    before = keys(graph())
    for after in (graph(FACTS.model_copy(update={"digest": "e"})), graph(numerics=Numerics(precision="bf16"))):
        assert not set(before.values()) & set(keys(after).values())


def test_every_stage_is_a_function_of_aecore() -> None:
    assert all(callable(stage.function()) for stage in graph().kept())


def test_tasks_follow_the_data() -> None:
    unlabelled = graph(FACTS.model_copy(update={"classes": ()}))
    assert unlabelled.finetune is not None
    assert unlabelled.finetune.spec.model_dump()["task"] == "reconstruct"
    assert unlabelled.experiment.finetune is not None and unlabelled.experiment.finetune.task == "reconstruct"
    assert graph().experiment.data.likelihood == "bernoulli" and graph().experiment.data.standardize is False
    assert keys(graph(data={"likelihood": "bernoulli"})) == keys(graph())
    with pytest.raises(InputError, match="classify needs labels"):
        graph(FACTS.model_copy(update={"classes": ()}), finetune={"task": "classify"})


def test_without_pretraining_there_is_nothing_to_control() -> None:
    stacked = graph(pretrain=None)
    assert list(keys(stacked)) == ["finetune", "evaluate"]
    # the finetuning is the finetuning that the control of the pretrained one is
    control = graph().control
    assert control is not None and stacked.finetune is not None and control.key == stacked.finetune.key


def test_without_finetuning_the_layers_are_evaluated() -> None:
    assert list(keys(graph(finetune=None))) == ["layer 1", "layer 2", "layer 3", "evaluate"]


def test_each_fit_may_have_its_own_dropout() -> None:
    stacked = graph(network={"dropout": 0.1}, finetune={"dropout": 0.5})
    assert stacked.finetune is not None
    assert stacked.layers[0].spec.model_dump()["layer"]["dropout"] == 0.1
    assert {layer["dropout"] for layer in stacked.finetune.spec.model_dump()["layers"]} == {0.5}


def test_a_batch_larger_than_the_data_draws_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"pretrain\.batch_size: 2000 is more than the 1797 rows of the data"):
        graph(pretrain={"batch_size": 2000})
    with pytest.warns(UserWarning, match=r"finetune\.batch_size: 32 is more than the 20 rows of the data"):
        graph(pretrain=None, data={"limit": 20})


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        ({"network": {"widths": (100,)}}, True),
        ({"network": {"widths": (64,)}}, True),
        ({"network": {"widths": (63,)}}, False),
        ({"network": {"widths": (100,)}, "variant": {"kind": "denoising"}}, False),
        ({"network": {"widths": (100,), "dropout": 0.2}}, False),
        ({"network": {"widths": (100,)}, "pretrain": {"weight_decay": 0.01}}, False),
        ({"network": {"widths": (100, 20)}, "pretrain": None, "finetune": {"task": "reconstruct"}}, False),
        ({"network": {"widths": (100, 64)}, "pretrain": None, "finetune": {"task": "reconstruct"}}, True),
        ({"network": {"widths": (100, 20)}}, True),
    ],
)
def test_an_unconstrained_overcomplete_layer_draws_a_warning(fields: dict[str, Any], warned: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graph(**fields)
    assert [("identity map" in str(w.message)) for w in caught] == [True] * warned
