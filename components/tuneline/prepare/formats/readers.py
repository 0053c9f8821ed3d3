"""One reader function per row format; each checks a row and returns an `Example`."""

from dataclasses import dataclass
from typing import Any

from tuneline.prepare.formats.checks import (
    check_text,
    check_unicode,
    describe_type,
    read_string,
    read_text,
)
from tuneline.prepare.formats.conversation import (
    assistant,
    check_contents,
    check_conversation,
    read_messages,
    user,
    with_system,
)
from tuneline.prepare.formats.example import BadRowError, Example, Message

Row = dict[str, Any]


@dataclass(frozen=True)
class Wording:
    """Text that a recipe adds to the rows."""

    system_prompt: str | None = None
    """System message to add to rows that have none; "" adds an empty message, None adds none."""
    input_heading: str = "\n\n"
    """Text between the instruction and the input of the alpaca format."""


def read_alpaca(row: Row, wording: Wording) -> Example:
    """Read an instruction with an optional input, and its output."""
    system = _system(row, wording)
    question = read_text(row, "instruction")
    if row.get("input") not in (None, ""):
        extra = read_string(row, "input")
        if extra.strip():
            question += wording.input_heading + extra
    return _conversation(row, system, [user(question), assistant(read_text(row, "output"))])


def read_prompt_completion(row: Row, wording: Wording) -> Example:
    """Read a prompt and its completion: two texts, or two lists of messages."""
    system = _system(row, wording)
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        messages = [*read_messages(row, "prompt"), *read_messages(row, "completion")]
    else:
        messages = [user(read_text(row, "prompt")), assistant(read_text(row, "completion"))]
    return _conversation(row, system, messages)


def read_conversation(row: Row, wording: Wording) -> Example:
    """Read a list of messages under `messages`."""
    system = _system(row, wording)
    return _conversation(row, system, read_messages(row, "messages"))


def read_sharegpt(row: Row, wording: Wording) -> Example:
    """Read a list of messages under `conversations`."""
    system = _system(row, wording)
    return _conversation(row, system, read_messages(row, "conversations"))


def read_document(row: Row, wording: Wording) -> Example:
    """Read a text for continued pre-training."""
    return Example(text=read_text(row, "text"))


def read_preference(row: Row, wording: Wording) -> Example:
    """Read a prompt with a chosen and a rejected answer, as texts or as lists of messages."""
    system = _system(row, wording)
    if isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):
        prompt, chosen, rejected = _preferred_messages(row)
    else:
        chosen, rejected = read_string(row, "chosen"), read_string(row, "rejected")
        prompt = _prompt(row)
    check_text(chosen, "chosen")
    check_text(rejected, "rejected")
    if not prompt or prompt[-1]["role"] != "user":
        raise BadRowError("the prompt does not end with a user message")
    check_text(prompt[-1]["content"], "prompt")
    if chosen == rejected:
        raise BadRowError("chosen and rejected are the same")
    prompt = with_system(prompt, system)
    check_contents(prompt)
    return Example(preference=(prompt, assistant(chosen), assistant(rejected)))


def _preferred_messages(row: Row) -> tuple[list[Message], str, str]:
    chosen, rejected = read_messages(row, "chosen"), read_messages(row, "rejected")
    shared = chosen[:-1]
    if shared != rejected[:-1]:
        raise BadRowError("chosen and rejected differ before their last message")
    if isinstance(row.get("prompt"), list):
        prompt = read_messages(row, "prompt")
        # In some datasets, both answers begin with the messages of the prompt.
        shared = shared if shared[: len(prompt)] == prompt else prompt + shared
    elif isinstance(row.get("prompt"), str) and not shared:
        shared = _prompt(row)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise BadRowError(f"{name} does not end with an answer")
    return shared, chosen[-1]["content"], rejected[-1]["content"]


def _prompt(row: Row) -> list[Message]:
    if isinstance(row.get("prompt"), list):
        return read_messages(row, "prompt")
    return [user(read_string(row, "prompt"))]


def _system(row: Row, wording: Wording) -> str | None:
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise BadRowError(f"system is {describe_type(system)}, not text")
    return system or wording.system_prompt


def _conversation(row: Row, system: str | None, messages: list[Message]) -> Example:
    messages = with_system(messages, system)
    check_conversation(messages)
    return Example(messages=messages, choices=_choices(row, messages[-1]["content"]))


def _choices(row: Row, answer: str) -> list[str] | None:
    """Return the column `choices` if it lists answers; some datasets use that name differently."""
    choices = row.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        return None
    if answer not in choices:
        return None
    for choice in choices:
        check_unicode(choice, "a choice")
    return choices
