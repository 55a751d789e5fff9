"""The house: who may import whom, and what a driver must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("aecore", "pipelines", "jobs")


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported(package: str) -> dict[str, set[str]]:
    return {f.relative_to(ROOT).as_posix(): imports(f) for f in (ROOT / package).rglob("*.py")}


def uses(names: set[str], module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in names)


@pytest.mark.parametrize(
    ("package", "forbidden"), [("aecore", ("ray", "mlflow", "pipelines", "jobs")), ("pipelines", ("jobs",))]
)
def test_arrows_point_down(package: str, forbidden: tuple[str, ...]) -> None:
    for file, names in imported(package).items():
        assert not [name for name in forbidden if uses(names, name)], file


@pytest.mark.parametrize(
    ("module", "owner"),
    [
        ("mlflow", "pipelines/tracking.py"),
        ("ray.tune", "pipelines/study.py"),
        ("ray.data", "pipelines/streaming.py"),
    ],
)
def test_one_importer(module: str, owner: str) -> None:
    importers = {f for package in PACKAGES for f, names in imported(package).items() if uses(names, module)}
    assert importers <= {owner}


def test_aecore_imports_without_ray_and_mlflow() -> None:
    modules = [
        f.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for f in (ROOT / "aecore").rglob("*.py")
    ]
    code = f"""
import sys, importlib
sys.modules["ray"] = sys.modules["mlflow"] = None
for name in {modules!r}:
    importlib.import_module(name.removesuffix(".__init__"))
print("imported", len({modules!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"imported {len(modules)}", done.stderr


def test_the_driver_builds_its_graph_without_torch_ray_or_mlflow() -> None:
    code = """
import sys
from jobs.train import Train
from aecore.data import inspect
from pipelines.stacked import build
settings = Train()
graph = build(settings.experiment, inspect(settings.data), settings.resources.numerics)
assert len(graph.kept()) == 7 and all(len(stage.key) == 64 for stage in graph.kept())
print(sorted({"torch", "ray", "mlflow", "sklearn", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
