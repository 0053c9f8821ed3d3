"""The cheap checks of what a recipe names, before a run starts."""

from tuneline.errors import RecipeError
from tuneline.pipelines.cli.terminal import say
from tuneline.pipelines.plan.early import check_early
from tuneline.recipe import Recipe


def refuse_early(recipe: Recipe, *, is_local: bool, has_packages: bool = False) -> None:
    """Refuse a recipe that names what is not there; warn of what may be missing.

    Args:
        recipe: the recipe.
        is_local: whether the run is on this machine.
        has_packages: whether the steps have their packages anyway, e.g. in containers.

    Raises:
        RecipeError: the run cannot work. The message has a line per problem.
    """
    failed = []
    for check in check_early(recipe, is_local=is_local, has_packages=has_packages):
        text = f"{check.name}: {check.words}{f': {check.advice}' if check.advice else ''}"
        if check.verdict == "fail":
            failed.append(text)
        elif check.verdict == "warn":
            say(f"warning: {text}")
        elif check.verdict == "unknown":
            say(f"note: {text}")
    if failed:
        raise RecipeError("\n".join(failed))
