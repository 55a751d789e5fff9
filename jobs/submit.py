"""python -m jobs.submit [--address URL] [--name NAME] [--once] [--env KEY ...] -- jobs.train [RECIPE.yaml] [...]

Ship this folder to a Ray cluster, run one of its commands there as a job, and follow the job to its end. stdout is the
job's log, so that its last line is the job's JSON; messages of this command go to stderr. The exit code is the job's
own; 130 if the job was stopped; 2 if nothing was submitted, with the reason in one line. (`ray job submit` ends with 0
or 1, whatever the job's exit code.)
"""

import argparse
import asyncio
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from aecore.core.errors import InputError
from jobs.cli import ENVIRONMENT
from pipelines.host.addresses import dashboard_address, store_address
from pipelines.host.environment import SUBMISSION_ID
from pipelines.host.messages import one_line, say

_SHIPPED = (
    "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "GIT_COMMIT", "RAY_JOB_STOP_WAIT_TIME_S",
)  # fmt: skip
"""Variables of this environment that the job gets, besides the settings in `DIABOLO__*`."""
_STOP_SECONDS = "60"  # Ray's default is 3, after which it kills a stopped driver before its MLflow runs are closed
_LARGE_FOLDER = 50 * 10**6  # bytes that are worth a warning; Ray refuses 512 MiB
_SILENCE_SECONDS = 60.0  # without a new line for so long, the log stream may be dead and is opened anew
_RETRY_SECONDS = 2.0  # between two attempts to reach the cluster
_AGENT_SECONDS = 60.0  # for which the cluster's head may still start the agent that runs jobs
_MOST_FAILURES = 150  # attempts in a row, after which the cluster is given up
_MOST_LOG_FAILURES = 5  # attempts in a row, after which the rest of an ended job's log is given up


def _connect(address: str) -> Any:
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers its environment variables to the argument
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)


def submit(args: list[str], connect: Callable[[str], Any] = _connect) -> int:
    """Submit the command after `--`, follow the job, and return its exit code; `connect` makes a client of an address.

    Raises:
        InputError: nothing was submitted.
        RuntimeError: the cluster refused the job, or stopped answering.
    """
    own, command = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    options = _options(own)
    if not command or not Path(command[0].replace(".", "/") + ".py").is_file():
        name = command[0] if command else "no command"
        raise InputError(f"{name}: not a command of this folder; write -- jobs.train RECIPE.yaml")
    variables = (os.environ.get(name, "") for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"))
    address = dashboard_address(next(filter(str.strip, (options.address or "", *variables)), ""))
    environment = _environment(options.env, address)
    recipes = [Path(arg) for arg in command[1:] if arg.endswith((".yaml", ".yml"))]
    _check_shipped(recipes)
    name = options.name or _identity(command, recipes, environment)
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):  # it becomes the name of a file on the head node
        raise InputError(f"--name {name}: use letters, digits, dots, dashes and underscores only")

    client = _ask(address, lambda: connect(address))
    jobs = {job.submission_id: job.status for job in _ask(address, client.list_jobs)}
    name = _free_id(name, jobs, options.once)
    _hand_in(client, address, name, command, {**environment, SUBMISSION_ID: name})
    say(f"{name}: submitted; `ray job stop {name}` stops it")
    return _exit_code(name, asyncio.run(_follow(client, name)))


def _hand_in(client: Any, address: str, name: str, command: list[str], environment: dict[str, str]) -> None:
    """Submit the job, and wait for the agent of the head, which runs jobs, where it has not started yet.

    Raises:
        InputError: the agent does not start, or somebody else has submitted a job of this name.
    """
    deadline, waiting = time.monotonic() + _AGENT_SECONDS, False
    runtime_env = {"working_dir": ".", "env_vars": environment}
    while True:
        try:
            client.submit_job(
                entrypoint=shlex.join(["python", "-m", *command]), submission_id=name, runtime_env=runtime_env
            )
            return
        except RuntimeError as error:
            if "already exists" in str(error):
                raise InputError(f"{name}: submitted by somebody else just now; see `ray job logs -f {name}`") from None
            if "No available agent" not in str(error):
                raise
        if time.monotonic() > deadline:
            raise InputError(
                f"{address}: the agent that runs jobs has not started on the head, maybe because another Ray of that "
                "machine has its port, 52365; restart the head with a free one, `ray start --head "
                "--dashboard-agent-listen-port PORT`"
            )
        if not waiting:
            say(f"{name}: waiting for the agent of the head, which runs jobs, {_AGENT_SECONDS:g} s at most")
            waiting = True
        time.sleep(_RETRY_SECONDS)


