"""Where a model is published: a name on the Hub, or a directory."""

import re

from tuneline.errors import RecipeError

DIRECTORY_PREFIX = "dir:"
MAX_NAME_LENGTH = 81
"""The Hub takes 96; the repositories of a family have up to 10 more than the name."""

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB_TARGET = re.compile(rf"{_PART}/(?P<name>{_PART})")


def check_target(target: str) -> None:
    """Check a recipe's `publish_to` as far as its words go: a run's last step is late to say so.

    Raises:
        RecipeError: it is neither a name that the Hub takes nor `dir:PATH`.
    """
    if target.startswith(DIRECTORY_PREFIX):
        path = target.removeprefix(DIRECTORY_PREFIX)
        if not path or path.startswith("~"):
            raise RecipeError(
                f"publish_to is '{target}': write dir:PATH with the path in full, as a step's home "
                "may be another than yours"
            )
        return
    found = _HUB_TARGET.fullmatch(target)
    strange = re.search(r"--|\.\.|\.git$", target)
    if not found or strange or len(found["name"]) > MAX_NAME_LENGTH:
        raise RecipeError(
            f"publish_to is '{target}': write namespace/name for the Hub, or dir:PATH; the Hub "
            f"takes ASCII letters, digits, '-', '_' and '.', a letter or digit first and no '-' or "
            f"'.' last, no '--', no '..', no '.git' at the end, and here {MAX_NAME_LENGTH} of them"
        )
