"""What rows look like in each format, and how they become conversations, preferences or texts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tuneline.artifacts import Method
from tuneline.errors import DataError
from tuneline.prepare.templates import ALPACA_INPUT

Message = dict[str, str]

# The columns that tell a format, in the order in which they are looked for.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
_OPTIONAL = {
    "preference": ("prompt", "system"),
    "messages": ("system",),
    "sharegpt": ("system",),
    "alpaca": ("input", "system"),
    "prompt-completion": ("system",),
    "text": (),
}
_METHOD_OF: dict[str, Method] = {
    format: {"preference": "dpo", "text": "cpt"}.get(format, "sft")  # type: ignore[misc]
    for format in _REQUIRED
}
_ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}


class BadRowError(ValueError):
    """A row cannot be used; the message says why, without the place."""


@dataclass(frozen=True)
class Example:
    """A checked row: exactly one of `messages`, `preference` and `text` is set."""

    messages: list[Message] | None = None
    """A conversation with at least one answer; the last message is one."""
    preference: tuple[list[Message], str, str] | None = None
    """Messages up to the question, the chosen answer, the rejected answer."""
    text: str | None = None
    choices: list[str] | None = None
    """Answers to choose from, the right one among them."""


def detect(values: dict[str, Any], method: Method) -> str:
    """Name the format of the first row.

    Raises:
        DataError: its columns are those of no format that the method can use.
    """
    fitting = [name for name, columns in _REQUIRED.items() if all(c in values for c in columns)]
    for name in fitting:
        if _METHOD_OF[name] == method:
            return name
    columns = ", ".join(map(str, values)) or "none"
    if fitting:
        raise DataError(
            f"the rows look like format {fitting[0]} (columns {columns}), which is for method "
            f"{_METHOD_OF[fitting[0]]}, and prepare.method is {method}: set the one that is meant"
        )
    raise DataError(
        f"the columns ({columns}) are those of no known format for method {method}: "
        + "; ".join(
            f"{name} has {', '.join(columns)}"
            for name, columns in _REQUIRED.items()
            if _METHOD_OF[name] == method
        )
        + ". Map them with prepare.columns, e.g. {prompt: question, completion: answer}"
    )


def check_names(format: str, columns: dict[str, str], method: Method) -> None:
    """Check a format that was named, and a column map.

    Raises:
        DataError: the format is not for the method, or the map has a key that is no column here.
    """
    if format != "auto" and _METHOD_OF[format] != method:
        raise DataError(
            f"format {format} is for method {_METHOD_OF[format]}, and prepare.method is {method}: "
            "set the one that is meant"
        )
    formats = _REQUIRED if format == "auto" else [format]
    known = {name for one in formats for name in (*_REQUIRED[one], *_OPTIONAL[one])} | {"choices"}
    for name in columns:
        if name not in known:
            raise DataError(
                f"prepare.columns maps '{name}', which is no column of ours: known are "
                f"{', '.join(sorted(known))} (ours: the source's)"
            )


def rename(values: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return the row under our column names; a mapped column that is absent stays absent."""
    if not columns:
        return values
    taken = set(columns.values())
    renamed = {name: value for name, value in values.items() if name not in taken}
    for ours, theirs in columns.items():
        renamed.pop(ours, None)
        if theirs in values:
            renamed[ours] = values[theirs]
    return renamed


def convert(
    values: dict[str, Any], format: str, *, system_prompt: str | None, alpaca_wording: bool
) -> Example:
    """Check one row and turn it into an `Example`.

    Args:
        values: the row under our column names.
        format: one of the formats above.
        system_prompt: a system message for rows without one; "" for an empty one.
        alpaca_wording: keep instruction and input apart in the words of the alpaca template.

    Raises:
        BadRowError: the row cannot be used.
    """
    if format == "text":
        return Example(text=_text(values, "text"))
    system = values.get("system")
    if system is not None and not isinstance(system, str):
        raise BadRowError(f"system is {_kind(system)}, not text")
    system = system or system_prompt
    if format == "preference":
        prompt, chosen, rejected = _preference(values)
        if chosen == rejected:
            raise BadRowError("chosen and rejected are the same")
        return Example(preference=(_with_system(prompt, system), chosen, rejected))
    messages = _with_system(_CONVERSATIONS[format](values, alpaca_wording), system)
    _check_conversation(messages)
    return Example(messages=messages, choices=_choices(values, messages[-1]["content"]))


def _alpaca(values: dict[str, Any], wording: bool) -> list[Message]:
    question = _text(values, "instruction")
    if values.get("input") not in (None, ""):
        extra = _string(values, "input")
        if extra.strip():
            question += (ALPACA_INPUT if wording else "\n\n") + extra
    return [_user(question), _assistant(_text(values, "output"))]


