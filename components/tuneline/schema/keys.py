"""Walk a JSON Schema: the node of a key, the keys below it, and what a value may be, in words."""

from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
Path = tuple[int | str, ...]
"""Keys and indices that lead to a value, e.g. ("datasets", 0, "source")."""

_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def dotted(path: Path) -> str:
    """Return a path as recipes and messages write it, e.g. datasets[0].source."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def node_at(schema: Schema, path: Path) -> Schema:
    """Return the node of the value at `path`; an empty one if the schema does not know the path."""
    node: Schema = schema
    for part in path:
        node = _child(schema, node, part)
    return node


def keys_at(schema: Schema, path: Path) -> dict[str, Schema]:
    """Return the keys that a mapping at `path` may have, with their nodes."""
    return _properties(schema, node_at(schema, path))


def all_keys(schema: Schema) -> Iterator[Path]:
    """Yield the path of every key, except below the items of lists and of free mappings."""

    def below(node: Schema, path: Path) -> Iterator[Path]:
        for name, child in _properties(schema, node).items():
            yield (*path, name)
            yield from below(child, (*path, name))

    yield from below(schema, ())


def allowed(schema: Schema, node: Schema, *, plural: bool = False) -> str:
    """Return in words what a value may be, e.g. a whole number, at least 1, or null."""
    options = _options(schema, node)
    words = [_type(schema, option, plural) for option in options if option.get("type") != "null"]
    if len(words) < len(options):
        words.append("null")
    return " or ".join(dict.fromkeys(words))


def types_of(schema: Schema, node: Schema) -> set[str]:
    """Return the JSON types that a value may have: integer, number, string, array ..."""
    return {_json_type(option) for option in _options(schema, node)}


def choices_of(schema: Schema, node: Schema) -> list[Any]:
    """Return the values that a value is one of; none if it may have others."""
    return [choice for option in _options(schema, node) for choice in _choices(option)]


def _options(schema: Schema, node: Schema) -> list[Schema]:
    node = _resolve(schema, node)
    branches = node.get("anyOf")
    if branches is None:
        return [node]
    return [option for branch in branches for option in _options(schema, branch)]


def _choices(node: Schema) -> list[Any]:
    return list(node["enum"]) if "enum" in node else [node["const"]] if "const" in node else []


def _json_type(node: Schema) -> str:
    choices = _choices(node)
    if choices:
        return "boolean" if isinstance(choices[0], bool) else "string"
    return str(node.get("type", "object" if "properties" in node else "any"))


def _type(schema: Schema, node: Schema, plural: bool) -> str:
    choices = _choices(node)
    if choices:
        listed = ", ".join(map(str, choices))
        several = "values from " if plural else "one of "
        return f"{several if len(choices) > 1 else ''}{listed}"
    match _json_type(node):
        case "array":
            items = node.get("items", {})
            return f"{'lists' if plural else 'a list'} of {allowed(schema, items, plural=True)}"
        case "object":
            return "mappings of keys to values" if plural else "a mapping of keys to values"
        case "integer":
            return f"{'whole numbers' if plural else 'a whole number'}{_limits(node)}"
        case "number":
            return f"{'numbers' if plural else 'a number'}{_limits(node)}"
        case "boolean":
            return "true or false"
        case "string" if node.get("format") == "date":
            return "dates" if plural else "a date such as 2026-01-31"
        case "string":
            pattern = f" that matches {node['pattern']}" if "pattern" in node else ""
            return f"{'texts' if plural else 'text'}{pattern}"
        case _:
            return "any value"


def _limits(node: Schema) -> str:
    words = [f"{word} {node[key]:g}" for key, word in _LIMITS.items() if key in node]
    return f" {' and '.join(words)}" if words else ""


def _child(schema: Schema, node: Schema, part: int | str) -> Schema:
    for option in _options(schema, node):
        if isinstance(part, int):
            if "items" in option:
                items: Schema = option["items"]
                return items
        elif part in option.get("properties", {}):
            found: Schema = option["properties"][part]
            return found
        elif isinstance(option.get("additionalProperties"), dict):
            values: Schema = option["additionalProperties"]
            return values
    return {}


def _properties(schema: Schema, node: Schema) -> dict[str, Schema]:
    return {
        name: child
        for option in _options(schema, node)
        for name, child in option.get("properties", {}).items()
    }


def _resolve(schema: Schema, node: Schema) -> Schema:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node
