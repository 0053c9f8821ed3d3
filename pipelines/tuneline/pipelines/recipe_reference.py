"""The reference of every recipe key, in Markdown, made from the recipe's JSON Schema.

Types, defaults and meanings come from the schema. The example of a key is its value in a shipped
recipe; if no shipped recipe sets the key, its value in reference_examples.yaml; else its default.
"""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tuneline.pipelines.catalog import shipped_recipes
from tuneline.recipe import Recipe

EXAMPLES_FILE = Path(__file__).parent / "reference_examples.yaml"

LINE_LENGTH = 100
MAX_INLINE_CHARACTERS = 88
"""Greatest length of an example on the line of its key; a longer one gets a code block."""

HEADER = """\
# Recipe reference

<!-- Generated from the JSON Schema of a recipe: run `make docs`, do not edit. -->

A recipe is a YAML file that describes one run. This page lists every key with its type, its default
and an example. `tuneline recipes` lists complete recipes, `tuneline recipes NAME` prints one to
start from, and `tuneline schema` prints the JSON Schema for an editor. The option `--set` overrides
a key for one run, e.g. `tuneline run demo --set train.max_steps=60`.

The file is read as YAML 1.2: `2e-4` is a number, `off`, `on`, `yes` and `no` are words, and truth
values are `true` and `false`. Paths are relative to the directory of the file, and those in `--set`
and in shipped recipes to the working directory.
"""

Schema = dict[str, Any]


def recipe_reference() -> str:
    """Return the reference as a Markdown document."""
    reference = _Reference(Recipe.model_json_schema(), _load_examples())
    return "\n".join([HEADER, *reference.lines()])


def _load_examples() -> list[Any]:
    paths = [*shipped_recipes(), EXAMPLES_FILE]
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths]


class _Reference:
    """The sections of the reference, made from a schema and from documents with examples."""

    def __init__(self, schema: Schema, examples: list[Any]) -> None:
        self.schema = schema
        self.examples = examples
        self.documented: dict[str, str] = {}
        """Path under which the keys of a pydantic model are documented, by the model's name."""

    def lines(self) -> Iterator[str]:
        parts = {key: node for key, node in self.schema["properties"].items() if "$ref" in node}
        yield "- [Top level](#top-level)"
        for key, node in parts.items():
            summary = _join_lines(self._resolve(node)["description"]).partition(". ")[0]
            yield from _wrapped(f"- {_link(key)}: {summary.removesuffix('.')}", indent="  ")
        yield from ("", "## Top level", "")
        yield from _paragraphs(self.schema["description"])
        yield from self._keys("", self.schema, level=3, leave_out=parts)
        for key, node in parts.items():
            yield from self._key(key, node, parent=self.schema, level=2)

    def _keys(
        self, path: str, model: Schema, level: int, leave_out: dict[str, Schema] | None = None
    ) -> Iterator[str]:
        for key, node in model["properties"].items():
            if key not in (leave_out or {}):
                yield from self._key(f"{path}.{key}".lstrip("."), node, model, level)

    def _key(self, path: str, node: Schema, parent: Schema, level: int) -> Iterator[str]:
        key = path.rpartition(".")[2]
        yield from (f"{'#' * level} `{path}`", "")
        nested = _nested_path(node, path)
        model_name, keys_path = nested or ("", "")
        is_new = bool(nested) and model_name not in self.documented
        description = node.get("description", "")
        if is_new:
            self.documented[model_name] = keys_path
            description = description or self.schema["$defs"][model_name].get("description", "")
        yield from _paragraphs(description)
        if "$ref" in node:
            if not is_new:
                yield from (f"It has the keys of {_link(self.documented[model_name])}.", "")
        else:
            yield from _wrapped(f"- Type: {self._type(node, path)}", indent="  ")
            default = _default(node)
            required = key in parent.get("required", ())
            yield f"- Default: {'none, the key is required' if required else _code(default)}"
            yield from self._example(path, default)
            yield ""
        if is_new:
            yield from self._keys(keys_path, self.schema["$defs"][model_name], level + 1)

    def _example(self, path: str, default: Any) -> Iterator[str]:
        values = [value for document in self.examples for value in _values_at(document, path)]
        value = next((value for value in values if value != default), default)
        key = path.rpartition(".")[2]
        line = f"{key}: {_flow(value)}"
        if len(line) <= MAX_INLINE_CHARACTERS:
            yield f"- Example: `{line}`"
            return
        block = yaml.safe_dump({key: value}, sort_keys=False, width=LINE_LENGTH - 4)
        yield from ("- Example:", "", textwrap.indent(f"```yaml\n{block}```", "  "))

    def _type(self, node: Schema, path: str, plural: str = "") -> str:
        """Return the type of a value in words; `plural` is "s" for the items of a list."""
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            keys_path = self.documented[name]
            below = "below" if keys_path.startswith(path) else f"of {_link(keys_path)}"
            return f"mapping{plural} with the keys {below}"
        if "anyOf" in node:
            return " or ".join(self._type(option, path) for option in node["anyOf"])
        if "enum" in node:
            values = ", ".join(_code(value) for value in node["enum"])
            return values if plural else f"one of {values}"
        if "const" in node:
            return _code(node["const"])
        match node["type"]:
            case "array":
                return f"list of {self._type(node['items'], path, 's')}"
            case "object":
                values = node["additionalProperties"]
                if "propertyNames" in node and "enum" in node["propertyNames"]:
                    names = self._type(node["propertyNames"], path, "s")
                    return f"mapping; keys: {names}; values: {self._type(values, path, 's')}"
                return f"mapping of strings to {self._type(values, path, 's')}"
            case "null":
                return "`null`"
            case "boolean":
                return "`true` or `false`"
            case kind:
                return f"{kind}{plural}{_limits(node)}"

    def _resolve(self, node: Schema) -> Schema:
        model: Schema = self.schema["$defs"][node["$ref"].rpartition("/")[2]]
        return model


