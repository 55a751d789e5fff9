"""Waiting out an MLflow that does not answer: which errors may pass, and calls that are tried again until they do."""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from aecore.core.errors import OutageError, hide_secrets
from pipelines.host.messages import one_line, say

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds between the first two tries of a call, doubled for each further try, and the longest pause."""
HURRY_SECONDS, CLOSE_SECONDS = 1.5, 60.0
"""Seconds that closing a job's runs may take: when the job is to end now, and otherwise."""
_PASSING_CODES = {
    "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED",
    "ABORTED", "CANCELLED",
}  # fmt: skip
"""MLflow's codes for errors that may be gone later. MLflow calls a lost connection an internal error."""
_NETWORK_PACKAGES = {"azure", "boto3", "botocore", "google", "urllib3"}
"""Packages below MLflow whose exceptions are about the network."""
T = TypeVar("T")


def wait_for(call: Callable[[], T], uri: str, patience: float) -> T:
    """Return what `call` returns, trying again with growing pauses as long as MLflow does not answer.

    The answer to a call may be lost on its way, so that `call` may act twice.

    Args:
        uri: Address of the store, for messages.
        patience: Seconds for which MLflow may be away.

    Raises:
        OutageError: MLflow was away for longer than `patience`.
    """
    began, pause, warned = time.monotonic(), FIRST_WAIT, False
    while True:
        try:
            return call()
        except Exception as error:
            if not may_pass(error):
                raise
            reason = hide_secrets(one_line(error))
            left = began + patience - time.monotonic()
            if left <= 0:
                silence = f"has not answered for {patience:g} s" if patience else "does not answer"
                raise OutageError(
                    f"MLflow at {hide_secrets(uri)} {silence} ({reason}); the same command goes on from what is kept"
                ) from error
        if not warned:
            say(f"warning: MLflow does not answer ({reason}); waiting for it, {patience:g} s at most")
            warned = True
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_WAIT)


class PatientClient:
    """An MlflowClient each of whose calls waits out an outage. Each try of a call gets the same arguments."""

    def __init__(self, client: MlflowClient, uri: str, patience: float) -> None:
        self._client, self._uri, self._patience = client, uri, patience

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **kwargs: wait_for(partial(method, *args, **kwargs), self._uri, self._patience)


def may_pass(error: Exception) -> bool:
    """Return whether the same call may succeed later: the network or the server failed, the request was not refused."""
    if isinstance(error, MlflowException):
        # a server whose connections to its database are all in use calls that a bad request
        return error.error_code in _PASSING_CODES or "QueuePool limit" in str(error)
    code = getattr(getattr(error, "response", None), "status_code", None)  # of an artifact store over HTTP
    if code is not None:
        return code >= 500 or code in (408, 429)
    if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
        return False
    if getattr(error, "errno", None) == errno.EROFS:  # a disk that is read-only stays so; a full one may be cleared
        return False
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES


def within(seconds: float, act: Callable[[], None]) -> None:
    """Call `act`, but wait at most `seconds`; a call that hangs goes on in a thread that ends with the process."""

    def act_or_warn() -> None:
        try:
            act()
        except Exception as error:
            say(f"warning: {one_line(error)}")

    thread = threading.Thread(target=act_or_warn, daemon=True)
    thread.start()
    thread.join(seconds)


@contextmanager
def ignoring(*codes: str) -> Iterator[None]:
    """Ignore an MlflowException that has one of these error codes."""
    try:
        yield
    except MlflowException as error:
        if error.error_code not in codes:
            raise
