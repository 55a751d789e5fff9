"""python -m jobs.compare [STUDY.yaml] [--dotted.field VALUE ...]

Variants x settings x seeds, measured alike: parallel trials on Ray Tune, one tree in MLflow, a report with verdicts.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_settings import CliImplicitFlag, CliPositionalArg

from aecore.core.errors import InputError
from aecore.core.fingerprint import fingerprint
from aecore.core.imports import fast_imports
from aecore.data.dataset import inspect
from jobs import cli
from pipelines.cluster.resources import Resources
from pipelines.execution.run import open_store
from pipelines.host.scratch import scratch
from pipelines.study.members import expand, shared
from pipelines.study.schema import Study
from pipelines.study.trials import run

if TYPE_CHECKING:
    from pipelines.reporting.report import Report

_DEFAULT = Path(__file__).parent / "recipes" / "study_digits.yaml"

_SHOWN = ("test/reconstruction_mse", "probe/accuracy", "knn/accuracy", "finetuned/accuracy")


class Compare(Study):
    """Which autoencoder should I use on my data, and does the difference mean anything?

    Every field can be set in the recipe, in the environment (DIABOLO__BUDGET__EPOCHS) and here, where the last wins.
    """

    recipe: CliPositionalArg[Path] = _DEFAULT
    """YAML file of the study; a study of scikit-learn's digits by default."""
    resources: Resources = Resources()
    plan: CliImplicitFlag[bool] = False
    """Print the trials, which are finished and which would run, and stop."""
    figures: cli.Folder | None = None
    """Also write the report and its figures into this folder."""

    @property
    def study(self) -> Study:
        """The part that decides the numbers."""
        return Study.model_validate(self.model_dump(include=set(Study.model_fields)))


def compare(settings: Compare) -> dict[str, Any] | None:
    """Run the study; the report for the last line of stdout, None for a plan."""
    study = settings.study
    if settings.resources.workers > 1:
        raise InputError("resources.workers: trials run side by side, each on one worker; leave it out of a study")
    facts = inspect(study.base.data)
    members = expand(study, facts, settings.resources.numerics)
    # one run a study: more seeds or another row are added to it
    key = fingerprint("compare", facts.digest, study.model_dump(mode="json", exclude={"seeds", "variants"}))
    tracker = open_store(settings.resources, create=not settings.plan, warm=False)
    if settings.plan:
        common = {stage.key for stage in shared(members)}
        for m in members:
            found = tracker.find(m.stage.key) if tracker else None
            own = [stage for stage in m.stages().values() if stage.kept]
            uses = f"{len(own)} stages, {sum(stage.key in common for stage in own)} shared"
            print(f"{m.name:40} {m.stage.key[:12]}  {uses:22} {'finished, run ' + found if found else 'would run'}")
        for row in study.variants if study.search == "optuna" else ():
            if study.space(row):
                print(f"{row:40} Optuna chooses {study.budget.settings} settings, the best gets all seeds")
        return None
    assert tracker is not None

    tags = {"data.digest": facts.digest, **cli.ray_tags()}
    with tracker.job_run(
        "compare", key, tags, study.base.model_dump(mode="json", exclude={"data": {"root", "path"}})
    ) as run_id:
        tracker.client.log_dict(run_id, cli.without_secrets(settings.model_dump(mode="json")), "study.json")
        tracker.log_data(run_id, study.base.data.name, facts)
        ended = run(study, facts, tracker, run_id, settings.resources, cli.say)
        trials = ended.trials
        with fast_imports():
            from pipelines.reporting import report  # matplotlib

        described = {
            "data": f"{study.base.data.name}, {facts.rows} rows",
            "seeds": ", ".join(map(str, study.seeds)),
            "budget": f"{study.budget.epochs} passes over the training rows per trial",
        }
        with scratch() as temporary:
            written = report.write(trials, study.name, described, facts.classes, temporary, study.choose_metric)
            # not from the user's folder: whatever else lies there is no artifact
            tracker.log_folder(run_id, temporary, "report")
            if settings.figures:
                shutil.copytree(temporary, settings.figures, dirs_exist_ok=True)
        metrics = {f"{row}/{name}": value for name, means in written.means.items() for row, value in means.items()}
        tracker.log_summary(run_id, metrics, {})
    if settings.figures:
        cli.say(f"wrote {settings.figures / 'report.html'}")
    for trial in trials:
        if trial.status == "failed":
            cli.say(f"warning: {trial.name} failed: {trial.error}")
    _print_table(written)
    counts = {status: sum(t.status == status for t in trials) for status in ("finished", "stopped", "failed")}
    return {
        "status": "finished",
        "run_id": run_id,
        "experiment": key,
        "metrics": metrics,
        "verdicts": written.verdicts,
        "trials": counts,
        "stages": {"computed": ended.computed, "restored": ended.restored},
    }


def _print_table(written: "Report") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110, markup=False)  # rows are called as the study says
    shown = [
        name
        for name in ("test/reconstruction_mse", "probe/accuracy", "knn/accuracy", "finetuned/accuracy")
        if name in written.means
    ]
    table = Table("mean over seeds", *shown, title="On the test split", title_justify="left")
    for row in written.means[shown[0]] if shown else ():
        table.add_row(row, *(f"{written.means[name].get(row, float('nan')):.4f}" for name in shown))
    console.print(table)
    for name, verdict in written.verdicts.items():
        console.print(f"{name}: {verdict}", highlight=False)


if __name__ == "__main__":
    cli.main("compare", lambda: compare(cli.parse(Compare, "python -m jobs.compare")))
