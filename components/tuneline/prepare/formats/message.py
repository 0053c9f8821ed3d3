"""One message: its role, content, reasoning, tool calls, and whether it is learnt."""

from dataclasses import dataclass, field
from typing import Any

from tuneline.prepare.formats.checks import as_list, describe_type, has_value, is_blank
from tuneline.prepare.formats.example import BadRowError, Message
from tuneline.prepare.formats.reading import REASONING, Reading
from tuneline.prepare.formats.refusals import check_key
from tuneline.prepare.formats.tools import (
    read_calls,
    response_text,
    split_call_text,
    split_responses,
)

EXCLUDED = "excluded"
"""Key of a message, while its row is read, that says that the row excludes it from the loss."""
JOINS = "joins"
"""Key of a message, while its row is read, that is a turn of its own which only calls tools."""

_CALL = "call"
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant"),
    # As helpdesks export conversations.
    **dict.fromkeys(("customer", "client", "requester", "end-user", "visitor"), "user"),
    **dict.fromkeys(("agent", "operator", "support"), "assistant"),
    **dict.fromkeys(
        ("tool", "function", "ipython", "observation", "tool_response", "function_response"), "tool"
    ),
    # A turn whose content is the JSON text of one call or several.
    **dict.fromkeys(("function_call", "tool_call"), _CALL),
}

# Keys that say whether a message is learnt, in the spellings of OpenAI, Axolotl (where the recipe
# names the key) and ms-swift; and keys that say the opposite.
_LEARNT = ("weight", "train", "training", "train_on_turn", "trainable", "loss", "loss_weight")
_MASKED = ("mask", "masked")
_TRUTH = {"true": True, "false": False, "1": True, "0": False}


@dataclass
class _Item:
    """A message as the row has it, and which of its keys are used."""

    values: dict[str, Any]
    name: str
    """Name of the column with the messages, and []."""
    where: str
    """Which message it is, for reasons."""
    reading: Reading
    used: set[str] = field(default_factory=set)

    def take(self, key: str) -> Any:
        """Return the value of a key, and note that it is used; None if there is no value."""
        value = self.values.get(key)
        if not has_value(value):
            return None
        self.used.add(key)
        return value

    def leave_rest(self) -> None:
        """Note the keys that are not used; refuse those that must not be lost."""
        for key, value in self.values.items():
            if key not in self.used:
                check_key(key, value, f"{self.name}.{key}", self.reading)


def read_message(values: Any, name: str, number: int, reading: Reading) -> list[Message]:
    """Return a message in the form of `Message`; several if it has what several tools returned.

    Args:
        values: the message as the row has it.
        name: the column with the messages.
        number: number of the message in the column, from 1.
        reading: receives the names of keys that are not used.
    """
    where = f"{name} {number}"
    if not isinstance(values, dict):
        raise BadRowError(f"{where} is {describe_type(values)}, not a message")
    if reading.ignored:
        values = {key: v for key, v in values.items() if not reading.is_ignored(f"{name}[].{key}")}
    role_key = "from" if values.get("role") is None else "role"
    content_key = "value" if values.get("content") is None else "content"
    given, content = values.get(role_key), values.get(content_key)
    role = (
        _ROLES.get(given) or _ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    )
    if given is None:
        raise BadRowError(
            f"{where} has no role: its keys are {', '.join(values) or 'none'}, but a message has "
            "role and content, or from and value; rename its keys"
        )
    if role is None:
        raise BadRowError(f"{where} has the role {given!r}; known roles are {', '.join(_ROLES)}")
    if len(values) == 2 and isinstance(content, str) and role not in ("tool", _CALL):
        return [{"role": role, "content": content}]
    item = _Item(values, f"{name}[]", f"{where} ({role})", reading, {role_key, content_key})
    if role == _CALL:
        item.where = f"{where} ({given})"
        messages = [_call_turn(item, content)]
    elif role == "assistant":
        messages = [_answer(item, content)]
    elif role == "tool":
        messages = _tool_messages(item, content)
    else:
        messages = [{"role": role, "content": _text(item, content)}]
    if _is_excluded(item, is_answer=role in ("assistant", _CALL)):
        messages[0][EXCLUDED] = True
    item.leave_rest()
    return messages


def _text(item: _Item, content: Any, thoughts: list[str] | None = None) -> str:
    """Return the text of a content; reasoning parts are appended to `thoughts` if it is given."""
    parts = as_list(content)
    if parts is not None:
        return "".join(_part(item, part, thoughts) for part in parts)
    if content is None:
        keys = ", ".join(item.values) or "none"
        raise BadRowError(f"{item.where} has no content; its keys are {keys}")
    if not isinstance(content, str):
        raise BadRowError(f"{item.where}: the content is {describe_type(content)}, not text")
    return content


