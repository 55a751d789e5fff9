"""Messages name no option that does not exist, and are not cut off in the middle of a word, a type or a secret."""

import ast
import contextlib
import importlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import BaseModel

from aecore.core.errors import InputError, short_repr, shorten
from aecore.data.cells import short_type
from jobs.cli import options_of, parse
from jobs.compare import Compare
from jobs.encode import Encode
from jobs.retrain import Retrain
from jobs.schedule import render
from jobs.submit import submit
from jobs.train import Train
from pipelines.host.messages import one_line

ROOT = Path(__file__).parents[1]
SOURCES = [file for package in ("aecore", "pipelines", "jobs") for file in (ROOT / package).rglob("*.py")]
PROGRAM = r"\b(jobs|tests)\.(\w+)|(?<![/\w])(ray|mlflow) ((?:[a-z][a-z-]* )+)|\b(uv|systemctl|docker)\b"
OPTION = r"(?<![\w-])--[a-z][\w.-]*\w"


def help_of(settings: type[BaseModel]) -> Callable[[], Any]:
    return lambda: parse(settings, "test", ["--help"])


JOBS: dict[str, Callable[[], Any]] = {
    "train": help_of(Train), "compare": help_of(Compare), "retrain": help_of(Retrain), "encode": help_of(Encode),
    "submit": lambda: submit(["--help"]), "schedule": lambda: render(["--help"]),
}  # fmt: skip
FOREIGN = {
    "uv": {"--with", "--extra"},
    "docker": {"--env-file"},
    "systemctl": {"--user", "--now"},
    "container": {"--ipc"},
}
"""Options of other programs that are named. Those of Ray and MLflow are read from the installed packages."""


