"""python -m jobs.compare [STUDY.yaml] [--dotted.field VALUE ...]

Compare variants of autoencoders, with several settings and seeds each, as parallel trials on Ray Tune. All trials are
measured alike; the report says which differences are more than chance.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic_settings import CliPositionalArg

from aecore.config.experiment import Data
from aecore.core.errors import InputError, join_names
from aecore.core.fingerprint import unhashed
from aecore.core.imports import fast_imports
from aecore.evaluation.trial import Trial, in_set, study_status
from jobs import cli
from pipelines.cluster.resources import Resources
from pipelines.execution.store import open_store
from pipelines.graph.description import Description, data_name
from pipelines.host.messages import say
from pipelines.host.scratch import scratch
from pipelines.study.preview import preview
from pipelines.study.results import read
from pipelines.study.run import Ended, run
from pipelines.study.schema import Study
from pipelines.study.sets import StudySet, describe, digest_of, inspect, key_of
from pipelines.study.spending import CostRow, cost_report, cost_rows

if TYPE_CHECKING:
    from pipelines.reporting.report import Report

_DEFAULT = Path(__file__).parent / "recipes" / "study_digits.yaml"
_COLUMNS = (
    "test/auroc",
    "test/average_precision",
    "test/reconstruction_mse",
    "probe/accuracy",
    "knn/accuracy",
    "finetuned/accuracy",
)
"""Measures of the printed table."""
_PRINTED_ROWS = 20
"""Most study rows of the printed table."""
_LABELS_OF_ANOMALIES = (
    "those of test rows alone are used, to measure; epochs and settings are chosen by the reconstruction error of "
    "validation rows"
)
_LOGGED_SETS = 50
"""Most data sets that MLflow shows as the inputs of a study."""
_NAMED = 3
"""Most trials that are named where they failed for the same reason."""


class Compare(Study):
    """Compares variants of autoencoders on your data, and tells which differences are more than chance.

    Every field can be set in the recipe, in the environment (DIABOLO__BUDGET__EPOCHS) or here; the last one wins.
    """

    recipe: CliPositionalArg[Path] = _DEFAULT
    """YAML file of the study; without one, scikit-learn's digits are studied."""
    resources: Resources = Resources()
    plan: bool | Literal["probe"] = False
    """Print the trials, which are finished already, and what the others will cost, and stop. `--plan probe` computes a
    few steps of each kind of trial first, for a better forecast."""
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
    sets = inspect(study, settings.resources.numerics)  # a row that does not fit the data ends the job here
    tracker = open_store(settings.resources, create=not settings.plan, warm=False)
    key = key_of(study, sets)
    if settings.plan:
        run_id = tracker.run_id_of(key) if tracker else None
        for line in preview(study, sets, settings.resources, tracker, run_id, probes=settings.plan == "probe"):
            print(line)
        return None
    began = time.monotonic()
    assert tracker is not None
    for line in describe(sets):
        say(line)
    tags = {"data.digest": digest_of(sets), **cli.ray_tags()}
    config = study.base.model_dump(mode="json", exclude={"data": unhashed(Data)})
    shown = _describe(study, sets)
    with tracker.job_run("compare", key, tags, config, shown) as run_id:
        tracker.client.log_dict(run_id, cli.without_secrets(settings.model_dump(mode="json")), "study.json")
        for one in sets[:_LOGGED_SETS]:
            tracker.log_data(run_id, one.name or data_name(study.base.data), one.facts, one.about())
        ended = run(study, sets, tracker, run_id, settings.resources, say)
        costs = cost_rows(ended.forecast, ended.spent, time.monotonic() - began) if ended.forecast else []
        with scratch() as folder:
            report, by_set = _write_report(study, sets, ended, costs, partial(read, tracker=tracker), folder)
            # uploaded from here and not from the user's folder, in which other files may lie
            tracker.log_folder(run_id, folder, "report")
            if settings.figures:
                shutil.copytree(folder, settings.figures, dirs_exist_ok=True)
        metrics = _metrics(report)
        per_set = {f"{name}/{metric}": value for name, of in by_set.items() for metric, value in _metrics(of).items()}
        status = study_status(ended.trials)
        tracker.log_summary(run_id, metrics | per_set, {"status": status})
        tracker.log_last(run_id, {"train_seconds": sum(trial.seconds for trial in ended.trials)})
        link = tracker.link(run_id, "report/report.html")
        shown.results = [report.answer, f"All verdicts and figures: {link}."]
        shown.status = ": ".join(filter(None, [status, "; ".join(_failures(ended.trials))]))
    if status == "failed":
        tracker.client.set_terminated(run_id, "FAILED")
    seconds = time.monotonic() - began
    _tell(settings, report, by_set, ended, seconds)
    return {
        "status": status,
        "run_id": run_id,
        "experiment": key,
        **({"sets": list(by_set)} if by_set else {}),
        "metrics": metrics,
        **({"over_sets": report.verdicts} if by_set else {}),
        "verdicts": {name: of.verdicts for name, of in by_set.items()} or report.verdicts,
        "trials": {kind: sum(t.status == kind for t in ended.trials) for kind in ("finished", "stopped", "failed")},
        "stages": {"computed": ended.computed, "restored": ended.restored},
        **({"cost": cost_report(ended.forecast, ended.spent, seconds)} if ended.forecast else {}),
    }


