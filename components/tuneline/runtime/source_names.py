"""The syntax that the source of a model and the source of a dataset have in common in a recipe.

`base_model` and `dataset` may be a path, the ID of a repository on the Hub, or `builtin:NAME`.
"""

import re

_BUILTIN_PREFIX = "builtin:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def builtin_name(source: str) -> str | None:
    """Return NAME of `builtin:NAME`; None for any other source."""
    return source.removeprefix(_BUILTIN_PREFIX) if source.startswith(_BUILTIN_PREFIX) else None


def list_builtins(names: list[str]) -> str:
    """Return the names as builtin:NAME, sorted and separated by commas, for an error message."""
    return ", ".join(f"{_BUILTIN_PREFIX}{name}" for name in sorted(names))


def looks_like_a_path(source: str) -> bool:
    """Return whether `source` begins with /, . or ~, so that it can only be a path."""
    return source.startswith(("/", ".", "~"))


def is_hub_id(source: str) -> bool:
    """Return whether `source` has the form of a Hub ID: NAME or NAMESPACE/NAME."""
    return _HUB_ID.fullmatch(source) is not None
