"""What the package promises as a whole: its names, and what an op may import."""

import ast
import sys
from pathlib import Path

import pytest

import tuneline.kernels

OPS = ["adamw", "cross_entropy", "gated_activation", "nf4", "rms_norm", "rope"]
FOLDER = Path(tuneline.kernels.__file__).parent / "ops"
KERNEL_FILES = sorted(p.stem for p in FOLDER.glob("*.py") if "@triton.jit" in p.read_text())


def test_every_public_name_is_listed_and_there():
    listed = tuneline.kernels.__all__
    imported = [
        alias.name
        for node in ast.parse(Path(tuneline.kernels.__file__).read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(imported) == sorted(listed) == listed
    assert all(callable(getattr(tuneline.kernels, name)) for name in listed)


@pytest.mark.parametrize("op", KERNEL_FILES)
def test_an_op_needs_torch_and_triton_only(op):
    imported = set()
    for node in ast.walk(ast.parse((FOLDER / f"{op}.py").read_text())):
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
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    jitted = ["triton.jit" in map(ast.unparse, node.decorator_list) for node in functions]
    public = [not node.name.startswith("_") for node in functions]
    last_kernel = len(jitted) - 1 - jitted[::-1].index(True)
    assert all(jitted[i] or i > last_kernel for i in range(len(functions)) if public[i])