def _prompt_completion(values: dict[str, Any], wording: bool) -> list[Message]:
    prompt, completion = values.get("prompt"), values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return [*_turns(prompt, "prompt"), *_turns(completion, "completion")]
    return [_user(_text(values, "prompt")), _assistant(_text(values, "completion"))]


def _messages(values: dict[str, Any], wording: bool) -> list[Message]:
    return _turns(values.get("messages"), "messages")


def _sharegpt(values: dict[str, Any], wording: bool) -> list[Message]:
    return _turns(values.get("conversations"), "conversations")


_CONVERSATIONS: dict[str, Callable[[dict[str, Any], bool], list[Message]]] = {
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "messages": _messages,
    "sharegpt": _sharegpt,
}


def _preference(values: dict[str, Any]) -> tuple[list[Message], str, str]:
    prompt, chosen, rejected = (values.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        ours, theirs = _turns(chosen, "chosen"), _turns(rejected, "rejected")
        if ours[:-1] != theirs[:-1]:
            raise BadRowError("chosen and rejected differ before their last message")
        shared = ours[:-1]
        if isinstance(prompt, list):
            messages = _turns(prompt, "prompt")
            # Some data sets repeat the prompt in front of both answers.
            shared = shared if shared[: len(messages)] == messages else messages + shared
        elif isinstance(prompt, str) and not shared:
            shared = [_user(_text(values, "prompt"))]
        for name, turns in (("chosen", ours), ("rejected", theirs)):
            if turns[-1]["role"] != "assistant":
                raise BadRowError(f"{name} does not end with an answer")
        answers = ours[-1]["content"], theirs[-1]["content"]
    else:
        answers = _text(values, "chosen"), _text(values, "rejected")
        if isinstance(prompt, list):
            shared = _turns(prompt, "prompt")
        else:
            shared = [_user(_text(values, "prompt"))]
    if not shared or shared[-1]["role"] != "user":
        raise BadRowError("the prompt does not end with a user message")
    return shared, *answers


def _turns(value: Any, name: str) -> list[Message]:
    if value is None:
        raise BadRowError(f"{name} is missing")
    if not isinstance(value, list):
        raise BadRowError(f"{name} is {_kind(value)}, not a list of messages")
    if not value:
        raise BadRowError(f"{name} is empty")
    turns = []
    for number, turn in enumerate(value, 1):
        where = f"{name} {number}"
        if not isinstance(turn, dict):
            raise BadRowError(f"{where} is {_kind(turn)}, not a message")
        if turn.get("role") is None and "from" in turn:
            role, content = _SHAREGPT_ROLES.get(turn["from"]), turn.get("value")
            given, known = turn["from"], list(_SHAREGPT_ROLES)
        else:
            given, known = turn.get("role"), list(_ROLES)
            role, content = (given if given in _ROLES else None), turn.get("content")
        if role is None:
            raise BadRowError(f"{where} has the role {given!r}; known are {', '.join(known)}")
        if isinstance(content, list):
            content = _join_parts(content, where)
        if content is None:
            raise BadRowError(f"{where} ({role}) has no content")
        if not isinstance(content, str):
            raise BadRowError(f"{where} ({role}): its content is {_kind(content)}, not text")
        turns.append({"role": role, "content": content})
    return turns


def _join_parts(parts: list[Any], where: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise BadRowError(f"{where} has a part that is not text")
        texts.append(part["text"])
    return "".join(texts)


def _check_conversation(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise BadRowError("a system message stands behind the first message")
    if "user" not in roles:
        raise BadRowError("there is no user message")
    if roles[-1] != "assistant":
        raise BadRowError(f"the last message is from the {roles[-1]}: it has no answer")
    if roles.index("assistant") < roles.index("user"):
        raise BadRowError("an answer stands before the first user message")
    for message in messages:
        if message["role"] == "assistant":
            _check_text(message["content"], "the answer")
        elif message["role"] == "user" and not message["content"].strip():
            raise BadRowError("a user message is empty")
        else:
            _check_unicode(message["content"], f"the {message['role']} message")


def _choices(values: dict[str, Any], answer: str) -> list[str] | None:
    """Return the row's choices, where that column means what we mean by it."""
    choices = values.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        return None
    return choices if answer in choices else None


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _text(values: dict[str, Any], name: str) -> str:
    text = _string(values, name)
    _check_text(text, name)
    return text


def _string(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if value is None:
        raise BadRowError(f"{name} is missing")
    if not isinstance(value, str):
        raise BadRowError(f"{name} is {_kind(value)}, not text")
    return value


def _check_text(text: str, name: str) -> None:
    if not text.strip():
        raise BadRowError(f"{name} is empty")
    if not any(character.isalnum() for character in text):
        raise BadRowError(f"{name} has no letter and no digit ({text.strip()[:20]!r})")
    _check_unicode(text, name)


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(f"{name} has half of a surrogate pair, which is no text") from None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text"}
    return kinds.get(type(value)) or ("a list" if isinstance(value, list) else "an object")


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
