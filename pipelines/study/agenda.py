"""What a study has still to run: it hands out groups of trials, takes their endings, and tries lost trials again."""

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Protocol

from pipelines.host.messages import say
from pipelines.study.groups import alike, reference_groups
from pipelines.study.plan import TrialPlan

LATE = "the study's time was up"
"""The error of a trial that `budget.hours` cut off."""
_MOST_AS_ONE = 64
"""Most trials of a group, since a lost worker costs all of them. The training sees to memory."""
_MOST_PARTS = 4
"""Most groups for each device where devices may come later: a large group trains far faster than several small ones."""


class Source(Protocol):
    """Trials that follow from how others end: the settings that a search chooses, the rounds of a race."""

    ahead: bool
    """Whether all that `next` has to give may be taken at once; a search knows more the later it is asked."""

    def next(self) -> TrialPlan | None:
        """Return a trial to run now; None if there is none, or none before others have ended."""

    def ended(self, plan: TrialPlan, value: float | None) -> None:
        """Take the end of one of the trials; None stands for one without a value."""


@dataclass
class Endings:
    """Errors of trials that failed and last epochs of trials that were stopped, by the key of the trial's stage."""

    errors: dict[str, str] = field(default_factory=dict)
    stopped: dict[str, int] = field(default_factory=dict)
    """The epoch at which the scheduler stopped the trial."""


