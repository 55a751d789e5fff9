"""What all commands share: reading the settings, and ending with a report, a message and an exit code."""

import difflib
import inspect
import json
import math
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
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, SettingsConfigDict, SettingsError

from aecore.config.experiment import overlay
from aecore.core.errors import (
    DeviceError,
    InputError,
    OutageError,
    TakenOverError,
    escape_unprintable,
    hide_secrets,
    join_names,
    short_repr,
    shorten,
)
from pipelines.host.environment import submission_id
from pipelines.host.messages import say

ENVIRONMENT = "DIABOLO__"
"""Prefix of the environment variables that set a field: `DIABOLO__FINETUNE__LR=1e-3` sets `finetune.lr`."""

NAME = r"^\w[\w .-]*$"
"""Pattern of a registered model's name: MLflow accepts it, and it can be quoted in an MLflow filter."""

S = TypeVar("S", bound=BaseModel)


def _require_folder(path: Path) -> Path:
    if file := next((p for p in (path, *path.parents) if p.is_file()), None):
        raise ValueError(f"figures: {file} is a file; name a folder")
    return path


Folder = Annotated[Path, AfterValidator(_require_folder)]
"""Type of a setting that names a folder to write files into. The folder is created if it does not exist."""


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
    """Read the settings of a command from, in rising precedence, the defaults, the recipe (the positional argument),
    the environment and the command line, `args`.

    An override of one field keeps the other fields beside it; another `kind` replaces its whole subtree.

    Raises:
        InputError: a key is unknown or a value does not fit. The message holds the full path of the field.
    """
    args = [_with_underscores(arg) for arg in (sys.argv[1:] if args is None else args)]
    args = _with_values(settings, args)
    both = type(settings.__name__, (settings, _Sources), {"__doc__": inspect.cleandoc(settings.__doc__ or "")})
    try:
        command_line = CliSettingsSource(both, cli_prog_name=prog)(args=args)()
        environment = EnvSettingsSource(both, env_ignore_empty=True)()
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
    file = command_line.get("recipe") or environment.get("recipe") or settings.model_fields["recipe"].default
    recipe = _read_recipe(Path(file)) if file else {}
    for name, field in settings.model_fields.items():
        if get_origin(field.annotation) is dict and name in recipe:
            values[name] = {}  # a study that names its rows does not have the default row as well
    for source in (recipe, environment, command_line):
        values = overlay(values, source)
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise InputError(_value_error(settings, error)) from None


def _with_underscores(arg: str) -> str:
    """Replace the hyphens in an option's name, as in `--warm-start`, by the underscores of the field's name."""
    option = re.match(r"--(no-)?([\w.-]+)", arg)
    return f"--{option[1] or ''}{option[2].replace('-', '_')}{arg[option.end() :]}" if option else arg


def _with_values(settings: type[BaseModel], args: list[str]) -> list[str]:
    """Give a value to each option that may stand alone or before a word, such as `--plan` and `--plan probe`: `true`
    where it stands alone, though a recipe may follow."""
    words = {
        f"--{name}": [word for kind in get_args(field.annotation) for word in get_args(kind)]
        for name, field in settings.model_fields.items()
        if bool in get_args(field.annotation)
    }
    complete: list[str] = []
    for argument in args:
        if complete and argument in words.get(complete[-1], ()):
            complete[-1] += f"={argument}"
        else:
            complete.append(argument)
    return [f"{argument}=true" if argument in words else argument for argument in complete]


_CODES = {"failed": 1, "partial": 3}
"""Exit codes by the status in a command's report, if they are not 0."""


class _Ending(NamedTuple):
    code: int
    report: dict[str, Any] | None
    message: str = ""


def main(job: str, run: Callable[[], dict[str, Any] | None], addresses: Sequence[str] | None = None) -> NoReturn:
    """Run a command, print the report that `run` returns as the last line of stdout, and exit.

    Exit codes: 0 finished; 3 finished in part (a study some of whose trials failed); 2 bad configuration or data,
    explained in one line; 1 failed; 130 interrupted.

    Args:
        addresses: URLs that the report is posted to. `run` fills the list while it works. If a list is passed, bad
            input makes a report too.
    """
    began = time.monotonic()
    warnings.showwarning = partial(_show_warning, job)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        report = run()
        ending = _Ending(_CODES.get((report or {}).get("status", ""), 0), report)
    except (KeyboardInterrupt, Exception) as error:
        ending = _ending_of(error, job, with_reason=addresses is not None)
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()  # workers print their last lines now, before the message below
    if ending.message:
        say(ending.message)
    if ending.report is not None:
        line = json.dumps(finite({"job": job, **ending.report, "seconds": round(time.monotonic() - began, 2)}))
        print(line, flush=True)
        for address in addresses or ():
            post(address, line, tries=1 if ending.code == 130 else 3)
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit, which joins idle threads of Ray and MLflow; that takes longer than some jobs do
    os._exit(ending.code)


def options_of(job: str, text: str) -> str:
    """Return a message with the options as a command has them: in a study an experiment's are those of its `base`."""
    return re.sub(r"--(?=(data|network|variant|pretrain|finetune)\b)", "--base.", text) if job == "compare" else text


def _ending_of(error: BaseException, job: str, with_reason: bool) -> _Ending:
    """Return exit code, report and message for the exception that ended a command. `with_reason` also puts the message
    into the report, and makes a report for bad input."""
    if isinstance(error, KeyboardInterrupt):
        return _Ending(130, {"status": "killed"}, "interrupted")
    cause = getattr(error, "cause", None) or error  # Ray wraps the exception of a task
    reason = options_of(job, escape_unprintable(hide_secrets(" ".join(str(cause).split()))))
    code, message = 1, f"error: {reason}"
    if isinstance(cause, InputError):
        code = 2
        if not with_reason:
            return _Ending(code, None, message)
    elif isinstance(cause, OSError):  # the disk is full or read-only, a folder vanished, a connection was lost
        message += "; remove the cause and run the same command again, it continues from what is stored"
    elif not isinstance(cause, DeviceError | OutageError | TakenOverError):
        traceback.print_exception(error)
        reason = f"{type(cause).__name__}: {shorten(reason, 300)}"
        message = f"error: {reason}"
    return _Ending(code, {"status": "failed", **({"reason": reason} if with_reason else {})}, message)


