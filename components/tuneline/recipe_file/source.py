"""The values of a recipe and where each comes from: a line of its file, or an option --set."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneline.bounded_yaml import MAX_CHARACTERS
from tuneline.errors import RecipeError
from tuneline.recipe_file.other_tools import foreign_key, tool_of
from tuneline.recipe_file.yaml_document import YamlDocument, decode, parse_document
from tuneline.schema.keys import Path as KeyPath
from tuneline.schema.keys import dotted
from tuneline.schema.words import Problem

_COMPILED = b"\npipelineInfo:"
"""Line that only a compiled pipeline has."""
_MAX_BYTES = 4 * MAX_CHARACTERS + 4
"""Bytes of a file that are read, of which the first is already beyond the largest document."""
_MEANT = "a recipe is a mapping of keys to values: name, base_model, dataset, publish_to and others"


@dataclass(frozen=True)
class RecipeSource:
    """A recipe before it is checked."""

    path: Path
    values: dict[str, Any]
    """The values of the file, with the overrides in their places."""
    document: YamlDocument
    overrides: Mapping[str, Any]

    def is_overridden(self, path: KeyPath) -> bool:
        """Return whether the value at a path comes from an override."""
        return self._override(path) is not None

    def explain(self, problems: Iterable[Problem]) -> str:
        """Return a line per problem; it begins with the file and the line in it, or with --set."""
        problems = sorted(problems, key=lambda each: self.document.line_of(each.path) or 0)
        tool = tool_of(str(each.path[0]) for each in problems if _is_top_level(each))
        lines = [f"{self._place(each.path)}: {_led_home(each, tool)}" for each in problems]
        if tool is not None:
            words = f"{self.path} looks like a config of {tool}, which has other keys than a recipe"
            lines.insert(0, f"{words}:")
        elif len(lines) > 1:
            lines.insert(0, f"{self.path} has {len(lines)} errors:")
        return "\n".join(lines)

    def _place(self, path: KeyPath) -> str:
        override = self._override(path)
        if override is not None:
            return f"--set {override}={self.overrides[override]}"
        line = self.document.line_of(path)
        return f"{self.path}:{line}" if line is not None else str(self.path)

    def _override(self, path: KeyPath) -> str | None:
        name = dotted(path)
        for key in self.overrides:
            if key == name or name.startswith((f"{key}.", f"{key}[")):
                return key
        # Of an unknown section that only an override has.
        beyond = (key for key in self.overrides if key.startswith(f"{name}."))
        return next(beyond, None) if path and path not in self.document.lines else None


def read_source(path: Path, overrides: Mapping[str, Any]) -> RecipeSource:
    """Read a recipe's file, and put overrides into their places.

    Args:
        path: the YAML file.
        overrides: values by dotted key.

    Raises:
        RecipeError: the file is missing, is not YAML, or is no mapping.
    """
    document = _read(path)
    values = document.values
    if values is None:
        raise RecipeError(f"{path} is empty: {_MEANT}")
    if not isinstance(values, dict):
        what = "a list" if isinstance(values, list) else f"one value, {str(values)[:40]!r}"
        raise RecipeError(f"{path} contains {what}, but {_MEANT}")
    for key, value in overrides.items():
        _set(values, key, value)
    return RecipeSource(path, values, document, overrides)


def _read(path: Path) -> YamlDocument:
    try:
        if path.is_dir():
            inner = path / "recipe.yaml"
            hint = f"give {inner}" if inner.is_file() else "give the file of a recipe"
            raise RecipeError(f"{path} is a directory: {hint}")
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES)
    except FileNotFoundError:
        raise RecipeError(
            f"there is no recipe at {path}: give a file, or a name that `tuneline recipes` lists"
        ) from None
    if _COMPILED in content:
        raise RecipeError(
            f"{path} is a compiled pipeline: give the recipe that it was compiled from, or start "
            "the file in KFP's UI"
        )
    return parse_document(decode(content, str(path)), str(path))


def _set(document: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        # A section whose keys are all comments is null.
        inner = document.get(parent)
        if inner is None:
            inner = document[parent] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {key}: '{parent}' is a value and has no keys below it")
        document = inner
    document[last] = value


def _is_top_level(problem: Problem) -> bool:
    return problem.is_unknown_key and len(problem.path) == 1


def _led_home(problem: Problem, tool: str | None) -> str:
    """Return a problem's sentence; that of a key of another tool says what a recipe has instead.

    Args:
        problem: the problem.
        tool: the tool that the file seems to be for; None if it is a recipe.
    """
    foreign = foreign_key(str(problem.path[-1])) if problem.is_unknown_key else None
    if foreign is None and problem.is_unknown_key and "known keys:" in problem.text and tool:
        return f"{dotted(problem.path)}: unknown key; a recipe has nothing like it, so leave it out"
    if foreign is None:
        return problem.text
    owner = tool if tool in foreign.tools else foreign.tools[0]
    return f"{dotted(problem.path)}: unknown key, which {owner} has; {foreign.advice}"
