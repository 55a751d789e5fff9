"""Champion and challenger: whether a model is trained again on data that have grown, and whether it takes over.

Every decision is a run, one for a model and a logical date however often it is fired. What was decided stands in the
registry: the aliases `champion`, `previous` and `challenger`, the last one that was decided on.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from aecore.config.experiment import Experiment
from aecore.config.facts import Facts
from aecore.config.specs import ContestSpec, DriftSpec, FinetuneSpec
from aecore.core.errors import InputError, OutageError, hide_secrets, join_names
from aecore.core.fingerprint import Frozen, fingerprint
from aecore.data.dataset import inspect
from pipelines.cluster.resources import Resources
from pipelines.execution.run import Outcome, compute
from pipelines.graph.recipe import Stacked, build, from_parent
from pipelines.graph.stage import Finished, Known, Stage
from pipelines.host.scratch import scratch

if TYPE_CHECKING:
    from aecore.models.storage import Result
    from pipelines.store.tracking import Tracker, Version


Metric = Literal["accuracy", "reconstruction"]
Say = Callable[[str], None]
Report = dict[str, Any]
CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"


def today() -> date:
    """In UTC."""
    return datetime.now(UTC).date()


class Rule(Frozen):
    """When a model is trained again, and when the new one takes over."""

    logical_date: date = Field(default_factory=today)
    """Day that this firing stands for (YYYY-MM-DD); today, UTC. In data.path, {date} is replaced by it."""
    metric: Literal["auto", Metric] = "auto"
    """By which champion and challenger are compared, on the same test rows; auto takes accuracy where the model
    classifies."""
    margin: NonNegativeFloat = 0.005
    """By how much the challenger must be better: a difference of accuracies, or a share of the champion's
    reconstruction error. The 95 % interval must exclude zero as well."""
    warm_start: bool = False
    """Finetune from the champion's weights instead of pretraining anew."""
    only_on_drift: bool = False
    """Train only if the data have drifted from those that the champion was trained on."""
    drift_effect: Annotated[PositiveFloat, Field(le=1)] = 0.2
    """Effect size from which on a significant difference is drift: the largest gap between two distributions, 0 to 1
    (0.2: the means of two normal ones lie half a standard deviation apart)."""
    catch_up: Literal["latest", "all"] = "latest"
    """Of dates that were missed since the last decision: one run for the logical date, or one for each, in order."""
    max_lag: NonNegativeInt | None = None
    """Days after which a logical date is not caught up with any more; null never gives one up."""


class Champion(NamedTuple):
    """What stands to be beaten."""

    number: str
    tags: Mapping[str, str]
    finetune: Finished
    contest: Finished
    """What it won, which knows the data of its day."""
    result: "Result"
    won: "Result"


class Decision(NamedTuple):
    status: Literal["promoted", "kept", "unchanged", "drifted"]
    reason: str


def dates(name: str, rule: Rule, tracker: "Tracker") -> list[date]:
    """The logical dates to decide on, in order; the reason why there are none is that all lie too far back."""
    decided = _decided(name, tracker)
    last = max((date.fromisoformat(tags["logical.date"]) for tags in decided), default=rule.logical_date)
    days = [rule.logical_date]
    if rule.catch_up == "all" and last < rule.logical_date:
        days = [last + timedelta(n) for n in range(1, (rule.logical_date - last).days + 1)]
    return [day for day in days if rule.max_lag is None or (today() - day).days <= rule.max_lag]


def retrain(
    name: str, experiment: Experiment, rule: Rule, day: date, tracker: "Tracker", resources: Resources, say: Say,
    more: Mapping[str, str] | None = None,
) -> Report:  # fmt: skip
    """Decide on a model for a logical date; what was decided for it already is told again.

    Args:
        more: further tags of the run.

    Raises:
        InputError: the data break the schema of the champion's, or the recipe does not fit; the champion stays.
    """
    check(experiment)
    key = run_key(name, day)
    if run_id := tracker.find(key):
        return _told(tracker, run_id, key)
    tags = {"model": name, "logical.date": day.isoformat(), **(more or {})}
    with tracker.job_run("retrain", key, tags, {"model": name, "logical_date": day.isoformat()}) as run_id:
        known = tracker.client.get_run(run_id).data.tags
        champion = tracker.version(name, CHAMPION)
        if champion and champion.tags.get("run") == run_id:  # a firing that was broken off had got that far
            tracker.log_summary(run_id, {}, {"decision": "promoted"})
        elif "decision" not in known:  # else another firing has ended while this one waited for it
            try:
                _Firing(name, _on(experiment, day), rule, day, tracker, resources, say, run_id).decide(champion)
            except Exception as error:
                with suppress(OutageError):
                    text = hide_secrets(" ".join(str(error).split()))[:1000]
                    tracker._replace(patience=0.0).client.set_tag(run_id, "reason", text)
                raise
        return _told(tracker, run_id, key)


