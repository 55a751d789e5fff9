"""What every command shares: settings from defaults < recipe < environment < command line, and how a command ends."""

import difflib
import json
import os
import re
import signal
import sys
import time
import traceback
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, SettingsConfigDict, SettingsError

from aecore.config.experiment import overlay
from aecore.core.errors import (
    InputError,
    OutageError,
    TakenOverError,
    escape_unprintable,
    hide_secrets,
    join_names,
    short_repr,
)
from pipelines.host.environment import submission_id

ENVIRONMENT = "DIABOLO__"
"""`DIABOLO__FINETUNE__LR=1e-3` sets `finetune.lr`."""

NAME = r"^\w[\w .-]*$"
"""What MLflow takes for a registered model's name, and a filter can quote."""

S = TypeVar("S", bound=BaseModel)


def without_secrets(config: Any) -> Any:
    """A configuration as it may be kept: addresses in it without passwords and the like."""
    if isinstance(config, dict):
        return {key: without_secrets(value) for key, value in config.items()}
    return hide_secrets(config) if isinstance(config, str) else config


def _is_no_file(path: Path) -> Path:
    if found := next((p for p in (path, *path.parents) if p.is_file()), None):
        raise ValueError(f"figures: {found} is a file; name a folder")
    return path


Folder = Annotated[Path, AfterValidator(_is_no_file)]
"""Where files are written; made where it is missing."""


class _Sources(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT,
        env_nested_delimiter="__",
        env_parse_none_str="null",
        cli_parse_none_str="null",
        cli_avoid_json=True,
        cli_exit_on_error=False,
    )


def parse(settings: type[S], prog: str, args: list[str] | None = None) -> S:
    """Settings from defaults < recipe (the positional argument) < environment < command line.

    A partial override keeps its siblings; a changed `kind` replaces its whole subtree.

    Raises:
        InputError: an unknown key, or a value that does not fit; the message has its full path.
    """
    args = [_with_underscores(arg) for arg in (sys.argv[1:] if args is None else args)]
    both = type(settings.__name__, (settings, _Sources), {"__doc__": settings.__doc__})
    try:
        command_line = CliSettingsSource(both, cli_prog_name=prog)(args=args)()
        environment = EnvSettingsSource(both)()
    except SettingsError as error:
        raise InputError(_option_error(settings, str(error))) from None
    for name in os.environ:
        top = name.removeprefix(ENVIRONMENT).split("__")[0].lower()
        if name.startswith(ENVIRONMENT) and top not in _keys([settings], []):
            raise InputError(f"{name}: unknown environment variable; {_nearest(settings, top)}")
    for alias in (field.alias for field in settings.model_fields.values() if field.alias):
        environment.pop(alias, None)  # pydantic-settings reads an alias without our prefix
        if value := os.environ.get(f"{ENVIRONMENT}{alias.upper()}"):
            environment[alias] = value
    values = settings().model_dump(by_alias=True)
    recipe = command_line.get("recipe") or environment.get("recipe") or settings.model_fields["recipe"].default
    for source in (_read_recipe(Path(recipe)) if recipe else {}, environment, command_line):
        values = overlay(values, source)
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise InputError(_value_error(settings, error)) from None


def _with_underscores(arg: str) -> str:
    """An option's name may be written with hyphens, which no field has."""
    found = re.match(r"--(no-)?([\w.-]+)", arg)
    return f"--{found[1] or ''}{found[2].replace('-', '_')}{arg[found.end() :]}" if found else arg


def main(job: str, run: Callable[[], dict[str, Any] | None], addresses: Sequence[str] | None = None) -> NoReturn:
    """Run a command to its end: print `run`'s report as the last line of stdout, and exit.

    Exit codes: 0 done; 2 bad configuration or data, told in one line; 1 failed; 130 interrupted.

    Args:
        addresses: where the report is posted to, filled in by `run`; where it is given, bad input makes a report too.
    """
    began = time.monotonic()
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, _interrupt)
    report: dict[str, Any] | None
    last = ""
    try:
        report, code = run(), 0
    except KeyboardInterrupt:
        last, report, code = "interrupted", {"status": "killed"}, 130
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # a task's error comes wrapped in Ray's
        text = escape_unprintable(hide_secrets(" ".join(str(cause).split())))
        if isinstance(cause, InputError):
            report = None if addresses is None else {"status": "failed", "reason": text}
            last, code = f"error: {text}", 2
        elif isinstance(cause, OutageError | TakenOverError):
            last, report, code = f"error: {text}", {"status": "failed"}, 1
        elif isinstance(cause, OSError):  # a disk that is full or read-only, a folder that vanished, a lost connection
            last = f"error: {text}; mend that, and the same command goes on from what is kept"
            report, code = {"status": "failed"}, 1
        else:
            traceback.print_exception(error)
            text = f"{type(cause).__name__}: {text[:300]}"
            last, report, code = f"error: {text}", {"status": "failed"}, 1
        if report is not None and addresses is not None:
            report["reason"] = text
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()  # what workers still print comes before the last words
    if last:
        say(last)
    if report is not None:
        line = json.dumps({"job": job, **report, "seconds": round(time.monotonic() - began, 2)})
        print(line, flush=True)
        for address in addresses or ():
            post(address, line, 1 if code == 130 else 3)
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: idle threads of Ray and MLflow take longer to unwind than some jobs do
    os._exit(code)


