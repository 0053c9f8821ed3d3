"""The rules of the layout, held by walking the tree."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {name: ROOT / name / "tuneline" for name in ("components", "kernels", "pipelines")}
STEPS = sorted(path.parent.name for path in SOURCES["components"].glob("*/__init__.py"))


def imported_modules(path: Path) -> set[str]:
    """Every module that a file names in an import, at any depth."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


def area(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "tuneline" or len(parts) < 2:
        return None
    return parts[1] if parts[1] in ("kernels", "pipelines") else "components"


def files(name: str) -> list[Path]:
    return sorted(SOURCES[name].rglob("*.py"))


@pytest.mark.parametrize(
    ("source", "forbidden"),
    [("components", {"pipelines"}), ("kernels", {"components", "pipelines"})],
)
def test_imports_go_one_way(source: str, forbidden: set[str]) -> None:
    assert files(source)
    wrong = [
        (str(path.relative_to(ROOT)), module)
        for path in files(source)
        for module in imported_modules(path)
        if area(module) in forbidden
    ]
    assert wrong == []


def test_steps_do_not_import_each_other() -> None:
    wrong = []
    for path in files("components"):
        own = path.relative_to(SOURCES["components"]).parts[0]
        if own not in STEPS:
            continue
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[0] == "tuneline" and len(parts) > 1 and parts[1] in STEPS and parts[1] != own:
                wrong.append((str(path.relative_to(ROOT)), module))
    assert wrong == []


def test_kfp_is_known_in_components_and_pipelines_only() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in files("components") + files("kernels")
        if path.name != "component.py"
        and any(module.split(".")[0] == "kfp" for module in imported_modules(path))
    ]
    assert wrong == []


def test_kubernetes_is_known_in_four_modules_only() -> None:
    known = ("placement.py", "kube.py", "kubernetes_client.py", "trainjob_api.py")
    wrong = [
        str(path.relative_to(ROOT))
        for name in SOURCES
        for path in files(name)
        if path.name not in known
        and any(
            module.split(".")[0] == "kubernetes" or module.startswith("kfp.kubernetes")
            for module in imported_modules(path)
        )
    ]
    assert wrong == []


def test_components_are_thin() -> None:
    for path in SOURCES["components"].glob("*/component.py"):
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
        "loaded = {'kfp', 'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def public_packages() -> list[str]:
    names = [f"tuneline.{name}" for name in STEPS]
    return [*names, "tuneline.kernels"]


@pytest.mark.parametrize("name", public_packages())
def test_all_is_what_the_package_exports(name: str) -> None:
    package = importlib.import_module(name)
    submodules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    exported = {
        public
        for public in vars(package)
        if not public.startswith("_") and public not in submodules
    }
    assert set(package.__all__) >= exported
    assert all(hasattr(package, public) for public in package.__all__)


def test_the_top_level_is_what_the_owner_fixed() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    allowed = {"pipelines", "components", "kernels", "images", "manifests", "tests"}
    allowed |= {"pyproject.toml", "Makefile", "README.md", "LICENSE", "CONTRIBUTING.md"}
    assert {name for name in top if not name.startswith(".")} <= allowed
    assert not list(ROOT.glob("tests/**/__init__.py"))
    assert not [root for root in SOURCES.values() if (root / "__init__.py").exists()]
