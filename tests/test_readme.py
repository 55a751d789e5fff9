"""README and the pages below jobs/: what they name exists, what exists is named, and every command line is valid."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from aecore.config.experiment import overlay
from jobs.cli import parse
from jobs.compare import Compare
from jobs.encode import Encode
from jobs.retrain import Retrain
from jobs.schedule import render
from jobs.submit import submit
from jobs.train import Train
from pipelines.study.schema import Study

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text() for file in (ROOT / "jobs").glob("*.md")}
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")} | PAGES


def test_the_two_commands_stand_there_once_each() -> None:
    for command in ("pip install uv && uv run python -m jobs.train", "pip install uv && uv run pytest"):
        assert len(re.findall(rf"^ *{re.escape(command)}$", README, re.MULTILINE)) == 1


def test_the_tree_names_every_room_and_every_command() -> None:
    tree = README.split("## The tree")[1]
    named = {name.rstrip("/") for name in re.findall(r"`([\w./]+)`", tree)}
    modules = [file.relative_to(ROOT) for top in ("aecore", "pipelines", "jobs") for file in (ROOT / top).rglob("*.py")]
    rooms = {file.parent.as_posix() for file in modules if len(file.parts) > 2}
    commands = {file.as_posix() for file in modules if file.parts[0] == "jobs" and file.name != "__init__.py"}
    assert rooms | commands <= named, rooms | commands - named
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_readme_links_every_page() -> None:
    for page in PAGES:
        assert f"({page})" in README, page


def test_every_recipe_is_in_a_table() -> None:
    for file in (ROOT / "jobs" / "recipes").glob("*.yaml"):
        assert any(f"| `{file.name}` |" in text for text in PAGES.values()), file.name


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_pictures_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        assert target.startswith("http") or ((ROOT / page).parent / target).is_file(), target


class ReachedError(Exception):
    """The command has checked its arguments and would connect to the cluster now."""


def connect(address: str) -> None:
    raise ReachedError


def command_lines(text: str) -> list[str]:
    """Return the command lines in indented blocks, each from `jobs.` on and without its comment."""
    blocks = "\n".join(re.findall(r"^    .*$", text, re.MULTILINE)).replace("\\\n", " ")
    return re.findall(r"python -m (jobs\.\w+[^#\n]*?) *(?:#.*)?$", blocks, re.MULTILINE)


LINES = [(page, line) for page, text in TEXTS.items() for line in command_lines(text)]
SETTINGS: dict[str, type[BaseModel]] = {
    "jobs.train": Train, "jobs.compare": Compare, "jobs.retrain": Retrain, "jobs.encode": Encode,
}  # fmt: skip


@pytest.mark.parametrize(("page", "line"), LINES)
def test_every_command_line_is_valid(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    command, *args = shlex.split(line)
    if command == "jobs.schedule":
        assert "jobs.retrain" in render(args)
        return
    if command == "jobs.submit":
        with pytest.raises(ReachedError):
            submit(args, connect)
        command, *args = args[args.index("--") + 1 :]
    assert isinstance(parse(SETTINGS[command], page, args), SETTINGS[command])


def test_there_are_lines_of_every_command() -> None:
    assert {line.split()[0] for _, line in LINES} == {*SETTINGS, "jobs.schedule", "jobs.submit"}


def test_the_example_of_a_study_is_one() -> None:
    (example,) = re.findall(r"^    base: .*?(?=\n\n)", PAGES["jobs/COMPARE.md"], re.MULTILINE | re.DOTALL)
    values = overlay(Study().model_dump(), yaml.safe_load(textwrap.dedent(example)))
    assert len(Study.model_validate(values).variants) == 3


def test_the_example_of_a_supervised_search_is_one() -> None:
    (example,) = re.findall(
        r"^    variants:\n      SDAE.*?(?=\n\n)", PAGES["jobs/COMPARE.md"], re.MULTILINE | re.DOTALL
    )
    study = Study.model_validate(yaml.safe_load(textwrap.dedent(example)))
    assert study.searched_rows == ["SDAE", "random"] and study.choose_metric == "val/finetuned_accuracy"