def rollback(name: str, tracker: "Tracker", more: Mapping[str, str] | None = None) -> Report:
    """Let champion and previous change places.

    Raises:
        InputError: there is no previous one.
    """
    with tracker.lease(_promotion(name), f"promotion of {name}") as check_lease:
        champion, previous = tracker.version(name, CHAMPION), tracker.version(name, PREVIOUS)
        if champion is None:
            raise InputError(f"model: {name} has no champion to roll back; run jobs.retrain first")
        if previous is None or previous.number == champion.number:
            raise InputError(f"rollback: {name} has no previous champion, version {champion.number} is its first")
        reason = f"rolled back by hand: version {previous.number} is the champion again, {champion.number} the previous"
        key = fingerprint("rollback", name, champion.number, previous.number, uuid.uuid4().hex)
        tags = {"model": name, "parent.version": champion.number, "model.version": previous.number}
        with tracker.job_run("rollback", key, tags | dict(more or {}), {"model": name}) as run_id:
            check_lease()
            tracker.set_alias(name, CHAMPION, previous.number)
            tracker.set_alias(name, PREVIOUS, champion.number)
            tracker.log_summary(run_id, {}, {"reason": reason, "decision": "promoted"})
            return _told(tracker, run_id, key)


def plan(
    name: str, experiment: Experiment, rule: Rule, tracker: "Tracker | None", resources: Resources
) -> Iterator[str]:
    """What a firing would do, line by line; nothing is run, and nothing written."""
    check(experiment)
    days = dates(name, rule, tracker) if tracker else [rule.logical_date]
    yield f"{'dates':18} {join_names([day.isoformat() for day in days])}"
    version = tracker.version(name, CHAMPION) if tracker else None
    yield f"{'champion':18} {'version ' + version.number if version else 'none yet'}"
    for day in days:
        run_id = tracker.find(run_key(name, day)) if tracker else None
        if run_id:
            yield f"{day.isoformat():18} is decided, run {run_id}"
            continue
        on_day = _on(experiment, day)
        facts = inspect(on_day.data)
        graph = build(on_day, facts, resources.numerics)
        yield f"{day.isoformat():18} {facts.rows:,} rows of {facts.shape}, digest {facts.digest[:12]}"
        champion, stages = None, []
        if version and tracker:
            if reason := _unchanged(name, identify(graph, rule), _decided(name, tracker), tracker):
                yield f"{'unchanged':18} {reason}"
                continue
            champion = load(name, version, tracker)
            stages = [drift_of(graph, facts, rule, champion)]
            if rule.warm_start:
                graph = from_parent(graph, champion.finetune)
        stages += [*graph.kept(), contest_of(graph, facts, resolve_metric(rule, graph, champion), champion)]
        for stage in stages:
            found = tracker.find(stage.key) if tracker else None
            yield f"{stage.name:18} {stage.key[:12]}  {'finished, run ' + found if found else 'would run'}"


def run_key(name: str, day: date) -> str:
    """Key of the run that decides on a model for a date."""
    return fingerprint("retrain", name, day.isoformat())


def decide(metric: Metric, scores: Mapping[str, float], margin: float) -> tuple[bool, str]:
    """Whether a challenger takes over, and why, from the metrics of its contest with the champion."""
    unit = "points of accuracy" if metric == "accuracy" else "% of the champion's reconstruction error"

    def words(prefix: str) -> str:
        mean, low, high = (100 * scores[f"{prefix}difference{end}"] for end in ("", "_low", "_high"))
        return f"{mean:+.2f} {unit} (95 % interval {low:+.2f} to {high:+.2f}, {scores[f'{prefix}rows']:,.0f} test rows)"

    found = f"the challenger gains {words('')}"
    if scores["difference"] < margin:
        return False, f"{found}, less than the margin of {100 * margin:g}: a tie, or worse"
    if not scores["difference_low"] > 0:
        return False, f"{found}, which may be chance: a tie"
    if scores.get("frozen/difference_high", 0.0) < 0:
        return False, f"{found}, but on the rows that the champion was chosen by it loses: {words('frozen/')}"
    return True, f"{found}, at least the margin of {100 * margin:g}"