def post(address: str, line: str, tries: int = 3, timeout: float = 5.0, pause: float = 1.0) -> bool:
    """POST a line of JSON to a webhook and return whether it was accepted.

    A failure prints a warning. The warning does not name the address, which may hold a secret. `timeout` and `pause`,
    which grows from try to try, are in seconds.
    """
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
        except Exception as error:  # urllib raises many types, and some of their messages hold the address
            reason = type(getattr(error, "reason", error)).__name__
    say(f"warning: webhook: not delivered ({reason}); the result is the last line of stdout")
    return False


def without_secrets(config: Any) -> Any:
    """Return a configuration in which addresses have lost their passwords, tokens and queries, so that it may be
    stored."""
    if isinstance(config, dict):
        return {key: without_secrets(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [without_secrets(value) for value in config]
    return hide_secrets(config) if isinstance(config, str) else config


def finite(value: Any) -> Any:
    """Return a report with null in place of numbers that are not finite, such as an error that is too large: JSON has
    no word for these, and strict readers refuse those that Python writes."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ray_tags() -> dict[str, str]:
    """Return the tags that link an MLflow run to its Ray job; none if this process was not submitted to a cluster."""
    submission = submission_id()
    return {"ray.submission_id": submission} if submission else {}


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM must not break off the closing of MLflow runs
    raise KeyboardInterrupt


def _show_warning(job: str, message: Warning | str, *_: Any, **__: Any) -> None:
    say(options_of(job, escape_unprintable(hide_secrets(f"warning: {' '.join(str(message).split())}"))))


_QUOTES = "put a pattern in quotes, and write several values of an option as [a,b]"
"""What to do about words behind an option: a shell has put the names of files in the place of a pattern."""


def _read_recipe(path: Path) -> dict[str, Any]:
    if path.suffix.lower() in (".parquet", ".parq", ".pq"):
        raise InputError(f"recipe {path}: is data, and a recipe is a YAML file; {_QUOTES}")
    try:
        recipe = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"recipe {path}: {error.strerror}; name a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that cannot be
        raise InputError(f"recipe {path}: not valid YAML ({' '.join(str(error).split())}); correct it") from None
    if not isinstance(recipe, dict | None):
        raise InputError(f"recipe {path}: holds a {type(recipe).__name__}; write lines such as `field: value`")
    return recipe or {}


def _models(field: FieldInfo) -> list[type[BaseModel]]:
    """Return the model classes that a field's value may have; several if the field is a union."""
    candidates = [field.annotation, *get_args(field.annotation)]
    return [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _keys(models: list[type[BaseModel]], path: list[str]) -> dict[str, FieldInfo]:
    """Return the keys that are valid below `path`. Where a union allows several models, the keys of all count."""
    fields = {(field.alias or name): field for model in models for name, field in model.model_fields.items()}
    return _keys(_models(fields[path[0]]), path[1:]) if path and path[0] in fields else fields


def _nearest(settings: type[BaseModel], path: str) -> str:
    """Return the end of a sentence that names the valid key most like an unknown one, or else all valid keys."""
    valid: list[str] = []
    for part in path.split("."):
        fields = _keys([settings], valid)
        if part not in fields:
            match = difflib.get_close_matches(part, fields, 1, 0.5)
            rest = path.split(".")[len(valid) + 1 :]
            if match:
                return f"the nearest is {'.'.join([*valid, match[0], *rest])}"
            return f"there are {join_names(['.'.join([*valid, name]) for name in fields])}"
        valid.append(part)
    return "see --help"


def _option_error(settings: type[BaseModel], text: str) -> str:
    """Return one line for an error of pydantic-settings: an option that it does not know or cannot read."""
    text = " ".join(text.removeprefix("error parsing CLI: ").split())
    if text.startswith("unrecognized arguments: --"):
        option = text.split()[2].removeprefix("--").split("=")[0]
        if option.split(".")[0] in _keys([settings], ["base"]) and "base" in settings.model_fields:
            return f"{option}: unknown option; a study has it as base.{option}"
        return f"--{option}: unknown option; {_nearest(settings, option)}"
    if match := re.match('error parsing value for field "(.*)" from source "(Cli|Env)', text):
        name = f"--{match[1]}" if match[2] == "Cli" else f"{ENVIRONMENT}{match[1].upper()}"
        return f"{name}: has several fields; set them one by one, or write all of them as JSON"
    if text.startswith("unrecognized arguments: "):
        return f"{text}; {_QUOTES}"
    return f"{text}; see --help"


def _value_error(settings: type[BaseModel], error: ValidationError) -> str:
    """Return pydantic's first error as one line: the field's path, what is wrong, and the value."""
    errors = error.errors(include_url=False)
    # each member of a union reports an error; a message of our own says more than a mismatch of types
    first = next(
        (e for e in errors if e["type"] == "value_error" and e["loc"][:-1] == errors[0]["loc"][:-1]), errors[0]
    )
    parts: list[str] = []
    models: list[type[BaseModel]] = [settings]
    for part in map(str, first["loc"]):
        tagged = [model for model in models if len(models) > 1 and part in _kinds(model)]
        if tagged:  # pydantic puts the `kind` into the location; it is no key
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
