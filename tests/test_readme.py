"""The README against the tree: what it names exists, what exists it names."""

import re
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
from jobs.train import Train
from pipelines.study.schema import Study

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_two_commands_stand_there_once_each() -> None:
    for command in ("pip install uv && uv run python -m jobs.train", "pip install uv && uv run pytest"):
        assert len(re.findall(rf"^ *{re.escape(command)}$", TEXT, re.MULTILINE)) == 1


def test_the_tree_names_every_module() -> None:
    tree = TEXT.split("## The tree")[1]
    named = set(re.findall(r"`([\w./]+)`", tree))
    for package in ("aecore", "pipelines", "jobs"):
        for file in (ROOT / package).glob("*.py"):
            assert file.name == "__init__.py" or file.relative_to(ROOT).as_posix() in named, file
    for name in named:
        if "/" in name:
            assert (ROOT / name).exists(), name
    assert {f.name for f in (ROOT / "aecore" / "variants").glob("*.py")} - {"__init__.py"} <= named


def test_every_recipe_is_in_the_table() -> None:
    for file in (ROOT / "jobs" / "recipes").glob("*.yaml"):
        assert f"| `{file.name}` |" in TEXT


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).is_file(), target


COMMANDS: dict[str, type[BaseModel]] = {"train": Train, "compare": Compare, "retrain": Retrain, "encode": Encode}
LINES = [c for c in re.findall(r"uv run python -m jobs\.(\w+) ([^#`\n]+)", TEXT) if "--help" not in c[1]]


@pytest.mark.parametrize(("command", "line"), LINES)
def test_every_command_line_parses(command: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert isinstance(parse(COMMANDS[command], "readme", line.split()), COMMANDS[command])


def test_the_example_of_a_study_is_one() -> None:
    (example,) = re.findall(r"^    base: .*?(?=\n\n)", TEXT, re.MULTILINE | re.DOTALL)
    values = overlay(Study().model_dump(), yaml.safe_load(textwrap.dedent(example)))
    assert len(Study.model_validate(values).variants) == 3
