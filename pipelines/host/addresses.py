"""The addresses of a Ray head, a dashboard and an MLflow store as users write them, judged before anything connects."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from aecore.core.errors import InputError

RAY_REMEDY = "name HOST:PORT of a Ray head, or unset it for a Ray of this job's own"
STORE_REMEDY = "name a server, http://HOST:5000, or a file, sqlite:///mlflow.db"
_HOST, _PORT = r"(?:\[[\da-fA-F:.]+\]|[\w.-]+)", r"[1-9]\d{0,4}"


def head_address(text: str) -> str | None:
    """Return what a value of RAY_ADDRESS names: HOST:PORT, "auto" for a Ray of this machine, None for an embedded one.

    Raises:
        InputError: The value is no address of a Ray head.
    """
    text = bare(text).rstrip("/")
    word = text.lower()
    if word in ("", "local", "auto"):
        return word if word == "auto" else None
    if word.startswith(("http:", "https:")):
        raise InputError(
            f"RAY_ADDRESS: {text} is a dashboard, which takes jobs from `python -m jobs.submit --address {text} -- "
            f"jobs.train`; to run a command itself, {RAY_REMEDY}"
        )
    if word.startswith("ray:"):
        raise InputError(
            f"RAY_ADDRESS: {text} is an address of Ray Client, through which no command runs here; {RAY_REMEDY}, or "
            "submit to the dashboard, `python -m jobs.submit --address http://HOST:8265 -- jobs.train`"
        )
    if re.fullmatch(_HOST, text):
        raise InputError(f"RAY_ADDRESS: {text} has no port; write {text}:6379, or unset it for a Ray of this job's own")
    if re.fullmatch(r"[\da-fA-F]*:[\da-fA-F:]*:[\da-fA-F]*", text):
        raise InputError(f"RAY_ADDRESS: {text} is an IPv6 address without brackets; write [ADDRESS]:PORT")
    if not re.fullmatch(f"{_HOST}:{_PORT}", text) or int(text.rpartition(":")[2]) > 65535:
        raise InputError(f"RAY_ADDRESS: {text} is not HOST:PORT; {RAY_REMEDY}")
    return text


def dashboard_address(text: str) -> str:
    """Return the address of a cluster's dashboard.

    Raises:
        InputError: The text is no address of a server.
    """
    address = _web_address(text)
    if address is None:
        raise InputError(f"address {text.strip() or 'missing'}: name the dashboard, --address http://HEAD:8265")
    return address


def store_address(text: str) -> str:
    """Return the address of an MLflow store, a file by its absolute path; SQLite in the working directory if it is
    blank.

    Schemes that are not known here are left to MLflow, which may have a plugin for them.

    Raises:
        InputError: The text is no address of a store.
    """
    text = bare(text) or "sqlite:///mlflow.db"
    scheme, colon, rest = text.partition(":")
    scheme = scheme.lower()
    if re.fullmatch(rf"([^\s/]+@)?{_HOST}:\d+(/.*)?", text):
        server = text.rpartition("@")[2]  # what stands before it may be a password
        raise InputError(f"MLFLOW_TRACKING_URI: {server} has no scheme; write http://{server}")
    if scheme in ("http", "https"):
        if address := _web_address(text):
            return address
        raise InputError(f"MLFLOW_TRACKING_URI: {text} is not an address of a server; write it as in http://HOST:5000")
    if scheme.startswith("sqlite"):
        return _sqlite_address(text)
    if scheme == "postgres":
        raise InputError(f"MLFLOW_TRACKING_URI: {text} has a scheme that MLflow does not know; write postgresql:{rest}")
    if scheme == "file" or not re.match(r"[a-zA-Z][\w+.-]+:|databricks", text):
        return _folder_address(text)
    return f"{scheme}:{rest}" if colon else text


def bare(text: str) -> str:
    """Return a value without the blanks and quotes around it, which `docker run --env-file` keeps."""
    return text.strip().strip("\"'").strip()


def _web_address(text: str) -> str | None:
    """Return the address of a server that speaks HTTP, without blanks around it, a slash at its end, or the page that a
    browser shows of it (#/...); None if the text is none."""
    text = text.strip()
    try:
        parts = urlsplit(text)
        is_right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query
    except ValueError:  # a port that is no number, or half a pair of brackets
        return None
    if not is_right or re.search(r"\s", text):
        return None
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _sqlite_address(text: str) -> str:
    file = re.fullmatch(r"sqlite:///(.+)", text, re.IGNORECASE)
    if file is None or file[1] == ":memory:":
        raise InputError(
            f"MLFLOW_TRACKING_URI: {text} names no file; write sqlite:///mlflow.db, or with four slashes an absolute "
            "path, sqlite:////FOLDER/mlflow.db"
        )
    path = Path(file[1]).expanduser().resolve()
    if re.search(r"\?|%[\da-fA-F]{2}", str(path)):
        raise InputError(
            f"MLFLOW_TRACKING_URI: MLflow reads the `?` or `%` in {path} as more than a part of a name; set it to a "
            "file elsewhere, sqlite:////FOLDER/mlflow.db"
        )
    return f"sqlite:///{path}"


def _folder_address(text: str) -> str:
    path = Path(text.removeprefix("file:").removeprefix("//") or "mlruns").expanduser().absolute()
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return path.as_uri()
    if re.fullmatch(r"[^:]+\.(db|sqlite3?)", text):
        raise InputError(f"MLFLOW_TRACKING_URI: {text} has no scheme; write sqlite:///{text}")
    raise InputError(
        f"MLFLOW_TRACKING_URI: {text} is a folder, and MLflow keeps runs in folders no longer; {STORE_REMEDY} "
        "(`mlflow migrate-filestore` copies the runs of a folder)"
    )
