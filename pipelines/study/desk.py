"""Between Ray Tune and the agenda: how much work the cluster has room for, and what the reports of trials mean."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from aecore.core.errors import InputError, TakenOverError
from pipelines.cluster.placement import most_trials
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share, count_gpus
from pipelines.execution.chain import cause_of, may_pass
from pipelines.host.messages import one_line
from pipelines.study.agenda import Agenda
from pipelines.study.measuring import Measured, Measuring
from pipelines.study.plan import TrialPlan
from pipelines.study.schema import Study
from pipelines.study.spending import Spending

_LOOK_SECONDS = 5.0
"""Seconds between two looks at what the cluster holds."""
_POLL_SECONDS = 0.2
"""Seconds between two looks at the tasks that measure."""


class Room:
    """How many groups of trials the cluster can run at once, by the nodes that are up and those that may come."""

    def __init__(self, share: Share, resources: Resources, as_one: bool) -> None:
        """
        Args:
            share: What each group gets of the cluster.
            as_one: Whether trials on GPUs are trained together as one.
        """
        self._share, self._resources, self._as_one = share, resources, as_one
        self._looked_at = float("-inf")
        self._slots, self._devices = 1, 0

    @property
    def slots(self) -> int:
        """The number of groups that can run at once."""
        self._look()
        return self._slots

    @property
    def devices(self) -> int | None:
        """The number of GPUs that share the trials; None where each trial is trained alone."""
        self._look()
        return self._devices or None

    def _look(self) -> None:
        if time.monotonic() - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()
        most = self._resources.max_concurrent
        holds = most_trials(self._share)
        self._slots = min(holds, most or holds)
        if self._as_one and self._share.gpus:
            with suppress(InputError):  # the last GPU of the type asked for may be lost for a while
                gpus = count_gpus(self._resources)
                self._devices = min(gpus, most or gpus) or self._devices


class Desk:
    """Hands out the trials of an agenda group by group, and enters in it how they end."""

    def __init__(
        self, study: Study, agenda: Agenda, room: Room, measuring: Measuring | None, spending: Spending
    ) -> None:  # fmt: skip
        """
        Args:
            measuring: Measures the trials that were trained; None where trials measure themselves.
        """
        self.study, self.agenda, self.room, self.measuring, self.spending = study, agenda, room, measuring, spending
        self.taken_over = ""
        """What a worker says that could not commit, since another driver works on the study now."""
        self._open = 0
        """Number of groups that were handed out and have not come back."""
        self._polled_at = 0.0

    def next_config(self) -> dict[str, Any] | None:
        """Return the config of the next of Tune's trials; None if there is none, or no room."""
        self.poll()
        # none in reserve: Tune would start it where a CPU is left for measuring, or beyond max_concurrent
        group = self.agenda.take(self.room.devices) if self._open < self.room.slots else []
        if not group:
            return None
        self._open += 1
        return config_of(group)

    def poll(self) -> None:
        """Take the measures of trials that were trained before, and halt the study if its budget is spent."""
        if time.monotonic() - self._polled_at < _POLL_SECONDS:
            return
        self._polled_at = time.monotonic()
        if self.measuring:
            self.take_measured(self.measuring.take_ended())
        if not self.agenda.halted and (reason := self.spending.exhausted()):
            self.agenda.halt(reason)

    def take_measured(self, measured: Iterable[Measured]) -> None:
        """Enter how the measuring of trials ended."""
        for plan, outcome in measured:
            if isinstance(outcome, Exception):
                self._fail([plan], reason_of(outcome), may_pass(cause_of(outcome)))
            else:
                self.spending.add(outcome.cost)
                self.agenda.finish(plan, outcome.metrics.get(self.study.choose_metric))

    def begin(self, trial_id: str, config: Mapping[str, Any], share: Share) -> None:
        """Note that Tune has started a group of trials, with this share of the cluster."""
        self.spending.begin(trial_id, share)
        self.agenda.begin(keys_of(config))

    def take_ended(self, trial_id: str, config: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Enter how the trials of a group ended.

        Args:
            config: The config of Tune's trial.
            report: Its last report.
        """
        self._open -= 1
        self.spending.end(trial_id)
        for plan in self._plans(config):
            key = plan.stage.key
            if failure := report.get("errors", {}).get(key):
                self._fail([plan], *failure)
            elif opened := report.get("trained", {}).get(key):
                assert self.measuring is not None
                self.measuring.start(plan, opened)
            elif report.get("ended"):
                self.agenda.finish(plan, report.get("chosen"))
            else:
                self.agenda.stop(plan, report.get("epoch", 0), report.get("chosen"))

    def take_lost(self, trial_id: str, config: Mapping[str, Any], reason: str) -> None:
        """Enter that a group lost its worker. What went wrong in a stage is reported and does not come here."""
        self._open -= 1
        self.spending.end(trial_id)
        self._fail(self._plans(config), reason, True)

    def _fail(self, plans: Sequence[TrialPlan], reason: str, may_pass: bool) -> None:
        if TakenOverError.__name__ in reason and not self.agenda.halted:
            self.taken_over = reason
            self.agenda.halt(reason)
        if may_pass:
            self.agenda.lose(plans, reason)
            return
        for plan in plans:
            self.agenda.fail(plan, reason)

    def _plans(self, config: Mapping[str, Any]) -> list[TrialPlan]:
        plans = [self.agenda.plans[key] for key in keys_of(config)]
        return [plan for plan in plans if plan.stage.key in self.agenda.running]


def config_of(group: Sequence[TrialPlan]) -> dict[str, Any]:
    """Return the config with which one of Tune's trials computes a group of trials."""
    return {
        "data": group[0].data,  # a group is of one data set
        "trials": [
            {"row": plan.row, "settings": plan.settings, "seed": plan.seed, "key": plan.stage.key} for plan in group
        ],
    }


def keys_of(config: Mapping[str, Any] | None) -> list[str]:
    """Return the keys of the trials that one of Tune's trials consists of."""
    return [one["key"] for one in (config or {}).get("trials", [])]


def reason_of(error: Exception) -> str:
    """Return one line for the error with which a trial ended, without the traceback that Ray puts around it."""
    cause = cause_of(error)
    lines = str(cause).strip().splitlines() or [""]
    return one_line(f"{type(cause).__name__}: {lines[-1]}", 300)
