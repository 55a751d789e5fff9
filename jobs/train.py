"""python -m jobs.train [RECIPE.yaml] [--dotted.field VALUE ...]

Pretrain a stacked autoencoder layer by layer, finetune it and evaluate it. Stages that are finished already are
restored instead of computed.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic_settings import CliImplicitFlag, CliPositionalArg

from aecore.config.experiment import Data, Experiment
from aecore.config.facts import Facts
from aecore.core.errors import InputError
from aecore.core.fingerprint import fingerprint, unhashed
from aecore.data.dataset import describe, inspect
from jobs import cli
from pipelines.cluster.resources import Resources
from pipelines.execution.chain import Outcome, compute
from pipelines.execution.journal import NOTES, noted
from pipelines.execution.store import open_store
from pipelines.execution.summary import job_metrics, train_seconds
from pipelines.graph.description import Description, data_name, describe_experiment, describe_scores, experiment_name
from pipelines.graph.recipe import Stacked, build
from pipelines.host.messages import say


class Train(Experiment):
    """Pretrain a stacked autoencoder layer by layer, finetune it, evaluate it, and keep the results in MLflow.

    Every field can be set in the recipe, in the environment (DIABOLO__FINETUNE__LR) and on the command line; the last
    of these wins.
    """

    recipe: CliPositionalArg[Path | None] = None
    """YAML file with the fields that differ from the defaults."""
    resources: Resources = Resources()
    plan: CliImplicitFlag[bool] = False
    """Print the stages, say of each whether it is finished or would run, and stop."""
    figures: cli.Folder | None = None
    """Folder to which the figures are written as well."""
    register_as: Annotated[str | None, Field(alias="register", pattern=cli.NAME)] = None
    """Name under which the finetuned model is registered in MLflow; null registers none."""

    @property
    def experiment(self) -> Experiment:
        """The fields that decide the numbers, and so are hashed."""
        return Experiment.model_validate(self.model_dump(include=set(Experiment.model_fields)))


def train(settings: Train) -> dict[str, Any] | None:
    """Run the experiment and return the report for the last line of stdout; None if only the plan was asked for."""
    experiment = settings.experiment
    if settings.register_as and experiment.finetune is None:
        raise InputError("register: finetune is null, so there is no model to register; set finetune")
    facts = inspect(experiment.data)
    graph = build(experiment, facts, settings.resources.numerics)
    stages = graph.kept()
    key = fingerprint("train", [stage.key for stage in stages])

    tracker = open_store(settings.resources, create=not settings.plan)
    if settings.plan:
        _print_plan(
            graph,
            facts,
            experiment.data.in_memory,
            {stage.key: tracker.find(stage.key) if tracker else None for stage in stages},
        )
        return None
    assert tracker is not None
    about = describe(experiment.data, facts)
    for line in about:
        say(line)

    tags = {"data.digest": facts.digest, **cli.ray_tags()}
    config = graph.experiment.model_dump(mode="json")
    places = {name: config["data"].pop(name) for name in sorted(unhashed(Data))}
    shown = Description(experiment_name(graph.experiment, facts), describe_experiment(graph.experiment))
    with tracker.job_run("train", key, tags, config, shown) as run_id:
        resources = settings.resources.model_dump(mode="json")
        resolved = cli.without_secrets({**config, "where": places, "resources": resources})
        tracker.client.log_dict(run_id, resolved, "experiment.json")
        tracker.log_data(run_id, data_name(experiment.data), facts, about)
        outcomes = compute(stages, tracker, run_id, settings.resources, say)
        metrics = job_metrics(outcomes)
        notes = noted(outcomes["evaluate"].run_id, tracker)
        runs = {f"run.{name}": outcome.run_id for name, outcome in outcomes.items()}
        tracker.log_summary(run_id, {**metrics, "train_seconds": train_seconds(outcomes)}, runs | notes)
        shown.results = [*describe_scores(metrics), f"Figures: {tracker.link(runs['run.evaluate'], 'figures')}."]
        version = None
        if settings.register_as:
            model_uri = tracker.models.logged_by(outcomes["finetune"].run_id)
            version = tracker.models.register(settings.register_as, model_uri)
            shown.results.append(f"Model: models:/{settings.register_as}/{version}.")
    if settings.figures:
        for path in tracker.save_figures(outcomes["evaluate"].run_id, settings.figures):
            say(f"wrote {path}")
    _print_tables(outcomes, metrics, notes.get(NOTES, ""))
    restored = sum(outcome.restored for outcome in outcomes.values())
    return {
        "status": "finished",
        "run_id": run_id,
        "experiment": key,
        "metrics": metrics,
        "stages": {"computed": len(outcomes) - restored, "restored": restored},
        **({"model": {"name": settings.register_as, "version": version}} if version else {}),
    }


def _print_plan(graph: Stacked, facts: Facts, mode: str, finished: dict[str, str | None]) -> None:
    """Print one line about the data and one per stage.

    Args:
        mode: `data.in_memory` as the user has set it.
        finished: The run of each finished stage, by the stage's key.
    """
    for line in describe(graph.experiment.data, facts):
        print(line)
    where = "read from disk each epoch" if graph.experiment.data.in_memory == "never" else "held in memory"
    print(f"rows are {where} (data.in_memory {mode})")
    for stage in graph.kept():
        run = finished[stage.key]
        print(f"{stage.name:18} {stage.key[:12]}  {'finished, run ' + run if run else 'would run'}")


def _print_tables(outcomes: dict[str, Outcome], metrics: dict[str, float], notes: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100)
    table = Table("stage", "epochs", "best", "validation", "seconds", "", title="Stages", title_justify="left")
    for name, (_, values, restored) in outcomes.items():
        if "epochs" not in values:
            continue
        score = f"error {values['best/error']:.2%}" if "best/error" in values else f"loss {values['best/loss']:.4g}"
        numbers = (f"{values['epochs']:.0f}", f"{values['best_epoch']:.0f}", score, f"{values['train_seconds']:.1f}")
        table.add_row(name, *numbers, "restored" if restored else "computed")
    console.print(table)
    table = Table("on the test split", "value", title="Result", title_justify="left")
    for name, value in sorted(metrics.items()):
        if name.endswith(("_low", "_high")) or name.startswith("val/"):
            continue
        is_share = name.endswith(("accuracy", "/error")) and not name.startswith("auroc/")
        show = "{:.2%}".format if is_share else "{:.4f}".format
        text = show(value)
        if f"{name}_low" in metrics:
            text += f"  (95 % interval {show(metrics[name + '_low'])} to {show(metrics[name + '_high'])})"
        table.add_row(name, text)
    console.print(table)
    if "reference/auroc" in metrics:
        for line in describe_scores(metrics)[:2]:
            console.print(line, highlight=False)
    if notes:
        console.print(notes, highlight=False, markup=False)


if __name__ == "__main__":
    cli.main("train", lambda: train(cli.parse(Train, "python -m jobs.train")))
