"""Make the paths of a recipe absolute: they are relative to the directory of the recipe's file."""

import glob
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneline.publish.target import DIRECTORY_PREFIX
from tuneline.runtime.source_names import (
    UPLOAD_PREFIX,
    builtin_name,
    is_claim,
    is_data_file,
    looks_like_a_path,
    scheme_of,
)
from tuneline.schema.keys import Path as KeyPath
from tuneline.schema.keys import dotted
from tuneline.schema.words import Problem

_DATA: tuple[KeyPath, ...] = (
    ("dataset",),
    ("prepare", "heldout", "source"),
    ("prepare", "general", "source"),
)
_TARGET: KeyPath = ("publish_to",)


@dataclass(frozen=True)
class _Key:
    path: KeyPath
    is_always_path: Callable[[str], bool]
    """Function that returns whether a value can only be a path, and not e.g. a Hub ID."""


def resolve(
    document: dict[str, Any],
    base_of: Callable[[KeyPath], Path],
    *,
    with_target: bool,
) -> list[Problem]:
    """Replace relative paths in a recipe by absolute ones; return those where nothing is.

    Args:
        document: the recipe's values, which are changed.
        base_of: function that returns the directory that the path of a key is relative to.
        with_target: whether `dir:PATH` of publish_to is a path of this machine.
    """
    problems: list[Problem] = []
    for key in _keys(document):
        place, name = _parent(document, key.path)
        value = place.get(name) if isinstance(place, Mapping) else None
        if not isinstance(value, str) or not value or _has_syntax(value):
            continue
        base = base_of(key.path)
        path = _absolute(value, base)
        is_there = _exists(path)
        if is_there or key.is_always_path(value):
            place[name] = str(path)
        if not is_there and not Path(value).is_absolute():
            problems += _missing(key, value, path, base)
    if with_target:
        given = document.get("publish_to")
        if isinstance(given, list):
            document["publish_to"] = [_target(each, base_of(_TARGET)) for each in given]
        elif given is not None:
            document["publish_to"] = _target(given, base_of(_TARGET))
    return problems


def _target(target: Any, base: Path) -> Any:
    """Return a target of publish, with the path of a directory made absolute."""
    if not isinstance(target, str) or not target.startswith(DIRECTORY_PREFIX):
        return target
    path = target.removeprefix(DIRECTORY_PREFIX)
    if not path.rstrip("/") or path.startswith("~"):
        return target
    return f"{DIRECTORY_PREFIX}{_absolute(path, base)}"


def _keys(document: dict[str, Any]) -> Iterator[_Key]:
    for path in _DATA:
        yield _Key(path, _is_data_path)
    entries = document.get("datasets")
    for index in range(len(entries) if isinstance(entries, list) else 0):
        yield _Key(("datasets", index, "source"), _is_data_path)
    yield _Key(("base_model",), _is_model_path)
    yield _Key(("fetch", "trust_remote_code"), _is_model_path)
    yield _Key(("evaluate", "task_dir"), lambda value: True)


def _is_data_path(value: str) -> bool:
    return looks_like_a_path(value) or is_data_file(value) or glob.has_magic(value)


def _is_model_path(value: str) -> bool:
    return looks_like_a_path(value) or value.endswith(".gguf")


def _has_syntax(value: str) -> bool:
    """Return whether a value has a form of its own, so that it is no path."""
    return bool(
        scheme_of(value)
        or builtin_name(value) is not None
        or is_claim(value)
        or value.startswith(UPLOAD_PREFIX)
        # The datasets of a compiled pipeline, as JSON.
        or value.lstrip().startswith("[{")
    )


def _parent(document: Any, path: KeyPath) -> tuple[Any, Any]:
    for part in path[:-1]:
        try:
            document = document[part]
        except (KeyError, IndexError, TypeError):
            return None, path[-1]
    return document, path[-1]


def _absolute(value: str, base: Path) -> Path:
    path = Path(value).expanduser()
    # Not `resolve`: a link may be replaced between two runs, and keeps its name.
    return Path(_normal(base / path))


def _normal(path: Path) -> str:
    """Return a path without `.`; `..` is removed too, unless it leads out of a link."""
    if ".." not in path.parts:
        return str(path)
    return str(path.parent.resolve() / path.name if path.name != ".." else path.resolve())


def _exists(path: Path) -> bool:
    try:
        if path.exists():
            return True
    except (OSError, ValueError):
        return False
    text = str(path)
    return glob.has_magic(text) and next(glob.iglob(text, recursive=True), None) is not None


def _missing(key: _Key, value: str, path: Path, base: Path) -> Iterator[Problem]:
    """Yield a problem if nothing is at a relative path that can only be a path, or is meant so."""
    elsewhere = Path(value).expanduser()
    is_elsewhere = Path.cwd() != base and _exists(Path.cwd() / elsewhere)
    if not (key.is_always_path(value) or is_elsewhere):
        return
    what = "no file matches" if glob.has_magic(value) else "there is no file or directory"
    text = f"{dotted(key.path)} is {value}, but {what} {path}"
    if is_elsewhere:
        text += (
            f": the path is relative to the recipe's directory, and {Path.cwd() / elsewhere} is "
            "another one; write that path in full, or move the recipe"
        )
    elif not looks_like_a_path(value) or value.startswith("."):
        text += f": paths are relative to {base}"
    yield Problem(key.path, text)
