"""Which room may import which, and what a driver must not import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("aecore", "pipelines", "jobs")


def imports(file: Path) -> set[str]:
    """Return the full names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported(package: str) -> dict[str, set[str]]:
    """Return the imports of each file of a package."""
    return {f.relative_to(ROOT).as_posix(): imports(f) for f in (ROOT / package).rglob("*.py")}


def uses(names: set[str], module: str) -> bool:
    """Return whether `module`, or something in it, is among the imported names."""
    return any(name == module or name.startswith(f"{module}.") for name in names)


ROOMS: dict[str, set[str]] = {
    "aecore.core": set(),
    "aecore.models": {"aecore.core"},
    "aecore.variants": {"aecore.core", "aecore.models"},
    "aecore.config": {"aecore.core", "aecore.models", "aecore.variants"},
    "aecore.data": {"aecore.core", "aecore.config"},
    "aecore.training": {"aecore.core", "aecore.models", "aecore.variants", "aecore.config", "aecore.data"},
    "aecore.evaluation": {"aecore.core", "aecore.models", "aecore.variants", "aecore.data", "aecore.training"},
    "aecore.anomaly": {"aecore.core", "aecore.models", "aecore.config", "aecore.evaluation"},
    "aecore.serving": {
        "aecore.core", "aecore.models", "aecore.config", "aecore.data", "aecore.evaluation", "aecore.anomaly",
    },
    "aecore.stages": {
        "aecore.core", "aecore.models", "aecore.variants", "aecore.config", "aecore.data", "aecore.training",
        "aecore.evaluation", "aecore.anomaly", "aecore.serving",
    },
    "pipelines.host": {"aecore.core"},
    "pipelines.graph": {"aecore.core", "aecore.models", "aecore.config"},
    "pipelines.store": {"aecore.core", "aecore.models", "aecore.config", "pipelines.host", "pipelines.graph"},
    "pipelines.cluster": {"aecore.core", "aecore.config", "aecore.data", "pipelines.host"},
    "pipelines.execution": {
        "aecore.core", "aecore.models", "aecore.config", "aecore.data", "aecore.training", "aecore.serving",
        "aecore.stages", "pipelines.host", "pipelines.graph", "pipelines.store", "pipelines.cluster",
    },
    "pipelines.study": {
        "aecore.core", "aecore.models", "aecore.config", "aecore.data", "aecore.evaluation", "pipelines.host",
        "pipelines.graph", "pipelines.store", "pipelines.cluster", "pipelines.execution",
    },
    "pipelines.retraining": {
        "aecore.core", "aecore.models", "aecore.config", "aecore.data", "pipelines.host", "pipelines.graph",
        "pipelines.store", "pipelines.cluster", "pipelines.execution",
    },
    "pipelines.reporting": {"aecore.evaluation"},
    "pipelines.encoding": {"aecore.models", "aecore.data", "aecore.serving", "pipelines.cluster"},
    "jobs": {
        "aecore.core", "aecore.models", "aecore.config", "aecore.data", "aecore.evaluation", "aecore.serving",
        "pipelines.host", "pipelines.graph", "pipelines.cluster", "pipelines.execution", "pipelines.study",
        "pipelines.retraining", "pipelines.reporting", "pipelines.encoding",
    },
}  # fmt: skip
"""Each room and the rooms that it may import, type-checking imports included.

A room stands below all rooms that import it, so the table has no cycle. It lists no arrow that is not used. If an
import breaks it, first look for the lower room in which the shared code belongs."""


def room(module: str) -> str:
    """Return the room of one of our modules: the first two parts of its name, or `jobs`."""
    parts = module.split(".")
    return parts[0] if parts[0] == "jobs" else ".".join(parts[:2])


def broken_arrows(root: Path) -> dict[str, set[str]]:
    """Return the files that import what the table does not allow, with these imports."""
    broken: dict[str, set[str]] = {}
    for file in (f for package in PACKAGES for f in (root / package).rglob("*.py")):
        own = room(module_name(file, root))
        forbidden = {name for name in ours(imports(file)) if room(name) not in {own, *ROOMS.get(own, set())}}
        if forbidden:
            broken[file.relative_to(root).as_posix()] = forbidden
    return broken


def module_name(file: Path, root: Path) -> str:
    return file.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def ours(names: set[str]) -> set[str]:
    """Return the imported names that belong to this project."""
    return {name for name in names if name.count(".") and name.split(".")[0] in PACKAGES}


def test_rooms_import_only_the_rooms_below_them() -> None:
    assert broken_arrows(ROOT) == {}


def test_an_import_against_the_arrows_is_found(tmp_path: Path) -> None:
    (tmp_path / "aecore" / "models").mkdir(parents=True)
    file = tmp_path / "aecore" / "models" / "layers.py"
    file.write_text("if TYPE_CHECKING:\n    from aecore.training.fit import Fitted\n")
    assert broken_arrows(tmp_path) == {"aecore/models/layers.py": {"aecore.training.fit.Fitted"}}


def test_the_table_of_rooms_is_no_larger_than_what_is_used() -> None:
    used: dict[str, set[str]] = {name: set() for name in ROOMS}
    for file in (f for package in PACKAGES for f in (ROOT / package).rglob("*.py")):
        if (own := room(module_name(file, ROOT))) in ROOMS:
            used[own] |= {room(name) for name in ours(imports(file))} - {own}
    assert used == ROOMS


def test_the_table_of_rooms_has_no_cycle() -> None:
    below = {name: set(rooms) for name, rooms in ROOMS.items()}
    while below:
        lowest = {name for name, rooms in below.items() if not rooms}
        assert lowest, f"these rooms import each other in a circle: {sorted(below)}"
        below = {name: rooms - lowest for name, rooms in below.items() if name not in lowest}


def test_aecore_knows_nothing_of_ray_or_mlflow() -> None:
    for file, names in imported("aecore").items():
        assert not uses(names, "ray") and not uses(names, "mlflow"), file


@pytest.mark.parametrize(
    ("module", "owner"),
    [
        ("mlflow", "pipelines/store/"),
        ("ray.tune", "pipelines/study/"),
        ("ray.data", "pipelines/cluster/reading.py"),
    ],
)
def test_only_one_room_imports_it(module: str, owner: str) -> None:
    importers = {f for package in PACKAGES for f, names in imported(package).items() if uses(names, module)}
    assert importers and all(file.startswith(owner) for file in importers)


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
from aecore.data.dataset import inspect
from pipelines.graph.recipe import build
settings = Train()
graph = build(settings.experiment, inspect(settings.data), settings.resources.numerics)
assert len(graph.kept()) == 7 and all(len(stage.key) == 64 for stage in graph.kept())
print(sorted({"torch", "ray", "mlflow", "sklearn", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
