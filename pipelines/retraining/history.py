"""What has been decided about a model so far, read from the runs and aliases in MLflow."""

from collections.abc import Mapping
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

from aecore.core.fingerprint import fingerprint
from pipelines.retraining.models import CHALLENGER, CHAMPION, PREVIOUS
from pipelines.retraining.rule import Rule, today

if TYPE_CHECKING:
    from pipelines.store.runs import Tracker


def run_key(model: str, day: date) -> str:
    """Return the key of the one run that decides on this model for this logical date."""
    return fingerprint("retrain", model, day.isoformat())


def decided_runs(model: str, tracker: "Tracker") -> list[Mapping[str, str]]:
    """Return the tags of the runs that have decided on a model, the latest logical date first."""
    runs = tracker.runs({"job": "retrain", "model": model})
    return sorted((run.data.tags for run in runs), key=lambda tags: tags["logical.date"], reverse=True)


def dates_to_decide(model: str, rule: Rule, tracker: "Tracker") -> list[date]:
    """Return the logical dates to decide on, in order; none where all lie further back than `max_lag`."""
    decided = [date.fromisoformat(tags["logical.date"]) for tags in decided_runs(model, tracker)]
    last = max(decided, default=rule.logical_date)
    days = [rule.logical_date]
    if rule.catch_up == "all" and last < rule.logical_date:
        days = [last + timedelta(n) for n in range(1, (rule.logical_date - last).days + 1)]
    return [day for day in days if rule.max_lag is None or (today() - day).days <= rule.max_lag]


def why_unchanged(model: str, identity: str, decided: list[Mapping[str, str]], tracker: "Tracker") -> str:
    """Return why nothing is to be trained: a decision was made on the same data and recipe. Empty if none was.

    Args:
        identity: hash of data and recipe (`Candidate.identity`).
        decided: tags of the runs that have decided on the model (`decided_runs`).
    """
    for alias in (CHAMPION, PREVIOUS):
        version = tracker.models.version(model, alias)
        if version and version.tags.get("identity") == identity:
            return f"data and recipe are those of the {alias}, version {version.number}"
    last = next((tags for tags in decided if "identity" in tags), None)
    if last and last["identity"] == identity:
        return f"data and recipe are those that {last['logical.date']} was decided on"
    return ""


def report(run_id: str, tracker: "Tracker") -> dict[str, Any]:
    """Return the decision of a run, its metrics and the versions, as the command prints them in JSON."""
    tags = tracker.client.get_run(run_id).data.tags
    versions = {alias: tracker.models.version(tags["model"], alias) for alias in (CHAMPION, PREVIOUS, CHALLENGER)}
    return {
        "status": tags["decision"],
        "run_id": run_id,
        "experiment": tags["stage.key"],
        "metrics": tracker.metrics(run_id),
        "stages": {kind: int(tags.get(f"stages.{kind}", "0")) for kind in ("computed", "restored")},
        "model": {"name": tags["model"], **{alias: v.number for alias, v in versions.items() if v}},
        "reason": tags["reason"],
        **({"logical_date": tags["logical.date"]} if "logical.date" in tags else {}),
    }
