"""Find, keep and remove the reasoning of answers.

Reasoning reaches a row under a key of the message, or inline: between <think> and </think> in front
of the answer's content.
"""

import re
from typing import Literal

from tuneline.prepare.formats.example import BadRowError, Message

Thinking = Literal["keep", "strip", "require"]
"""Values of `prepare.thinking`."""

# Models whose generation prompt opens <think> write no opening tag themselves, so recorded answers
# may lack it. Then the closing tag has to begin a line, as a mention of the tag does not.
_INLINE = re.compile(
    r"\s*<think>(?P<reasoning>.*?)</think>\s*|(?P<bare>(?:(?!<think>).)*?)\n\s*</think>\s*",
    re.DOTALL,
)
_OPENING = re.compile(r"\s*<think>")


def split_reasoning(message: Message) -> tuple[str, str]:
    """Return the reasoning of an assistant's message, and its content without the reasoning.

    Raises:
        BadRowError: the reasoning never ends, or the message has reasoning in both places.
    """
    content, reasoning = message["content"], message.get("reasoning") or ""
    if "think>" not in content:
        return reasoning, content
    found = _INLINE.match(content)
    if found is None:
        if _OPENING.match(content):
            raise BadRowError(
                "an answer opens <think> and does not close it, so it was probably cut off"
            )
        return reasoning, content
    inline = found["bare"] if found["reasoning"] is None else found["reasoning"]
    if reasoning and inline.strip():
        raise BadRowError("an answer has reasoning both under a key and between <think> tags")
    return reasoning or inline.strip(), content[found.end() :]


def strip_reasoning(message: Message) -> Message:
    """Return an assistant's message without its reasoning.

    Raises:
        BadRowError: nothing but reasoning is in the message.
    """
    reasoning, content = split_reasoning(message)
    kept = {key: value for key, value in message.items() if key != "reasoning"}
    if reasoning and not content.strip() and not message.get("tool_calls"):
        raise BadRowError("an answer is only reasoning, so prepare.thinking strip leaves nothing")
    return {**kept, "content": content}


def require_reasoning(messages: list[Message], learnt: list[int]) -> None:
    """Refuse a row in which a learnt answer has no reasoning."""
    for index in learnt:
        if not split_reasoning(messages[index])[0].strip():
            raise BadRowError(
                "an answer has no reasoning, but prepare.thinking is require: set it to keep, or "
                "leave such rows out"
            )
