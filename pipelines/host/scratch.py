"""Temporary folders, deleted at the end of their process or, if it was killed, by the next process that makes one."""

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_PREFIX = "diabolo+"
_CLOCK_SECONDS = 2.0
"""Largest difference between two readings of the start time of one process. The readings differ if the machine's clock
was set in between."""


@contextmanager
def scratch(place: Path | None = None) -> Iterator[Path]:
    """Make a temporary folder for the block, in `place` or where the system keeps temporary files.

    Folders that killed processes of this machine have left in the same place are deleted first.
    """
    place = place or Path(tempfile.gettempdir())
    for folder in place.glob(f"{_PREFIX}*"):
        owner, _, _ = folder.name.removeprefix(_PREFIX).rpartition("+")
        if is_dead(owner.replace("+", " ")):
            shutil.rmtree(folder, ignore_errors=True)
    prefix = f"{_PREFIX}{me().replace(' ', '+')}+"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def all_temporary() -> Iterator[None]:
    """Send every temporary file that this process makes in the block, its libraries' too, to one scratch folder."""
    before = tempfile.tempdir
    with scratch() as folder:
        tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


def me() -> str:
    """Return a name that only this process has: host name, process number and start in Unix seconds."""
    process = psutil.Process()
    return f"{socket.gethostname()} {process.pid} {process.create_time()}"


def is_dead(owner: str) -> bool:
    """Return whether a process that `me` named has ended; False for any process of another host."""
    host, pid, created = (owner + "  ").split(" ")[:3]
    return host == socket.gethostname() and not _is_alive(int(pid), float(created))


def _is_alive(pid: int, created: float) -> bool:
    try:
        process = psutil.Process(pid)
        is_the_same = abs(process.create_time() - created) < _CLOCK_SECONDS
        return is_the_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
