"""The ways in which a run can end badly although the code is right, and helpers that write their messages."""

import re
from collections.abc import Sequence


class InputError(ValueError):
    """The configuration or the data are wrong.

    The message is one line that says what is wrong, where, and how to mend it. Secrets in addresses and characters that
    a terminal would act on are taken out of it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escape_unprintable(hide_secrets(message)))


class DivergenceError(ArithmeticError):
    """A term of the loss is no longer finite. The message names the term and the epoch."""


class OutageError(Exception):
    """A service outside, such as MLflow, does not answer. The message is one line: what is down, which work is safe,
    and how to go on."""


class DeviceError(Exception):
    """A GPU that a stage was given cannot be used. The message is one line: what the driver says, and how to go on."""


class TakenOverError(Exception):
    """Another process has taken this job over, and only that process's results count."""


def without_frames(error: Exception) -> Exception:
    """Return an error without its traceback, whose frames would keep alive what was computed, on a device as well."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error


def escape_unprintable(text: str) -> str:
    """Return `text` on one line: line ends, terminal escapes and other unprintable characters become escape
    sequences."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def hide_secrets(text: str) -> str:
    """Return `text` with stars in place of the user, password and query of every address in it."""
    return re.sub(r"(://[^\s?]*\?)[^\s'\"]*", r"\1***", re.sub(r"://\S*@", "://***@", text))


def shorten(text: str, most: int = 160) -> str:
    """Return `text` without secrets on one line; what is longer than `most` characters ends after a word, with three
    dots."""
    text = " ".join(hide_secrets(text).split())  # first, since half an address may no longer look like one
    if len(text) <= most:
        return text
    whole_words, _, _ = text[: most - 2].rpartition(" ")
    return f"{whole_words.rstrip(' ,;:(') or text[: most - 3]}..."


def short_repr(value: object, most: int = 80) -> str:
    """Return `repr(value)` without secrets, shortened to at most `most` characters."""
    return shorten(repr(value), most)


def join_names(names: Sequence[str], most: int = 12) -> str:
    """Return the names joined by commas; if there are more than `most`, the first ones and the number of the others."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "none"