def post(address: str, line: str, tries: int = 3, timeout: float = 5.0, pause: float = 1.0) -> bool:
    """POST a line of JSON; whether it was taken. What goes wrong is a warning without the address, which may be a
    secret."""
    reason = ""
    for number in range(tries):
        time.sleep(pause * number)
        try:
            request = urllib.request.Request(address, line.encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=timeout):
                return True
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except Exception as error:  # urllib raises almost anything; some of it names the address
            reason = type(getattr(error, "reason", error)).__name__
    say(f"warning: webhook: not delivered ({reason}); the result is the line on stdout")
    return False


def say(line: str) -> None:
    """Progress goes to stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows closes the runs
    raise KeyboardInterrupt


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(escape_unprintable(hide_secrets(f"warning: {' '.join(str(message).split())}")))


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"recipe {path}: {error.strerror}; name a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or no such day
        raise InputError(f"recipe {path}: not YAML ({' '.join(str(error).split())}); mend it") from None
    if not isinstance(recipe, dict | None):
        raise InputError(f"recipe {path}: holds a {type(recipe).__name__}; write `field: value` lines")
    return recipe or {}


def _models(field: FieldInfo) -> list[type[BaseModel]]:
    """The models that a field's value may be."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _keys(models: list[type[BaseModel]], path: list[str]) -> dict[str, FieldInfo]:
    """The keys that are valid below `path`, with all kinds of a union taken together."""
    fields = {(field.alias or name): field for model in models for name, field in model.model_fields.items()}
    return _keys(_models(fields[path[0]]), path[1:]) if path and path[0] in fields else fields


def _nearest(settings: type[BaseModel], path: str) -> str:
    """The valid key nearest to an unknown one, as the end of a sentence."""
    good: list[str] = []
    for part in path.split("."):
        fields = _keys([settings], good)
        if part not in fields:
            match = difflib.get_close_matches(part, fields, 1, 0.5)
            rest = path.split(".")[len(good) + 1 :]
            if match:
                return f"the nearest is {'.'.join([*good, match[0], *rest])}"
            return f"there are {join_names(['.'.join([*good, name]) for name in fields])}"
        good.append(part)
    return "see --help"


def _option_error(settings: type[BaseModel], text: str) -> str:
    text = " ".join(text.removeprefix("error parsing CLI: ").split())
    if text.startswith("unrecognized arguments: --"):
        option = text.split()[2].removeprefix("--").split("=")[0]
        return f"--{option}: unknown option; {_nearest(settings, option)}"
    if found := re.match('error parsing value for field "(.*)" from source "(Cli|Env)', text):
        name = f"--{found[1]}" if found[2] == "Cli" else f"{ENVIRONMENT}{found[1].upper()}"
        return f"{name}: not a value for all of it; set its fields one by one, or write it as JSON"
    return f"{text}; see --help"


def _value_error(settings: type[BaseModel], error: ValidationError) -> str:
    """One line of pydantic's first error: path, what is wrong, what was given."""
    errors = error.errors(include_url=False)
    # of what a union's members say, our own words say more than their types
    first = next(
        (e for e in errors if e["type"] == "value_error" and e["loc"][:-1] == errors[0]["loc"][:-1]), errors[0]
    )
    parts: list[str] = []
    models: list[type[BaseModel]] = [settings]
    for part in map(str, first["loc"]):
        tagged = [model for model in models if len(models) > 1 and part in _kinds(model)]
        if tagged:  # the tag of a union is no key
            models = tagged
            continue
        parts.append(part)
        field = _keys(models, []).get(part)
        models = _models(field) if field else []
    path = ".".join(parts)
    if first["type"] == "extra_forbidden":
        everywhere = _keys([settings], parts[:-1])
        if parts[-1] in everywhere:
            return f"{path}: not a field of this {parts[-2]}.kind; leave it out or choose the kind that has it"
        return f"{path}: unknown key; {_nearest(settings, path)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    return f"{path}: {message[0].lower()}{message[1:]}, got {short_repr(first['input'])}"


def _kinds(model: type[BaseModel]) -> tuple[str, ...]:
    return get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()


def ray_tags() -> dict[str, str]:
    """What ties an MLflow run to the Ray job that it is part of; empty outside `ray job submit`."""
    submission = submission_id()
    return {"ray.submission_id": submission} if submission else {}
