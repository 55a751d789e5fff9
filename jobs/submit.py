"""python -m jobs.submit [--address URL] [--name NAME] [--once] [--env KEY ...] -- jobs.train [RECIPE.yaml] [...]

Ship this folder to a Ray cluster, run one of its commands there as a job, and follow it to its end. stdout is the job's
log, so its last line is the job's JSON; what this command has to say goes to stderr. The exit code is the job's own,
130 if it was stopped, 2 if nothing was submitted, told in one line. (`ray job submit` knows no more than 0 and 1.)
"""

import argparse
import asyncio
import hashlib
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from aecore.core.errors import InputError
from jobs.cli import ENVIRONMENT, say

_SHIPPED = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "GIT_COMMIT", "RAY_JOB_STOP_WAIT_TIME_S")
_STOP_SECONDS = "60"  # Ray kills a stopped driver after 3, before it has closed its MLflow runs
_LARGE = 50 * 10**6  # bytes; Ray refuses 512 MiB
_SILENCE = 60.0  # seconds without a line, after which the stream may be dead
_RETRY = 2.0  # seconds between two attempts to reach the cluster
_LOST, _LOGLESS = 150, 5  # attempts in vain, after which the cluster, or the log of an ended job, is given up


def _connect(address: str) -> Any:
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers its variables to its argument
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)


def submit(args: list[str], connect: Callable[[str], Any] = _connect) -> int:
    """Submit the command behind `--` with the client that `connect` makes of an address, and follow it; the exit code.

    Raises:
        InputError: nothing was submitted.
        RuntimeError: the cluster refused the job, or was lost.
    """
    own, command = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    parser = argparse.ArgumentParser("python -m jobs.submit", "%(prog)s [options] -- jobs.train [RECIPE.yaml] [...]")
    parser.add_argument("--address", help="URL of the dashboard (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS)")
    parser.add_argument("--name", help="submission id (default: of command, settings, commit and recipe)")
    parser.add_argument("--env", nargs="+", default=[], metavar="KEY", help="more of your variables for the job")
    parser.add_argument("--once", action="store_true", help="refuse what has succeeded under this submission id before")
    options = parser.parse_args(own)
    if not command or not Path(command[0].replace(".", "/") + ".py").is_file():
        raise InputError(f"{(command or ['no command'])[0]}: not a command of this folder; write -- jobs.train RECIPE")
    address = options.address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
    if not address.startswith(("http://", "https://")):
        raise InputError(f"address {address or 'missing'}: name the dashboard, --address http://HEAD:8265")
    environment = _environment(options.env, address)
    recipes = [Path(arg) for arg in command[1:] if arg.endswith((".yaml", ".yml"))]
    _check_shipped(recipes)
    name = options.name or _identity(command, recipes, environment)
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):  # becomes a file's name on the head
        raise InputError(f"--name {name}: letters, digits, dots, dashes and underscores only")
    client = _ask(address, lambda: connect(address))
    jobs = {job.submission_id: job.status for job in _ask(address, client.list_jobs)}
    name = _free_id(name, jobs, options.once)
    runtime_env = {"working_dir": ".", "env_vars": environment}
    try:
        client.submit_job(
            entrypoint=shlex.join(["python", "-m", *command]), submission_id=name, runtime_env=runtime_env
        )
    except RuntimeError as error:
        if "already exists" in str(error):
            raise InputError(f"{name}: submitted by another just now; see `ray job logs -f {name}`") from None
        raise
    say(f"{name}: submitted; `ray job stop {name}` stops it")
    details = asyncio.run(_follow(client, name))
    status, code = str(details.status), details.driver_exit_code
    say(f"{name}: {status.lower()}" + (f" ({_line(details.message)})" if status == "FAILED" and code is None else ""))
    if status != "FAILED":
        return {"SUCCEEDED": 0}.get(status, 130)
    return 128 - code if code and code < 0 else code or 1  # below 0 it is minus a signal


def _environment(keys: list[str], address: str) -> dict[str, str]:
    """The job's variables, settings among them; InputError if one is missing or MLflow out of the job's reach."""
    for key in keys:
        if key not in os.environ:
            raise InputError(f"--env {key}: not set here; export it")
    found = {k: v for k, v in os.environ.items() if k in (*keys, *_SHIPPED) or k.startswith(ENVIRONMENT)}
    uri = found.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise InputError("MLFLOW_TRACKING_URI: not set; name a server, a submitted job's own folder is thrown away")
    parts = urlsplit(uri)
    if parts.scheme in ("sqlite", "file", "") and not uri.startswith("databricks"):
        absolute = parts.path.startswith("//" if parts.scheme == "sqlite" else "/")
        if not absolute or urlsplit(address).hostname not in ("localhost", "127.0.0.1", "::1"):
            raise InputError(f"MLFLOW_TRACKING_URI {uri}: a file that the job cannot reach; name a server, http://...")
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {"RAY_JOB_STOP_WAIT_TIME_S": _STOP_SECONDS, "GIT_COMMIT": git.stdout.strip() or "unknown", **found}


