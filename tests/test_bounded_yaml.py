"""YAML from others is read within bounds."""

import time

import pytest
import yaml

from tuneline.bounded_yaml import check_yaml, load_yaml
from tuneline.errors import DataError, RecipeError
from tuneline.recipe import load_recipe

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
"""590 bytes that stand for 10^12 values."""


def test_billion_laughs_end_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match=r"the card stands for [\d,]+ values, nested 14 deep, once"):
        load_yaml(LAUGHS, where="the card")
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("text", ["[" * 3000, "a: &a [*a]", "{" * 200 + "}" * 200, "x" * (5 << 20)])
def test_what_exceeds_a_bound_is_one_sentence(text: str) -> None:
    with pytest.raises((DataError, yaml.YAMLError)):
        load_yaml(text)


def test_ordinary_documents_are_read_as_before() -> None:
    plain = "a: &x {b: [1, 2.5, null, yes, 2026-01-31]}\nc: *x\nd: *x\n"
    assert load_yaml(plain) == yaml.safe_load(plain)
    assert load_yaml("") is None


def test_a_recipe_of_laughs_is_one_sentence(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(LAUGHS)
    with pytest.raises(RecipeError, match=r"recipe.yaml stands for [\d,]+ values"):
        load_recipe(path)


def test_yaml_that_another_library_reads_may_have_tags() -> None:
    check_yaml("task: mine\nprocess: !function utils.process\n", where="mine.yaml")
    check_yaml("", where="empty.yaml")
    for text in (LAUGHS, "a: " + "[" * 150 + "]" * 150):
        with pytest.raises(DataError, match=r"mine.yaml (stands for|is nested)"):
            check_yaml(text, where="mine.yaml")
