"""Lists of messages: roles, contents and their order."""

from typing import Any

from tuneline.prepare.formats.checks import check_text, check_unicode, describe_type
from tuneline.prepare.formats.example import BadRowError, Message

_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
# ShareGPT writes a message as {"from": ..., "value": ...}, with other names for the roles.
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}


def user(content: str) -> Message:
    """Return a message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """Return a message of the assistant, that is, an answer."""
    return {"role": "assistant", "content": content}


def read_messages(values: dict[str, Any], name: str) -> list[Message]:
    """Return the messages in a column.

    A message has the keys `role` and `content`, or `from` and `value` as in ShareGPT.

    Raises:
        BadRowError: the column is not a list of messages with known roles and text.
    """
    value = values.get(name)
    if value is None:
        raise BadRowError(f"{name} is missing")
    if not isinstance(value, list):
        raise BadRowError(f"{name} is {describe_type(value)}, not a list of messages")
    if not value:
        raise BadRowError(f"{name} is empty")
    return [_read_message(message, f"{name} {number}") for number, message in enumerate(value, 1)]


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise BadRowError(f"{where} is {describe_type(message)}, not a message")
    if message.get("role") is None and "from" in message:
        given, roles, content = message["from"], _SHAREGPT_ROLES, message.get("value")
    else:
        given, roles, content = message.get("role"), _ROLES, message.get("content")
    role = roles.get(given) if isinstance(given, str) else None
    if role is None:
        raise BadRowError(f"{where} has the role {given!r}; known roles are {', '.join(roles)}")
    if isinstance(content, list):
        content = _join_parts(content, where)
    if content is None:
        raise BadRowError(f"{where} ({role}) has no content")
    if not isinstance(content, str):
        raise BadRowError(f"{where} ({role}): the content is {describe_type(content)}, not text")
    return {"role": role, "content": content}


def _join_parts(parts: list[Any], where: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise BadRowError(f"{where} has a part that is not text")
        texts.append(part["text"])
    return "".join(texts)


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Return the messages with a system message in front, unless they begin with one."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def check_conversation(messages: list[Message]) -> None:
    """Check the order and the contents of a conversation to train on.

    Raises:
        BadRowError: the conversation does not end with an answer, or a message is misplaced or
            empty.
    """
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise BadRowError("a system message comes after the first message")
    if "user" not in roles:
        raise BadRowError("there is no user message")
    if roles[-1] != "assistant":
        raise BadRowError(f"the last message is from the {roles[-1]}: there is no answer to learn")
    if roles.index("assistant") < roles.index("user"):
        raise BadRowError("an answer comes before the first user message")
    check_contents(messages)


def check_contents(messages: list[Message]) -> None:
    """Refuse empty messages of the user and the assistant, and text that is not valid Unicode."""
    for message in messages:
        if message["role"] == "assistant":
            check_text(message["content"], "the answer")
        elif message["role"] == "user" and not message["content"].strip():
            raise BadRowError("a user message is empty")
        else:
            check_unicode(message["content"], f"the {message['role']} message")