def _check_shipped(recipes: list[Path]) -> None:
    """Warn if Ray would pack much of this folder; InputError if it would not pack a recipe."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    root, packed = Path.cwd(), list[Path]()
    excludes = packaging._get_excludes(root, ray_constants.get_runtime_env_default_excludes())
    gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") != "1"
    packaging._dir_travel(root, [excludes], packed.append, gitignore, logging.getLogger("jobs"))
    for recipe in recipes:
        if root / recipe not in packed:
            raise InputError(f"recipe {recipe}: does not reach the cluster; it is missing here, ignored or elsewhere")
    size = sum(path.stat().st_size for path in packed if path.is_file())
    if size > _LARGE:
        say(f"warning: {size / 1e6:.0f} MB go to the cluster; list in .rayignore what the job does not need")


def _identity(command: list[str], recipes: list[Path], environment: dict[str, str]) -> str:
    """The same submission id for the same command, settings, commit and bytes of the recipe."""
    settings = [f"{k}={v}" for k, v in sorted(environment.items()) if k == "GIT_COMMIT" or k.startswith(ENVIRONMENT)]
    digest = hashlib.sha256("\n".join([shlex.join(command), *settings]).encode())
    for recipe in recipes:
        digest.update(recipe.read_bytes())
    return "-".join([command[0].split(".")[-1], *(recipe.stem for recipe in recipes), digest.hexdigest()[:12]])


def _free_id(name: str, taken: dict[str, Any], once: bool = False) -> str:
    """`name`, or `name-a2`, `name-a3` ... after attempts that have ended; InputError if one has not, or, where it is
    wanted only once, has succeeded."""
    free, attempt = name, 1
    while free in taken:
        if not taken[free].is_terminal():
            raise InputError(f"{free}: {str(taken[free]).lower()} already; see `ray job logs -f {free}`, or stop it")
        if once and str(taken[free]) == "SUCCEEDED":
            raise InputError(f"{free}: has succeeded already; see `ray job logs {free}`, or leave out --once")
        attempt += 1
        free = f"{name}-a{attempt}"
    return free


def _ask(address: str, question: Callable[[], Any]) -> Any:
    """The cluster's answer; InputError if it cannot be reached, wants a token, or is no Ray."""
    from ray.exceptions import AuthenticationError

    try:
        return question()
    except AuthenticationError as error:
        why = re.split(r"\. |\n", error.message)[0]
        why += "; export RAY_AUTH_MODE=token and put the cluster's token into ~/.ray/auth_token"
    except (RuntimeError, ValueError, KeyError) as error:
        why = f"not a Ray dashboard ({_line(error)}); name its URL"
    except OSError:
        why = "no answer; is the address right, and the tunnel open (ray dashboard cluster.yaml)?"
    raise InputError(f"{address}: {why}")


async def _follow(client: Any, name: str) -> Any:
    """Print the job's log until it has ended, over streams that break off or fall silent; the job's details."""
    printed, failures, ended = 0, 0, False
    while failures < _LOST:
        stream = client.tail_job_logs(name)
        received = 0  # each stream starts at the log's first character
        while True:
            try:
                text = await asyncio.wait_for(anext(stream), _SILENCE)
            except Exception:  # how a stream ends tells nothing, only the job's status does
                break
            print(text[max(0, printed - received) :], end="", flush=True)
            received += len(text)
            printed = max(printed, received)
        try:
            details = client.get_job_info(name)
            ended = details.status.is_terminal()
            rest = client.get_job_logs(name)[printed:] if ended else ""
        except (OSError, RuntimeError):
            failures += 1
            if ended and failures >= _LOGLESS:
                say("warning: the end of the log is lost with its node")
                return details
        else:
            failures = 0
            print(rest, end="", flush=True)
            if ended:
                return details
        await asyncio.sleep(_RETRY)
    raise RuntimeError(f"{name}: the cluster does not answer; the job may go on")


def _line(text: object) -> str:
    return " ".join(str(text).split())[:200]


def main() -> NoReturn:
    """Run the command. Not by `cli.main`, which would print a second JSON object behind the job's."""
    try:
        code = submit(sys.argv[1:])
    except (InputError, OSError, RuntimeError) as error:
        say(f"error: {error if isinstance(error, InputError) else _line(error)}")
        code = 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        say("interrupted; a job that was submitted goes on")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
