"""Temporary folders that outlive their process only until the next one of ours comes by, however it was killed."""

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_PREFIX = "diabolo+"


@contextmanager
def scratch(place: Path | None = None) -> Iterator[Path]:
    """A temporary folder, in `place` or where the system has them; those that the killed have left there go."""
    place = place or Path(tempfile.gettempdir())
    for left in place.glob(f"{_PREFIX}*"):
        owner, _, _ = left.name.removeprefix(_PREFIX).rpartition("+")
        if is_dead(owner.replace("+", " ")):
            shutil.rmtree(left, ignore_errors=True)
    prefix = f"{_PREFIX}{me().replace(' ', '+')}+"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def all_temporary() -> Iterator[None]:
    """Whatever this process, its libraries included, makes of temporary files in the block lies in such a folder."""
    before = tempfile.tempdir
    with scratch() as folder:
        tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


def me() -> str:
    """This process among all of all machines."""
    process = psutil.Process()
    return f"{socket.gethostname()} {process.pid} {process.create_time()}"


def is_dead(owner: str) -> bool:
    """Whether a process of this machine, as `me` names it, has died; of other machines, nothing is known."""
    host, pid, created = (owner + "  ").split(" ")[:3]
    return host == socket.gethostname() and not _alive(int(pid), float(created))


def _alive(pid: int, created: float) -> bool:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - created) < 2  # a clock may have been set since
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