@cache
def options_of_job(job: str) -> frozenset[str]:
    """Return the options in a job's `--help`, with underscores, as `cli.parse` reads them."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        JOBS[job]()
    options = {option.replace("-", "_") for option in re.findall(OPTION, text.getvalue())}
    parts = {option.rpartition(".")[0] for option in options if "." in option}  # as in `--finetune null`
    return frozenset({*options, *parts, "__help", "__dotted.field"})


@cache
def options_of_tool(words: tuple[str, ...]) -> set[str]:
    """Return the options of a command of Ray or MLflow, such as ("ray", "job", "submit")."""
    if words[0] == "ray":
        command: Any = importlib.import_module("ray.scripts.scripts").cli
    else:
        with warnings.catch_warnings(action="ignore"):  # MLflow's own, at the first import
            command = importlib.import_module("mlflow.cli").cli
    found = command
    for word in words[1:]:
        found = getattr(found, "commands", {}).get(word, found)
    assert found is not command, f"{' '.join(words)}: no such command"
    return {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}


def unknown_options(text: str) -> set[str]:
    """Return the options in a text that the program named before them in the same code, else every job, lacks."""
    unknown = set()
    for code in re.split(r"`|\n", text):
        for match in re.finditer(OPTION, code):
            programs = re.findall(PROGRAM, code[: match.start()])
            if not is_known(match[0], programs[-1] if programs else None):
                unknown.add(f"{code[: match.start()][-30:]}{match[0]}")
    return unknown


def is_known(option: str, program: tuple[str, ...] | None) -> bool:
    if program is None:
        ours = any(option.replace("-", "_") in options_of_job(job) for job in JOBS)
        return ours or option in FOREIGN["container"]
    package, module, tool, words, other = program
    if package == "jobs":
        return option.replace("-", "_") in options_of_job(module)
    if package == "tests":
        files = [ROOT / "tests" / f"{module}.py", *(ROOT / "tests" / module).glob("*.py")]
        return any(f'"{option}"' in file.read_text() for file in files if file.is_file())
    if tool:
        return option in options_of_tool((tool, *words.split()))
    return option in FOREIGN[other]


def sentences(file: Path) -> Iterator[str]:
    """Yield the strings of a module that have a blank, and so are for people, with X where a value is put in."""
    parts = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(part) for part in node.values}
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            text = node.value
        else:
            continue
        if " " in text.strip():
            yield text


def test_the_options_of_the_jobs_are_found() -> None:
    assert {"__data.labels", "__finetune.lr", "__variant.level", "__plan"} <= options_of_job("train")
    assert {"__once", "__env"} <= options_of_job("submit") and "__cron" in options_of_job("schedule")
    assert "__pretrain.lr" not in options_of_job("encode")
    assert options_of("compare", "set --data.labels null, --figures x") == "set --base.data.labels null, --figures x"
    assert unknown_options("set --data.labels null or `--addres X`; see `ray start --head --hed` and --shape") == {
        "--addres", "ray start --head --hed", " and --shape",
    }  # fmt: skip


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_message_names_only_options_that_exist(file: Path) -> None:
    assert set().union(*map(unknown_options, sentences(file)), set()) == set()


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_study_names_the_options_of_an_experiment_as_its_own(file: Path) -> None:
    for text in sentences(file):
        options = re.findall(OPTION, options_of("compare", text))
        own = {option.replace("-", "_") for option in options if option.startswith("--base.")}
        assert own <= options_of_job("compare")
        assert options_of("train", text) == text


PAGES = [ROOT / "README.md", *sorted((ROOT / "jobs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_only_options_that_exist(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    indented = re.findall(r"^    .*$", text, re.MULTILINE)
    prose = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    assert set().union(*map(unknown_options, [*indented, *spans])) == set()


LONG = "struct<bytes: binary, path: string, height: int32, width: int32, caption: large_string, id: int64>"


def test_a_message_is_cut_after_a_word() -> None:
    assert shorten("as it is") == "as it is" and shorten(" a\n b ") == "a b"
    assert shorten("one, two, three", 15) == "one, two, three" and shorten("one, two, three", 14) == "one, two..."
    assert shorten("one two", 6) == "one..." and shorten("x" * 50, 10) == "xxxxxxx..."
    for most in range(10, 60):
        text = shorten("cannot reach http://me:secret@host:5000?token=secret now", most)
        assert "secret" not in text and len(text) <= most
    assert one_line(ValueError("a b" * 100)).endswith(" ba...") and short_repr("a b" * 50).endswith("...")
    with pytest.raises(InputError, match=r"^see http://\*\*\*@h \.\.\.$"):
        raise InputError("see http://me:secret@h ...")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (pa.int64(), "int64"),
        (pa.list_(pa.float32(), 8), "fixed_size_list<item: float>[8]"),
        (pa.struct([(name, pa.int32()) for name in "abc"]), "struct<a: int32, b: int32, c: int32>"),
        (
            pa.struct([("bytes", pa.binary()), ("path", pa.string()), ("height", pa.int32()), ("width", pa.int32())]),
            "struct<bytes: binary, path: string, height: int32, ...>",
        ),
        (
            pa.list_(pa.struct([("first", pa.large_string()), ("second", pa.large_string()), ("third", pa.int8())])),
            "list<item: struct<first: large_string, ...>>",
        ),
        (pa.struct([("a" * 70, pa.int8())]), f"struct<{'a' * 50}..."),
    ],
    ids=["plain", "vector", "short", "long", "nested", "one long name"],
)  # fmt: skip
def test_a_type_is_cut_between_its_parts(kind: pa.DataType, name: str) -> None:
    assert short_type(kind) == name


def cuts(tree: ast.AST) -> Iterator[int]:
    """Yield the lines on which text is cut at a number of characters: `[:80]` of a call or within a string, `:.80`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FormattedValue) and node.format_spec is not None:
            spec = "".join(str(part.value) for part in ast.walk(node.format_spec) if isinstance(part, ast.Constant))
            if re.fullmatch(r"\.\d+s?", spec):
                yield node.lineno
        in_text = {id(part) for part in ast.walk(node)} if isinstance(node, ast.FormattedValue) else set()
        for part in ast.walk(node):
            if isinstance(part, ast.Subscript) and isinstance(part.slice, ast.Slice) and part.slice.lower is None:
                most = part.slice.upper
                long = isinstance(most, ast.Constant) and isinstance(most.value, int) and most.value >= 30
                if long and (id(part) in in_text or isinstance(part.value, ast.Call | ast.Subscript)):
                    yield part.lineno


def test_no_text_is_cut_by_hand() -> None:
    assert {*cuts(ast.parse('f"{a:.60} {b[:40]}"\nstr(c)[:120]\nd[1][:300]\ncodes[:64]'))} == {1, 2, 3}
    found = {f"{file.relative_to(ROOT)}:{line}" for file in SOURCES for line in cuts(ast.parse(file.read_text()))}
    assert found == set(), "use aecore.core.errors.shorten"
