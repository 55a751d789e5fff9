"""What a study will cost, by what is known of trials like its own.

A forecast adds up the missing trials. The seconds of a trial come from finished trials of the same shape in the store;
else from a probe, which computes a few steps; else they are guessed from the number of operations.
"""

import heapq
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from aecore.config.facts import Facts
from aecore.config.specs import Numerics
from pipelines.cluster.nodes import Node
from pipelines.cluster.placement import most_trials
from pipelines.cluster.resources import Resources
from pipelines.cluster.share import Share, share_of
from pipelines.graph.needs import device_memory
from pipelines.graph.stage import Stage
from pipelines.graph.work import guessed_seconds, shape_of
from pipelines.study.agenda import Agenda
from pipelines.study.groups import reference_groups
from pipelines.study.plan import COST_SHAPE, COST_WORK, TrialPlan, plan_trial, settings_to_try, shared_stages
from pipelines.study.schema import Study
from pipelines.study.worker import share_of_row

if TYPE_CHECKING:
    from pipelines.store.runs import Tracker

_NEWEST = 1000
"""Most finished trials of the store that a forecast looks at, the newest."""
_START_SECONDS, _REPORT_SECONDS = 20.0, 6.0
"""Seconds until Ray, Tune and the imports of its workers are ready, and seconds that the report takes."""
_TRIAL_SECONDS = 1.0
"""Seconds of a trial besides its stages: its worker gets it, and MLflow gets its results."""
_SAME = 0.02
"""Largest relative difference of work between trials of one shape that count as equal."""
HOUR = 3600.0
SHARED, ALL = "shared stages", "all rows"
"""Labels of the stages that several trials share, which are computed before the trials, and of the sum."""

Group = list[TrialPlan]
"""Trials that one worker computes."""
Basis = Literal["measured", "scaled", "probed", "guessed"]
_FACTORS: dict[Basis, float] = {"measured": 1.15, "scaled": 1.35, "probed": 1.3, "guessed": 3.0}
"""For each basis of an estimate a factor: the true cost most likely lies between the estimate divided by it and the
estimate times it."""
_FEW_SPREAD = 0.15
"""Relative standard deviation that is assumed between trials where fewer than three are known."""
_WORDS: dict[Basis, str] = {
    "measured": "measured on finished trials like these ({count})",
    "scaled": "scaled from finished trials with other epochs or rows ({count})",
    "probed": "probed by a few steps",
    "guessed": "guessed from the number of operations",
}


@dataclass(frozen=True)
class Cost:
    """Seconds of CPUs and of GPUs: the share that was held, times the seconds for which it was held."""

    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.cpu_seconds + other.cpu_seconds, self.gpu_seconds + other.gpu_seconds)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.cpu_seconds * factor, self.gpu_seconds * factor)

    @classmethod
    def of(cls, share: Share, seconds: float) -> "Cost":
        """Return the cost of holding a share for some seconds."""
        return cls(share.cpus * seconds, share.gpus * seconds)

    def hours(self) -> dict[str, float]:
        """Return the cost in hours, as it stands in the last line of a job."""
        return {"cpu_hours": round(self.cpu_seconds / HOUR, 4), "gpu_hours": round(self.gpu_seconds / HOUR, 4)}


class Sample(NamedTuple):
    """What a finished trial has cost, or what one of its stages would cost by a probe."""

    shape: str
    """See `shape_of`."""
    work: float
    """See `guessed_seconds`."""
    cost: Cost


class Machine(NamedTuple):
    """The share of the cluster that each trial gets, and how many trials run side by side."""

    share: Share
    slots: int


class Estimate(NamedTuple):
    """What a trial or a shared stage will cost."""

    cost: Cost
    seconds: float
    """For how long it holds its share of the machine."""
    basis: Basis
    samples: int = 0
    """Number of finished trials that the estimate is based on."""
    factor: float = 1.0
    """The truth lies between the estimate divided by this factor and the estimate times it, most likely."""


class RowForecast(NamedTuple):
    """What the missing trials of a study row will cost, or those of all rows."""

    label: str
    trials: int
    seconds: float
    """Wall time: for a study row the part of the study's time that its trials take."""
    cost: Cost
    low: float
    """The truth lies between `low` and `high` times the forecast, most likely."""
    high: float
    basis: str
    """What the forecast is based on, in words."""


class Forecast(NamedTuple):
    """What the missing trials of a study will cost."""

    rows: tuple[RowForecast, ...]
    total: RowForecast