def check(experiment: Experiment) -> None:
    """Raises an InputError where an experiment cannot be retrained day by day."""
    if experiment.finetune is None:
        raise InputError("finetune: null leaves no model to register; set finetune")
    if experiment.data.split != "content":
        raise InputError(
            f"data.split: {experiment.data.split} moves rows between splits as the data grow, so that a challenger "
            "would train on the champion's test rows; use content"
        )


def check_schema(name: str, champion: Champion, experiment: Experiment, facts: Facts, task: str) -> None:
    """Raises an InputError where data or recipe are not of the champion's kind."""
    won, whom = champion.won.config, f"models:/{name}@{CHAMPION}"
    then, other = Facts.model_validate(won["facts"]), "mend it, or name another --model"
    if facts.shape != then.shape:
        raise InputError(f"data: rows have the shape {facts.shape}, those of {whom} {then.shape}; {other}")
    if facts.levels != then.levels:
        kinds = ["bytes" if levels else "floats" for levels in (facts.levels, then.levels)]
        raise InputError(f"data: values are {kinds[0]}, those of {whom} {kinds[1]}; {other}")
    if task != champion.result.config["task"]:
        raise InputError(f"finetune.task: {whom} is to {champion.result.config['task']}, this is to {task}; {other}")
    if gone := [label for label in then.classes if label not in facts.classes]:
        raise InputError(f"data: no row is of the classes {join_names(gone)} any more, which {whom} knows; {other}")
    if (experiment.data.split, experiment.data.test) != (won["split"], won["test"]):
        raise InputError(
            f"data.test: {experiment.data.test:g}, but the test rows of {whom} were cut by {won['test']:g} "
            f"({won['split']}), so that it would be tested on rows of its training; {other}"
        )


