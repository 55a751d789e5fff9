"""Retrains a model: trains a challenger where that is needed, and makes the better model champion; plans; rolls back.

A firing is one scheduled run of `jobs.retrain`. Each decision is one run in MLflow, for a model and a logical date,
however many firings there are for them. The aliases of the model in MLflow's registry say what was decided.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from aecore.config.experiment import Data, Experiment
from aecore.core.errors import InputError, OutageError, join_names, shorten
from aecore.core.fingerprint import fingerprint, unhashed
from aecore.core.types import describe_shape
from aecore.data.dataset import describe
from pipelines.cluster.resources import Resources
from pipelines.execution.chain import Outcome, compute
from pipelines.execution.journal import noted
from pipelines.execution.summary import job_metrics, train_seconds
from pipelines.graph.description import Description, data_name, describe_scores
from pipelines.graph.stage import Stage
from pipelines.host.scratch import scratch
from pipelines.retraining import models
from pipelines.retraining.history import dates_to_decide, decided_runs, report, run_key, why_unchanged
from pipelines.retraining.models import CHALLENGER, CHAMPION, PREVIOUS, Candidate, Champion
from pipelines.retraining.rule import Decision, Metric, Rule, decide

if TYPE_CHECKING:
    from pipelines.store.models import Version
    from pipelines.store.runs import Tracker


@dataclass(frozen=True, kw_only=True)
class Firing:
    """One scheduled run of `jobs.retrain`: the model and the logical date to decide on, and the means to do so."""

    model: str
    """Name of the registered model."""
    experiment: Experiment
    """The recipe; {date} in `data.path` stands for `day`."""
    rule: Rule
    day: date
    """The logical date."""
    tracker: "Tracker"
    resources: Resources
    say: Callable[[str], None]
    """Prints a line of progress."""
    tags: Mapping[str, str]
    """Further tags of the run."""


def retrain(firing: Firing) -> dict[str, Any]:
    """Decide on a model for a logical date and return the report; a date that is decided already is only reported.

    Raises:
        InputError: the data are not of the kind that the champion was trained on, or the recipe does not fit them. The
            champion stays.
    """
    tracker, model, day = firing.tracker, firing.model, firing.day.isoformat()
    key = run_key(model, firing.day)
    if run_id := tracker.find(key):
        return report(run_id, tracker)
    tags = {"model": model, "logical.date": day, **firing.tags}
    about = f"What: whether the data of {day} make a better champion of models:/{model}."
    shown = Description(f"{model} {day}", about)
    with tracker.job_run("retrain", key, tags, {"model": model, "logical_date": day}, shown) as run_id:
        known = tracker.client.get_run(run_id).data.tags
        version = tracker.models.version(model, CHAMPION)
        if version and version.tags.get("run") == run_id:
            # an earlier firing was cut off between the promotion of its model and this entry
            tracker.log_summary(run_id, {}, {"decision": "promoted"})
        elif "decision" not in known:  # otherwise another firing has decided while this one waited for the run
            try:
                _decide(firing, run_id, version)
            except Exception as error:
                with suppress(OutageError):
                    tracker._replace(patience=0.0).client.set_tag(run_id, "reason", shorten(str(error), 1000))
                raise
        decided = report(run_id, tracker)
        shown.results = _results(decided, tracker)
        return decided


def _decide(firing: Firing, run_id: str, version: "Version | None") -> None:
    """Look at the data, and train a challenger for the champion, `version`, unless there is a reason not to."""
    tracker, rule, model, day = firing.tracker, firing.rule, firing.model, firing.day.isoformat()
    like = models.known_columns(model, version, tracker)
    candidate = models.candidate_of(firing.experiment, firing.day, rule, firing.resources, like)
    tracker.log_summary(run_id, {}, {"data.digest": candidate.facts.digest})
    data = candidate.graph.experiment.data
    about = describe(data, candidate.facts)
    for line in about:
        firing.say(line)
    tracker.log_data(run_id, data_name(data), candidate.facts, about)
    decided = decided_runs(model, tracker)
    if decided and decided[0]["logical.date"] > day:
        later = decided[0]["logical.date"]
        _conclude(firing, run_id, Decision("unchanged", f"{later}, a later date, is decided already"))
        return
    if version and (reason := why_unchanged(model, candidate.identity, decided, tracker)):
        _conclude(firing, run_id, Decision("unchanged", reason), {"identity": candidate.identity})
        return
    champion = models.load_champion(model, version, tracker) if version else None
    metric = models.resolve_metric(rule, candidate, champion)
    drift = None
    if champion:
        models.check_schema(candidate, champion)
        drift = _measure_drift(firing, run_id, models.drift_stage(candidate, champion, rule))
        if rule.only_on_drift and not drift["drifted"]:
            _conclude(firing, run_id, Decision("kept", f"{drift['words']}, so nothing was trained"))
            return
        if rule.warm_start:
            candidate = models.start_from_champion(candidate, champion)
    _challenge(firing, run_id, candidate, champion, metric, drift)


def _challenge(
    firing: Firing, run_id: str, candidate: Candidate, champion: Champion | None, metric: Metric,
    drift: Mapping[str, Any] | None,
) -> None:  # fmt: skip
    """Train the candidate and compare it with the champion, again if the champion has changed meanwhile; then promote
    the better one."""
    tracker, model = firing.tracker, firing.model
    while True:
        contest = models.contest_stage(candidate, champion, metric)
        outcomes = _compute(firing, run_id, [*candidate.graph.kept(), contest])
        parent = champion.number if champion else ""
        number = tracker.models.register(
            model,
            tracker.models.logged_by(outcomes["finetune"].run_id),
            {
                "run": run_id, "identity": candidate.identity, "stage.key": candidate.finetune.key,
                "contest.key": contest.key, "data.digest": candidate.facts.digest,
                "logical.date": firing.day.isoformat(), "parent.version": parent,
                **models.column_tag(candidate),
            },
        )  # fmt: skip
        with tracker.lease(_promotion_key(model), f"promotion of {model}") as check_lease:
            version = tracker.models.version(model, CHAMPION)
            if (version.number if version else "") == parent:
                decision = decide(firing.rule, metric, outcomes["contest"].metrics, number, parent, drift)
                # written before the aliases change: a firing that is cut off in between is repeated with the same
                # result
                tags = {"model.version": number, "parent.version": parent, "identity": candidate.identity}
                tracker.log_summary(run_id, {}, {**tags, "reason": decision.reason})
                check_lease()
                tracker.models.set_alias(model, CHALLENGER, number)
                if decision.status == "promoted":
                    if parent:
                        tracker.models.set_alias(model, PREVIOUS, parent)
                    tracker.models.set_alias(model, CHAMPION, number)
                _conclude(firing, run_id, decision)
                return
            if version and version.number == number:  # another firing has made the same model of the same data
                _conclude(firing, run_id, Decision("unchanged", f"version {number} is the champion already"))
                return
        now = f"version {version.number}" if version else "none"
        firing.say(f"the champion has changed meanwhile, it is {now} now: comparing once more")
        champion = models.load_champion(model, version, tracker) if version else None
        if champion:
            models.check_schema(candidate, champion)


def _measure_drift(firing: Firing, run_id: str, stage: Stage) -> Mapping[str, Any]:
    """Compare the new rows of data with the champion's; return the findings, and log them as a table and a figure."""
    outcome = _compute(firing, run_id, [stage])["drift"]
    findings = firing.tracker.restore(outcome.run_id).config
    with scratch() as folder:
        (folder / "drift.csv").write_text(findings["table"])
        firing.tracker.save_figures(outcome.run_id, folder)
        firing.tracker.log_folder(run_id, folder, "drift")
    firing.say(findings["words"])
    return findings