@dataclass
class Agenda:
    """The trials of a study that wait, that run and that have ended.

    Ray Tune asks it for the next group whenever there is room, so that nodes which join later find work, and trials
    that lost their worker run again while others run.
    """

    retries: int
    """Times that a trial runs again after its worker, its node or a connection was lost."""
    grows: bool = False
    """Whether devices may come later, so that work is kept for them."""
    plans: dict[str, TrialPlan] = field(default_factory=dict)
    """All trials that were ever added, by the keys of their stages."""
    endings: Endings = field(default_factory=Endings)
    running: dict[str, TrialPlan] = field(default_factory=dict)
    """Trials that were handed out and have not ended, by key."""
    sources: list[Source] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    """The measure to choose by of trials that an earlier call of the study has finished, by key."""
    ended: int = 0
    halted: str = ""
    """Why no further trial is handed out; empty while trials are."""
    _waiting: deque[list[TrialPlan]] = field(default_factory=deque)
    """Trials that wait: lists of such as can be trained as one, and a list of all seeds of each reference."""
    _source_of: dict[str, Source] = field(default_factory=dict)
    _began: dict[str, float] = field(default_factory=dict)
    _attempts: Counter[str] = field(default_factory=Counter)
    _total: int = 0
    _to_group: int = 0
    """Number of trials added that are no references."""

    def add(self, plans: Sequence[TrialPlan]) -> None:
        """Add trials whose settings are known."""
        self.plans |= {plan.stage.key: plan for plan in plans}
        self._waiting += reference_groups(plans)
        others = [plan for plan in plans if not plan.is_fixed_reference]
        self._waiting += alike(others)
        self._total += len(plans)
        self._to_group += len(others)

    def take(self, devices: int | None) -> list[TrialPlan]:
        """Return the next trials to run as one; none if there are none, or none before others have ended.

        Args:
            devices: GPUs that share the work; None trains each trial that is no reference alone, as on CPUs.
        """
        if self.halted:
            return []
        if not self._waiting:
            self._ask_sources()
        group = self._next_group(devices)
        self.running |= {plan.stage.key: plan for plan in group}
        return group

    def begin(self, keys: Sequence[str]) -> None:
        """Note that trials which were handed out have started."""
        self._began |= dict.fromkeys(keys, time.monotonic())

    def waiting(self) -> list[TrialPlan]:
        """Return the trials that wait."""
        return [plan for plans in self._waiting for plan in plans]

    def has_work(self) -> bool:
        """Return whether there is a trial to run."""
        if not self._waiting:
            self._ask_sources()
        return bool(self._waiting)

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Let trials that wait fail.

        Args:
            reasons: The reason of each by its key.
        """
        kinds = [[plan for plan in plans if plan.stage.key not in reasons] for plans in self._waiting]
        for plan in [plan for plan in self.waiting() if plan.stage.key in reasons]:
            self.fail(plan, reasons[plan.stage.key])
        self._waiting = deque(filter(None, kinds))

    @property
    def is_done(self) -> bool:
        """Whether nothing runs, and nothing will."""
        return not self.running and (bool(self.halted) or not self._waiting)

    def finish(self, plan: TrialPlan, value: float | None = None) -> None:
        """Note that a trial is finished, with the measure by which a search chooses."""
        self._end(plan, "finished", value)

    def stop(self, plan: TrialPlan, epoch: int, value: float | None) -> None:
        """Note that the scheduler stopped a trial after this epoch."""
        self.endings.stopped[plan.stage.key] = epoch
        self._end(plan, f"stopped after epoch {epoch}", value)

    def fail(self, plan: TrialPlan, reason: str) -> None:
        """Note that a trial failed for good."""
        self.endings.errors[plan.stage.key] = reason
        self._end(plan, f"failed: {reason}", None)

    def lose(self, plans: Sequence[TrialPlan], reason: str) -> None:
        """Note that trials which ran as one lost their worker, their node or a connection. They run again, in two
        halves, since one of them may be the cause; those that were lost too often fail."""
        self._attempts.update(plan.stage.key for plan in plans)
        again = [m for m in plans if self._attempts[m.stage.key] <= self.retries and not self.halted]
        for plan in plans:
            if plan not in again:
                self.fail(plan, reason)
        if again:
            more = f" and {len(again) - 1} more" if again[1:] else ""
            say(f"warning: {again[0].name}{more}: once more ({reason})")
        for plan in again:
            del self.running[plan.stage.key]
        half = ceil(len(again) / 2)
        self._waiting.extendleft(filter(None, (again[half:], again[:half])))

    def halt(self, reason: str) -> None:
        """Hand out no further trials; those that run go on."""
        say(reason)
        self.halted = reason

    def close(self, reason: str) -> None:
        """Let the trials that run or wait fail, and what a source has still to give: the study ends without them."""
        self.halted = ""
        for plan in list(self.running.values()):
            self.fail(plan, reason)
        self._ask_sources()
        self.endings.errors |= {plan.stage.key: reason for plan in self.waiting()}
        self._waiting.clear()

    def groups(self, devices: int | None) -> list[tuple[TrialPlan, int]]:
        """Return one trial of each kind that waits, and how many such trials are run as one at most."""
        return [(plans[0], min(len(plans), self._size(devices))) for plans in self._waiting]

    def _next_group(self, devices: int | None) -> list[TrialPlan]:
        if not self._waiting:
            return []
        plans = self._waiting.popleft()
        size = len(plans) if plans[0].is_fixed_reference else self._size(devices, len(plans))
        if plans[size:]:
            self._waiting.appendleft(plans[size:])
        return plans[:size]

    def _size(self, devices: int | None, beside: int = 0) -> int:
        """Return how many trials are to be trained as one, so that each device gets some.

        Where devices may come later, groups get smaller as less work remains (guided self-scheduling, Polychronopoulos
        & Kuck 1987).

        Args:
            beside: Number of trials to count beside those that wait.
        """
        if devices is None:
            return 1
        size = self._to_group // devices
        if self.grows:
            left = beside + sum(map(len, self._waiting))
            size = max(ceil(left / (2 * devices)), ceil(size / _MOST_PARTS))
        return max(1, min(size, _MOST_AS_ONE))

    def _ask_sources(self) -> None:
        """Let a trial wait that a source has, or all that can be known ahead; the sources take turns."""
        for _ in list(self.sources):
            self.sources.append(source := self.sources.pop(0))
            plans: list[TrialPlan] = []
            while (source.ahead or not plans) and (plan := source.next()):
                self.plans[plan.stage.key] = plan
                if plan.stage.key in self.before:
                    source.ended(plan, self.before[plan.stage.key])
                    continue
                self._source_of[plan.stage.key] = source
                plans.append(plan)
            if plans:
                self._waiting += alike(plans)
                self._total += len(plans)
                self._to_group = len(plans)
                return

    def _end(self, plan: TrialPlan, how: str, value: float | None) -> None:
        key = plan.stage.key
        self.running.pop(key, None)
        self.ended += 1
        seconds = time.monotonic() - self._began.get(key, time.monotonic())
        say(f"{self.ended} of {self._total}: {plan.name}: {how} ({seconds:.1f} s)")
        if source := self._source_of.get(key):
            source.ended(plan, value)
