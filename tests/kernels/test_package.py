"""What the package promises as a whole: its names, and what an op may import."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import tuneline.kernels
from tuneline.kernels import decisions, limits
from tuneline.kernels.decoder import budget, mlp_half
from tuneline.kernels.ops import lora
from tuneline.train.memory import estimate

ROOT = Path(__file__).parent.parent.parent
ESTIMATED = ["STASH_MIN_TOKENS", "MLP_CHUNK_TOKENS", "KEPT_MLP_CHUNK_TOKENS", "MIN_ADAPTER_COLUMNS"]
SUBMODULES = [module.name for module in pkgutil.iter_modules(tuneline.kernels.__path__)]
OPS = ["adamw", "cross_entropy", "gated_activation", "nf4", "rms_norm", "rope"]
PACKAGE = Path(tuneline.kernels.__file__).parent
FOLDER = PACKAGE / "ops"
FOLDERS = "ops", "experts"
KERNEL_FILES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for folder in FOLDERS
    for path in (PACKAGE / folder).glob("*.py")
    if "@triton.jit" in path.read_text()
)


def test_every_public_name_is_listed_and_there():
    listed = tuneline.kernels.__all__
    typed = {
        alias.name: node.module
        for node in ast.walk(ast.parse(Path(tuneline.kernels.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("tuneline.")
        for alias in node.names
    }
    assert typed == tuneline.kernels._MODULES
    assert sorted(typed) == sorted(listed) == listed
    assert set(listed) <= set(dir(tuneline.kernels))
    assert all(callable(getattr(tuneline.kernels, name)) for name in listed)
    with pytest.raises(AttributeError, match="'tuneline.kernels' has no attribute 'patsch'"):
        _ = tuneline.kernels.patsch


def test_no_submodule_takes_the_place_of_a_function():
    assert not set(tuneline.kernels.__all__) & set(SUBMODULES)
    imports = "".join(f"import tuneline.kernels.{name}\n" for name in SUBMODULES)
    program = f"""
from tuneline.kernels import patch as before
{imports}
from tuneline.kernels import patch
assert callable(patch) and patch is before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_package_and_its_limits_need_no_torch():
    program = """
import sys
import tuneline.kernels
from tuneline.kernels.limits import FP8_CAPABILITY
assert "torch" not in sys.modules and "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def assigned_names(path):
    """Return the names that a file's top level assigns, without leading underscores."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id.lstrip("_") for target in targets if isinstance(target, ast.Name)}
    return names


def test_a_limit_is_written_once():
    written = {name for name in vars(limits) if name.isupper()}
    assert "STASH_MIN_TOKENS" in written
    folders = (ROOT / "components", ROOT / "kernels", ROOT / "pipelines")
    sources = [path for folder in folders for path in folder.rglob("*.py")]
    twice = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in sources
        if path != Path(limits.__file__)
        for name in assigned_names(path) & written
    }
    assert twice == set()


def test_the_memory_estimate_plans_with_the_limits_of_the_kernels():
    modules = (estimate, decisions, mlp_half, budget, lora)
    for name in ESTIMATED:
        values = [getattr(module, name) for module in modules if hasattr(module, name)]
        assert hasattr(estimate, name) and len(values) > 1
        assert all(value is getattr(limits, name) for value in values)


@pytest.mark.parametrize("op", KERNEL_FILES)
def test_an_op_needs_torch_and_triton_only(op):
    imported = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{op}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    foreign = {
        name
        for name in imported
        if name.split(".")[0] not in {"torch", "triton", *sys.stdlib_module_names}
        and not name.startswith("tuneline.kernels.")
    }
    assert not foreign


@pytest.mark.parametrize("op", OPS)
def test_a_reader_finds_kernel_before_reference_before_public_function(op):
    tree = ast.parse((FOLDER / f"{op}.py").read_text())
    order = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    kernels = [i for i, name in enumerate(order) if name.endswith("_kernel")]
    references = [i for i, name in enumerate(order) if name.endswith("_reference")]
    public = [i for i, name in enumerate(order) if name in tuneline.kernels.__all__]
    assert ast.get_docstring(tree)
    assert max(kernels) < min(references) < max(public) == len(order) - 1


@pytest.mark.parametrize("name", KERNEL_FILES)
def test_kernels_come_before_the_functions_that_launch_them(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    jitted = ["triton.jit" in map(ast.unparse, node.decorator_list) for node in functions]
    public = [not node.name.startswith("_") for node in functions]
    last_kernel = len(jitted) - 1 - jitted[::-1].index(True)
    assert all(jitted[i] or i > last_kernel for i in range(len(functions)) if public[i])
