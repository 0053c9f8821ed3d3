"""The shipped recipes, and how a command finds and overrides a recipe."""

from pathlib import Path
from typing import Any

from tuneline.errors import RecipeError
from tuneline.recipe import Recipe, load_recipe
from tuneline.recipe_file.yaml_document import parse_document

RECIPES_DIR = Path(__file__).parent / "recipes"


def shipped_recipes() -> list[Path]:
    """Return the files of the shipped recipes, ordered by name."""
    return sorted(RECIPES_DIR.glob("*.yaml"))


def is_shipped(name: str) -> bool:
    """Return whether a name is that of a shipped recipe, and not of a file."""
    return not Path(name).exists() and (RECIPES_DIR / f"{name}.yaml").exists()


def find_recipe(name: str, assignments: list[str], *, is_local: bool = False) -> Recipe:
    """Load a recipe from a file, or a shipped recipe by its name.

    Paths in a file are relative to the file, and those in a shipped recipe or in an assignment are
    relative to the working directory.

    Args:
        name: a path, or the name of a shipped recipe; an existing file takes precedence.
        assignments: overrides as KEY=VALUE, with a dotted key and a YAML value.
        is_local: whether the run is on this machine, so that dir:PATH of publish_to is a path of
            it.

    Raises:
        RecipeError: the recipe does not exist, the recipe or an assignment is not valid, or one
            names a file that does not exist.
    """
    overrides = parse_assignments(assignments)
    shipped = is_shipped(name)
    path = RECIPES_DIR / f"{name}.yaml" if shipped else Path(name)
    if not path.exists():
        names = ", ".join(recipe.stem for recipe in shipped_recipes())
        raise RecipeError(f"no recipe '{name}': give a YAML file, or one of {names}")
    return load_recipe(
        path,
        overrides,
        base_dir=Path.cwd() if shipped else None,
        is_local=is_local,
        needs_files=True,
    )


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Return the values of --set KEY=VALUE by dotted key.

    Raises:
        RecipeError: an assignment is not KEY=VALUE, or its value is not YAML.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {assignment}: write KEY=VALUE, e.g. train.max_steps=60")
        try:
            overrides[key.strip()] = parse_document(value, f"--set {key}").values
        except RecipeError:
            raise RecipeError(
                f"--set {assignment}: the value is not YAML; quote text that has brackets, braces "
                "or colons in it, e.g. 'description=\"a: b\"'"
            ) from None
    return overrides
