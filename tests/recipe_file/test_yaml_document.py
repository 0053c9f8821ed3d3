"""A recipe's YAML is YAML 1.2, and what is wrong in it is a sentence with its line."""

from pathlib import Path

import pytest
import yaml

from tuneline.errors import RecipeError
from tuneline.recipe import load_recipe
from tuneline.recipe_file.yaml_document import decode, dump_document, parse_document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2E+3", 2000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("1e", "1e"),
        ("'2e-4'", "2e-4"),
        ("!!str 1", "1"),
        ("[1e-5, off, {a: no}]", [1e-5, "off", {"a": "no"}]),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(text: str, value: object) -> None:
    document = parse_document(f"key: {text}\n", "x")
    assert document.values == {"key": value}
    assert type(document.values["key"]) is type(value)


def test_what_is_written_is_read_alike_by_both_versions() -> None:
    texts = ["2e-4", "off", "yes", "1_000", "0o17", "017", "1:30", "null", "", "2026-01-31", "a: b"]
    values = {"texts": texts, "numbers": [2e-4, 1e-20, 3, 1e30], "flag": False, "none": None}
    text = dump_document(values)
    assert parse_document(text, "x").values == values
    assert yaml.safe_load(text) == values


def test_every_key_and_item_has_its_line() -> None:
    text = "a: 1\nb:\n  c: {d: 2}\n  e:\n  - x\n  - f: 3\n"
    document = parse_document(text, "x")
    assert document.line_of(("a",)) == 1
    assert document.line_of(("b", "c", "d")) == 3
    assert document.line_of(("b", "e", 1, "f")) == 6
    assert document.line_of(("b", "absent", "x")) == 2
    assert document.line_of(("absent",)) is None


def test_a_merged_key_may_be_replaced() -> None:
    document = parse_document("base: &base {a: 1, b: 2}\nmine:\n  <<: *base\n  a: 3\n", "x")
    assert document.values["mine"] == {"a": 3, "b": 2}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"name: a\ntrain:\n\tseed: 1\n", "x:3: not YAML: a tab stands there: indent with spaces"),
        (b"a: 1\nb: 2\na: 3\n", "x:3: a is given twice, first in line 1: remove one"),
        (b"t:\n  a: 1\n  a: 2\n", "x:3: a is given twice, first in line 2: remove one"),
        (b"a: *.csv\n", "x:1: not YAML: a text that begins with \\* has to be quoted"),
        (b"a: @b\n", "x:1: not YAML: a text that begins with this character has to be quoted"),
        (b"a: b: c\n", "x:1: not YAML: a colon is where none can be: quote"),
        (b"a: 1\nb: {c: 1\nd: 2\n", "x:2: not YAML: the mapping that begins here with {"),
        (b"a: 1\nt:\n  b: 1\n c: 2\n", "x:4: not YAML: the indentation differs"),
        (b"a: 1\nb 2\nc: 3\n", "x:2: not YAML: this is no KEY: VALUE, because the colon"),
        (b'a: 1\nb: "C:\\data"\n', "x:2: not YAML: a backslash in "),
        (b'a: "C:\\Users"\n', "x:1: not YAML: a backslash in "),
        (b'a: "b\n', "x:1: not YAML: the text that begins here with a quote"),
        (b"a: 1\n---\nb: 1\n", "x:2: not YAML: a second document begins here"),
        (b"a: !b c\n", "x:1: not YAML: recipes have no tags"),
        (b"a: 1\nb: \x01\n", "x:2: the character #x0001 is not allowed in YAML"),
        ("a: 1\nb: \ud55c\uae00\n".encode("cp949"), "x:2: not UTF-8 text .byte 0xc7.: save the"),
    ],
)
def test_what_is_no_yaml_has_a_line_and_a_sentence(content: bytes, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        parse_document(decode(content, "x"), "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_not_part_of_the_first_key(tmp_path: Path, encoding: str) -> None:
    text = "name: a\nbase_model: b/c\ndataset: d/e\npublish_to: f/g\ndescription: \ud55c\uae00\n"
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode(encoding))
    assert load_recipe(path).description == "\ud55c\uae00"
