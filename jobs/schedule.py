"""python -m jobs.schedule [RECIPE.yaml] --model NAME [--cron "0 2 * * *"] [--format cron|systemd|kuberay] [...]

Print a schedule that starts `jobs.retrain` once a day: a crontab line, a systemd service and timer, or a RayCronJob.
Nothing is installed. Each start (firing) has a logical date: the day on the clock of the machine that starts it. Except
on Kubernetes, it also has a submission id made of the model and that date. Ray accepts an id once and refuses a second
firing.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from aecore.core.errors import InputError, hide_secrets
from jobs.cli import NAME
from pipelines.host.addresses import dashboard_address
from pipelines.host.messages import say
from pipelines.retraining.cron import Cron, parse_cron

_SAMPLE = Path(__file__).parent / "kuberay" / "raycronjob.yaml"
_ENVIRONMENT = (
    "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH",
)  # fmt: skip
"""Variables that a job needs and that cron does not pass on."""
_LONGEST_NAME = 40
"""Most characters of a model in a name: Kubernetes lengthens the name of a RayCronJob, to at most 63 characters."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which model is to be retrained, by which recipe, when, and where."""

    recipe: str | None
    model: str
    cron: Cron
    address: str
    """URL of the cluster's dashboard."""
    folder: Path
    """Folder of this project, in which the job is submitted."""

    @property
    def name(self) -> str:
        """The name of the printed objects, in lower case, digits and dashes; different models have different names."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.model.lower()).strip("-")[:_LONGEST_NAME]
        digest = hashlib.sha256(self.model.encode()).hexdigest()[:6]
        return f"retrain-{plain}" if plain == self.model else f"retrain-{plain}-{digest}"

    def command(self) -> list[str]:
        """Return the scheduled module's name and its arguments, but not `--logical-date`, which each firing adds."""
        return ["jobs.retrain", *([self.recipe] if self.recipe else []), "--model", self.model]

    def shell(self) -> str:
        """Return a shell command that submits the job for today, by the clock of the machine that fires it."""
        submit = [sys.executable, "-m", "jobs.submit", "--address", self.address, "--once"]
        line = shlex.join([*submit, "--name", f"{self.name}-@DAY@", "--", *self.command(), "--logical-date", "@DAY@"])
        return f"D=$(date +%F) && {line.replace('@DAY@', '$D')}"


def crontab(schedule: Schedule) -> str:
    """Return a line for `crontab -e`. An unescaped `%` would end the command there."""
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in _environment().items())
    folder = shlex.quote(str(schedule.folder))
    # the log lies outside the project's folder, which Ray packs: the log would change meanwhile
    line = f'cd {folder} && export {variables}&& {schedule.shell()} >> "$HOME"/{schedule.name}.log 2>&1'
    return f"{schedule.cron} {line}".replace("%", r"\%")


def systemd(schedule: Schedule) -> str:
    """Return a service and its timer, each below a comment with the name of its file."""
    folder, model = (str(text).replace("%", "%%") for text in (schedule.folder, schedule.model))
    variables = "\n".join(f"Environment={_quote(f'{name}={value}')}" for name, value in _environment().items())
    return f"""# ~/.config/systemd/user/{schedule.name}.service
[Unit]
Description=Retrain {model}

[Service]
Type=oneshot
WorkingDirectory={folder}
{variables}
ExecStart=/bin/sh -c {_quote(schedule.shell().replace("$", "$$"))}

# ~/.config/systemd/user/{schedule.name}.timer
[Unit]
Description=When to retrain {model}

[Timer]
OnCalendar={schedule.cron.on_calendar()}
Persistent=true

[Install]
WantedBy=timers.target

# systemctl --user daemon-reload && systemctl --user enable --now {schedule.name}.timer"""


def kuberay(schedule: Schedule) -> str:
    """Return `jobs/kuberay/raycronjob.yaml` for this job; its logical date is the day on which it starts, in UTC."""
    text = _SAMPLE.read_text().rstrip()
    job = json.dumps(shlex.join(["python", "-m", *schedule.command()]))
    for key, value in (("  name", schedule.name), ("  schedule", str(schedule.cron)), ("    entrypoint", job)):
        line = f"{key}: {value}".replace("\\", r"\\")
        text = re.sub(rf"^{key}: .*", line, text, count=1, flags=re.MULTILINE)
    return text


def _environment() -> dict[str, str]:
    """Return the variables to print: those that are set here, without the values that hold a password."""
    variables = {name: os.environ[name] for name in _ENVIRONMENT if os.environ.get(name)}
    for name, value in variables.items():
        if hide_secrets(value) != value:
            say(f"warning: {name} holds a password and is not printed; put it in by hand")
            variables[name] = "CHANGE-ME"
    return {"MLFLOW_TRACKING_URI": "CHANGE-ME", **variables}


def _quote(text: str) -> str:
    """Quote `text` as one word of a systemd unit."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


_FORMATS = {"cron": crontab, "systemd": systemd, "kuberay": kuberay}


def render(args: list[str]) -> str:
    """Return the text that the command line asks for.

    Raises:
        InputError: the cron expression, the model's name, the recipe or the address is not valid.
    """
    parser = argparse.ArgumentParser("python -m jobs.schedule", description=__doc__.split("\n\n", 1)[1])
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="recipe of jobs.retrain, a file in this folder")
    parser.add_argument("--model", required=True, metavar="NAME", help="name of the registered model")
    parser.add_argument("--cron", default="0 2 * * *", help="when: minute hour day-of-month month day-of-week")
    parser.add_argument("--format", default="cron", choices=_FORMATS)
    parser.add_argument(
        "--address", help="URL of the dashboard (default: RAY_API_SERVER_ADDRESS, http://127.0.0.1:8265)"
    )
    options = parser.parse_args(args)
    cron = parse_cron(options.cron)
    if not re.fullmatch(NAME, options.model):
        raise InputError(
            f"--model {options.model}: not a name for a registered model; use letters, digits, dots and dashes"
        )
    if options.recipe and not Path(options.recipe).is_file():
        raise InputError(f"recipe {options.recipe}: does not exist here; name a YAML file in this folder")
    address = options.address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    address = dashboard_address(address)
    schedule = Schedule(recipe=options.recipe, model=options.model, cron=cron, address=address, folder=Path.cwd())
    return _FORMATS[options.format](schedule)


def main() -> NoReturn:
    """Run the command. The text goes to stdout, ready to be written to a file; errors go to stderr."""
    try:
        print(render(sys.argv[1:]))
    except InputError as error:
        say(f"error: {error}")
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    main()