def _options(args: list[str]) -> argparse.Namespace:
    usage = "%(prog)s [options] -- jobs.train [RECIPE.yaml] [...]"
    parser = argparse.ArgumentParser("python -m jobs.submit", usage, (__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--address", help="URL of the dashboard (default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS)")
    parser.add_argument("--name", help="submission id (default: made of command, settings, commit and recipe)")
    parser.add_argument("--env", nargs="+", default=[], metavar="KEY", help="more of your variables for the job")
    parser.add_argument("--once", action="store_true", help="refuse what has succeeded under this submission id before")
    return parser.parse_args(args)


def _environment(keys: list[str], address: str) -> dict[str, str]:
    """Return the job's environment variables, settings included.

    Raises:
        InputError: a variable of `--env` is not set, or the job could not reach the MLflow store.
    """
    for key in keys:
        if key not in os.environ:
            raise InputError(f"--env {key}: not set in this environment; export it")
    variables = {k: v for k, v in os.environ.items() if k in (*keys, *_SHIPPED) or k.startswith(ENVIRONMENT)}
    uri = variables.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        raise InputError("MLFLOW_TRACKING_URI: not set; name a server, since a submitted job's own folder is deleted")
    if store_address(uri).startswith(("sqlite:", "file:")):
        absolute = uri.lower().startswith(("sqlite:////", "file:///"))
        if not absolute or urlsplit(address).hostname not in ("localhost", "127.0.0.1", "::1"):
            raise InputError(f"MLFLOW_TRACKING_URI {uri}: a file that the job cannot reach; name a server, http://...")
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {"RAY_JOB_STOP_WAIT_TIME_S": _STOP_SECONDS, "GIT_COMMIT": git.stdout.strip() or "unknown", **variables}


def _check_shipped(recipes: list[Path]) -> None:
    """Warn if Ray would upload a large folder, and raise an InputError if it would not upload a recipe."""
    files = _shipped_files()
    for recipe in recipes:
        if Path(os.path.relpath(recipe)) not in files:
            raise InputError(f"recipe {recipe}: does not reach the cluster; it is missing here, ignored, or elsewhere")
    size = sum(file.lstat().st_size for file in files if not file.is_dir())
    if size > _LARGE_FOLDER:
        say(f"warning: {size / 1e6:.0f} MB go to the cluster; list in .rayignore what the job does not need")


def _shipped_files() -> set[Path]:
    """Return the files of this folder that Ray uploads: all but those that `.gitignore` and `.rayignore` exclude.

    Ray has no public function for this. git reads the same patterns; in an empty repository beside the folder every
    file is untracked, so that patterns count for tracked files too, as they do for Ray. `.rayignore` files below the
    top folder are not read here, and repositories inside this one are not looked into.
    """
    ignored = os.environ.get("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", ".git,.venv,venv,__pycache__").split(",")
    patterns = [f"--exclude={name.strip()}" for name in ignored if name.strip()]
    if os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") != "1":
        patterns.append("--exclude-per-directory=.gitignore")
    if Path(".rayignore").is_file():
        patterns.append("--exclude-from=.rayignore")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # a git hook sets GIT_INDEX_FILE
    with tempfile.TemporaryDirectory() as empty:
        subprocess.run(["git", "init", "--quiet", empty], env=environment, check=True)
        command = ["git", f"--git-dir={empty}/.git", "--work-tree=.", "ls-files", "--others", "-z", *patterns]
        listed = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    return {Path(os.fsdecode(name)) for name in listed.split(b"\0") if name}


def _identity(command: list[str], recipes: list[Path], environment: dict[str, str]) -> str:
    """Return a submission id that is the same for the same command, settings, commit and content of the recipes."""
    settings = [f"{k}={v}" for k, v in sorted(environment.items()) if k == "GIT_COMMIT" or k.startswith(ENVIRONMENT)]
    digest = hashlib.sha256("\n".join([shlex.join(command), *settings]).encode())
    for recipe in recipes:
        digest.update(recipe.read_bytes())
    return "-".join([command[0].split(".")[-1], *(recipe.stem for recipe in recipes), digest.hexdigest()[:12]])


def _free_id(name: str, jobs: dict[str, Any], once: bool = False) -> str:
    """Return the first of `name`, `name-a2`, `name-a3` ... that is not in `jobs`, the status of each known job.

    Raises:
        InputError: a job of this name is still running, or has succeeded and is wanted only `once`.
    """
    free, attempt = name, 1
    while free in jobs:
        if not jobs[free].is_terminal():
            raise InputError(f"{free}: {str(jobs[free]).lower()} already; see `ray job logs -f {free}`, or stop it")
        if once and str(jobs[free]) == "SUCCEEDED":
            raise InputError(f"{free}: has succeeded already; see `ray job logs {free}`, or leave out --once")
        attempt += 1
        free = f"{name}-a{attempt}"
    return free


def _ask(address: str, question: Callable[[], Any]) -> Any:
    """Return the result of `question`, a call of the cluster's client.

    Raises:
        InputError: the cluster cannot be reached, asks for a token, or is no Ray cluster.
    """
    from ray.exceptions import AuthenticationError

    try:
        return question()
    except AuthenticationError as error:
        why = re.split(r"\. |\n", error.message)[0]
        why += "; export RAY_AUTH_MODE=token and put the cluster's token into ~/.ray/auth_token"
    except (RuntimeError, ValueError, KeyError) as error:
        why = f"not a Ray dashboard ({one_line(error)}); name its URL"
    except OSError:
        why = "no answer; is the address right, and the tunnel open (ray dashboard cluster.yaml)?"
    raise InputError(f"{address}: {why}")


async def _follow(client: Any, name: str) -> Any:
    """Print the job's log until the job has ended, and return Ray's details of the job.

    A log stream that breaks off or falls silent is opened anew; what was printed before is not printed again.

    Raises:
        RuntimeError: the cluster has not answered for a long time.
    """
    printed, failures, ended = 0, 0, False
    while failures < _MOST_FAILURES:
        stream = client.tail_job_logs(name)
        received = 0  # each stream starts at the log's first character
        while True:
            try:
                text = await asyncio.wait_for(anext(stream), _SILENCE_SECONDS)
            except Exception:  # how a stream ends says nothing about the job; its status is asked for below
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
            if ended and failures >= _MOST_LOG_FAILURES:
                say("warning: the end of the log is lost with its node")
                return details
        else:
            failures = 0
            print(rest, end="", flush=True)
            if ended:
                return details
        await asyncio.sleep(_RETRY_SECONDS)
    raise RuntimeError(f"{name}: the cluster does not answer; the job may still be running")


def _exit_code(name: str, details: Any) -> int:
    """Say how the job ended, and return its exit code: 130 if it was stopped, 128 + n if signal n killed it."""
    status, code = str(details.status), details.driver_exit_code
    reason = f" ({one_line(details.message)})" if status == "FAILED" and code is None else ""
    say(f"{name}: {status.lower()}{reason}")
    if status != "FAILED":
        return 0 if status == "SUCCEEDED" else 130
    return 128 - code if code and code < 0 else code or 1  # a negative code is minus the signal's number


def main() -> NoReturn:
    """Run the command. It does not use `cli.main`, which would print a second JSON object below the job's."""
    try:
        code = submit(sys.argv[1:])
    except (InputError, OSError, RuntimeError) as error:
        say(f"error: {error if isinstance(error, InputError) else one_line(error)}")
        code = 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        say("interrupted; a job that was submitted continues")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
