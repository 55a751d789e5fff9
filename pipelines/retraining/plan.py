"""What a firing of the retraining command would do, without doing it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from aecore.config.experiment import Experiment
from aecore.core.errors import join_names
from pipelines.cluster.resources import Resources
from pipelines.graph.stage import Stage
from pipelines.retraining import models
from pipelines.retraining.history import dates_to_decide, decided_runs, run_key, why_unchanged
from pipelines.retraining.rule import Rule

if TYPE_CHECKING:
    from pipelines.store.tracking import Tracker


def plan(
    model: str, experiment: Experiment, rule: Rule, tracker: "Tracker | None", resources: Resources
) -> Iterator[str]:
    """Yield, line by line, the dates that would be decided on and the stages that would run; nothing is written.

    Raises:
        InputError: the data cannot be used, or the recipe does not fit them or the champion.
    """
    days = dates_to_decide(model, rule, tracker) if tracker else [rule.logical_date]
    version = tracker.version(model, models.CHAMPION) if tracker else None
    yield f"{'dates':18} {join_names([day.isoformat() for day in days])}"
    yield f"{'champion':18} {'version ' + version.number if version else 'none yet'}"
    for day in days:
        if tracker and (run_id := tracker.find(run_key(model, day))):
            yield f"{day.isoformat():18} is decided, run {run_id}"
            continue
        candidate = models.candidate_of(experiment, day, rule, resources)
        facts = candidate.facts
        yield f"{day.isoformat():18} {facts.rows:,} rows of {facts.shape}, digest {facts.digest[:12]}"
        champion, stages = None, list[Stage]()
        if version and tracker:
            if reason := why_unchanged(model, candidate.identity, decided_runs(model, tracker), tracker):
                yield f"{'unchanged':18} {reason}"
                continue
            champion = models.load_champion(model, version, tracker)
            stages = [models.drift_stage(candidate, champion, rule)]
        metric = models.resolve_metric(rule, candidate, champion)
        if champion and rule.warm_start:
            candidate = models.start_from_champion(candidate, champion)
        stages += [*candidate.graph.kept(), models.contest_stage(candidate, champion, metric)]
        for stage in stages:
            run_id = tracker.find(stage.key) if tracker else None
            yield f"{stage.name:18} {stage.key[:12]}  {'finished, run ' + run_id if run_id else 'would run'}"
