"""python -m jobs.schedule [RECIPE.yaml] --model NAME [--cron "0 2 * * *"] [--format cron|systemd|kuberay] [...]

Print what fires `jobs.retrain` once a day: a crontab line, a systemd service and timer, or a RayCronJob. Nothing is
installed. Each firing has a logical date, the day on the clock that fires it, and, but on Kubernetes, a submission id
made of the model and that date: Ray takes it once, so that a second firing is refused.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import NamedTuple, NoReturn

from aecore.core.errors import InputError, hide_secrets
from jobs.cli import NAME, say

_SAMPLE = Path(__file__).parent / "kuberay" / "raycronjob.yaml"
_MONTHS = {date(1, n, 1).strftime("%b").lower(): n for n in range(1, 13)}
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_ENVIRONMENT = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
"""What a job submitted from here needs to know, and cron does not."""
_LONGEST = 40
"""Of a name that Kubernetes may lengthen up to 63."""
_MACROS = {"@yearly": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0", "@daily": "0 0 * * *"}


class Cron(NamedTuple):
    """A cron expression that fires once a day at most, as the numbers that its fields stand for; none is any."""

    minute: int
    hour: int
    days: tuple[int, ...]
    """Of the month."""
    months: tuple[int, ...]
    weekdays: tuple[int, ...]
    """0 is Sunday."""

    def __str__(self) -> str:
        """In numbers: not every cron takes lists and ranges of names."""
        rest = (",".join(map(str, part)) or "*" for part in (self.days, self.months, self.weekdays))
        return " ".join([str(self.minute), str(self.hour), *rest])


class Firing(NamedTuple):
    """What is to be run, and when."""

    recipe: str | None
    model: str
    cron: Cron
    address: str
    """Of the cluster's dashboard."""
    folder: Path
    """Of this project, where it is fired from."""

    @property
    def name(self) -> str:
        """Of what is printed: lower case, digits and dashes, other for other models."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.model.lower()).strip("-")[:_LONGEST]
        digest = hashlib.sha256(self.model.encode()).hexdigest()[:6]
        return f"retrain-{plain}" if plain == self.model else f"retrain-{plain}-{digest}"

    def command(self) -> list[str]:
        """The job, but for its date."""
        return ["jobs.retrain", *([self.recipe] if self.recipe else []), "--model", self.model]

    def shell(self) -> str:
        """A command line that submits it for today, as the clock that fires it sees the day."""
        submit = [sys.executable, "-m", "jobs.submit", "--address", self.address, "--once"]
        line = shlex.join([*submit, "--name", f"{self.name}-@DAY@", "--", *self.command(), "--logical-date", "@DAY@"])
        return f"D=$(date +%F) && {line.replace('@DAY@', '$D')}"


def parse_cron(text: str) -> Cron:
    """A cron expression that fires once a day at most.

    Raises:
        InputError: it is none, or fires more often.
    """
    fields = _MACROS.get(text.strip(), text).split()
    if len(fields) != 5:
        raise InputError(
            f"cron {text!r}: {len(fields)} fields; write five, minute hour day-of-month month day-of-week, such as "
            "'0 2 * * *'"
        )
    minute = _numbers(fields[0], "minute", 0, 59)
    hour = _numbers(fields[1], "hour", 0, 23)
    days = _numbers(fields[2], "day-of-month", 1, 31)
    months = _numbers(fields[3], "month", 1, 12, _MONTHS)
    # 7 is Sunday too
    weekdays = _numbers(fields[4], "day-of-week", 0, 7, {name: n for n, name in enumerate(_DAYS)})
    if len(minute) != 1 or len(hour) != 1:
        raise InputError(f"cron {text!r}: fires several times a day, and a logical date is a day; name one time")
    if days and weekdays:
        raise InputError(
            f"cron {text!r}: day-of-month and day-of-week together mean either of them to cron, and both to systemd; "
            "leave one of them *"
        )
    if days and all(day > _longest(months) for day in days):
        raise InputError(f"cron {text!r}: no such day in any of its months, so it never fires; name another")
    return Cron(minute[0], hour[0], days, months, tuple(sorted({day % 7 for day in weekdays})))


def _longest(months: tuple[int, ...]) -> int:
    return max(29 if m == 2 else 30 if m in (4, 6, 9, 11) else 31 for m in months or range(1, 13))


def _numbers(
    text: str, what: str, first: int, last: int, names: dict[str, int] | None = None
) -> tuple[int, ...]:  # fmt: skip
    """What a field of a cron expression stands for, in order; nothing for `*`."""
    if text == "*":
        return ()
    found: set[int] = set()
    for part in text.lower().split(","):
        match = re.fullmatch(r"(\*|\w+)(?:-(\w+))?(?:/(\d+))?", part)
        if not match or (match[1] == "*" and match[2]):
            raise InputError(f"cron {what} {text!r}: not a field; write *, 5, 1-5, */2 or 1,3,5")
        low, high = first, last - (what == "day-of-week")
        if match[1] != "*":
            low = _number(match[1], text, what, first, last, names)
            # 5/10 is from 5 on
            high = _number(match[2], text, what, first, last, names) if match[2] else last if match[3] else low
        step = int(match[3] or 1)
        if low > high or not step:
            raise InputError(f"cron {what} {text!r}: {'a step of 0' if not step else 'ends before it begins'}; mend it")
        found.update(range(low, high + 1, step))
    return tuple(sorted(found))


def _number(text: str, field: str, what: str, first: int, last: int, names: dict[str, int] | None) -> int:
    value = (names or {}).get(text, int(text) if text.isdecimal() else -1)
    if not first <= value <= last:
        raise InputError(f"cron {what} {field!r}: {text} is not within {first} to {last}; mend it")
    return value


def on_calendar(cron: Cron) -> str:
    """The same times as systemd writes them."""
    week = ",".join(_DAYS[day].capitalize() for day in cron.weekdays)
    month, day = (",".join(f"{n:02}" for n in part) or "*" for part in (cron.months, cron.days))
    return f"{week + ' ' if week else ''}*-{month}-{day} {cron.hour:02}:{cron.minute:02}:00"


def crontab(firing: Firing) -> str:
    """A line for `crontab -e`, in which `%` would end the command."""
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in _environment().items())
    folder = shlex.quote(str(firing.folder))
    # not into the folder that is shipped: it would change while Ray packs it
    line = f'cd {folder} && export {variables}&& {firing.shell()} >> "$HOME"/{firing.name}.log 2>&1'
    return f"{firing.cron} {line}".replace("%", r"\%")


def systemd(firing: Firing) -> str:
    """A service and its timer, each behind the name of its file."""
    folder, model = (str(text).replace("%", "%%") for text in (firing.folder, firing.model))
    variables = "\n".join(f"Environment={_word(f'{name}={value}')}" for name, value in _environment().items())
    return f"""# ~/.config/systemd/user/{firing.name}.service