def _metrics(report: "Report") -> dict[str, float]:
    return {f"{row}/{name}": value for name, means in report.means.items() for row, value in means.items()}


def _tell(
    settings: Compare, report: "Report", by_set: Mapping[str, "Report"], ended: Ended, seconds: float
) -> None:  # fmt: skip
    """Print what came out of a study, what failed, and what it has cost."""
    if settings.figures:
        say(f"wrote {settings.figures / 'report.html'}")
    for note in report.notes:
        say(f"warning: {note}")
    _print_table(report, "sets and seeds" if by_set else "seeds")
    _say_failures(ended.trials)
    if ended.forecast:
        _print_costs(cost_rows(ended.forecast, ended.spent, seconds))


def _describe(study: Study, sets: Sequence[StudySet]) -> Description:
    """Return what MLflow's list of runs shows of a study."""
    data = data_name(study.base.data)
    name = f"study of {data}" if study.name == Study.model_fields["name"].default else study.name
    data = f"{len(sets)} sets of {data}" if study.data else data
    rows, seeds = join_names([*study.variants]), ", ".join(map(str, study.seeds))
    length = f"{study.budget.epochs} epochs" if study.budget.steps is None else study.budget.length
    about = f"What: compares {rows} on {data} ({_rows(sets):,} rows), seeds {seeds}; {length} per trial."
    return Description(name, about)


def _rows(sets: Sequence[StudySet]) -> int:
    return sum(one.facts.rows for one in sets)


def _write_report(
    study: Study, sets: Sequence[StudySet], ended: Ended, costs: Sequence[CostRow], read: Callable[[Trial], Trial],
    folder: Path,
) -> "tuple[Report, dict[str, Report]]":  # fmt: skip
    """Write the report of a study; return it, and of several data sets that of each one by name."""
    with fast_imports():
        from pipelines.reporting import report  # imports matplotlib, which takes a second
        from pipelines.reporting import sets as report_of_sets

    most = "at most " if study.choose == "finetuned" else ""
    facts = {"labels": _LABELS_OF_ANOMALIES} if study.base.data.anomaly else {}
    facts |= {
        "seeds": ", ".join(map(str, study.seeds)),
        "budget": f"{most}{study.budget.length} per trial",
    }
    abouts = {
        one.name: report.About(
            in_set(one.name, study.name), study.choose_metric,
            {"data": f"{study.base.data.name}, {one.facts.rows} rows", **facts}, one.facts.classes,
            ended.dropped.get(one.name, ()),
        )
        for one in sets
    }  # fmt: skip
    told = [report.Cost(*row) for row in costs]
    if len(sets) == 1:  # there is nothing to rank over, though a folder may get further sets
        return report.write(ended.trials, abouts[sets[0].name]._replace(costs=told), folder, read), {}
    reports = report_of_sets.write_each(ended.trials, abouts, folder, read)
    about = report.About(
        study.name, study.choose_metric, {"data": f"{len(sets)} sets, {_rows(sets):,} rows", **facts}, costs=told
    )
    return report_of_sets.write(reports, ended.trials, about, folder), reports


def _failures(trials: list[Trial]) -> list[str]:
    """Return a line for each reason for which trials failed."""
    reasons: dict[str, list[str]] = {}
    for trial in trials:
        if trial.status == "failed":
            reasons.setdefault(trial.error, []).append(trial.name)
    return [f"{join_names(names, _NAMED)} failed: {reason}" for reason, names in reasons.items()]


def _say_failures(trials: list[Trial]) -> None:
    """Print why trials failed."""
    for line in (failures := _failures(trials)):
        say(f"warning: {line}")
    if failures:
        say("the same command runs these trials again, and no others")


def _print_costs(rows: Sequence[CostRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("row", "forecast", "spent", title="What it cost, all attempts included", title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=110, markup=False).print(table)


def _print_table(report: "Report", over: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110, markup=False)  # the user chooses the names of study rows, which may look like markup
    columns = [name for name in _COLUMNS if name in report.means]
    table = Table(f"mean over {over}", *columns, title="On the test split", title_justify="left")
    rows = list(report.means[columns[0]]) if columns else []
    for row in rows[:_PRINTED_ROWS]:
        table.add_row(row, *(f"{report.means[name].get(row, float('nan')):.4f}" for name in columns))
    console.print(table)
    if rows[_PRINTED_ROWS:]:
        console.print(f"{len(rows) - _PRINTED_ROWS} more rows are in the report", highlight=False)
    for name, verdict in report.verdicts.items():
        console.print(f"{name}: {verdict}", highlight=False)
    console.print(f"Which should I use? {report.answer}", highlight=False)


if __name__ == "__main__":
    cli.main("compare", lambda: compare(cli.parse(Compare, "python -m jobs.compare")))
