"""Reading settings: precedence, another `kind`, and every kind of mistake."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from aecore.config.experiment import Conv, Experiment
from aecore.core.errors import InputError
from aecore.variants import Denoising
from jobs.cli import finite, options_of, parse, without_secrets
from jobs.compare import Compare
from jobs.retrain import Retrain
from jobs.train import Train
from pipelines.study.plan import experiment_of

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))


def settings(*args: str) -> Train:
    return parse(Train, "test", list(args))


def recipe(folder: Path, content: Any) -> str:
    file = folder / "recipe.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(file)


def test_no_arguments_are_the_defaults() -> None:
    assert settings().experiment == Experiment()


def test_precedence_is_defaults_recipe_environment_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(tmp_path, {"finetune": {"epochs": 5, "lr": 0.5, "batch_size": 7}, "seed": 1})
    monkeypatch.setenv("DIABOLO__FINETUNE__LR", "0.25")
    monkeypatch.setenv("DIABOLO__FINETUNE__EPOCHS", "6")
    monkeypatch.setenv("DIABOLO__RESOURCES__RETRIES", "9")
    parsed = settings(file, "--finetune.epochs", "8")
    assert parsed.finetune is not None
    assert (parsed.finetune.epochs, parsed.finetune.lr, parsed.finetune.batch_size) == (8, 0.25, 7)
    assert parsed.finetune.schedule == "constant" and parsed.seed == 1 and parsed.resources.retries == 9


def test_a_partial_override_keeps_the_class_defaults_of_its_siblings() -> None:
    default = Experiment().pretrain
    parsed = settings("--pretrain.lr", "0.1").pretrain
    assert default is not None and parsed == default.model_copy(update={"lr": 0.1})


def test_another_kind_replaces_its_subtree(tmp_path: Path) -> None:
    file = recipe(tmp_path, {"variant": {"kind": "denoising", "level": 0.4}, "network": {"widths": [5], "tied": True}})
    assert settings(file, "--variant.noise", "gaussian").variant == Denoising(level=0.4, noise="gaussian")
    assert settings(file, "--variant.kind", "plain").variant.kind == "plain"
    assert settings(file, "--network.kind", "conv").network == Conv()
    assert settings("--variant.kind", "denoising", "--variant.level", "0.3").variant == Denoising(level=0.3)


@pytest.mark.parametrize("null", ["recipe", "option"])
def test_null_switches_a_part_off_and_a_field_switches_it_on_again(null: str, tmp_path: Path) -> None:
    file = recipe(tmp_path, {"pretrain": None} if null == "recipe" else {})
    args = [] if null == "recipe" else ["--pretrain", "null"]
    assert settings(file, *args).pretrain is None
    again = settings(file, "--pretrain.epochs", "3").pretrain
    assert again is not None and again.epochs == 3


def test_values_of_every_type() -> None:
    parsed = settings(
        "--network.widths", "[7, 5]", "--control", "false", "--data.labels", "null", "--data.validation", "100",
        "--pretrain.lr", "1e-4", "--plan", "--figures", "somewhere", "--register", "name",
    )  # fmt: skip
    assert parsed.network.widths == (7, 5) and parsed.control is False and parsed.data.labels is None
    assert parsed.data.validation == 100 and parsed.pretrain is not None and parsed.pretrain.lr == 1e-4
    assert parsed.plan and parsed.figures == Path("somewhere") and parsed.register_as == "name"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("[a.parquet,b.parquet]", ("a.parquet", "b.parquet")),
        ('["a.parquet", "b,c.parquet"]', ("a.parquet", "b,c.parquet")),
        ("a,b.parquet", "a,b.parquet"),
        ("data/[ab]-*.parquet", "data/[ab]-*.parquet"),
        ("[ab].parquet", "[ab].parquet"),
        ("{a,b}", "{a,b}"),
        ("5", "5"),
    ],
)
def test_one_path_or_several(text: str, path: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert settings("--data.name", "parquet", "--data.path", text).data.path == path
    assert settings(recipe(tmp_path, {"data": {"name": "parquet", "path": path}})).data.path == path
    monkeypatch.setenv("DIABOLO__DATA__PATH", text)
    assert settings("--data.name", "parquet").data.path == path


BAD: list[tuple[list[str], Any, str]] = [
    (["--finetune.epohs", "3"], None, "--finetune.epohs: unknown option; the nearest is finetune.epochs"),
    (["--varient.kind", "plain"], None, "the nearest is variant.kind"),
    (["--zzz"], None, "--zzz: unknown option"),
    ([], {"finetune": {"lrr": 1}}, "finetune.lrr: unknown key; the nearest is finetune.lr"),
    ([], {"pretain": {}}, "pretain: unknown key; the nearest is pretrain"),
    ([], {"resources": {"gpu": 1}}, "resources.gpu: unknown key; the nearest is resources.gpus"),
    ([], {"variant": {"kind": "denoising", "levle": 1}}, "variant.levle: unknown key; the nearest is variant.level"),
    ([], {"variant": {"level": 1}}, "variant.level: not a field of this variant.kind"),
    (["--network.kernel", "3"], None, "network.kernel: not a field of this network.kind"),
    ([], {"variant": {"kind": "sparce"}}, "variant: input tag 'sparce'"),
    (["--pretrain.epochs", "0"], None, "pretrain.epochs: input should be greater than 0, got '0'"),
    (["--pretrain.epochs", "many"], None, "pretrain.epochs: input should be a valid integer"),
    (["--network.dropout", "1"], None, "network.dropout: input should be less than 1"),
    (["--network.widths", "[]"], None, "network.widths: "),
    (["--data.name", "minst"], None, "data.name: "),
    (["--data.name", "parquet"], None, "data.path is missing"),
    (["--data.path", "x.parquet"], None, "add --data.name parquet"),
    (["--pretrain", "null", "--finetune", "null"], None, "nothing to train"),
    ([], {"variant": {"kind": "denoising", "level": 1.5}}, "variant.level: 1.5 is not a share"),
    (["--control", "maybe"], None, "control: input should be a valid boolean"),
    (["--finetune.epochs"], None, "expected one argument"),
    (["no-such-recipe.yaml"], None, "recipe no-such-recipe.yaml: No such file"),
    ([], "a: [1", "not valid YAML"),
    ([], "- just\n- a list", "holds a list"),
]  # fmt: skip


def test_an_option_of_an_experiment_is_one_of_base_in_a_study() -> None:  # before: "--base.data.name: unknown option"
    with pytest.raises(InputError) as error:
        parse(Compare, "test", ["--data.name", "parquet"])
    assert options_of("compare", str(error.value)) == "data.name: unknown option; a study has it as base.data.name"
    assert parse(Compare, "test", ["--base.data.name", "mnist"]).base.data.name == "mnist"


@pytest.mark.parametrize(("args", "content", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_settings_are_reported_in_one_line(args: list[str], content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        settings(*([] if content is None else [recipe(tmp_path, content)]), *args)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_environment_variable_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIABOLO__FINETUNE__LRR", "3")
    with pytest.raises(InputError, match=r"finetune\.lrr: unknown key; the nearest is finetune\.lr"):
        settings()


def test_a_field_at_the_top_is_read_only_from_a_variable_with_our_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTER", "not ours")
    assert settings().register_as is None
    monkeypatch.setenv("DIABOLO__REGISTER", "ours")
    monkeypatch.setenv("DIABOLO__RECIPE", recipe(tmp_path, {"seed": 3}))
    assert settings().register_as == "ours" and settings().seed == 3
    monkeypatch.setenv("DIABOLO__SEEED", "1")
    with pytest.raises(InputError, match="DIABOLO__SEEED: unknown environment variable; the nearest is seed"):
        settings()


def test_a_stored_configuration_has_no_secrets() -> None:
    kept = without_secrets(
        {"a": {"path": "s3://key:pass/word@bucket/x?token=1", "n": 3}, "b": "mail@host", "c": ("/a@b", "s3://k@b")}
    )
    assert kept == {"a": {"path": "s3://***@bucket/x?***", "n": 3}, "b": "mail@host", "c": ["/a@b", "s3://***@b"]}
    assert str(InputError("s3://a:b@c/d is gone, 'gs://e?f=g' too")) == "s3://***@c/d is gone, 'gs://e?***' too"


def test_numbers_that_are_not_finite_are_null_in_a_report() -> None:
    report = {"metrics": {"a": math.inf, "b": 0.5, "c": 2}, "rows": [math.nan, {"d": -math.inf}], "status": "finished"}
    found = finite(report)
    assert found == {"metrics": {"a": None, "b": 0.5, "c": 2}, "rows": [None, {"d": None}], "status": "finished"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_every_recipe_parses(file: Path) -> None:
    if file.stem.startswith("study"):
        study = parse(Compare, "test", [str(file)]).study
        assert len({*study.variants, *study.searched_rows}) > 1 and all(
            experiment_of(study, row, {}, 0) for row in study.variants
        )
    else:
        assert settings(str(file)).experiment != Experiment()


def test_a_study_that_names_its_rows_has_no_others(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("variants: {SDAE: {pretrain: {}}}")
    study = parse(Compare, "test", [str(tmp_path / "study.yaml"), "--variants", '{"more": {}}']).study
    assert study.variants == {"SDAE": {"pretrain": {}}, "more": {}}


def test_the_study_of_digits_is_the_default_and_can_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIABOLO__BUDGET__EPOCHS", "7")
    study = parse(Compare, "test", ["--base.finetune.lr", "0.1", "--seeds", "[5]"]).study
    assert study.base.network.widths == (48, 16) and set(study.variants) >= {"plain", "sparse", "variational"}
    assert (study.seeds, study.budget.epochs) == ((5,), 7) and study.base.finetune is not None
    assert (study.base.finetune.lr, study.base.finetune.batch_size) == (0.1, 32)


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "jobs.train", *args]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False, env=None)


def test_help_lists_every_field_with_its_meaning(tmp_path: Path) -> None:
    done = command("--help", cwd=tmp_path)
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for part in (
        "--finetune.lr",
        "Learning rate of Adam, at its peak.",
        "(default: 0.001)",
        "RECIPE",
        "--variant.level",
    ):
        assert part in text
    for name, field in Train.model_fields.items():
        assert f"--{field.alias or name}" in text or name == "recipe"


def test_bad_input_ends_with_one_line_and_exit_code_2_before_anything_is_made(tmp_path: Path) -> None:
    done = command("--finetune.epohs", "3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --finetune.epohs: unknown option; the nearest is finetune.epochs\n"
    done = command("--data.name", "parquet", "--data.path", "gone.parquet", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "gone.parquet does not exist" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_plan_makes_nothing(tmp_path: Path) -> None:
    done = command("--plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data, rows, *lines = done.stdout.splitlines()
    assert data == "data: digits, 1,797 rows, images of 8 x 8 pixels with 1 channel, 10 classes"
    assert rows == "rows are held in memory (data.in_memory auto)"
    assert [line.split()[0] for line in lines] == [
        "layer", "layer", "layer", "finetune", "evaluate", "control", "evaluate",
    ]  # fmt: skip
    assert all(line.endswith("would run") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_hyphens_in_the_name_of_an_option() -> None:
    parsed = parse(
        Retrain,
        "test",
        ["--warm-start", "--no-only-on-drift", "--logical-date=2026-11-23", "--data.in-memory", "always"],
    )
    assert parsed.warm_start and not parsed.only_on_drift and parsed.rule.logical_date.isoformat() == "2026-11-23"
    assert parsed.data.in_memory == "always" and parsed.data.split == "content" and not parsed.control
