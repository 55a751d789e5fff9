"""python -m jobs.train [RECIPE.yaml] [--dotted.field VALUE ...]

Stacked pretraining, layer by layer, then finetuning, then evaluation; whatever is finished already is restored.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic_settings import CliImplicitFlag, CliPositionalArg

from aecore.config.experiment import Experiment
from aecore.core.errors import InputError
from aecore.core.fingerprint import fingerprint
from aecore.data.dataset import inspect
from jobs import cli
from pipelines.cluster.resources import Resources
from pipelines.execution.run import Outcome, compute, open_store
from pipelines.graph.recipe import build


class Train(Experiment):
    """Greedy layer-wise pretraining of a stacked autoencoder, finetuning, evaluation; results go to MLflow.

    Every field can be set in the recipe, in the environment (DIABOLO__FINETUNE__LR) and here, where the last wins.
    """

    recipe: CliPositionalArg[Path | None] = None
    """YAML file with whatever differs from the defaults."""
    resources: Resources = Resources()
    plan: CliImplicitFlag[bool] = False
    """Print the stages, which are finished and which would run, and stop."""
    figures: cli.Folder | None = None
    """Also write the figures into this folder."""
    register_as: Annotated[str | None, Field(alias="register", pattern=cli.NAME)] = None
    """Register the finetuned model under this name."""

    @property
    def experiment(self) -> Experiment:
        """The hashed part."""
        return Experiment.model_validate(self.model_dump(include=set(Experiment.model_fields)))


def train(settings: Train) -> dict[str, Any] | None:
    """Run the experiment; the report for the last line of stdout, None for a plan."""
    experiment = settings.experiment
    if settings.register_as and experiment.finetune is None:
        raise InputError("register: finetune is null, so there is no model to register; set finetune")
    facts = inspect(experiment.data)
    graph = build(experiment, facts, settings.resources.numerics)
    stages = graph.kept()
    key = fingerprint("train", [stage.key for stage in stages])

    tracker = open_store(settings.resources, create=not settings.plan)
    if settings.plan:
        kept = "read from disk each epoch" if graph.experiment.data.in_memory == "never" else "held in memory"
        print(f"{'data':18} {facts.rows:,} rows of {facts.shape}, {kept} (data.in_memory {experiment.data.in_memory})")
        for stage in stages:
            found = tracker.find(stage.key) if tracker else None
            print(f"{stage.name:18} {stage.key[:12]}  {'finished, run ' + found if found else 'would run'}")
        return None
    assert tracker is not None

    tags = {"data.digest": facts.digest, **cli.ray_tags()}
    config = graph.experiment.model_dump(mode="json")
    where = {name: config["data"].pop(name) for name in ("root", "path")}
    with tracker.job_run("train", key, tags, config) as run_id:
        resources = settings.resources.model_dump(mode="json")
        kept = cli.without_secrets({**config, "where": where, "resources": resources})
        tracker.client.log_dict(run_id, kept, "experiment.json")
        tracker.log_data(run_id, experiment.data.name, facts)
        outcomes = compute(stages, tracker, run_id, settings.resources, cli.say)
        metrics = dict(outcomes["evaluate"].metrics)
        if graph.finetune is not None:
            best = {k: v for k, v in outcomes["finetune"].metrics.items() if k.startswith("best/")}
            metrics |= {k.replace("best/", "val/"): v for k, v in best.items()}
        if graph.evaluate_control is not None:
            control = outcomes["evaluate control"].metrics
            metrics |= {k.replace("test/", "control/"): v for k, v in control.items()}
        runs = {f"run.{name}": outcome.run_id for name, outcome in outcomes.items()}
        tracker.log_summary(run_id, metrics, runs)
        version = None
        if settings.register_as:
            version = tracker.register(settings.register_as, tracker.model_uri(outcomes["finetune"].run_id))
    if settings.figures:
        for path in tracker.save_figures(outcomes["evaluate"].run_id, settings.figures):
            cli.say(f"wrote {path}")
    _print_table(outcomes, metrics)
    restored = sum(outcome.restored for outcome in outcomes.values())
    return {
        "status": "finished",
        "run_id": run_id,
        "experiment": key,
        "metrics": metrics,
        "stages": {"computed": len(outcomes) - restored, "restored": restored},
        **({"model": {"name": settings.register_as, "version": version}} if version else {}),
    }


def _print_table(outcomes: dict[str, Outcome], metrics: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100)
    table = Table("stage", "epochs", "best", "validation", "seconds", "", title="Stages", title_justify="left")
    for name, (_, found, restored) in outcomes.items():
        if "epochs" not in found:
            continue
        score = f"error {found['best/error']:.2%}" if "best/error" in found else f"loss {found['best/loss']:.4g}"
        state = "restored" if restored else "computed"
        table.add_row(
            name, f"{found['epochs']:.0f}", f"{found['best_epoch']:.0f}", score, f"{found['train_seconds']:.1f}", state
        )
    console.print(table)
    table = Table("on the test split", "value", title="Result", title_justify="left")
    for name, value in sorted(metrics.items()):
        if name.endswith(("_low", "_high")) or name.startswith("val/"):
            continue
        shown = f"{value:.4f}" if name.endswith("mse") else f"{value:.2%}"
        if f"{name}_low" in metrics:
            shown += f"  (95 % interval {metrics[name + '_low']:.2%} to {metrics[name + '_high']:.2%})"
        table.add_row(name, shown)
    console.print(table)


if __name__ == "__main__":
    cli.main("train", lambda: train(cli.parse(Train, "python -m jobs.train")))
