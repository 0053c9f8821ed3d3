"""Tool calling: definitions of tools, calls of tools, and what tools return.

The spellings of OpenAI (wrapped or bare definitions, `tool_calls`, the older `functions` and
`function_call`), LLaMA-Factory (`function_call` turns) and Hermes function calling are read.
"""

import json
import re
from collections.abc import Container
from functools import lru_cache
from typing import Any

from tuneline.prepare.formats.checks import (
    as_list,
    check_json,
    describe_type,
    has_value,
    parse_json,
    without_nulls,
)
from tuneline.prepare.formats.example import BadRowError, Message
from tuneline.prepare.formats.reading import Reading, Row

COLUMNS = ("tools", "functions")
"""Columns with definitions of tools; the first one with a value is used."""

_MAX_CACHED = 1 << 16
"""Longest text of definitions, in characters, whose definitions are kept for the next rows."""
_RESPONSE = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
_NAME = re.compile(r'"name"\s*:\s*"([^"]+)"')
_THOUGHT = re.compile(r"\s*(<think>.*?</think>)\s*", re.DOTALL)

# Keys of a JSON Schema that may be null on purpose. Any other null of a definition only fills the
# gap of a key that the definitions of other tools have.
_MAY_BE_NULL = ("default", "const", "example")

Definition = dict[str, Any]


def read_tools(row: Row, messages: list[Message], reading: Reading) -> list[Definition] | None:
    """Return the definitions of the tools that a conversation may call.

    Args:
        row: the row; its definitions are a list or JSON text.
        messages: the conversation. If its system message already contains the definitions, as in
            Hermes function calling, none are returned: the chat template would repeat them.
        reading: receives the names of columns that are not used.
    """
    found: list[Definition] | None = None
    for name in COLUMNS:
        value = row.get(name)
        if not has_value(value):
            continue
        if found is not None:
            reading.leave(name, f"{COLUMNS[0]} is used")
            continue
        found = _definitions(value, name, reading) or None
        if found and messages[0]["role"] == "system" and _lists(messages[0]["content"], found):
            reading.leave(name, "the system message contains the definitions")
            return None
    return found


def _lists(text: str, tools: list[Definition]) -> bool:
    """Return whether a system message contains the definitions of tools, as JSON or in tags."""
    if "<tools>" in text:
        return True
    named = set(_NAME.findall(text))
    return all(tool["function"]["name"] in named for tool in tools)


def _definitions(value: Any, name: str, reading: Reading) -> list[Definition]:
    if not isinstance(value, str):
        return _normalise(value, name, () if reading.nulls_are_padding else _MAY_BE_NULL)
    if len(value) > _MAX_CACHED:
        return _parse_definitions.__wrapped__(value, name)
    return _parse_definitions(value, name)


# Most rows of a dataset repeat the definitions of other rows.
@lru_cache(maxsize=128)
def _parse_definitions(text: str, name: str) -> list[Definition]:
    return _normalise(parse_json(text, name), name, _MAY_BE_NULL) if text.strip() else []


def _normalise(value: Any, name: str, may_be_null: Container[str]) -> list[Definition]:
    value = without_nulls(value, may_be_null)
    items = [value] if isinstance(value, dict) and _function_of(value) else as_list(value)
    if items is None:
        raise BadRowError(f"{name} is {describe_type(value)}, not a list of definitions of tools")
    definitions = [_definition(item, f"{name} {number}") for number, item in enumerate(items, 1)]
    check_json(definitions, name)
    return definitions


def _definition(item: Any, where: str) -> Definition:
    if isinstance(item, str):
        item = parse_json(item, where)
    if not isinstance(item, dict):
        raise BadRowError(f"{where} is {describe_type(item)}, not the definition of a tool")
    if item.get("type") not in (None, "function"):
        raise BadRowError(f"{where} has the type {item['type']!r}; the only known type is function")
    function = _function_of(item)
    if function is None:
        raise BadRowError(f"{where} has no name: a definition has name, description, parameters")
    if isinstance(function.get("parameters"), str):
        function["parameters"] = parse_json(function["parameters"], f"the parameters of {where}")
    if not isinstance(function.get("parameters", {}), dict):
        shown = describe_type(function["parameters"])
        raise BadRowError(f"the parameters of {where} are {shown}, not an object")
    around = item if isinstance(item.get("function"), dict) else {}
    return {**around, "type": "function", "function": function}


