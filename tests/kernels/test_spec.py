"""The table of families is the one place of the package that tells families apart."""

import ast
import re
from pathlib import Path

import pytest

import tuneline.kernels
from tuneline.kernels import spec

SOURCES = sorted(Path(tuneline.kernels.__file__).parent.rglob("*.py"))
NAMES = [family.name for family in spec.FAMILIES.values()]
FAMILY = re.compile("model_type|" + "|".join(NAMES))


def docstrings(tree):
    """Return the string statements of a file: docstrings, and those below constants and fields."""
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return {id(node.value) for node in statements if isinstance(node.value, ast.Constant)}


def family_words(source):
    """Return the lines of code, not of prose, that name a family or read a model's type."""
    tree = ast.parse(source)
    prose = docstrings(tree)
    lines = []
    for node in ast.walk(tree):
        is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
        text = node.value if is_string and id(node) not in prose else ""
        text = node.attr if isinstance(node, ast.Attribute) else text
        if FAMILY.search(text.lower()):
            lines.append(node.lineno)
    return lines


def test_no_family_is_named_outside_the_table():
    assert len(SOURCES) > 20 and Path(spec.__file__) in SOURCES
    assert len(family_words(Path(spec.__file__).read_text())) >= 2 * len(NAMES)
    others = [path for path in SOURCES if path != Path(spec.__file__)]
    assert {path.name: lines for path in others if (lines := family_words(path.read_text()))} == {}


@pytest.mark.parametrize(
    "line", ['config.model_type == "x"', 'spec.name != "gemma3"', 'getattr(config, "model_type")']
)
def test_a_family_named_elsewhere_is_seen(line):
    assert family_words(f'"""About gemma3."""\n{line}\n') == [2]