def machine_for(groups: Sequence[Sequence[TrialPlan]], resources: Resources, nodes: Sequence[Node]) -> Machine:
    """Return the share of the nodes that each group of trials gets, and how many groups run side by side."""
    resources = resources if resources.cpus else resources.model_copy(update={"cpus": 1})
    needs = [device_memory(stage, len(group)) or 0 for group in groups for stage in group[0].stages().values()]
    share = share_of(resources, max(needs, default=0), nodes=nodes)
    most = most_trials(share, nodes)
    return Machine(share, min(most, resources.max_concurrent or most))


def groups_of(plans: Sequence[TrialPlan], study: Study, resources: Resources, nodes: Sequence[Node]) -> list[Group]:
    """Divide trials into the groups that run as one, as the study itself would on these nodes."""
    gpus = 0 if resources.gpus == 0 or study.scheduler == "asha" else int(sum(n.gpus * n.count for n in nodes))
    agenda = Agenda(retries=0)
    agenda.add(plans)
    return list(iter(lambda: agenda.take(min(gpus, resources.max_concurrent or gpus) or None), []))


def finished_samples(tracker: "Tracker") -> list[Sample]:
    """Return what the newest finished trials of the store have cost, whatever study they belong to, by one search."""
    samples = []
    for run in tracker.search(f"attributes.status = 'FINISHED' and tags.`{COST_SHAPE}` LIKE '%'", _NEWEST):
        metrics, tags = run.data.metrics, run.data.tags
        wall = (run.info.end_time - run.info.start_time) / 1000
        cost = Cost(metrics.get("cpu_seconds", wall), metrics.get("gpu_seconds", 0.0))
        samples.append(Sample(tags[COST_SHAPE], float(tags[COST_WORK]), cost))
    return samples


def forecast(
    plans: Sequence[TrialPlan], machine: Machine, known: Sequence[Sample], probed: Sequence[Sample] = ()
) -> Forecast:
    """Return what trials will cost.

    Args:
        plans: The missing trials.
        known: Finished trials, of this study and of others.
        probed: Stages that a probe has computed.
    """
    groups = reference_groups(plans) + [[plan] for plan in plans if not plan.is_fixed_reference]  # as they begin
    shared = shared_stages(plans)
    oracle = _Oracle(machine.share, known, probed)
    stages = [oracle.stages([stage], machine.share) for stage in shared]
    keys = {stage.key for stage in shared}
    rows: dict[str, list[Estimate]] = {}
    lengths = []
    for group in groups:
        seen = set(keys)
        ends = 0.0
        for plan in group:
            estimate = oracle.trial(plan, seen)
            rows.setdefault(plan.row, []).append(estimate)
            seen |= plan.stages().keys()
            ends += estimate.seconds
        lengths.append(ends)
    if stages:
        rows = {SHARED: stages, **rows}
    wall = _seconds_side_by_side([one.seconds for one in stages], machine.slots)
    wall += _seconds_side_by_side(lengths, machine.slots) + (_START_SECONDS + _REPORT_SECONDS if plans else 0)
    lines = [_summed(row, one, sum(e.seconds for e in one) / machine.slots) for row, one in rows.items()]
    total = _summed(ALL, [one for row in rows.values() for one in row], wall)
    return Forecast(tuple(lines), total._replace(trials=len(plans)))


def plans_of_search(study: Study, facts: Facts, numerics: Numerics) -> list[TrialPlan]:
    """Return trials like those that Optuna will choose, which are not known yet: their settings are drawn at random."""
    drawn = study.model_copy(update={"search": "random"})
    return [
        plan_trial(study, row, settings, seed, facts, numerics)
        for row in (study.searched_rows if study.search == "optuna" else ())
        for number, settings in enumerate(settings_to_try(drawn, row))
        for seed in (study.seeds if number == 0 else study.seeds[:1])
    ]