def _compute(firing: Firing, run_id: str, stages: list[Stage]) -> dict[str, Outcome]:
    """Restore or compute stages, log their metrics, keys and run ids in the run `run_id`, and return their outcomes."""
    tracker = firing.tracker
    outcomes = compute(stages, tracker, run_id, firing.resources, firing.say)
    logged = {"contest", "drift"} & outcomes.keys()
    metrics = {name: value for stage in logged for name, value in outcomes[stage].metrics.items()}
    if "evaluate" in outcomes:
        metrics |= {**job_metrics(outcomes), "train_seconds": train_seconds(outcomes)}
    tags = {f"run.{name}": outcome.run_id for name, outcome in outcomes.items()}
    tags |= {f"key.{stage.name}": stage.key for stage in stages}
    if "evaluate" in outcomes:
        tags |= noted(outcomes["evaluate"].run_id, tracker)
    known = tracker.client.get_run(run_id).data.tags
    for kind in ("computed", "restored"):
        count = sum(outcome.restored == (kind == "restored") for outcome in outcomes.values())
        tags[f"stages.{kind}"] = str(count + int(known.get(f"stages.{kind}", "0")))
    tracker.log_summary(run_id, metrics, tags)
    return outcomes


def _conclude(firing: Firing, run_id: str, decision: Decision, tags: Mapping[str, str] | None = None) -> None:
    firing.say(f"{decision.status}: {decision.reason}")
    firing.tracker.log_summary(run_id, {}, {**(tags or {}), "reason": decision.reason})
    # last and by itself: a run with this tag is decided, and then has all the others. The recipe, which may be another
    # in each firing until one has decided, comes in the same request, since params never change
    config = firing.experiment.model_dump(mode="json", exclude={"data": unhashed(Data)})
    firing.tracker.log_summary(run_id, {}, {"decision": decision.status}, config)


