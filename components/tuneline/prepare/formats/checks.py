"""Checks of single values of a row; each raises BadRowError with the reason."""

import json
import unicodedata
from collections.abc import Container
from typing import Any

from tuneline.prepare.formats.example import BadRowError


def read_text(values: dict[str, Any], name: str) -> str:
    """Return the text in a column; it must contain a visible character."""
    text = read_string(values, name)
    check_text(text, name)
    return text


def read_string(values: dict[str, Any], name: str) -> str:
    """Return the string in a column; it may be empty."""
    value = values.get(name)
    if value is None:
        raise BadRowError(f"{name} is missing")
    if not isinstance(value, str):
        raise BadRowError(f"{name} is {describe_type(value)}, not text")
    return value


def check_text(text: str, name: str) -> None:
    """Refuse text without a visible character, and text that is not valid Unicode.

    Letters are not required: an emoji, "+", "{}" or "..." can be the right answer.
    """
    if is_blank(text):
        raise BadRowError(f"{name} is empty")
    check_unicode(text, name)


def is_blank(text: str) -> bool:
    """Return whether the text has only white space, control and zero-width characters."""
    if text[:1].isalnum():
        return False
    return not any(
        not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf")
        for character in text
    )


def check_unicode(text: str, name: str) -> None:
    """Refuse text that cannot be encoded as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(f"{name} is not valid Unicode: it has half of a surrogate pair") from None


def check_json(value: Any, name: str) -> None:
    """Refuse a value that cannot be written as JSON, and text in it that is not valid Unicode."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRowError(f"{name} cannot be written as JSON: {error}") from None
    check_unicode(text, name)


def parse_json(text: str, name: str) -> Any:
    """Return the value of a JSON text; a key that an object has twice is refused."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        # str() of a Python list, as pandas writes it to CSV, has single quotes.
        hint = "; write it with json.dumps" if text[error.pos : error.pos + 1] == "'" else ""
        raise BadRowError(
            f"{name} is not JSON: {error.msg} at character {error.pos + 1}{hint}"
        ) from None
    except _UnclearError as error:
        raise BadRowError(f"{name} {error}") from None


class _UnclearError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _UnclearError(repeated_key(pairs))
    return values


def repeated_key(pairs: list[tuple[str, Any]]) -> str:
    """Return what is wrong with an object of JSON that has a key twice."""
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    return f"has the key {twice[:100]!r} twice"


def _refuse_constant(name: str) -> None:
    raise _UnclearError(f"has the number {name}, which JSON does not have")


def without_nulls(value: Any, keep: Container[str] = ()) -> Any:
    """Return a value without the null keys of its objects, at any depth, except those in `keep`."""
    if isinstance(value, dict):
        return {
            key: without_nulls(inner, keep)
            for key, inner in value.items()
            if inner is not None or key in keep
        }
    if isinstance(value, list):
        return [without_nulls(inner, keep) for inner in value]
    return value


def as_list(value: Any) -> list[Any] | None:
    """Return a list, a tuple or an array as a list; None for any other value."""
    if isinstance(value, list):
        return value
    if isinstance(value, tuple):
        return list(value)
    if type(value).__name__ == "ndarray":
        items: list[Any] = value.tolist()
        return items
    return None


def has_value(value: Any) -> bool:
    """Return whether a row has the value.

    Null, an empty text, an empty list, and an object whose values are all null stand for a missing
    value: CSV and Parquet have a cell for every column of every row.
    """
    if value is None:
        return False
    if isinstance(value, dict):
        return any(
            inner is not None and (inner == {} or not isinstance(inner, dict) or has_value(inner))
            for inner in value.values()
        )
    return not isinstance(value, str | list | tuple) or bool(value)


def describe_type(value: Any) -> str:
    """Return the type of a JSON value in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text"}
    return names.get(type(value)) or ("a list" if as_list(value) is not None else "an object")
