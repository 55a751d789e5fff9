"""Cron expressions that fire once a day at most: reading them, and writing the same times for systemd."""

import re
from typing import NamedTuple

from aecore.core.errors import InputError

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_WEEKDAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
_RANGES = {"minute": (0, 59), "hour": (0, 23), "day-of-month": (1, 31), "month": (1, 12), "day-of-week": (0, 7)}
"""The lowest and highest number of each field; both 0 and 7 are Sunday."""
_NAMES = {
    "month": {name: number for number, name in enumerate(_MONTHS, 1)},
    "day-of-week": {name: number for number, name in enumerate(_WEEKDAYS)},
}
_MACROS = {"@yearly": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0", "@daily": "0 0 * * *"}


class Cron(NamedTuple):
    """A cron expression as the numbers that its fields stand for; an empty tuple means any."""

    minute: int
    hour: int
    days: tuple[int, ...]
    """Days of the month."""
    months: tuple[int, ...]
    weekdays: tuple[int, ...]
    """0 is Sunday."""

    def __str__(self) -> str:
        """Return the expression in numbers, since not every cron takes lists and ranges of names."""
        rest = (",".join(map(str, numbers)) or "*" for numbers in (self.days, self.months, self.weekdays))
        return " ".join([str(self.minute), str(self.hour), *rest])

    def on_calendar(self) -> str:
        """Return the same times in the form of systemd's OnCalendar."""
        weekdays = ",".join(_WEEKDAYS[day].capitalize() for day in self.weekdays)
        month, day = (",".join(f"{n:02}" for n in numbers) or "*" for numbers in (self.months, self.days))
        return f"{weekdays + ' ' if weekdays else ''}*-{month}-{day} {self.hour:02}:{self.minute:02}:00"


def parse_cron(text: str) -> Cron:
    """Parse a cron expression of five fields, or one of `@yearly`, `@monthly`, `@weekly` and `@daily`.

    Raises:
        InputError: the expression is not valid, never fires, or fires more often than once a day.
    """
    fields = _MACROS.get(text.strip(), text).split()
    if len(fields) != 5:
        raise InputError(
            f"cron {text!r}: {len(fields)} fields; write five, minute hour day-of-month month day-of-week, such as "
            "'0 2 * * *'"
        )
    minute, hour, days, months, weekdays = map(_parse_field, _RANGES, fields)
    if len(minute) != 1 or len(hour) != 1:
        raise InputError(f"cron {text!r}: fires several times a day, but a date is decided on once; name one time")
    if days and weekdays:
        raise InputError(
            f"cron {text!r}: with day-of-month and day-of-week, cron fires where either fits and systemd where both "
            "fit; leave one of them *"
        )
    longest = max(29 if month == 2 else 30 if month in (4, 6, 9, 11) else 31 for month in months or (1,))
    if days and min(days) > longest:
        raise InputError(f"cron {text!r}: its months have no such day, so it never fires; name another day")
    return Cron(minute[0], hour[0], days, months, tuple(sorted({day % 7 for day in weekdays})))


def _parse_field(field: str, text: str) -> tuple[int, ...]:
    """Return the numbers that a field stands for, in order; none for `*`."""
    if text == "*":
        return ()
    where, (lowest, highest) = f"cron {field} {text!r}", _RANGES[field]

    def number(word: str) -> int:
        value = _NAMES.get(field, {}).get(word, int(word) if word.isdecimal() else -1)
        if not lowest <= value <= highest:
            raise InputError(f"{where}: {word} is not within {lowest} to {highest}")
        return value

    numbers: set[int] = set()
    for part in text.lower().split(","):
        match = re.fullmatch(r"(\*|\w+)(?:-(\w+))?(?:/(\d+))?", part)
        if not match or (match[1] == "*" and match[2]):
            raise InputError(f"{where}: not a field; write *, 5, 1-5, */2 or 1,3,5")
        step = int(match[3] or 1)
        if match[1] == "*":
            first, last = lowest, highest - (field == "day-of-week")
        else:
            first = number(match[1])
            last = number(match[2]) if match[2] else highest if match[3] else first  # 5/10 means from 5 on
        if first > last or not step:
            raise InputError(f"{where}: {'ends before it begins' if step else 'has a step of 0'}")
        numbers.update(range(first, last + 1, step))
    return tuple(sorted(numbers))
