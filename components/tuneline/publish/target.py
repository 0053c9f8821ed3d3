"""The target of publish: a name on the Hub, or a directory."""

import re

from tuneline.errors import RecipeError
from tuneline.pods import CACHE_PATH
from tuneline.runtime.source_names import is_claim

DIRECTORY_PREFIX = "dir:"
MAX_NAME_LENGTH = 81
"""Maximum length of a model's name. The Hub allows 96 characters, and the names of exports have a
suffix such as -gptq-4bit."""

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB_TARGET = re.compile(rf"{_PART}/(?P<name>{_PART})")


def check_target(target: str) -> str:
    """Check the form of `publish_to` when the recipe is read, hours before it is used.

    Returns:
        The target without slashes at its end.

    Raises:
        RecipeError: the target is neither a name that the Hub accepts nor `dir:PATH`.
    """
    if target.startswith(DIRECTORY_PREFIX):
        path = target.removeprefix(DIRECTORY_PREFIX)
        path = path.rstrip("/") or path[:1]
        if not path or path.startswith("~"):
            raise RecipeError(
                f"publish_to is '{target}'. Write dir:PATH with a full path: the home directory of "
                "a step may differ from yours"
            )
        return f"{DIRECTORY_PREFIX}{path}"
    if is_claim(target):
        raise RecipeError(
            f"publish_to is '{target}', but only sources can be claims. To publish to a claim, "
            f"name it in placement.cache_claim and write dir:{CACHE_PATH}/PATH"
        )
    given, target = target, target.strip().rstrip("/")
    match = _HUB_TARGET.fullmatch(target)
    forbidden = re.search(r"--|\.\.|\.git$", target)
    if not match or forbidden or len(match["name"]) > MAX_NAME_LENGTH:
        raise RecipeError(
            f"publish_to is '{given}': write namespace/name for the Hub, or dir:PATH. A Hub name "
            "has ASCII letters, digits, '-', '_' and '.'; it starts with a letter or digit, does "
            "not end with '-', '.' or '.git', has no '--' and no '..', and the model's name has at "
            f"most {MAX_NAME_LENGTH} characters"
        )
    return target
