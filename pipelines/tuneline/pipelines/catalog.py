"""Find a recipe: a file, or one of those that come along, with single values changed."""

from pathlib import Path

import yaml

from tuneline.errors import RecipeError
from tuneline.recipe import Recipe, load_recipe

RECIPES_DIR = Path(__file__).parent / "recipes"


def find_recipe(name: str, assignments: list[str]) -> Recipe:
    """Load a recipe from a file or by the name of a shipped one.

    Args:
        name: a path, or the name of a shipped recipe; a file wins.
        assignments: KEY=VALUE, the key dotted, the value as YAML.

    Raises:
        RecipeError: there is no such recipe, or it or an assignment is not valid.
    """
    overrides = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {assignment}: write KEY=VALUE, e.g. train.max_steps=60")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(
                f"--set {assignment}: the value is not YAML; quote text that has brackets, braces "
                "or colons in it, e.g. 'description=\"a: b\"'"
            ) from None
    path = Path(name)
    shipped = RECIPES_DIR / f"{name}.yaml"
    if not path.exists() and shipped.exists():
        path = shipped
    if not path.exists():
        known = ", ".join(sorted(found.stem for found in RECIPES_DIR.glob("*.yaml")))
        raise RecipeError(f"no recipe '{name}': give a YAML file, or one of {known}")
    return load_recipe(path, overrides)
