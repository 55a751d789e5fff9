"""A lease: the right to work on a job, which one process has at a time, whatever fails.

A lease is a run in an experiment of its own. A process that wants a lease creates such a run and then looks: if its run
is the only one for the job, the process holds the lease; else it deletes its run and waits. If two come at once, at
least the later one sees the run of the other, so that two never hold the lease. The run with the smaller id stays, so
that one holds the lease.

The holder's heartbeat, a counter in a tag, shows that the holder lives. A process that waits deletes the run of a
holder that was silent for `SILENT_SECONDS`. No clocks of different machines are compared, and no process is looked up
by its number, since two containers may share a host name. A deleted run is never used again, so that a holder which was
only paused finds that its lease is lost.
"""

import itertools
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from mlflow import MlflowClient
from mlflow.entities import Run

from aecore.core.errors import TakenOverError
from pipelines.host.messages import say
from pipelines.host.scratch import me
from pipelines.store.client import PAGE_SIZE, Store, all_pages
from pipelines.store.patience import HURRY_SECONDS, ignoring, within

BEAT_SECONDS, POLL_SECONDS, SILENT_SECONDS = 5.0, 2.0, 20.0
"""Seconds between two heartbeats, between two looks at the leases, and of silence until a holder counts as dead."""
EXPERIMENT = "diabolo.leases"
_NOTE = (
    "Each run marks a job of Diabolo that is at work now; it is deleted when the job ends. `mlflow gc` removes deleted "
    "runs for good."
)
_KEY, _TOKEN, _BEAT, _OWNER = "lease.key", "lease.token", "lease.beat", "lease.owner"
_PROCESS = uuid.uuid4().hex
"""The first part of the tokens of this process's leases."""
_held: dict[str, "Lease"] = {}
"""This process's leases by token, those included that are being taken."""


class Lease:
    """The right of one process to work on a job: taken, kept by heartbeats, and given up.

    Args:
        key: Identity of the job.
        purpose: What the job is, for messages.
        on_removal: Called in a thread after the leases of drivers that died at other jobs were deleted.
    """

    def __init__(self, store: Store, key: str, purpose: str, on_removal: Callable[[], None] | None = None) -> None:
        self.store, self.key, self.purpose, self.on_removal = store, key, purpose, on_removal
        self.name = ""
        """Id of the lease's run; empty while there is none."""
        self.is_lost = False
        """Whether it is known that another driver has taken the lease over."""
        self._token = ""
        self._experiment_id = ""
        self._stopped = threading.Event()
        self._beats: dict[str, tuple[str, float]] = {}
        """Last heartbeat of each other lease, and when that heartbeat was first seen."""
        self._unheard: set[str] = set()
        """Other leases that have shown no new heartbeat since they were first seen."""
        self._looked_at = time.monotonic()

    def take(self) -> None:
        """Wait until no other living driver has the lease, then hold it."""
        try:
            self._experiment_id = _experiment_of_leases(self.store)
            has_told = False
            while rivals := self._look(self.store)[0] or self._claim():
                if not has_told:
                    say(
                        f"another driver ({rivals[min(rivals)]}) works on the same {self.purpose}: waiting until it "
                        f"has ended or, should it have died, for {SILENT_SECONDS:g} s without a sign of life"
                    )
                    has_told = True
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.release()
            raise
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Raise a TakenOverError if another driver has taken the lease over."""
        check_leases(self.store, [self.name])

    def is_taken_over(self) -> bool:
        """Return whether another driver has taken the lease over; if MLflow does not answer, what was known before."""
        with suppress(Exception):
            self.is_lost = self.is_lost or not _exists(self.store.direct, self.name)
        return self.is_lost

    def release(self) -> None:
        """Give the lease up. If MLflow does not answer within a moment, only the heartbeat ends: the lease expires."""
        self.stop()
        within(HURRY_SECONDS, partial(self.store.wait_for, self.remove))

    def stop(self) -> None:
        """End the heartbeat: even if `remove` fails, the lease will count as a dead driver's."""
        self._stopped.set()
        _held.pop(self._token, None)

    def remove(self) -> None:
        """Delete the lease, so that the next driver gets it at once."""
        _held.pop(self._token, None)
        if self.name:
            _delete(self.store.direct, self.name)

    def _claim(self) -> dict[str, str]:
        """Create the lease; delete it again if it has rivals. Return the rivals: owners of other leases, by lease."""
        self._create()
        until = time.monotonic() + POLL_SECONDS
        while (rivals := self._look(self.store)[0]) and self.name < min(rivals) and time.monotonic() < until:
            time.sleep(POLL_SECONDS / 20)
        if rivals:
            self.store.wait_for(self.remove)
            self.name = ""
        else:
            self.check()  # if this process was paused meanwhile, a driver that came and went has deleted the lease
        return rivals

    def _create(self) -> None:
        self._token = f"{_PROCESS}.{uuid.uuid4().hex}"
        _held[self._token] = self
        tags = {"mlflow.runName": self.purpose, _KEY: self.key, _TOKEN: self._token, _OWNER: me(), _BEAT: "0"}
        # if an answer is lost there are two runs with this token; `_look` deletes the one that has no name here
        self.name = self.store.client.create_run(self._experiment_id, tags=tags).info.run_id

    def _look(self, store: Store) -> tuple[dict[str, str], bool]:
        """Read all leases, and delete those that nobody holds.

        Returns:
            Other living drivers on the same job by the names of their leases, and whether any lease was deleted.
        """
        runs = _leases(store.client, self._experiment_id)
        now = time.monotonic()
        if now - self._looked_at > SILENT_SECONDS / 2:  # MLflow or this process was away: no heartbeat was seen
            self._beats.clear()
        self._looked_at = now
        rivals: dict[str, str] = {}
        dead: set[str] = set()
        others = {run.info.run_id: run.data.tags for run in runs if run.info.run_id != self.name}
        for name, tags in others.items():
            token = tags.get(_TOKEN, "")
            # of this process, but not held: a call made it although its answer was lost, or it could not be deleted
            is_forgotten = token.startswith(_PROCESS) and _held.get(token, self) is self
            if is_forgotten or self._silence(name, tags.get(_BEAT, ""), now) > SILENT_SECONDS:
                store.wait_for(partial(_delete, store.direct, name))
                dead.add(name)
            elif tags.get(_KEY) == self.key:
                rivals[name] = tags.get(_OWNER, "")
        self._unheard &= others.keys() - dead
        return rivals, bool(dead)

    def _silence(self, name: str, beat: str, now: float) -> float:
        """Return for how many seconds a lease has shown no other heartbeat than `beat`."""
        last = self._beats.get(name)
        if last is None or last[0] != beat:
            (self._unheard.add if last is None else self._unheard.discard)(name)
            last = self._beats[name] = beat, now
        return now - last[1]

    def _beat(self) -> None:
        hasty = self.store._replace(patience=0.0)
        for number in itertools.count(1):
            if self._stopped.wait(BEAT_SECONDS):
                return
            try:
                hasty.direct.set_tag(self.name, _BEAT, str(number))
                if self._unheard and self._look(hasty)[1] and self.on_removal:
                    self.on_removal()
            except Exception:  # in an outage nobody is heard, and nobody takes a lease over
                if not self._stopped.is_set() and self.is_taken_over():
                    # wakes the main thread, wherever it waits
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return