def _function_of(item: dict[str, Any]) -> dict[str, Any] | None:
    """Return a copy of a wrapped or bare definition; None if it has no name."""
    inner = item.get("function")
    function = inner if isinstance(inner, dict) else item
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        return None
    return {key: value for key, value in function.items() if function is inner or key != "type"}


def read_calls(value: Any, where: str, name: str, reading: Reading) -> list[dict[str, Any]]:
    """Return the calls of a message in OpenAI's form; a missing ID stays missing.

    Args:
        value: a call or a list of calls, wrapped or bare, also as JSON text.
        where: the message, for reasons.
        name: name of the key that holds the calls, e.g. `messages[].tool_calls`.
        reading: receives the names of keys that are not used.
    """
    if isinstance(value, str):
        value = parse_json(value, f"{where}: the text of the tool call")
    items = [value] if isinstance(value, dict) else as_list(value)
    if items is None:
        raise BadRowError(f"{where}: the tool calls are {describe_type(value)}, not a list")
    calls = [_call(item, where, name, reading) for item in items]
    check_json(calls, f"{where}: a tool call")
    return calls


def _call(item: Any, where: str, name: str, reading: Reading) -> dict[str, Any]:
    if isinstance(item, str):
        item = parse_json(item, f"{where}: the text of the tool call")
    if not isinstance(item, dict):
        raise BadRowError(f"{where}: a tool call is {describe_type(item)}, not an object")
    if item.get("type") not in (None, "function"):
        raise BadRowError(
            f"{where}: a tool call has the type {item['type']!r}; the only known type is function"
        )
    wrapped = item.get("function")
    function = wrapped if isinstance(wrapped, dict) else item
    called = function.get("name")
    if not isinstance(called, str) or not called.strip():
        raise BadRowError(f"{where}: a tool call has no name")
    key = "arguments" if function.get("arguments") is not None else "parameters"
    call: dict[str, Any] = {"id": str(item["id"])} if has_value(item.get("id")) else {}
    call |= {
        "type": "function",
        "function": {
            "name": called,
            "arguments": _arguments(function.get(key), f"{where}: the call of {called}", reading),
        },
    }
    used = {"id", "type", "name", "arguments", key}
    for other in {**item, **function}:
        if other not in used and not (other == "function" and function is wrapped):
            if has_value(item.get(other)) or has_value(function.get(other)):
                reading.leave(f"{name}[].{other}")
    return call


def _arguments(value: Any, where: str, reading: Reading) -> dict[str, Any]:
    if isinstance(value, str):
        value = parse_json(value, f"{where}: the text of the arguments") if value.strip() else {}
    elif reading.nulls_are_padding:
        value = without_nulls(value)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRowError(f"{where} has {describe_type(value)} as arguments, not an object")
    return value


def split_call_text(text: str) -> tuple[str, str]:
    """Return the reasoning that stands before a call written as JSON, with its tags, and the call.

    The reasoning is "" if there is none.
    """
    thought = _THOUGHT.match(text)
    return (thought[1], text[thought.end() :]) if thought else ("", text)


def split_responses(text: str) -> list[str]:
    """Return what each tool returned, without the tags that Hermes function calling puts around it.

    Chat templates write tags of their own.
    """
    found, position = [], 0
    while match := _RESPONSE.match(text, position):
        found.append(match[1])
        position = match.end()
    return found if found and position == len(text) else [text]


def response_text(value: Any, where: str, reading: Reading) -> str:
    """Return what a tool returned as JSON text, if it is an object or a list."""
    if reading.nulls_are_padding:
        value = without_nulls(value)
    check_json(value, f"{where}: the content")
    return json.dumps(value, ensure_ascii=False)


def may_call(message: Message) -> bool:
    """Return whether an assistant's message calls a tool, possibly in words of its own.

    Calls that are written as text have brackets: <tool_call>, {"name": ...} or search[...].
    """
    return bool(message.get("tool_calls")) or any(
        bracket in message["content"] for bracket in "<{[("
    )
