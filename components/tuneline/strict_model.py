"""Base class of strict models, whose errors say in words what each value may be."""

import functools
import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tuneline.errors import RecipeError
from tuneline.schema.words import Problem, problems_of


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
        model, problems = cls.check(value)
        if model is not None:
            return model
        prefix = f"{where}: " if where else ""
        raise RecipeError(prefix + "; ".join(problem.text for problem in problems))

    @classmethod
    def check(cls, value: str | dict[str, Any]) -> tuple[Self | None, list[Problem]]:
        """Validate like `parse`; return the model, or None and what is wrong."""
        # Mappings are validated as JSON too. Lists and strings are then accepted for tuples and
        # paths in strict mode, but "3" is still not accepted for an int.
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        try:
            return cls.model_validate_json(text, strict=True), []
        except ValidationError as error:
            document = _loads(text) if isinstance(value, str) else value
            return None, problems_of(_schema_of(cls), error, document)


@functools.cache
def _schema_of(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