class _Oracle:
    """Estimates the cost of trials and stages from what is known of others."""

    def __init__(self, share: Share, known: Sequence[Sample], probed: Sequence[Sample]) -> None:
        self.share, self.probed = share, _by_shape(probed)
        # seconds on a GPU say nothing of a CPU
        self.known = _by_shape([one for one in known if bool(one.cost.gpu_seconds) == bool(share.gpus)])
        self.on_cpus = _by_shape([one for one in known if not one.cost.gpu_seconds])
        speeds = [_held(one.cost, share) / one.work for ones in self.known.values() for one in ones if one.work]
        self.speed = statistics.median(speeds) if speeds else None
        """Seconds of finished trials here by their guessed seconds."""

    def trial(self, plan: TrialPlan, others: set[str]) -> Estimate:
        """Estimate a trial.

        Args:
            others: Keys of the stages that are computed before the trial.
        """
        share = share_of_row(plan.row, self.share)
        known = self.known if share.gpus else self.on_cpus
        shape, work = cost_of_plan(plan) if known else ("", 0.0)
        if same := known.get(shape):
            near = _nearest(same, work)
            ratios = [work / one.work for one in near]
            held = [_held(one.cost, share) * ratio for one, ratio in zip(near, ratios, strict=True)]
            basis: Basis = "measured" if abs(math.log(ratios[0])) < _SAME else "scaled"
            spread = statistics.stdev(held) / statistics.mean(held) if len(held) > 2 else _FEW_SPREAD
            cost = sum((one.cost * ratio for one, ratio in zip(near, ratios, strict=True)), Cost()) * (1 / len(near))
            factor = max(_FACTORS[basis], 1 + 2 * spread)
            return Estimate(cost, statistics.mean(held), basis, len(near), factor)
        own = [stage for key, stage in plan.stages().items() if stage.kept and key not in others]
        return self.stages(own, share, _TRIAL_SECONDS)

    def stages(self, stages: Sequence[Stage], share: Share, more: float = 0.0) -> Estimate:
        """Estimate stages that one worker computes, with `more` seconds for what it does besides."""
        basis: Basis = "probed"
        total, held = Cost.of(Share(0, 1), more), 0.0 if share.gpus else more
        for stage in stages:
            work = guessed_seconds(stage)
            if self.probed and (same := self.probed.get(shape_of([stage]))):
                near = _nearest(same, work)[0]
                seconds = near.cost.cpu_seconds * work / near.work
            else:
                basis, seconds = "guessed", work * (self.speed or 1.0)
            on_gpu = stage.trains and share.gpus > 0
            total += Cost.of(share if on_gpu or not share.gpus else Share(0, 1), seconds)
            held += seconds if on_gpu or not share.gpus else 0.0  # tasks on CPUs measure beside the next trials
        factor = _FACTORS[basis] if basis == "probed" or self.speed is None else _FACTORS[basis] ** 0.5
        return Estimate(total, held, basis, factor=factor)


def cost_of_plan(plan: TrialPlan) -> tuple[str, float]:
    """Return the shape of a trial's work and its guessed seconds, as the tags of its run say them."""
    tags = plan.tags()
    return tags[COST_SHAPE], float(tags[COST_WORK])


def describe(forecast: Forecast, bound: bool = False) -> Iterator[str]:
    """Yield the lines of a forecast as a table, the whole study last.

    Args:
        bound: The trials may be stopped early, so that the forecast is the most that the study costs.
    """
    yield f"{'forecast':24} {'trials':>6} {'seconds':>9} {'CPU-hours':>10} {'GPU-hours':>10}  how sure"
    for row in (*forecast.rows, forecast.total):
        hours = row.cost * (1 / HOUR)
        trials = "" if row.label == SHARED else row.trials
        yield (
            f"{row.label:24} {trials:>6} {row.seconds:>9.0f} {hours.cpu_seconds:>10.4f} {hours.gpu_seconds:>10.4f}  "
            f"{row.low:.0%} to {row.high:.0%} of this, {row.basis}"
        )
    if bound:
        yield "this is the most it costs: trials may stop early"
    if "guessed" in forecast.total.basis:
        yield "--plan probe computes a few steps of each kind of trial first, and knows better"


def _held(cost: Cost, share: Share) -> float:
    """Return for how many seconds a trial of this cost holds its share."""
    return cost.gpu_seconds / share.gpus if share.gpus else cost.cpu_seconds / share.cpus


def _by_shape(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    shapes: dict[str, list[Sample]] = {}
    for sample in samples:
        shapes.setdefault(sample.shape, []).append(sample)
    return shapes


def _nearest(samples: Sequence[Sample], work: float) -> list[Sample]:
    """Return the samples whose work is nearest to `work`."""
    distances = [abs(math.log(one.work / work)) for one in samples]
    return [one for one, distance in zip(samples, distances, strict=True) if distance <= min(distances) + _SAME]


def _seconds_side_by_side(lengths: Sequence[float], slots: int) -> float:
    """Return when the last of some tasks ends, each started in turn as soon as one of the slots is free."""
    ends = [0.0] * slots
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def _summed(label: str, estimates: Sequence[Estimate], seconds: float) -> RowForecast:
    """Return the sum of estimates, with the interval in which it lies if all err in the same direction."""
    held = sum(one.seconds for one in estimates) or 1.0
    high = sum(one.seconds * one.factor for one in estimates) / held
    low = sum(one.seconds / one.factor for one in estimates) / held
    cost = sum((one.cost for one in estimates), Cost())
    counts: dict[Basis, int] = {}
    for one in estimates:
        counts[one.basis] = max(one.samples, counts.get(one.basis, 0))
    basis = ", ".join(_WORDS[name].format(count=count) for name, count in counts.items())
    return RowForecast(label, len(estimates), seconds, cost, low, high, basis)
