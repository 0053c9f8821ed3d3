"""Say in words what is wrong with a value that a strict model refuses.

What a value may be is taken from the JSON Schema, because pydantic's own messages name its types
and say the same thing once per branch of a union.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tuneline.schema.keys import (
    Path,
    Schema,
    all_keys,
    allowed,
    choices_of,
    dotted,
    keys_at,
    node_at,
    types_of,
)

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_VALUE_CHARACTERS = 120
_MAX_PLACES = 3
"""Number of places that a message names for a key that is known elsewhere."""
_YES = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
"""Words that YAML 1.1 reads as truth values, and YAML 1.2 does not."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one value."""

    path: Path
    """Where the value is; empty if the problem concerns the document as a whole."""
    text: str
    """One sentence that names the key."""
    is_unknown_key: bool = False


def problems_of(schema: Schema, error: ValidationError, document: Any) -> list[Problem]:
    """Return one problem per value that pydantic refuses, in pydantic's order.

    Args:
        schema: JSON Schema of the model.
        error: what pydantic found.
        document: the value that was validated.
    """
    found: dict[Path, Problem] = {}
    for details in error.errors():
        path = _real_path(details, document)
        # Of a union, each branch reports an error for the same value.
        if path not in found or details["type"] == "value_error":
            found[path] = _problem(schema, details, path, document)
    return list(found.values())


def unknown_key(schema: Schema, path: Path) -> str:
    """Return the sentence for a key that the schema does not know.

    A key of this name elsewhere in the schema is named first, then the nearest key beside it.
    """
    name, beside = str(path[-1]), keys_at(schema, path[:-1])
    same = name.replace("-", "_").lower()
    in_list = any(isinstance(part, int) for part in path)
    places = [] if in_list else [dotted(key) for key in all_keys(schema) if key[-1] == same]
    if places:
        at = " or ".join(places[:_MAX_PLACES])
        return f"{dotted(path)}: unknown key here; set {at}"
    near = difflib.get_close_matches(name, beside, n=1, cutoff=0.5)
    if near:
        return f"{dotted(path)}: unknown key; did you mean '{near[0]}'?"
    return f"{dotted(path)}: unknown key; known keys: {', '.join(sorted(beside))}"


def _real_path(details: "ErrorDetails", document: Any) -> Path:
    """Return the path of a value without the names of a union's branches, which pydantic adds."""
    path: list[int | str] = []
    value = document
    for part in details["loc"]:
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and isinstance(part, int):
            value = value[part] if part < len(value) else None
        elif not (details["type"] == "missing" and part == details["loc"][-1]):
            continue
        path.append(part)
    return tuple(path)


def _problem(schema: Schema, details: "ErrorDetails", path: Path, document: Any) -> Problem:
    key = dotted(path)
    match details["type"]:
        case "extra_forbidden":
            return Problem(path, unknown_key(schema, path), is_unknown_key=True)
        case "missing":
            return Problem(path, f"{key}: missing, but required. {_meaning(schema, path)}".rstrip())
        case "value_error":
            # The sentence of one of our own checks.
            prefix = f"{key}: " if key else ""
            return Problem(path, f"{prefix}{details['msg'].removeprefix('Value error, ')}")
        case "json_invalid":
            return Problem(path, details["msg"])
    if details["loc"][-1:] == ("[key]",):
        names = node_at(schema, path[:-1]).get("propertyNames", {}).get("enum", ())
        near = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(names)}"
        return Problem(path, f"{key}: unknown key; {hint}")
    value = document
    for part in path:
        value = value[part]
    node = node_at(schema, path)
    text = f"{key or 'the document'} is {_shown(value)}, but must be {allowed(schema, node)}"
    advice = _advice(value, types_of(schema, node), choices_of(schema, node))
    if not advice and "pattern" in details["type"]:
        advice = _meaning(schema, path).rstrip(".")
    return Problem(path, f"{text}: {advice}" if advice else text)


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    text = json.dumps(value, ensure_ascii=False, default=str)
    limit = MAX_VALUE_CHARACTERS
    return text if len(text) <= limit else f"{text[:limit]}..."


def _advice(value: Any, types: set[str], choices: list[Any]) -> str:
    """Return what to write instead, if the value tells what was meant."""
    if value is None and "object" in types:
        return "give it keys, or remove the line"
    if isinstance(value, str):
        if "boolean" in types and value.lower() in _YES:
            return f"write {_YES[value.lower()]}"
        if types & {"integer", "number"} and _is_number(value):
            plain = value.replace("_", "").replace(",", "")
            return f"write {plain}, without quotes"
        near = difflib.get_close_matches(value, map(str, choices), n=1, cutoff=0.6)
        if near:
            return f"did you mean {near[0]}?"
    if isinstance(value, bool):
        word = next((w for w in choices if _YES.get(str(w)) == str(value).lower()), None)
        return f"write {word}" if word else ""
    if isinstance(value, float) and "integer" in types and value.is_integer():
        return f"write {int(value)}"
    if "array" in types and not isinstance(value, dict | list) and value is not None:
        return f"write [{value}]"
    if isinstance(value, int | float) and types == {"string"}:
        return f'write "{value}", in quotes'
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True


def _meaning(schema: Schema, path: Path) -> str:
    """Return the first sentence of a key's description."""
    described = " ".join(str(node_at(schema, path).get("description", "")).split())
    first, full_stop, _ = described.partition(". ")
    return f"{first}{full_stop}".strip()
