"""A stable identity for data: canonical JSON, then SHA-256.

Identity is data only. What has no stable representation is refused instead of guessed at, and fields marked
`Unhashed` (where a file lies, say) are left out.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Base of every config: immutable, no unknown keys, finite numbers, the docstring under a field is its `--help`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Unhashed:
    """Marks a config field that says where or how, never what: `root: Annotated[Path, Unhashed()]`."""


def canonical(value: Any) -> Any:
    """`value` as plain JSON types.

    Raises:
        TypeError: `value` has no stable identity (a function, an array, any other object).
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            if not math.isfinite(value):
                raise TypeError(f"cannot fingerprint {value!r}: use a finite number or None")
            # 1.0 and 1 are the same choice, whichever way a recipe spells it
            return int(value) if value.is_integer() else value
        case BaseModel():
            fields = type(value).model_fields.items()
            hashed = [name for name, field in fields if not any(isinstance(m, Unhashed) for m in field.metadata)]
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


def fingerprint(*parts: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of `parts`.

    Raises:
        TypeError: a part has no stable identity.
    """
    text = json.dumps([canonical(part) for part in parts], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def derive_seed(seed: int, *role: str | int) -> int:
    """A seed for one role of an experiment, independent of the seeds of its other roles."""
    return int(fingerprint("seed", seed, *role)[:15], 16)
