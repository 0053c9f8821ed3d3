"""The shipped recipes, and how a command finds and overrides a recipe."""

from pathlib import Path

import yaml

from tuneline.errors import RecipeError
from tuneline.recipe import Recipe, load_recipe

RECIPES_DIR = Path(__file__).parent / "recipes"


def shipped_recipes() -> list[Path]:
    """Return the files of the shipped recipes, ordered by name."""
    return sorted(RECIPES_DIR.glob("*.yaml"))


def find_recipe(name: str, assignments: list[str]) -> Recipe:
    """Load a recipe from a file, or a shipped recipe by its name.

    Args:
        name: a path, or the name of a shipped recipe; an existing file takes precedence.
        assignments: overrides as KEY=VALUE, with a dotted key and a YAML value.

    Raises:
        RecipeError: the recipe does not exist, or the recipe or an assignment is not valid.
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
        names = ", ".join(recipe.stem for recipe in shipped_recipes())
        raise RecipeError(f"no recipe '{name}': give a YAML file, or one of {names}")
    return load_recipe(path, overrides)