def _results(decided: Mapping[str, Any], tracker: "Tracker") -> list[str]:
    """Say in a few lines what was decided, as MLflow's list of runs shows it; `decided` is the `report`."""
    lines = [f"{decided['status'].capitalize()}: {decided['reason']}."]
    if scores := describe_scores(decided["metrics"]):
        lines.append(f"Challenger: {' '.join(scores)}")
    tags = tracker.client.get_run(decided["run_id"]).data.tags
    if evaluated := tags.get("run.evaluate"):
        lines.append(f"Figures: {tracker.link(evaluated, 'figures')}.")
    return lines


def plan(
    model: str, experiment: Experiment, rule: Rule, tracker: "Tracker | None", resources: Resources
) -> Iterator[str]:
    """Yield, line by line, the dates that would be decided on and the stages that would run; nothing is written.

    Raises an InputError where `retrain` would.
    """
    days = dates_to_decide(model, rule, tracker) if tracker else [rule.logical_date]
    version = tracker.models.version(model, CHAMPION) if tracker else None
    yield f"{'dates':18} {join_names([day.isoformat() for day in days])}"
    yield f"{'champion':18} {'version ' + version.number if version else 'none yet'}"
    like = models.known_columns(model, version, tracker)
    for day in days:
        if tracker and (run_id := tracker.find(run_key(model, day))):
            yield f"{day.isoformat():18} is decided, run {run_id}"
            continue
        candidate = models.candidate_of(experiment, day, rule, resources, like)
        facts = candidate.facts
        yield f"{day.isoformat():18} {facts.rows:,} rows of {describe_shape(facts.shape)}, digest {facts.digest[:12]}"
        champion, stages = None, list[Stage]()
        if version and tracker:
            if reason := why_unchanged(model, candidate.identity, decided_runs(model, tracker), tracker):
                yield f"{'unchanged':18} {reason}"
                continue
            champion = models.load_champion(model, version, tracker)
            models.check_schema(candidate, champion)
            stages = [models.drift_stage(candidate, champion, rule)]
        metric = models.resolve_metric(rule, candidate, champion)
        if champion and rule.warm_start:
            candidate = models.start_from_champion(candidate, champion)
        stages += [*candidate.graph.kept(), models.contest_stage(candidate, champion, metric)]
        for stage in stages:
            run_id = tracker.find(stage.key) if tracker else None
            yield f"{stage.name:18} {stage.key[:12]}  {'finished, run ' + run_id if run_id else 'would run'}"


def rollback(model: str, tracker: "Tracker", tags: Mapping[str, str]) -> dict[str, Any]:
    """Let champion and previous champion change places, in a run with these further tags; return the report.

    Raises:
        InputError: there is no champion, or no previous champion.
    """
    with tracker.lease(_promotion_key(model), f"promotion of {model}") as check_lease:
        champion, previous = tracker.models.version(model, CHAMPION), tracker.models.version(model, PREVIOUS)
        if champion is None:
            raise InputError(f"model: {model} has no champion to roll back; run jobs.retrain first")
        if previous is None or previous.number == champion.number:
            raise InputError(f"rollback: {model} has no previous champion, version {champion.number} is its first")
        reason = f"rolled back by hand: version {previous.number} is the champion again, {champion.number} the previous"
        # a new key each time: a model may be rolled back more than once
        key = fingerprint("rollback", model, champion.number, previous.number, uuid.uuid4().hex)
        own = {"model": model, "parent.version": champion.number, "model.version": previous.number}
        shown = Description(f"{model} rollback", f"What: {reason}.")
        with tracker.job_run("rollback", key, own | dict(tags), {"model": model}, shown) as run_id:
            check_lease()
            tracker.models.set_alias(model, CHAMPION, previous.number)
            tracker.models.set_alias(model, PREVIOUS, champion.number)
            tracker.log_summary(run_id, {}, {"reason": reason, "decision": "promoted"})
            return report(run_id, tracker)


def _promotion_key(model: str) -> str:
    """Return the key of the lease that a process must hold to change a model's aliases."""
    return fingerprint("promotion", model)
