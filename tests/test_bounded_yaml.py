"""YAML from others is read within bounds."""

import time
from pathlib import Path

import pytest
import yaml

from tuneline.bounded_yaml import check_yaml, load_documents, load_yaml
from tuneline.errors import DataError, RecipeError
from tuneline.fetch.model_card import licence_of
from tuneline.pipelines.lint.lint import lint_file
from tuneline.publish.card_parts import BEGIN, END, split_card
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 2026-02-30", "has a value that cannot be read (day is out of range"),
        ("a: 2026-01-01T00:00:00+99:00", "has a value that cannot be read (offset must be"),
        ("{2026-13-01: x}", "has a value that cannot be read (month must be in 1..12)"),
        ("a:\n - " + "9" * 5000, "a whole number of 5,000 characters in line 2, but at most 1,000"),
        ("a: 0x" + "f" * 5000, "a whole number of 5,002 characters in line 1, but at most 1,000"),
    ],
)
def test_values_that_cannot_be_made_are_named(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        load_yaml(text, where="the card")
    assert f"the card has {words.removeprefix('has ')}" in str(error.value)
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n# Base\n")
    assert licence_of(tmp_path) is None
    assert split_card(f"---\n{text}\n---\n{BEGIN}\n{END}\n") is None


def test_files_of_several_documents_are_bounded_too(tmp_path: Path) -> None:
    several = "a: [1]\n---\n---\nb: &x 2\nc: *x\n"
    assert load_documents(several) == list(yaml.safe_load_all(several))
    path = tmp_path / "mine.yaml"
    for text, words in (
        (f"kind: Pod\n---\n{LAUGHS}", "mine.yaml stands for"),
        ("a: " + "[" * 5000, "mine.yaml is nested deeper"),
        ("kind: Pod\n---\na: 2026-02-30\n", "mine.yaml has a value that cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=words):
            lint_file(path)


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