[Unit]
Description=Retrain {model}

[Service]
Type=oneshot
WorkingDirectory={folder}
{variables}
ExecStart=/bin/sh -c {_word(firing.shell().replace("$", "$$"))}

# ~/.config/systemd/user/{firing.name}.timer
[Unit]
Description=When to retrain {model}

[Timer]
OnCalendar={on_calendar(firing.cron)}
Persistent=true

[Install]
WantedBy=timers.target

# systemctl --user daemon-reload && systemctl --user enable --now {firing.name}.timer"""


def _environment() -> dict[str, str]:
    """Variables that are printed: those that are set here, but for what holds a password."""
    found = {name: os.environ[name] for name in _ENVIRONMENT if os.environ.get(name)}
    for name in [name for name, value in found.items() if hide_secrets(value) != value]:
        say(f"warning: {name} holds a password and is not printed; put it in by hand")
        found[name] = "CHANGE-ME"
    return {"MLFLOW_TRACKING_URI": "CHANGE-ME", **found}


def _word(text: str) -> str:
    """One word of a unit file."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def kuberay(firing: Firing) -> str:
    """`jobs/kuberay/raycronjob.yaml` with this job, which takes the date of its start (UTC)."""
    text = _SAMPLE.read_text().rstrip()
    job = json.dumps(shlex.join(["python", "-m", *firing.command()]))
    for line, value in (("  name", firing.name), ("  schedule", str(firing.cron)), ("    entrypoint", job)):
        new = f"{line}: {value}".replace("\\", r"\\")
        text = re.sub(rf"^{line}: .*", new, text, count=1, flags=re.MULTILINE)
    return text


_FORMATS = {"cron": crontab, "systemd": systemd, "kuberay": kuberay}


def schedule(args: list[str]) -> str:
    """What is asked for on the command line.

    Raises:
        InputError: the cron expression, the model's name, the recipe or the address is none.
    """
    parser = argparse.ArgumentParser("python -m jobs.schedule", description=__doc__.split("\n\n", 1)[1])
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="of jobs.retrain, in this folder")
    parser.add_argument("--model", required=True, metavar="NAME", help="registered model")
    parser.add_argument("--cron", default="0 2 * * *", help="when: minute hour day-of-month month day-of-week")
    parser.add_argument("--format", default="cron", choices=_FORMATS)
    parser.add_argument(
        "--address", help="URL of the dashboard (default: RAY_API_SERVER_ADDRESS, http://127.0.0.1:8265)"
    )
    options = parser.parse_args(args)
    cron = parse_cron(options.cron)
    if not re.fullmatch(NAME, options.model):
        raise InputError(
            f"--model {options.model}: no name of a registered model; use letters, digits, dots and dashes"
        )
    if options.recipe and not Path(options.recipe).is_file():
        raise InputError(f"recipe {options.recipe}: does not exist here; name a YAML file of this folder")
    address = options.address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    if not address.startswith(("http://", "https://")):
        raise InputError(f"address {address}: name the dashboard, --address http://HEAD:8265")
    return _FORMATS[options.format](Firing(options.recipe, options.model, cron, address, Path.cwd()))


def main() -> NoReturn:
    """Run the command; what it prints is meant for a file."""
    try:
        print(schedule(sys.argv[1:]))
    except InputError as error:
        say(f"error: {error}")
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    main()
