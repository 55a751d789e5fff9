"""python -m jobs.compare [STUDY.yaml] [--dotted.field VALUE ...]

Compare variants of autoencoders, with several settings and seeds each, as parallel trials on Ray Tune. All trials are
measured alike; the report says which differences are more than chance.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_settings import CliImplicitFlag, CliPositionalArg

from aecore.config.facts import Facts
from aecore.core.errors import InputError
from aecore.core.fingerprint import fingerprint
from aecore.core.imports import fast_imports
from aecore.data.dataset import inspect
from aecore.evaluation.trial import Trial
from jobs import cli
from pipelines.cluster.resources import Resources
from pipelines.execution.store import open_store
from pipelines.host.messages import say
from pipelines.host.scratch import scratch
from pipelines.study.plan import describe_plans, plan_trials
from pipelines.study.run import run
from pipelines.study.schema import Study

if TYPE_CHECKING:
    from pipelines.reporting.report import Report

_DEFAULT = Path(__file__).parent / "recipes" / "study_digits.yaml"
_COLUMNS = ("test/reconstruction_mse", "probe/accuracy", "knn/accuracy", "finetuned/accuracy")
"""Measures of the printed table."""
_NAMED = 3
"""Most trials that are named where they failed for the same reason."""


class Compare(Study):
    """Compares variants of autoencoders on your data, and tells which differences are more than chance.

    Every field can be set in the recipe, in the environment (DIABOLO__BUDGET__EPOCHS) or here; the last one wins.
    """

    recipe: CliPositionalArg[Path] = _DEFAULT
    """YAML file of the study; without one, scikit-learn's digits are studied."""
    resources: Resources = Resources()
    plan: CliImplicitFlag[bool] = False
    """Print the trials, which are finished already and which would run, and stop."""
    figures: cli.Folder | None = None
    """Also write the report and its figures into this folder."""

    @property
    def study(self) -> Study:
        """The fields that decide the numbers."""
        return Study.model_validate(self.model_dump(include=set(Study.model_fields)))


def compare(settings: Compare) -> dict[str, Any] | None:
    """Run the study and return the report for the last line of stdout, or None where only the plan is printed."""
    study = settings.study
    if settings.resources.workers > 1:
        raise InputError("resources.workers: trials run side by side, each on one worker; leave it out of a study")
    facts = inspect(study.base.data)
    plans = plan_trials(study, facts, settings.resources.numerics)
    tracker = open_store(settings.resources, create=not settings.plan, warm=False)
    if settings.plan:
        for line in describe_plans(study, plans, tracker):
            print(line)
        return None
    assert tracker is not None

    # a study that gets another seed or study row stays the same study, and so the same MLflow run
    key = fingerprint("compare", facts.digest, study.model_dump(mode="json", exclude={"seeds", "variants"}))
    tags = {"data.digest": facts.digest, **cli.ray_tags()}
    config = study.base.model_dump(mode="json", exclude={"data": {"root", "path"}})
    with tracker.job_run("compare", key, tags, config) as run_id:
        tracker.client.log_dict(run_id, cli.without_secrets(settings.model_dump(mode="json")), "study.json")
        tracker.log_data(run_id, study.base.data.name, facts)
        ended = run(study, facts, tracker, run_id, settings.resources, say)
        with scratch() as folder:
            report = _write_report(study, facts, ended.trials, folder)
            # uploaded from here and not from the user's folder, in which other files may lie
            tracker.log_folder(run_id, folder, "report")
            if settings.figures:
                shutil.copytree(folder, settings.figures, dirs_exist_ok=True)
        metrics = {f"{row}/{name}": value for name, means in report.means.items() for row, value in means.items()}
        status = ended.status
        tracker.log_summary(run_id, metrics, {"status": status})
    if status == "failed":
        tracker.client.set_terminated(run_id, "FAILED")
    if settings.figures:
        say(f"wrote {settings.figures / 'report.html'}")
    _print_table(report)
    _say_failures(ended.trials)
    return {
        "status": status,
        "run_id": run_id,
        "experiment": key,
        "metrics": metrics,
        "verdicts": report.verdicts,
        "trials": {kind: sum(t.status == kind for t in ended.trials) for kind in ("finished", "stopped", "failed")},
        "stages": {"computed": ended.computed, "restored": ended.restored},
    }


def _write_report(study: Study, facts: Facts, trials: list[Trial], folder: Path) -> "Report":
    with fast_imports():
        from pipelines.reporting import report  # imports matplotlib, which takes a second

    description = {
        "data": f"{study.base.data.name}, {facts.rows} rows",
        "seeds": ", ".join(map(str, study.seeds)),
        "budget": f"{study.budget.epochs} passes over the training rows per trial",
    }
    about = report.About(study.name, study.choose_metric, description, facts.classes)
    return report.write(trials, about, folder, read=lambda trial: trial)


def _say_failures(trials: list[Trial]) -> None:
    """Print a line for each reason for which trials failed."""
    reasons: dict[str, list[str]] = {}
    for trial in trials:
        if trial.status == "failed":
            reasons.setdefault(trial.error, []).append(trial.name)
    for reason, names in reasons.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        say(f"warning: {', '.join(names[:_NAMED])}{more} failed: {reason}")
    if reasons:
        say("the same command runs these trials again, and no others")


def _print_table(report: "Report") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110, markup=False)  # the user chooses the names of study rows, which may look like markup
    columns = [name for name in _COLUMNS if name in report.means]
    table = Table("mean over seeds", *columns, title="On the test split", title_justify="left")
    for row in report.means[columns[0]] if columns else ():
        table.add_row(row, *(f"{report.means[name].get(row, float('nan')):.4f}" for name in columns))
    console.print(table)
    for name, verdict in report.verdicts.items():
        console.print(f"{name}: {verdict}", highlight=False)


if __name__ == "__main__":
    cli.main("compare", lambda: compare(cli.parse(Compare, "python -m jobs.compare")))
