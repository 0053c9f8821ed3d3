"""Readers of rows that compare or judge answers."""

from tuneline.prepare.formats import tools
from tuneline.prepare.formats.checks import check_text, has_value, read_string, read_text
from tuneline.prepare.formats.conversation import (
    assistant,
    check_contents,
    find_messages,
    read_messages,
    take_excluded,
    user,
)
from tuneline.prepare.formats.example import BadRowError, Example, Message
from tuneline.prepare.formats.readers import read_history, read_instruction, read_system
from tuneline.prepare.formats.reading import Reading, Row

PROMPTS = ("prompt", "messages", "conversations", "instruction")
"""Columns that can have the prompt of two answers; the first one with a value is used."""


def read_preference(row: Row, reading: Reading) -> Example:
    """Read a prompt with a chosen and a rejected answer, as texts, messages or lists of messages.

    Lists may begin with the messages of the prompt.
    """
    if all(find_messages(row.get(name)) is not None for name in ("chosen", "rejected")):
        chosen = read_messages(row, "chosen", reading)
        rejected = read_messages(row, "rejected", reading)
    else:
        chosen = [assistant(read_string(row, "chosen"))]
        rejected = [assistant(read_string(row, "rejected"))]
    if chosen[:-1] != rejected[:-1]:
        raise BadRowError("chosen and rejected differ before their last message")
    prompt = _prompt(row, chosen[:-1], reading)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise BadRowError(f"{name} does not end with an answer")
        if "tool_calls" not in messages[-1]:
            check_text(messages[-1]["content"], name)
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise BadRowError("the prompt does not end with a user message")
    if prompt[-1]["role"] == "user":
        check_text(prompt[-1]["content"], "prompt")
    if take_excluded([*prompt, chosen[-1], rejected[-1]]):
        reading.leave("weights of messages", "method dpo compares whole answers")
    if chosen[-1] == rejected[-1]:
        raise BadRowError("chosen and rejected are the same")
    prompt = read_system(row, prompt, reading)
    check_contents([*prompt, chosen[-1]])
    check_contents([rejected[-1]])
    definitions = tools.read_tools(row, prompt, reading)
    return Example(preference=(prompt, chosen[-1], rejected[-1]), tools=definitions)


def _prompt(row: Row, shared: list[Message], reading: Reading) -> list[Message]:
    """Return the messages before the answers.

    Args:
        row: the row.
        shared: messages that both answers begin with; they may be all or part of the prompt.
        reading: receives the names of columns that are not used.
    """
    name = next((name for name in PROMPTS if has_value(row.get(name))), None)
    is_complete = any(message["role"] == "user" for message in shared)
    if name != "prompt" and is_complete:
        name = None
    if name is None:
        messages = shared
        if not shared:
            read_text(row, "prompt")
    elif name == "instruction":
        messages = [*shared, *read_history(row), user(read_instruction(row, reading))]
    elif name == "prompt" and isinstance(row[name], str) and find_messages(row[name]) is None:
        messages = shared if is_complete else [*shared, user(row[name])]
        if is_complete and row[name] not in (message["content"] for message in shared):
            reading.leave(name, "the answers begin with another prompt")
    else:
        given = read_messages(row, name, reading)
        # In some datasets, both answers begin with the messages of the prompt.
        messages = shared if shared[: len(given)] == given else [*given, *shared]
    used = {name, "input", "history"} if name == "instruction" else {name}
    for other in (*PROMPTS, "input", "history"):
        if other not in used and has_value(row.get(other)):
            reading.leave(other)
    return messages
