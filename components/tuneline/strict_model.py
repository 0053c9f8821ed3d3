"""Base class of strict models, whose errors suggest the key nearest to a mistyped one."""

import difflib
import json
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tuneline.errors import RecipeError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class StrictModel(BaseModel):
    """A model that rejects unknown keys and does not convert types.

    The docstring under each field is its description in the JSON Schema.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def parse(cls, value: str | dict[str, Any], *, where: str = "") -> Self:
        """Validate JSON text or the content of a YAML file as this model.

        Args:
            value: JSON text, or a mapping of plain values.
            where: prefix of the error message, e.g. "demo.yaml".

        Raises:
            RecipeError: the value is invalid. The message names, for each error, the key, the
                value and what is allowed.
        """
        # Mappings are validated as JSON too. Lists and strings are then accepted for tuples and
        # paths in strict mode, but "3" is still not accepted for an int.
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise RecipeError(_explain(cls, error, where)) from None


def _explain(model: type[BaseModel], error: ValidationError, where: str) -> str:
    lines = []
    for problem in error.errors():
        # An error about a combination of keys has no location.
        key = ".".join(map(str, problem["loc"])) + (": " if problem["loc"] else "")
        if problem["type"] == "extra_forbidden":
            keys = _known_keys(model, problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), keys, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(keys)}"
            lines.append(f"{key}unknown key; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{key}missing, but required")
        else:
            lines.append(f"{key}{problem['msg'].removeprefix('Value error, ')}{_given(problem)}")
    prefix = f"{where}: " if where else ""
    return prefix + "; ".join(lines)


def _given(problem: "ErrorDetails") -> str:
    """Return the offending value; empty if the error is about a combination of keys."""
    value = problem["input"]
    if isinstance(value, dict) and problem["type"] == "value_error":
        return ""
    advice = ""
    if value is False and "'off'" in problem["msg"]:
        advice = ', because YAML reads off as false: write "off" in quotes'
    return f" (got {json.dumps(value, default=str)[:120]}{advice})"


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the nested model at `path`, sorted."""
    schema = model.model_json_schema()
    node: Any = schema
    for part in path:
        node = _resolve(schema, node)
        node = node.get("items", {}) if isinstance(part, int) else _property(schema, node, part)
    return sorted(_properties(schema, node))


def _property(schema: dict[str, Any], node: dict[str, Any], name: str) -> dict[str, Any]:
    values = node.get("additionalProperties") or {}
    schema_of_key: dict[str, Any] = _properties(schema, node).get(name, values)
    return schema_of_key


def _properties(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    node = _resolve(schema, node)
    properties: dict[str, Any] = dict(node.get("properties", {}))
    for branch in node.get("anyOf", []):
        properties.update(_properties(schema, branch))
    return properties


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node
