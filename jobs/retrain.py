"""python -m jobs.retrain [RECIPE.yaml] --model NAME [--logical-date D] [--dotted.field VALUE ...]

Train a registered model again if the data have changed, and let the new model be champion only if it is proven better.
One decision is made for a model and a date, however often the command is started.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import CliImplicitFlag, CliPositionalArg

from aecore.config.experiment import Data, Experiment
from aecore.core.errors import InputError
from jobs import cli
from pipelines.cluster.resources import Resources
from pipelines.execution.store import open_store
from pipelines.host.messages import say
from pipelines.retraining.history import dates_to_decide
from pipelines.retraining.retrain import Firing, plan, retrain, rollback
from pipelines.retraining.rule import Rule, check_recipe


class Retrain(Experiment, Rule):
    """Retrains a registered model on new data: champion and challenger are compared on the same rows, drift is
    measured, and the aliases in MLflow's registry follow.

    Every field can be set in the recipe, in the environment (DIABOLO__MARGIN) or here; the last one wins.
    """

    recipe: CliPositionalArg[Path | None] = None
    """YAML file with the fields that differ from the defaults."""
    data: Data = Data(split="content")
    control: bool = False
    """Also finetune the same network from random weights, to see what pretraining is worth."""
    resources: Resources = Resources()
    model: Annotated[str | None, Field(pattern=cli.NAME)] = None
    """Name of the registered model; its aliases champion, previous and challenger are set here."""
    rollback: CliImplicitFlag[bool] = False
    """Let champion and previous champion change places, and do nothing else."""
    webhook: str | None = None
    """URL to which the final JSON is posted, however the command ends."""
    plan: CliImplicitFlag[bool] = False
    """Print the dates that would be decided on and the stages that would run, and stop."""

    @field_validator("webhook")
    @classmethod
    def _check_webhook(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError("webhook: not an address; write http://HOST/PATH or https://HOST/PATH")
        return url

    @property
    def experiment(self) -> Experiment:
        """The fields that are hashed into the keys of the stages."""
        return Experiment.model_validate(self.model_dump(include=set(Experiment.model_fields)))

    @property
    def rule(self) -> Rule:
        """The fields that decide whether to train, and which model to promote."""
        return Rule.model_validate(self.model_dump(include=set(Rule.model_fields)))


def run(settings: Retrain) -> dict[str, Any] | None:
    """Retrain or roll back, and return the report for the last line of stdout; None where only the plan is printed."""
    model, experiment, rule, resources = settings.model, settings.experiment, settings.rule, settings.resources
    if model is None:
        raise InputError("model: name the registered model, --model NAME")
    check_recipe(experiment)
    tracker = open_store(resources, create=not settings.plan, ready=False)
    if settings.plan:
        for line in plan(model, experiment, rule, tracker, resources):
            print(line)
        return None
    assert tracker is not None
    if settings.rollback:
        reports = [rollback(model, tracker, cli.ray_tags())]
    else:
        firing = Firing(
            model=model, experiment=experiment, rule=rule, day=rule.logical_date, tracker=tracker, resources=resources,
            say=say, tags=cli.ray_tags(),
        )  # fmt: skip
        reports = [retrain(replace(firing, day=day)) for day in dates_to_decide(model, rule, tracker)]
    if not reports:
        reason = f"{rule.logical_date} lies more than {rule.max_lag} days back (max_lag)"
        return {"status": "unchanged", "reason": reason, "logical_date": rule.logical_date.isoformat()}
    for report in reports:
        _print_table(report)
    earlier = [{key: report[key] for key in ("logical_date", "status", "run_id")} for report in reports[:-1]]
    return {**reports[-1], **({"earlier": earlier} if earlier else {})}


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    metrics, title = report["metrics"], Text(f"{report['status']}: {report['reason']}")
    table = Table("", "all test rows", "frozen", "newest", title=title, title_justify="left")
    styles = {"rows": "{:,.0f}", "anomalies": "{:,.0f}"}
    scores = {"accuracy": "{:.2%}", "reconstruction": "{:.5f}", "auroc": "{:.4f}", "average_precision": "{:.4f}"}
    styles |= {f"{model}/{name}": style for name, style in scores.items() for model in ("champion", "challenger")}
    difference = "{:+.4f}" if "challenger/auroc" in metrics else "{:.2%}"
    styles |= dict.fromkeys(("difference", "difference_low", "difference_high"), difference)
    for row, style in styles.items():
        values = [metrics.get(prefix + row) for prefix in ("", "frozen/", "newest/")]
        if any(value is not None for value in values):
            table.add_row(row, *("" if value is None else style.format(value) for value in values))
    Console(width=110).print(table)


if __name__ == "__main__":
    addresses: list[str] = []

    def command() -> dict[str, Any] | None:
        settings = cli.parse(Retrain, "python -m jobs.retrain")
        addresses.extend(filter(None, [settings.webhook]))
        return run(settings)

    cli.main("retrain", command, addresses)
