"""A checked row, and the error for a row that cannot be used."""

from dataclasses import dataclass

Message = dict[str, str]
"""A message of a conversation, with the keys `role` and `content`."""


class BadRowError(ValueError):
    """A row cannot be used. The error's message is the reason, without the row's file and line."""


@dataclass(frozen=True)
class Example:
    """A checked row; exactly one of `messages`, `preference` and `text` is set."""

    messages: list[Message] | None = None
    """A conversation whose last message is an answer."""
    preference: tuple[list[Message], str, str] | None = None
    """The messages up to the question, the chosen answer and the rejected answer."""
    text: str | None = None
    """A document for continued pre-training."""
    choices: list[str] | None = None
    """All answers of a multiple-choice question, including the correct one."""