class _Firing(NamedTuple):
    """One firing's work, inside its run."""

    name: str
    experiment: Experiment
    rule: Rule
    day: date
    tracker: "Tracker"
    resources: Resources
    say: Say
    run_id: str

    def decide(self, version: "Version | None") -> None:
        """Look at the data, train where that is needed, and let the better one be champion."""
        facts = inspect(self.experiment.data)
        graph = build(self.experiment, facts, self.resources.numerics)
        assert graph.finetune is not None
        identity = identify(graph, self.rule)
        self.tracker.log_summary(self.run_id, {}, {"data.digest": facts.digest})
        self.tracker.log_data(self.run_id, self.experiment.data.name, facts)
        decided = _decided(self.name, self.tracker)
        if decided and decided[0]["logical.date"] > self.day.isoformat():
            self.conclude(Decision("unchanged", f"{decided[0]['logical.date']}, a later date, is decided already"))
            return
        if version and (reason := _unchanged(self.name, identity, decided, self.tracker)):
            self.conclude(Decision("unchanged", reason), {"identity": identity})
            return
        champion = load(self.name, version, self.tracker) if version else None
        spec = graph.finetune.spec
        assert isinstance(spec, FinetuneSpec)
        metric = resolve_metric(self.rule, graph, champion)
        if champion:
            check_schema(self.name, champion, self.experiment, facts, spec.task)
        drift = self.look_for_drift(graph, facts, champion) if champion else None
        if self.rule.only_on_drift and drift and not drift["drifted"]:
            self.conclude(Decision("kept", f"{drift['words']}, so nothing was trained"))
            return
        if self.rule.warm_start and champion:
            check_parent(self.name, champion, spec)
            graph = from_parent(graph, champion.finetune)
        while True:
            contest = contest_of(graph, facts, metric, champion)
            outcomes = self.compute([*graph.kept(), contest])
            assert graph.finetune is not None
            number = self.tracker.register(
                self.name,
                self.tracker.model_uri(outcomes["finetune"].run_id),
                {
                    "run": self.run_id, "identity": identity, "stage.key": graph.finetune.key,
                    "contest.key": contest.key, "data.digest": facts.digest, "logical.date": self.day.isoformat(),
                    "parent.version": champion.number if champion else "",
                },
            )  # fmt: skip
            with self.tracker.lease(_promotion(self.name), f"promotion of {self.name}") as check_lease:
                now = self.tracker.version(self.name, CHAMPION)
                if (now and now.number) == (champion and champion.number):
                    self.settle(number, champion, metric, outcomes["contest"].metrics, drift, identity, check_lease)
                    return
                if now and now.number == number:
                    self.conclude(Decision("unchanged", f"version {number} is the champion already"))
                    return
            self.say(f"the champion is another by now, version {now.number if now else 'none'}: compared once more")
            champion = load(self.name, now, self.tracker) if now else None

    def settle(
        self, number: str, champion: Champion | None, metric: Metric, scores: Mapping[str, float],
        drift: dict[str, Any] | None, identity: str, check_lease: Callable[[], None],
    ) -> None:  # fmt: skip
        """Decide, write it down, then let the aliases follow; broken off in between, it is done again alike."""
        if champion is None:
            promote, reason = True, f"version {number} is the first champion"
        else:
            promote, reason = decide(metric, scores, self.rule.margin)
            reason = f"version {number} against {champion.number}: {reason}"
        if drift:
            reason = f"{reason}; {drift['words']}"
        drifted = bool(drift and drift["drifted"])
        decision = Decision("promoted" if promote else "drifted" if drifted else "kept", reason)
        tags = {"model.version": number, "parent.version": champion.number if champion else "", "identity": identity}
        self.tracker.log_summary(self.run_id, {}, {**tags, "reason": decision.reason})
        check_lease()
        self.tracker.set_alias(self.name, CHALLENGER, number)
        if promote:
            if champion:
                self.tracker.set_alias(self.name, PREVIOUS, champion.number)
            self.tracker.set_alias(self.name, CHAMPION, number)
        self.conclude(decision)

    def look_for_drift(self, graph: Stacked, facts: Facts, champion: Champion) -> dict[str, Any]:
        """The champion on the new rows: findings, also kept as a table and a figure with the run."""
        stage = drift_of(graph, facts, self.rule, champion)
        outcome = self.compute([stage])["drift"]
        found = self.tracker.restore(outcome.run_id).config
        with scratch() as folder:
            (folder / "drift.csv").write_text(found["table"])
            self.tracker.save_figures(outcome.run_id, folder)
            self.tracker.log_folder(self.run_id, folder, "drift")
        self.say(found["words"])
        return found

    def compute(self, stages: list[Stage]) -> dict[str, Outcome]:
        """Finish these stages, and keep what they found and which they were with the run."""
        outcomes = compute(stages, self.tracker, self.run_id, self.resources, self.say)
        shown = {"evaluate", "contest", "drift"}
        metrics = {k: v for name in shown & outcomes.keys() for k, v in outcomes[name].metrics.items()}
        tags = {f"run.{name}": outcome.run_id for name, outcome in outcomes.items()}
        tags |= {f"key.{stage.name}": stage.key for stage in stages}
        known = self.tracker.client.get_run(self.run_id).data.tags
        for kind in ("computed", "restored"):
            own = sum(outcome.restored == (kind == "restored") for outcome in outcomes.values())
            tags[f"stages.{kind}"] = str(own + int(known.get(f"stages.{kind}", "0")))
        self.tracker.log_summary(self.run_id, metrics, tags)
        return outcomes

    def conclude(self, decision: Decision, tags: Mapping[str, str] | None = None) -> None:
        """The last word of the run."""
        self.say(f"{decision.status}: {decision.reason}")
        self.tracker.log_summary(self.run_id, {}, {**(tags or {}), "reason": decision.reason})
        self.tracker.log_summary(self.run_id, {}, {"decision": decision.status})


def identify(graph: Stacked, rule: Rule) -> str:
    """What data and recipe together would make, whatever the champion is by then."""
    assert graph.finetune is not None
    return fingerprint("retrain", graph.finetune.key, rule.warm_start)


def resolve_metric(rule: Rule, graph: Stacked, champion: Champion | None) -> Metric:
    """By what the two are compared, `auto` resolved."""
    assert graph.finetune is not None and isinstance(graph.finetune.spec, FinetuneSpec)
    classifies = graph.finetune.spec.task == "classify"
    if rule.metric == "accuracy" and not classifies:
        raise InputError("metric: accuracy needs a model that classifies, this one reconstructs; use reconstruction")
    if rule.metric != "reconstruction":
        return "accuracy" if classifies else "reconstruction"
    lacks = champion is not None and not champion.result.config["autoencoder"]
    if classifies and (lacks or not graph.layers):
        raise InputError("metric: reconstruction needs an autoencoder, and nothing was pretrained; use accuracy")
    return "reconstruction"


def check_parent(name: str, champion: Champion, spec: FinetuneSpec) -> None:
    """Raises an InputError where the champion's weights do not fit the network."""
    then = [{**layer, "dropout": 0} for layer in champion.result.config["layers"]]
    if then != [{**layer.model_dump(mode="json"), "dropout": 0} for layer in spec.layers]:
        raise InputError(f"warm_start: the network is not that of models:/{name}@{CHAMPION}; leave warm_start out once")


