"""How a run can end badly through no fault of the code."""

import re
from collections.abc import Sequence


class InputError(ValueError):
    """Bad configuration or bad data. The message is one line: what, where, and how to mend it."""

    def __init__(self, message: str) -> None:
        super().__init__(escape_unprintable(hide_secrets(message)))


class DivergenceError(ArithmeticError):
    """A loss term stopped being finite. The message names the term and the epoch."""


class OutageError(Exception):
    """Something outside, such as MLflow, does not answer. One line: what, what is kept, and how to go on."""


class TakenOverError(Exception):
    """Another process has this job now; what it does counts."""


def escape_unprintable(text: str) -> str:
    """`text` on one line, fit for a terminal: line ends, escapes and the like, which names in data may hold, spelled
    out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def hide_secrets(text: str) -> str:
    """`text` without what an address in it may hold of secrets: user, password and query."""
    return re.sub(r"(://[^\s?]*\?)[^\s'\"]*", r"\1***", re.sub(r"://\S*@", "://***@", text))


def short_repr(value: object, most: int = 80) -> str:
    """`value` as it is written in code, cut where it is longer than `most` characters."""
    text = hide_secrets(repr(value))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def join_names(names: Sequence[str], most: int = 12) -> str:
    """Names with commas, the first of them if they are many."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "none"
