"""A stable identity for configurations: the SHA-256 of their canonical JSON.

A value without a stable representation is refused rather than guessed at. Fields marked `Unhashed`, such as the folder
where a data set lies, are left out, and so are fields marked `Later` that have their default.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Frozen(BaseModel):
    """Base of every configuration: immutable, without unknown keys, all numbers finite.

    The docstring under a field is its text in `--help`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Unhashed:
    """Marks a field that says where or how, but never what is computed: `root: Annotated[Path, Unhashed()]`."""


class Later:
    """Marks a field that a later version added: at its default it is left out, so that the keys of earlier results
    stay."""


def canonical(value: Any) -> Any:
    """Convert `value` to plain JSON types, so that equal choices become equal values.

    Raises:
        TypeError: `value` has no stable identity; it is a function, an array or some other object.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            if not math.isfinite(value):
                raise TypeError(f"cannot fingerprint {value!r}: use a finite number or None")
            # a recipe may spell the same choice as 1 or as 1.0
            return int(value) if value.is_integer() else value
        case BaseModel():
            fields = type(value).model_fields.items()
            hashed = [name for name, field in fields if _is_hashed(field, getattr(value, name))]
            return {name: canonical(getattr(value, name)) for name in hashed}
        case Mapping():
            if not all(isinstance(key, str) for key in value):
                raise TypeError("cannot fingerprint a mapping with keys that are not strings")
            return {key: canonical(item) for key, item in value.items()}
        case list() | tuple():
            return [canonical(item) for item in value]
    raise TypeError(
        f"cannot fingerprint a {type(value).__qualname__}: pass numbers, strings, lists, mappings or pydantic models"
    )


def _is_hashed(field: FieldInfo, value: Any) -> bool:
    return not any(isinstance(mark, Unhashed) for mark in field.metadata) and not _is_later_default(field, value)


def _is_later_default(field: FieldInfo, value: Any) -> bool:
    later = any(isinstance(mark, Later) for mark in field.metadata)
    return later and bool(value == field.get_default(call_default_factory=True))


def unhashed(config: type[BaseModel]) -> set[str]:
    """Return the names of the fields marked `Unhashed`."""
    fields = config.model_fields.items()
    return {name for name, field in fields if any(isinstance(mark, Unhashed) for mark in field.metadata)}


def later_defaults(config: BaseModel) -> dict[str, Any]:
    """Return the fields marked `Later` that have their default, at any depth, as `model_dump` takes them in
    `exclude`."""
    fields: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if _is_later_default(field, value):
            fields[name] = True
        elif isinstance(value, BaseModel) and (inner := later_defaults(value)):
            fields[name] = inner
    return fields


def fingerprint(*parts: Any) -> str:
    """Return the SHA-256 of the canonical JSON of `parts`, as 64 hexadecimal digits.

    Raises:
        TypeError: a part has no stable identity.
    """
    text = json.dumps([canonical(part) for part in parts], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def derive_seed(seed: int, *role: str | int) -> int:
    """Return the seed of one role in an experiment, such as `("pretrain", 2)`; different roles get independent
    seeds."""
    return int(fingerprint("seed", seed, *role)[:15], 16)
