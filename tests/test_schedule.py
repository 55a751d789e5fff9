"""`jobs.schedule`: the printed text fires the right command at the right times, at most once a day."""

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from aecore.core.errors import InputError
from jobs.schedule import render
from pipelines.retraining.cron import Cron, parse_cron
from tests.test_cluster import lint_manifest

ROOT = Path(__file__).parents[1]
RECIPE = "jobs/recipes/mnist.yaml"
CRONS = {
    "0 2 * * *": "*-*-* 02:00:00",
    "@daily": "*-*-* 00:00:00",
    "@weekly": "Sun *-*-* 00:00:00",
    "30  14 * * 1-5": "Mon,Tue,Wed,Thu,Fri *-*-* 14:30:00",
    "5 0 * * mon,THU": "Mon,Thu *-*-* 00:05:00",
    "0 23 * * 5-7": "Sun,Fri,Sat *-*-* 23:00:00",
    "0 3 1 * *": "*-*-01 03:00:00",
    "0 3 */10 2 *": "*-02-01,11,21,31 03:00:00",
    "59 23 31 jan-mar/2 *": "*-01,03-31 23:59:00",
    "0 4 29 2 *": "*-02-29 04:00:00",
    "0 4 * * */3": "Sun,Wed,Sat *-*-* 04:00:00",
}


def fires(cron: Cron, begin: date, count: int) -> Iterator[datetime]:
    """Yield the next times at which an expression fires, by trying day after day."""
    day = begin
    while count:
        weekday = (day.weekday() + 1) % 7
        parts = ((cron.days, day.day), (cron.months, day.month), (cron.weekdays, weekday))
        if all(value in wanted or not wanted for wanted, value in parts):
            yield datetime(day.year, day.month, day.day, cron.hour, cron.minute, tzinfo=UTC)
            count -= 1
        day += timedelta(1)


@pytest.mark.parametrize("text", CRONS)
def test_systemd_fires_when_cron_does(text: str) -> None:
    cron = parse_cron(text)
    calendar = cron.on_calendar()
    assert calendar == CRONS[text] and parse_cron(str(cron)) == cron
    if shutil.which("systemd-analyze"):
        line = ["systemd-analyze", "calendar", "--iterations=6", "--base-time=2026-11-23 12:00:00 UTC"]
        done = subprocess.run([*line, f"{calendar} UTC"], capture_output=True, text=True, check=True, env={"TZ": "UTC"})
        found = re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", done.stdout.split("Next elapse")[1])
        after = datetime(2026, 11, 23, 12, tzinfo=UTC)
        expected = [f"{time:%F %T}" for time in fires(cron, after.date(), 7) if time > after][:6]
        assert found == expected


