"""A checked row, and the error for a row that cannot be used."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""A message of a conversation, in one form whatever the source's spelling:

role          system, user, assistant or tool
content       text; "" if an assistant's message only calls tools
reasoning     optional: the assistant's reasoning before its answer, without tags
tool_calls    optional, of an assistant: a list of {"id": text, "type": "function", "function":
              {"name": text, "arguments": object}}
tool_call_id  optional, of a tool: the call that the message answers
name          optional, of a tool: the tool's name
"""


class BadRowError(ValueError):
    """A row cannot be used. The error's message is the reason, without the row's file and line."""


@dataclass(frozen=True)
class Example:
    """A checked row; exactly one of `messages`, `preference`, `judged` and `text` is set."""

    messages: list[Message] | None = None
    """A conversation whose last message is an answer."""
    not_learnt: frozenset[int] = frozenset()
    """Indices of the assistant's messages that the row excludes from the loss."""
    tools: list[dict[str, Any]] | None = None
    """Definitions of the tools that the conversation may call: {"type": "function", "function":
    {"name", "description", "parameters"}}."""
    preference: tuple[list[Message], Message, Message] | None = None
    """The messages up to the question, the chosen answer and the rejected answer."""
    judged: tuple[list[Message], Message, bool] | None = None
    """The messages up to the question, the answer, and whether the answer is desirable."""
    text: str | None = None
    """A document for continued pre-training."""
    choices: list[str] | None = None
    """All answers of a multiple-choice question, including the correct one."""