def drift_of(graph: Stacked, facts: Facts, rule: Rule, champion: Champion) -> Stage:
    """The comparison of today's new rows with those that the champion was trained on."""
    spec = DriftSpec(classes=facts.classes, threshold=rule.drift_effect)
    inputs = {"data": graph.data, "champion": champion.finetune, "earlier": champion.contest}
    return Stage("drift", "drift.drift", spec, inputs)


def contest_of(graph: Stacked, facts: Facts, metric: Metric, champion: Champion | None) -> Stage:
    """The comparison of the challenger with the champion, or its score where there is none yet."""
    assert graph.finetune is not None
    data = graph.experiment.data
    spec = ContestSpec(metric=metric, facts=facts, split=data.split, test=data.test)
    inputs: dict[str, Stage] = {"data": graph.data, "challenger": graph.finetune}
    if champion:
        inputs |= {"champion": champion.finetune, "earlier": champion.contest}
    return Stage("contest", "contest.contest", spec, inputs)


def load(name: str, version: "Version", tracker: "Tracker") -> Champion:
    """The champion with what is known of its day.

    Raises:
        InputError: somebody else has made it champion, or its artifacts are lost.
    """
    from pipelines.store.tracking import LostResultError

    whom = f"models:/{name}@{CHAMPION}, version {version.number}"
    found: list[tuple[Finished, Result]] = []
    for title, tag in (("champion", "stage.key"), ("earlier", "contest.key")):
        if not (key := version.tags.get(tag)):
            raise InputError(
                f"model: {whom} was not made champion by jobs.retrain, so that nobody knows which rows it was trained "
                "on; delete the alias, or name another --model"
            )
        run_id = tracker.find(key)
        try:
            if run_id is None:
                raise LostResultError("no such run in this MLflow experiment")
            found.append((Finished(title, "", Known(key=key)), tracker.restore(run_id)))
        except LostResultError as error:
            raise InputError(
                f"model: what is known of {whom} is lost ({error}); set MLFLOW_EXPERIMENT_NAME to the experiment that "
                "it was trained in, use --rollback, or delete the alias"
            ) from error
    (finetune, result), (contest, won) = found
    return Champion(version.number, version.tags, finetune, contest, result, won)


def _unchanged(name: str, identity: str, decided: list[Mapping[str, str]], tracker: "Tracker") -> str:
    """Why there is nothing to train, or nothing."""
    for alias in (CHAMPION, PREVIOUS):
        version = tracker.version(name, alias)
        if version and version.tags.get("identity") == identity:
            return f"data and recipe are those of the {alias}, version {version.number}"
    last = next((tags for tags in decided if "identity" in tags), None)
    if last and last["identity"] == identity:
        return f"data and recipe are those that {last['logical.date']} was decided on"
    return ""


def _decided(name: str, tracker: "Tracker") -> list[Mapping[str, str]]:
    """Tags of the runs that have decided on a model, the latest date first."""
    runs = tracker.runs({"job": "retrain", "model": name})
    return sorted((run.data.tags for run in runs), key=lambda tags: tags["logical.date"], reverse=True)


def _promotion(name: str) -> str:
    """Key of the lease of those who change a model's aliases."""
    return fingerprint("promotion", name)


def _on(experiment: Experiment, day: date) -> Experiment:
    """The experiment on the data of a day."""
    path = experiment.data.path
    if path is None or "{date}" not in path:
        return experiment
    data = experiment.data.model_copy(update={"path": path.replace("{date}", day.isoformat())})
    return experiment.model_copy(update={"data": data})


def _told(tracker: "Tracker", run_id: str, key: str) -> Report:
    """What a run has decided."""
    tags = tracker.client.get_run(run_id).data.tags
    name = tags["model"]
    aliases = {alias: tracker.version(name, alias) for alias in (CHAMPION, PREVIOUS, CHALLENGER)}
    return {
        "status": tags["decision"],
        "run_id": run_id,
        "experiment": key,
        "metrics": tracker.metrics(run_id),
        "stages": {kind: int(tags.get(f"stages.{kind}", "0")) for kind in ("computed", "restored")},
        "model": {"name": name, **{alias: found.number for alias, found in aliases.items() if found}},
        "reason": tags["reason"],
        **({"logical_date": tags["logical.date"]} if "logical.date" in tags else {}),
    }