def _part(item: _Item, part: Any, thoughts: list[str] | None) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else describe_type(part)
    if thoughts is not None and kind in ("thinking", "reasoning"):
        thought = part.get("thinking") or part.get("reasoning") or part.get("text")
        thoughts.append(_text(item, thought))
        return ""
    if (
        not isinstance(part, dict)
        or kind not in (None, "text", "input_text", "output_text")
        or not isinstance(part.get("text"), str)
    ):
        raise BadRowError(
            f"{item.where} has a part that is not text (type {kind}): tuneline trains on text only"
        )
    text: str = part["text"]
    for key, value in part.items():
        if key not in ("type", "text"):
            check_key(key, value, f"{item.name}.content[].{key}", item.reading)
    return text


def _answer(item: _Item, content: Any) -> Message:
    calls: list[dict[str, Any]] = []
    for key in ("tool_calls", "function_call"):
        if not calls and (value := item.take(key)) is not None:
            calls = read_calls(value, item.where, f"{item.name}.{key}", item.reading)
    parts: list[str] = []
    text = "" if content is None and calls else _text(item, content, parts)
    message: Message = {"role": "assistant", "content": text}
    thoughts = ["".join(parts)]
    for key in REASONING:
        value = item.take(key)
        if value is not None and not isinstance(value, str):
            raise BadRowError(f"{item.where}: {key} is {describe_type(value)}, not text")
        thoughts += [value] if value is not None else []
    add_reasoning(message, thoughts, item.where)
    if calls:
        message["tool_calls"] = calls
    return message


def add_reasoning(message: Message, thoughts: list[str], where: str) -> None:
    """Set the reasoning of an answer.

    Args:
        message: the answer.
        thoughts: the reasoning under each name that the row has for it; blank ones do not count.
        where: the answer, for the reason why the row is refused.

    Raises:
        BadRowError: the row has two reasonings that differ.
    """
    found = {thought for thought in thoughts if not is_blank(thought)}
    if len(found) > 1:
        raise BadRowError(
            f"{where} has two reasonings that differ: keep one of {', '.join(REASONING)}"
        )
    if found:
        message["reasoning"] = found.pop()


def _call_turn(item: _Item, content: Any) -> Message:
    thought = ""
    if isinstance(content, str):
        thought, content = split_call_text(content)
    if not has_value(content):
        raise BadRowError(f"{item.where} has no content: it should be a tool call as JSON")
    calls = read_calls(content, item.where, f"{item.name}.value", item.reading)
    return {"role": "assistant", "content": thought, "tool_calls": calls, JOINS: True}


def _tool_messages(item: _Item, content: Any) -> list[Message]:
    parts = as_list(content)
    are_parts = bool(parts) and all(
        isinstance(part, dict) and "type" in part for part in parts or []
    )
    if isinstance(content, dict) or (parts is not None and not are_parts):
        texts = [response_text(content, item.where, item.reading)]
    else:
        texts = split_responses(_text(item, content))
    message: Message = {"role": "tool"}
    for key in ("tool_call_id", "name"):
        value = item.take(key)
        if value is not None:
            message[key] = str(value)
    if len(texts) > 1 and "tool_call_id" in message:
        raise BadRowError(f"{item.where} answers one call with {len(texts)} tool responses")
    return [{**message, "content": text} for text in texts]


def _is_excluded(item: _Item, *, is_answer: bool) -> bool:
    """Return whether the row excludes a message from the loss."""
    is_excluded = False
    for key in (*_LEARNT, *_MASKED):
        value = item.values.get(key)
        if value is None:
            continue
        item.used.add(key)
        flag = _flag(value)
        if is_answer and flag is None:
            raise BadRowError(
                f"{item.where} has the {key} {value!r}: an answer is learnt (1 or true) or "
                "excluded (0 or false). For another meaning, name "
                f"{item.reading.source_name(f'{item.name}.{key}')} in prepare.ignore_columns"
            )
        is_learnt = flag if key in _LEARNT else not flag
        is_excluded |= is_answer and not is_learnt
        if not is_answer and (flag is None or is_learnt):
            # Only answers are learnt, so 0 is honoured, but 1 is not.
            item.reading.leave(f"{item.name}.{key}", "not an answer")
    return is_excluded


def _flag(value: Any) -> bool | None:
    if isinstance(value, str):
        return _TRUTH.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None
