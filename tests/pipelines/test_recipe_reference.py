"""docs/recipe.md against the schema that it is generated from."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tuneline.pipelines.cli.main import app
from tuneline.pipelines.recipe_reference import EXAMPLES_FILE, recipe_reference
from tuneline.recipe import Recipe, load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"


@pytest.fixture(scope="module")
def reference() -> str:
    return recipe_reference()


def test_the_page_is_what_the_schema_says(reference: str) -> None:
    stale = "docs/recipe.md differs from the recipe's schema: run `make docs` and commit the file"
    assert PAGE.is_file() and PAGE.read_text(encoding="utf-8") == reference, stale


def test_the_command_prints_the_page(reference: str) -> None:
    assert CliRunner().invoke(app, ["schema", "--markdown"]).output == reference


def keys_of(node: Any, path: str = "") -> list[str]:
    """Return every key of a dumped recipe by its dotted path."""
    keys = []
    for key, value in node.items():
        keys.append(f"{path}{key}")
        if isinstance(value, dict) and value and key not in ("steps", "secrets", "columns"):
            keys += keys_of(value, f"{path}{key}.")
    return keys


def test_every_key_has_type_default_and_example(reference: str) -> None:
    recipe = Recipe.parse({"name": "n", "base_model": "m", "dataset": "d", "publish_to": "o/m"})
    sections = dict(part.split("`", 1) for part in reference.split("# `")[1:])
    keys = keys_of(recipe.model_dump())
    assert "train.lora.r" in keys and "placement.accelerated.num_retries" in keys
    parts = set()
    for key in keys:
        if any(other.startswith(f"{key}.") for other in keys):
            parts.add(key)
            assert key in sections
        else:
            for line in ("- Type: ", "- Default: ", "- Example:"):
                assert f"\n{line}" in sections[key], (key, line)
    assert {"train", "train.lora", "prepare.heldout"} <= parts


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("train.learning_rate", "- Type: number above 0 or `auto` - Default: `0.0002`"),
        # Of a shipped recipe, and another value than the default.
        ("train.learning_rate", "- Example: `learning_rate: 0.001`"),
        ("prepare.method", "- Type: one of `sft`, `dpo`, `kto`, `cpt` -"),
        ("quantize.gptq", "- Type: list of `gptq-8bit`, `gptq-4bit`, `gptq-3bit` -"),
        ("base_model", "- Type: string - Default: none, the key is required -"),
        ("placement.queue", "- Example: `queue: team-a`"),
        ("placement.tolerations", "- Type: list of mappings with the keys below -"),
        ("placement.tolerations[].key", "- Example: `key: pool`"),
        ("placement.steps", "with the keys of [`placement.accelerated`](#placementaccelerated)"),
        ("prepare.general", "- Type: mapping with the keys below or `null` -"),
    ],
)
def test_a_key_in_words(reference: str, key: str, says: str) -> None:
    _, section = reference.split(f"# `{key}`\n", 1)
    assert says in " ".join(section.partition("\n#")[0].split())
    assert "anyOf" not in reference and "$ref" not in reference


def test_the_examples_are_a_valid_recipe() -> None:
    assert load_recipe(EXAMPLES_FILE).name == "example"