BAD = {
    "0 2 * *": "4 fields; write five",
    "@hourly": "1 fields; write five",
    "60 2 * * *": "cron minute '60': 60 is not within 0 to 59",
    "0 24 * * *": "cron hour '24'",
    "0 2 0 * *": "cron day-of-month '0'",
    "0 2 * 13 *": "cron month '13'",
    "0 2 * * 8": "cron day-of-week '8'",
    "0 2 * * someday": "someday is not within 0 to 7",
    "0 2 5-1 * *": "ends before it begins",
    "0 2 */0 * *": "a step of 0",
    "0 2 1,,3 * *": "not a field; write",
    "0 2 *-3 * *": "not a field; write",
    "-5 2 * * *": "not a field; write",
    "* 2 * * *": "fires several times a day",
    "0 */6 * * *": "fires several times a day",
    "0 2 13 * 5": "leave one of them",
    "0 2 30 2 *": "never fires",
    "0 2 31 4,6,9,11 *": "never fires",
    "0 2 * * * rm": "6 fields",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_expression_ends_in_one_line(text: str) -> None:
    with pytest.raises(InputError, match=re.escape(BAD[text])) as error:
        parse_cron(text)
    assert "\n" not in str(error.value) and str(error.value).startswith("cron ")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder whose name needs quoting, with a recipe and a Python that prints its arguments and environment."""
    project = tmp_path / "50% of it's"
    project.mkdir()
    (project / "our recipe.yaml").touch()
    python = project / "python"
    python.write_text('#!/bin/sh\nfor word in "$@" "$MLFLOW_TRACKING_URI" "$PWD"; do printf "%s\\n" "$word"; done\n')
    python.chmod(0o755)
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000/a%20b")
    return project


ARGS = ["our recipe.yaml", "--model", "My digits", "--address", "http://head:8265"]


def ran(folder: Path) -> list[str]:
    """Return the arguments and environment of the command that must run today."""
    day, digest = date.today(), hashlib.sha256(b"My digits").hexdigest()[:6]
    return [
        "-m", "jobs.submit", "--address", "http://head:8265", "--once", "--name",
        f"retrain-my-digits-{digest}-{day}", "--",
        "jobs.retrain", "our recipe.yaml", "--model", "My digits", "--logical-date", f"{day}", "http://mlflow:5000/a%20b",
        str(folder),
    ]  # fmt: skip


def test_the_crontab_line_runs_as_cron_runs_it(folder: Path, tmp_path: Path) -> None:
    line = render([*ARGS, "--cron", "15 3 * * mon-fri"])
    times, command = line[: len("15 3 * * 1,2,3,4,5")], line[len("15 3 * * 1,2,3,4,5 ") :]
    assert times == "15 3 * * 1,2,3,4,5" and "\n" not in line and not re.search(r"(?<!\\)%", line)
    home = tmp_path / "home of it"
    home.mkdir()
    env = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["/bin/sh", "-c", command.replace(r"\%", "%")], check=True, cwd="/", env=env)
    log = next(home.glob("retrain-my-digits-*.log"))
    assert done.returncode == 0 and log.read_text().splitlines() == ran(folder)


def test_the_units_run_as_systemd_runs_them(folder: Path, tmp_path: Path) -> None:
    text = render([*ARGS, "--format", "systemd"])
    names = re.findall(r"^# ~/\.config/systemd/user/(\S+)", text, re.MULTILINE)
    service, timer = re.split(r"^# ~/.*\n", text, flags=re.MULTILINE)[1:]
    assert [name.rsplit(".")[-1] for name in names] == ["service", "timer"] and "OnCalendar=*-*-* 02:00:00\n" in timer

    def value(key: str) -> str:
        (found,) = re.findall(rf"^{key}=(.*)$", service, re.MULTILINE)
        return found.replace("%%", "%")

    (environment,) = shlex.split(value("Environment"))
    name, _, uri = environment.partition("=")
    line = [word.replace("$$", "$") for word in shlex.split(value("ExecStart"))]
    done = subprocess.run(
        line, cwd=value("WorkingDirectory"), env={name: uri, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ran(folder)
    if shutil.which("systemd-analyze"):
        for name, unit in zip(names, (service, timer), strict=True):
            (tmp_path / name).write_text(unit)
        files = [str(tmp_path / name) for name in names]
        verified = subprocess.run(["systemd-analyze", "verify", *files], capture_output=True, text=True, check=False)
        assert verified.returncode == 0 and not [line for line in verified.stderr.splitlines() if str(tmp_path) in line]


def test_the_manifest_is_the_sample_with_another_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = render([RECIPE, "--model", "digits", "--cron", "0 5 * * sun", "--format", "kuberay"])
    manifest = yaml.safe_load(text)
    assert manifest["metadata"]["name"] == "retrain-digits" and manifest["spec"]["schedule"] == "0 5 * * 0"
    job = manifest["spec"]["jobTemplate"]
    assert job["entrypoint"] == f"python -m jobs.retrain {RECIPE} --model digits"
    job["entrypoint"] = f"python -m jobs.train {RECIPE}"
    assert lint_manifest(manifest) == []


def test_other_models_have_other_names(folder: Path) -> None:
    names = ["digits", "Digits", "my digits", "my-digits", "my.digits", "d" * 80, "d" * 81]
    printed = [render(["--model", name, "--format", "kuberay"]) for name in names]
    found = [yaml.safe_load(text)["metadata"]["name"] for text in printed]
    assert len(set(found)) == len(names) and found[0] == "retrain-digits"
    assert all(re.fullmatch(r"[a-z0-9-]{1,57}", name) for name in found)


def test_passwords_are_not_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow:5000")
    for form in ("cron", "systemd"):
        assert "secret" not in (text := render([*ARGS, "--format", form])) and "CHANGE-ME" in text
    assert "MLFLOW_TRACKING_URI holds a password" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "a/b"], "--model a/b: not a name for a registered model"),
        (["gone.yaml", "--model", "a"], "recipe gone.yaml: does not exist here"),
        (["--model", "a", "--address", "head:8265"], "address head:8265: name the dashboard"),
        (["--model", "a", "--cron", "often"], "cron 'often': 1 fields"),
    ],
)
def test_bad_arguments_are_refused(args: list[str], message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        render(args)


def test_a_mistake_ends_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.schedule", "--model", "digits", "--cron", "0 25 * * *"], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: cron hour '25'")
