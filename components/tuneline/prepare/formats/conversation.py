"""Lists of messages: roles, contents and their order."""

import re
from typing import Any

from tuneline.prepare.formats.checks import (
    as_list,
    check_text,
    check_unicode,
    describe_type,
    has_value,
    is_blank,
    parse_json,
)
from tuneline.prepare.formats.example import BadRowError, Message
from tuneline.prepare.formats.message import EXCLUDED, JOINS, read_message
from tuneline.prepare.formats.reading import Reading, Row
from tuneline.prepare.formats.tools import may_call

_OPENS_LIST = re.compile(r"\s*\[\s*\{")
"""Matches the beginning of JSON text that may be a list of messages."""


def user(content: str) -> Message:
    """Return a message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """Return a message of the assistant, that is, an answer."""
    return {"role": "assistant", "content": content}


def find_messages(value: Any) -> list[Any] | None:
    """Return the messages in a value, unread; None if the value is not a list of messages.

    In CSV, and often in Parquet, a list of messages is JSON text. Some Hub datasets have an object
    of lists instead, with one list for the roles and one for the contents. A single message stands
    for a list of one.
    """
    if isinstance(value, str):
        if not _OPENS_LIST.match(value):
            return None
        try:
            items = parse_json(value, "the text")
        except BadRowError:
            return None
        are_messages = all(isinstance(item, dict) and _has_role(item) for item in items)
        return items if are_messages else None
    if isinstance(value, dict):
        columns = {key: as_list(items) for key, items in value.items() if items is not None}
        if columns.get("role", columns.get("from")) is None:
            return [value] if _has_role(value) else None
        if None in columns.values():
            return None
        if len({len(items or []) for items in columns.values()}) != 1:
            return None
        rows = zip(*(items or [] for items in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]
    return as_list(value)


def _has_role(message: dict[str, Any]) -> bool:
    return "role" in message or "from" in message


def read_messages(row: Row, name: str, reading: Reading) -> list[Message]:
    """Return the messages in a column.

    A message has the keys `role` and `content`, or `from` and `value` as in ShareGPT. A message
    that the row excludes from the loss has the key `EXCLUDED`; `take_excluded` removes it.

    Args:
        row: the row.
        name: the column.
        reading: receives the names of keys that are not used.

    Raises:
        BadRowError: the column is not a list of messages with known roles and text.
    """
    value = row.get(name)
    if value is None:
        raise BadRowError(f"{name} is missing")
    if isinstance(value, str) and _OPENS_LIST.match(value):
        items = as_list(parse_json(value, name))
    else:
        items = find_messages(value)
    if items is None:
        hint = "; write lists into a table with json.dumps" if isinstance(value, str) else ""
        raise BadRowError(f"{name} is {describe_type(value)}, not a list of messages{hint}")
    if not items:
        raise BadRowError(f"{name} is empty")
    messages: list[Message] = []
    for number, item in enumerate(items, 1):
        for message in read_message(item, name, number, reading):
            _append(messages, message)
    return messages


def _append(messages: list[Message], message: Message) -> None:
    """Append a message; a turn of its own that only calls tools joins the answer before it.

    Some spellings give each call a turn of its own, but the model writes all calls in one turn.
    """
    last = messages[-1] if messages else None
    if (
        not message.pop(JOINS, False)
        or last is None
        or last["role"] != "assistant"
        or (message["content"] and last["content"])
        or last.get(EXCLUDED) != message.get(EXCLUDED)
    ):
        messages.append(message)
        return
    last["content"] = last["content"] or message["content"]
    last["tool_calls"] = [*last.get("tool_calls", []), *message["tool_calls"]]


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Return the messages with a system message in front, unless they begin with one."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def take_excluded(messages: list[Message]) -> frozenset[int]:
    """Remove the key `EXCLUDED` from messages; return the indices of those that had it."""
    return frozenset(
        index for index, message in enumerate(messages) if message.pop(EXCLUDED, False)
    )


def check_conversation(messages: list[Message]) -> None:
    """Check the order and the contents of a conversation to train on.

    Raises:
        BadRowError: the conversation does not end with an answer, or a message is misplaced or
            empty.
    """
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise BadRowError("there is no user message")
    if roles[-1] != "assistant":
        raise BadRowError(f"the last message is from the {roles[-1]}: there is no answer to learn")
    if roles.index("assistant") < roles.index("user"):
        raise BadRowError("an answer comes before the first user message")
    check_contents(messages)


def check_contents(messages: list[Message]) -> None:
    """Refuse misplaced and empty messages, and text that is not valid Unicode."""
    called: set[str] | None = set()
    caller: Message | None = None
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "assistant":
            caller = message
            _check_answer(message)
            if "tool_calls" in message and called is not None:
                ids = [call.get("id") for call in message["tool_calls"]]
                called = None if None in ids else called | set(map(str, ids))
        elif role == "user":
            caller = None
            if is_blank(content):
                raise BadRowError("a user message is empty")
            check_unicode(content, "the user message")
        else:
            if role == "system" and index:
                raise BadRowError("a system message comes after the first message")
            if role == "tool":
                _check_tool_message(message, caller, called)
            check_unicode(content, f"the {role} message")


def _check_answer(message: Message) -> None:
    if "tool_calls" in message:
        check_unicode(message["content"], "the answer")
    else:
        check_text(message["content"], "the answer")
    if "reasoning" in message:
        check_unicode(message["reasoning"], "the reasoning")


def _check_tool_message(message: Message, caller: Message | None, called: set[str] | None) -> None:
    if caller is None or not may_call(caller):
        raise BadRowError("a tool message follows no call of a tool")
    answered = message.get("tool_call_id")
    # Calls may be written as text; then their IDs are not known.
    if answered is not None and called and answered not in called:
        raise BadRowError(f"a tool message answers the call {answered!r}, which no message makes")
    for key in ("name", "tool_call_id"):
        if has_value(message.get(key)):
            check_unicode(message[key], f"the {key} of a tool message")
