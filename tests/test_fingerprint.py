from pathlib import Path
from typing import Annotated

import numpy as np
import pytest

from aecore.config.experiment import Data, Fit
from aecore.core.fingerprint import Frozen, Later, Unhashed, canonical, derive_seed, fingerprint, later_defaults
from aecore.data.splits import content_hashes


class Example(Frozen):
    a: int = 1
    where: Annotated[Path, Unhashed()] = Path("here")


class Grown(Frozen):
    a: Example = Example()
    b: Annotated[int, Later()] = 2
    c: "Grown | None" = None


def test_later_fields_at_their_default_are_found_at_any_depth() -> None:
    assert later_defaults(Example()) == {}
    grown = Grown(c=Grown(b=3, c=Grown()))
    assert later_defaults(grown) == {"b": True, "c": {"c": {"b": True}}}
    assert grown.model_dump(exclude=later_defaults(grown)) == {
        "a": Example().model_dump(),
        "c": {"a": Example().model_dump(), "b": 3, "c": {"a": Example().model_dump(), "c": None}},
    }


def test_known_value() -> None:
    # a change of this value forks every finished stage of every user
    assert fingerprint("a", {"b": [1, 2.5, None, True]}) == (
        "7fb2687a51056dbd4f5b783b16d2285919725563fe8828858bc1b9ce59413cad"
    )


def test_order_of_keys_does_not_matter() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_unhashed_fields_do_not_matter_and_others_do() -> None:
    assert fingerprint(Example(where=Path("there"))) == fingerprint(Example())
    assert fingerprint(Example(a=2)) != fingerprint(Example())
    assert fingerprint(Data(root=Path("/elsewhere"))) == fingerprint(Data())
    assert fingerprint(Data(limit=5)) != fingerprint(Data())


def test_ids_are_of_values_alone() -> None:
    x = np.array([[1, 0], [2, 3], [1, -0.0]], np.float32)
    assert content_hashes(x)[0] == content_hashes(x)[2] != content_hashes(x)[1]
    assert (content_hashes(x[::-1]) == content_hashes(x)[::-1]).all() and content_hashes(x[:0]).shape == (0,)
    assert content_hashes(np.arange(4, dtype=np.uint8)[:, None]).tolist()[0] == 5224996704525874836


def test_whole_floats_are_the_integers_they_equal() -> None:
    assert fingerprint(Fit(lr=1)) == fingerprint(Fit(lr=1.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.zeros(2), object(), print, {1: 2}, {"a": {1, 2}}])
def test_refuses_what_has_no_stable_identity(value: object) -> None:
    with pytest.raises(TypeError, match="cannot fingerprint"):
        canonical(value)


def test_seeds_of_roles_differ_and_repeat() -> None:
    roles: list[tuple[str | int, ...]] = [("pretrain", 1), ("pretrain", 2), ("finetune",)]
    seeds = [derive_seed(seed, *role) for seed in (0, 1) for role in roles]
    assert len(set(seeds)) == 6
    assert seeds[0] == derive_seed(0, "pretrain", 1)
    assert all(0 <= seed < 2**63 for seed in seeds)
