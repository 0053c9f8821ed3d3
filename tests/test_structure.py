"""The rules of the layout, checked by walking the tree.

A room is a folder of modules. Where a folder has rooms below it, each of its own modules counts as
a room of one: `train/run.py` uses the rooms of train, and they use `train/config.py`.
"""

import ast
import functools
import graphlib
import importlib
import pkgutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {name: ROOT / name / "tuneline" for name in ("components", "kernels", "pipelines")}
STEPS = sorted(path.parent.name for path in SOURCES["components"].glob("*/component.py"))
PACKAGES = sorted(
    ".".join(path.parent.relative_to(source.parent).parts)
    for source in SOURCES.values()
    for path in source.rglob("__init__.py")
)
MAX_FILES_IN_A_FOLDER = 20

# Modules that know the Kubernetes client or kfp's Kubernetes extension.
KNOWS_KUBERNETES = {
    "components/tuneline/diagnose/cluster.py",
    "components/tuneline/runtime/kubernetes_client.py",
    "components/tuneline/train/trainjob/client.py",
    "pipelines/tuneline/pipelines/kube.py",
    "pipelines/tuneline/pipelines/kube_api.py",
    "pipelines/tuneline/pipelines/placement.py",
}


def files(name: str) -> list[Path]:
    found = sorted(SOURCES[name].rglob("*.py"))
    assert found
    return found


@functools.cache
def module_paths() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    named = {}
    for name, source in SOURCES.items():
        for path in files(name):
            parts = path.relative_to(source.parent).with_suffix("").parts
            named[".".join(parts).removesuffix(".__init__")] = path
    return named


@functools.cache
def imported_modules(path: Path) -> frozenset[str]:
    """Every module that a file imports, at any depth, and every name that is not a module."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules.update(names)
            if any(name not in module_paths() for name in names):
                modules.add(node.module)
    return frozenset(modules)


def room(module: str) -> str:
    """Return the room of a module."""
    path = module_paths()[module]
    folder = module if path.name == "__init__.py" else module.rpartition(".")[0]
    has_rooms = folder == "tuneline" or any(other.startswith(f"{folder}.") for other in PACKAGES)
    return module if has_rooms else folder


def rooms_and_what_they_import() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = defaultdict(set)
    for module, path in module_paths().items():
        own = room(module)
        graph[own] |= {room(name) for name in imported_modules(path) if name in module_paths()}
        graph[own].discard(own)
    return graph


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    ("source", "forbidden"),
    [
        ("components", ("tuneline.pipelines",)),
        ("kernels", ("tuneline.pipelines", *(f"tuneline.{name}" for name in STEPS))),
    ],
)
def test_imports_go_one_way(source: str, forbidden: tuple[str, ...]) -> None:
    wrong = [
        (relative(path), module)
        for path in files(source)
        for module in imported_modules(path)
        if module.startswith("tuneline.")
        and (
            module.startswith(forbidden)
            or (source == "kernels" and not module.startswith("tuneline.kernels"))
        )
    ]
    assert wrong == []


def test_steps_do_not_import_each_other_nor_the_recipe_that_holds_their_configs() -> None:
    assert "train" in STEPS and "html" not in STEPS
    wrong = []
    for path in files("components"):
        own = path.relative_to(SOURCES["components"]).parts[0]
        for module in imported_modules(path) if own in STEPS else ():
            parts = module.split(".")
            if parts[0] == "tuneline" and len(parts) > 1 and parts[1] in {*STEPS, "recipe"} - {own}:
                wrong.append((relative(path), module))
    assert wrong == []


def test_no_room_imports_itself_through_others() -> None:
    try:
        graphlib.TopologicalSorter(rooms_and_what_they_import()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_a_folder_can_be_taken_in_at_a_glance() -> None:
    beside: dict[Path, int] = defaultdict(int)
    for name in (*SOURCES, "tests"):
        for path in (ROOT / name).rglob("*.py"):
            beside[path.parent] += 1
    crowded = {relative(path): n for path, n in beside.items() if n > MAX_FILES_IN_A_FOLDER}
    assert crowded == {}


def test_kfp_is_known_in_components_and_pipelines_only() -> None:
    wrong = [
        relative(path)
        for path in files("components") + files("kernels")
        if path.name != "component.py"
        and any(module.split(".")[0] == "kfp" for module in imported_modules(path))
    ]
    assert wrong == []


def test_kubernetes_is_known_in_few_modules_only() -> None:
    knows = {
        relative(path)
        for name in SOURCES
        for path in files(name)
        if any(
            module.split(".")[0] == "kubernetes" or module.startswith("kfp.kubernetes")
            for module in imported_modules(path)
        )
    }
    assert knows == KNOWS_KUBERNETES


def test_components_are_thin() -> None:
    for step in STEPS:
        path = SOURCES["components"] / step / "component.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert functions, path
        for function in functions:
            statements = [
                node
                for node in ast.walk(function)
                if isinstance(node, ast.stmt) and node is not function
            ]
            assert len(statements) <= 12, f"{path}: {function.name} has {len(statements)}"


def test_importing_the_steps_loads_neither_kfp_nor_torch() -> None:
    program = "import sys\n" + "".join(f"import tuneline.{name}\n" for name in STEPS)
    program += (
        "import tuneline.recipe, tuneline.kernels\n"
        "loaded = {'kfp', 'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", PACKAGES)
def test_all_is_what_the_package_exports(name: str) -> None:
    package = importlib.import_module(name)
    submodules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    exported = {
        public
        for public in vars(package)
        if not public.startswith("_") and public not in submodules | {"Any", "TYPE_CHECKING"}
    }
    public = set(getattr(package, "__all__", ()))
    assert public >= exported
    assert all(hasattr(package, name) for name in public)


def test_the_top_level_is_what_the_owner_fixed() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    allowed = {"pipelines", "components", "kernels", "images", "manifests", "tests", "docs"}
    allowed |= {"pyproject.toml", "Makefile", "README.md", "LICENSE"}
    allowed |= {"CONTRIBUTING.md", "CHANGELOG.md"}
    assert {name for name in top if not name.startswith(".")} <= allowed
    assert not list(ROOT.glob("tests/**/__init__.py"))
    assert not [root for root in SOURCES.values() if (root / "__init__.py").exists()]