def _nested_path(node: Schema, path: str) -> tuple[str, str] | None:
    """Return the name of the model inside a value and the path of its keys; None if no model."""
    if "$ref" in node:
        return node["$ref"].rpartition("/")[2], path
    for option in node.get("anyOf", ()):
        if nested := _nested_path(option, path):
            return nested
    if "items" in node:
        return _nested_path(node["items"], f"{path}[]")
    values = node.get("additionalProperties")
    return _nested_path(values, f"{path}.NAME") if isinstance(values, dict) else None


def _limits(node: Schema) -> str:
    words = [
        f"{word} {node[key]}"
        for key, word in {
            "minimum": "at least",
            "exclusiveMinimum": "above",
            "maximum": "at most",
            "exclusiveMaximum": "below",
        }.items()
        if key in node
    ]
    if "pattern" in node:
        words.append(f"that matches `{node['pattern']}`")
    return f" {' and '.join(words)}" if words else ""


def _default(node: Schema) -> Any:
    # The schema has no default where a function makes it; all such defaults are empty.
    empty: dict[str, Any] = {"object": {}, "array": []}
    return node.get("default", empty.get(node.get("type", "")))


def _values_at(document: Any, path: str) -> Iterator[Any]:
    """Yield the values at a path, in which `[]` and `NAME` stand for every item."""
    if not path:
        yield document
        return
    part, _, rest = path.partition(".")
    key = part.removesuffix("[]")
    if not isinstance(document, dict):
        return
    if key == "NAME":
        for value in document.values():
            yield from _values_at(value, rest)
    elif key in document:
        values = document[key] if part.endswith("[]") else [document[key]]
        for value in values:
            yield from _values_at(value, rest)


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.strip().removesuffix("...").strip()


def _code(value: Any) -> str:
    return f"`{_flow(value)}`"


def _link(path: str) -> str:
    """Return a link to the heading of a path, by the anchor that GitHub gives it."""
    return f"[`{path}`](#{re.sub(r'[^a-z0-9_-]', '', path.lower())})"


def _join_lines(text: str) -> str:
    return " ".join(text.split())


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in filter(None, text.split("\n\n")):
        yield from (*_wrapped(_join_lines(paragraph)), "")


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        LINE_LENGTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
