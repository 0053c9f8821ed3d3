"""Checks of single values of a row; each raises BadRowError with the reason."""

from typing import Any

from tuneline.prepare.formats.example import BadRowError


def read_text(values: dict[str, Any], name: str) -> str:
    """Return the text in a column; it must contain at least one letter or digit."""
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
    """Refuse text without a letter or digit, and text that is not valid Unicode."""
    if not text.strip():
        raise BadRowError(f"{name} is empty")
    if not any(character.isalnum() for character in text):
        raise BadRowError(f"{name} has no letter and no digit ({text.strip()[:20]!r})")
    check_unicode(text, name)


def check_unicode(text: str, name: str) -> None:
    """Refuse text that cannot be encoded as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(f"{name} is not valid Unicode: it has half of a surrogate pair") from None


def describe_type(value: Any) -> str:
    """Return the type of a JSON value in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text"}
    return names.get(type(value)) or ("a list" if isinstance(value, list) else "an object")