def held_leases() -> tuple[str, ...]:
    """Return the names of the leases that this process holds."""
    return tuple(lease.name for lease in _held.values() if lease.name)


def check_leases(store: Store, names: Iterable[str]) -> None:
    """Raise a TakenOverError if one of these leases is not held any more."""
    for name in names:
        if not _exists(store.client, name):
            raise TakenOverError(taken_over("job"))


def taken_over(purpose: str) -> str:
    """Return the message to a driver that has lost its lease."""
    return (
        f"another driver has taken this {purpose} over, since this one was silent for {SILENT_SECONDS:g} s; what that "
        "one does counts"
    )


def existing_leases(store: Store) -> set[str]:
    """Return the names of all leases that are held, or whose holders are not known to be dead yet."""
    return {run.info.run_id for run in _leases(store.client, _experiment_of_leases(store))}


def _leases(client: MlflowClient, experiment_id: str) -> list[Run]:
    return list(all_pages(partial(client.search_runs, [experiment_id], max_results=PAGE_SIZE)))


def _exists(client: MlflowClient, name: str) -> bool:
    with ignoring("RESOURCE_DOES_NOT_EXIST"):  # `mlflow gc` has removed it for good
        return bool(client.get_run(name).info.lifecycle_stage == "active")
    return False


def _delete(client: MlflowClient, name: str) -> None:
    with ignoring("RESOURCE_DOES_NOT_EXIST"):
        client.delete_run(name)


def _experiment_of_leases(store: Store) -> str:
    """Return the id of the experiment for leases, which is made if there is none, and restored if it was deleted."""
    client = store.client
    own_name = client.get_experiment(store.experiment_id).name
    name = own_name[: own_name.rfind("/") + 1] + EXPERIMENT  # hosted stores name experiments by paths
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        with ignoring("RESOURCE_ALREADY_EXISTS"):  # another driver has made it just now
            return client.create_experiment(name, tags={"mlflow.note.content": _NOTE})
        return _experiment_of_leases(store)
    if experiment.lifecycle_stage != "active":
        with ignoring("RESOURCE_DOES_NOT_EXIST"):  # another driver has restored it just now
            client.restore_experiment(experiment.experiment_id)
        for run in _leases(client, experiment.experiment_id):  # MLflow restores the runs, too, of jobs that ended
            _delete(client, run.info.run_id)
    return str(experiment.experiment_id)
