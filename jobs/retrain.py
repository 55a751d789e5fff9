"""python -m jobs.retrain [RECIPE.yaml] --model NAME [--logical-date D] [--dotted.field VALUE ...]

Train again if the data have changed, and let the new model be champion only if it is proven better; never twice.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import CliImplicitFlag, CliPositionalArg

from aecore.config.experiment import Data, Experiment
from aecore.core.errors import InputError
from jobs import cli
from pipelines.cluster.resources import Resources
from pipelines.execution.run import open_store
from pipelines.retraining import retrain


class Retrain(Experiment, retrain.Rule):
    """Retraining on a schedule: champion and challenger on the same rows, drift, aliases in MLflow's registry.

    Every field can be set in the recipe, in the environment (DIABOLO__MARGIN) and here, where the last wins.
    """

    recipe: CliPositionalArg[Path | None] = None
    """YAML file with whatever differs from the defaults."""
    data: Data = Data(split="content")
    control: bool = False
    """Also finetune the same network from random weights, to see what pretraining is worth."""
    resources: Resources = Resources()
    model: Annotated[str | None, Field(pattern=cli.NAME)] = None
    """Name of the registered model; its aliases champion, previous and challenger are set here."""
    rollback: CliImplicitFlag[bool] = False
    """Let champion and previous change places, and do nothing else."""
    warm_start: CliImplicitFlag[bool] = False
    """Finetune from the champion's weights instead of pretraining anew."""
    only_on_drift: CliImplicitFlag[bool] = False
    """Train only if the data have drifted from those that the champion was trained on."""
    webhook: str | None = None
    """URL that the final JSON is posted to, however the command ends."""
    plan: CliImplicitFlag[bool] = False
    """Print what would be decided on and which stages would run, and stop."""

    @field_validator("webhook")
    @classmethod
    def _is_address(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError("webhook: not an address; write http://HOST/PATH or https://HOST/PATH")
        return url

    @property
    def experiment(self) -> Experiment:
        """The hashed part."""
        return Experiment.model_validate(self.model_dump(include=set(Experiment.model_fields)))

    @property
    def rule(self) -> retrain.Rule:
        """The part that decides."""
        return retrain.Rule.model_validate(self.model_dump(include=set(retrain.Rule.model_fields)))


def run(settings: Retrain) -> dict[str, Any] | None:
    """Decide; the report for the last line of stdout, None for a plan."""
    name, rule = settings.model, settings.rule
    if name is None:
        raise InputError("model: name the registered model, --model NAME")
    retrain.check(settings.experiment)
    tracker = open_store(settings.resources, create=not settings.plan, ready=False)
    if settings.plan:
        for line in retrain.plan(name, settings.experiment, rule, tracker, settings.resources):
            print(line)
        return None
    assert tracker is not None
    if settings.rollback:
        reports = [retrain.rollback(name, tracker, cli.ray_tags())]
    else:
        days = retrain.dates(name, rule, tracker)
        if not days:
            reason = f"{rule.logical_date} lies more than {rule.max_lag} days back (max_lag)"
            return {"status": "unchanged", "reason": reason, "logical_date": rule.logical_date.isoformat()}
        reports = [
            retrain.retrain(name, settings.experiment, rule, day, tracker, settings.resources, cli.say, cli.ray_tags())
            for day in days
        ]
    for report in reports:
        _print_table(report)
    more = [{key: report[key] for key in ("logical_date", "status", "run_id")} for report in reports[:-1]]
    return {**reports[-1], **({"earlier": more} if more else {})}


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found, title = report["metrics"], Text(f"{report['status']}: {report['reason']}")
    table = Table("", "all test rows", "frozen", "newest", title=title, title_justify="left")
    models = [f"{who}/{what}" for what in ("accuracy", "reconstruction") for who in ("champion", "challenger")]
    for row in ("rows", *models, "difference", "difference_low", "difference_high"):
        values = [found.get(prefix + row) for prefix in ("", "frozen/", "newest/")]
        if any(value is not None for value in values):
            shown = "{:,.0f}" if row == "rows" else "{:.5f}" if row.endswith("reconstruction") else "{:.2%}"
            table.add_row(row, *("" if value is None else shown.format(value) for value in values))
    Console(width=110).print(table)


if __name__ == "__main__":
    addresses: list[str] = []

    def command() -> dict[str, Any] | None:
        settings = cli.parse(Retrain, "python -m jobs.retrain")
        addresses.extend(filter(None, [settings.webhook]))
        return run(settings)

    cli.main("retrain", command, addresses)
