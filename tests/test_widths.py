"""Widths that are shares of the number of features: one recipe for narrow and wide data."""

from typing import Any

import pytest
from pydantic import ValidationError

from aecore.config.experiment import Conv, Data, Dense, Experiment
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs, resolve, resolve_widths
from aecore.config.specs import FinetuneSpec, Numerics, ReferenceSpec
from aecore.core.errors import InputError
from aecore.core.fingerprint import fingerprint
from jobs import cli
from jobs.train import Train
from pipelines.graph.description import experiment_name
from pipelines.graph.recipe import build
from pipelines.study.plan import largest_settings, plan_trials
from pipelines.study.schema import Study

TABLE = Facts(digest="d", shape=(9,), levels=0, classes=(), rows=500)
IMAGES = Facts(digest="d", shape=(1, 8, 8), levels=17, classes=tuple("0123456789"), rows=1797)


@pytest.mark.parametrize(
    ("widths", "most", "table", "images"),
    [
        (["4x", "0.5x"], None, (36, 4), (256, 32)),
        (["4x", "0.5x"], 100, (36, 4), (100, 32)),
        (["2x", 128, "0.01x"], 20, (18, 128, 1), (20, 128, 1)),  # a number stays as it is, and one unit is the least
        ([7], 5, (7,), (7,)),
    ],
)
def test_a_share_is_rounded_and_bounded(widths: list[Any], most: int | None, table: Any, images: Any) -> None:
    network = Dense.model_validate({"widths": widths, "max_width": most})
    assert (resolve_widths(network, TABLE), resolve_widths(network, IMAGES)) == (table, images)
    assert tuple(layer.code_shape[0] for layer in layer_specs(network, Data(), TABLE)) == table


def test_the_share_that_gives_a_number_has_the_keys_of_the_number() -> None:
    by_share = Experiment(network=Dense(widths=("2x", "0.5x"), max_width=48))
    by_number = Experiment(network=Dense(widths=(48, 32)))
    assert resolve(by_share, IMAGES) == resolve(by_number, IMAGES)
    keys = [[stage.key for stage in build(one, IMAGES, Numerics()).kept()] for one in (by_share, by_number)]
    assert keys[0] == keys[1]
    assert "64-48-32" in experiment_name(build(by_share, IMAGES, Numerics()).experiment, IMAGES)
    # of the version before there were shares
    assert fingerprint(Dense()) == "d43aa2e6b2ec11aaee9ffb4b53870dda5189e1b5fb5748a6948447c8be42886b"


@pytest.mark.parametrize(
    ("text", "widths"),
    [
        ("[4x]", ("4x",)), ("4x", ("4x",)), ("4x,0.5x", ("4x", "0.5x")), ("[4x, 16]", ("4x", 16)),
        ('["4x", 16]', ("4x", 16)), ("48,32", (48, 32)), ("[48, 32]", (48, 32)), ("48", (48,)),
    ],
)  # fmt: skip
def test_a_command_reads_shares_and_numbers(text: str, widths: Any) -> None:
    assert cli.parse(Train, "train", ["--network.widths", text]).network.widths == widths


@pytest.mark.parametrize("text", ["0x", "0.0x", "-1x", "x", "1.x", "4X", "1e3x", "1.5", "0", f"{'9' * 400}x"])
def test_what_is_neither_is_refused(text: str) -> None:
    message = "network.widths.0: input should be a whole number above 0, or a share of the number of features such as "
    with pytest.raises(InputError, match=message):
        cli.parse(Train, "train", [f"--network.widths=[{text}]"])


@pytest.mark.parametrize("field", ["widths", "dense"])
def test_convolutions_take_no_shares(field: str) -> None:
    with pytest.raises(InputError, match=rf"network\.{field}\.0: only network\.kind dense takes shares .* got '4x'"):
        cli.parse(Train, "train", ["--network.kind", "conv", f"--network.{field}", "[4x]"])
    with pytest.raises(ValidationError, match="max_width"):
        Conv.model_validate({"max_width": 8})


def test_more_units_than_a_device_holds_are_refused() -> None:
    with pytest.raises(InputError, match=r"network\.widths: 9000000000000 units give layer 1"):
        layer_specs(Dense(widths=("1000000000000x",)), Data(), TABLE)


def test_a_study_searches_shares() -> None:
    study = Study.model_validate({
        "variants": {"plain": {}, "narrow": {"network": {"widths": ["0.25x"]}, "settings": {"network.max_width": [8]}}},
        "base": {"network": {"kind": "dense", "widths": ["0.5x"]}},
        "seeds": [0],
    })  # fmt: skip
    plans = {plan.row: plan for plan in plan_trials(study, IMAGES, Numerics())}
    pca = [s.spec for s in plans["pca"].stages().values() if isinstance(s.spec, ReferenceSpec)]
    assert [spec.layers[-1].code_shape for spec in pca] == [(32,)]
    assert plans["narrow"].settings == {"network.max_width": 8}
    searched = Study.model_validate({"seeds": [0], "settings": {"network.widths": [["0.9x"], [10], ["0.1x", "0.05x"]]}})
    assert largest_settings(searched, "plain", IMAGES) == {"network.widths": ["0.9x"]}
    assert largest_settings(searched, "plain", TABLE) == {"network.widths": [10]}
    plans_of_row = [plan.trained.spec for plan in plan_trials(searched, IMAGES, Numerics()) if plan.row == "plain"]
    widths = [[layer.code_shape for layer in spec.layers] for spec in plans_of_row if isinstance(spec, FinetuneSpec)]
    assert widths == [[(58,)], [(10,)], [(6,), (3,)]]
