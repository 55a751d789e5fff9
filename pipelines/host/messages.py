"""Messages to the person who started the command."""

import sys

from aecore.core.errors import shorten


def say(line: str) -> None:
    """Print a line of progress or a warning to stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def one_line(error: object, limit: int = 160) -> str:
    """Return the text of an error without secrets on one line, shortened to `limit` characters."""
    return shorten(str(error), limit)
