"""Strict models for everything a person writes, with errors that name the nearest known key."""

import difflib
import json
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tuneline.errors import RecipeError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class StrictModel(BaseModel):
    """A model that refuses unknown keys and does not convert types.

    The docstring under each field is its description in the JSON Schema.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def parse(cls, value: str | dict[str, Any], *, where: str = "") -> Self:
        """Validate JSON text, or what a YAML file held, as this model.

        Args:
            value: JSON text, or a mapping of plain values.
            where: what stands before the key in messages, e.g. "demo.yaml".

        Raises:
            RecipeError: with one line a fault: the key, the value, what is allowed.
        """
        # One strict path for both: JSON knows lists and strings, so tuples and paths are
        # accepted from them, while "3" is still not an int.
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise RecipeError(_explain(cls, error, where)) from None


def _explain(model: type[BaseModel], error: ValidationError, where: str) -> str:
    lines = []
    for fault in error.errors():
        # What disagrees with another key stands at none.
        key = ".".join(map(str, fault["loc"])) + (": " if fault["loc"] else "")
        if fault["type"] == "extra_forbidden":
            known = _known_keys(model, fault["loc"][:-1])
            near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"{key}unknown key; {hint}")
        elif fault["type"] == "missing":
            lines.append(f"{key}missing, and it has no default")
        else:
            lines.append(f"{key}{fault['msg'].removeprefix('Value error, ')}{_given(fault)}")
    prefix = f"{where}: " if where else ""
    return prefix + "; ".join(lines)


def _given(fault: "ErrorDetails") -> str:
    """Return the offending value; what disagrees with another one its message names itself."""
    value = fault["input"]
    if isinstance(value, dict) and fault["type"] == "value_error":
        return ""
    advice = ""
    if value is False and "'off'" in fault["msg"]:
        advice = ', which YAML makes of off: write "off", with its quotes'
    return f" (got {json.dumps(value, default=str)[:120]}{advice})"


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the nested model that `path` leads to."""
    schema = model.model_json_schema()
    node: Any = schema
    for part in path:
        node = _resolve(schema, node)
        node = node.get("items", {}) if isinstance(part, int) else _property(schema, node, part)
    return sorted(_properties(schema, node))


def _property(schema: dict[str, Any], node: dict[str, Any], name: str) -> dict[str, Any]:
    properties = _properties(schema, node)
    return properties.get(name, node.get("additionalProperties") or {})


def _properties(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    node = _resolve(schema, node)
    found = dict(node.get("properties", {}))
    for branch in node.get("anyOf", []):
        found.update(_properties(schema, branch))
    return found


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node
