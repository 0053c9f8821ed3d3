"""Bring tools, calls and results into the form that a chat template needs, and check its text."""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from tuneline.prepare.formats.example import BadRowError, Message
from tuneline.prepare.tokens.probe_tools import ToolFacts

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}\Z")
_ADVICE = "use a model whose chat template supports it, or leave such rows out"


def check_tools(messages: list[Message], has_tools: bool, facts: ToolFacts) -> None:
    """Refuse a row whose tools, calls or results the template leaves out.

    Args:
        messages: the conversation.
        has_tools: whether the row defines tools.
        facts: what the template does with tools.
    """
    if has_tools and not facts.shows_tools:
        raise BadRowError(
            "the row defines tools, but the chat template knows no tools, so the model would not "
            f"see them: {_ADVICE}"
        )
    for message in messages:
        calls = message.get("tool_calls") or []
        if calls and facts.arguments is None:
            raise BadRowError(
                f"an answer calls a tool, but the chat template writes no tool calls: {_ADVICE}"
            )
        if len(calls) > 1 and not facts.shows_all_calls:
            raise BadRowError(
                f"an answer calls {len(calls)} tools at once, but the chat template writes one "
                f"call per answer: {_ADVICE}"
            )
        if message["role"] == "tool" and not facts.shows_results:
            raise BadRowError(
                "a message has the result of a tool, but the chat template writes no results: "
                + _ADVICE
            )


def shape_tools(tools: list[dict[str, Any]], facts: ToolFacts) -> list[dict[str, Any]]:
    """Return the definitions with every key that the template reads."""
    if not facts.needs_whole_tools:
        return tools
    empty = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return [{**tool, "function": {**empty, **tool["function"]}} for tool in tools]


def shape_calls(messages: list[Message], facts: ToolFacts) -> list[Message]:
    """Return the messages with arguments and identifiers as the template needs them.

    Every call gets an identifier, and every result the identifier and the tool of its call: in
    order of the calls if the row names none.
    """
    shaped = []
    open_calls: list[tuple[str | None, str, str]] = []
    for index, message in enumerate(messages):
        if message.get("tool_calls"):
            calls = []
            for number, call in enumerate(message["tool_calls"]):
                function = call["function"]
                given = call.get("id")
                written = _identifier(given, f"{index} {number} {function}", facts)
                open_calls.append((given, written, function["name"]))
                calls.append(_call(function, written, facts))
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            message = _result(message, open_calls, facts)
        shaped.append(message)
    return shaped


def _call(function: dict[str, Any], identifier: str, facts: ToolFacts) -> dict[str, Any]:
    arguments = function["arguments"]
    if facts.arguments == "text":
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": identifier,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _identifier(given: str | None, seed: str, facts: ToolFacts) -> str:
    if given and (_SHORT_ID.match(given) or not facts.needs_short_ids):
        return given
    return hashlib.sha256((given or seed).encode()).hexdigest()[:9]


def _result(
    message: Message, open_calls: list[tuple[str | None, str, str]], facts: ToolFacts
) -> Message:
    given = message.get("tool_call_id")
    matching = [call for call in open_calls if given is None or call[0] == given]
    if matching:
        open_calls.remove(matching[0])
        _, identifier, name = matching[0]
        return {**message, "tool_call_id": identifier, "name": message.get("name") or name}
    if given is None:
        return message
    return {**message, "tool_call_id": _identifier(given, given, facts)}


def check_calls(message: Message, text: str) -> None:
    """Refuse a row if a call's name or an argument is not in the text of the answer."""
    for call in message.get("tool_calls") or []:
        function = call["function"]
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        for value in (function["name"], *_leaves(arguments)):
            if not is_written(value, text):
                raise BadRowError(
                    f"the chat template changes or leaves out a part of the call of "
                    f"{function['name']}: {str(value)[:40]!r}"
                )


def is_written(value: Any, text: str) -> bool:
    """Return whether a text contains a JSON value: as it is, trimmed, or escaped as in JSON."""
    if isinstance(value, str):
        stripped = value.strip()
        if stripped in text:
            return True
        forms = [json.dumps(stripped, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    else:
        forms = [str(value), json.dumps(value)]
    return any(form in text for form in forms)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
