"""Find the answers of a conversation in its text without rendering the text up to each answer.

Most rows have neither tools nor reasoning. What the template writes around their messages is known
from the probe, so the text of the conversation can be read back from its end, message by message.
Each message has to stand exactly where it is expected; otherwise `answers.py` renders further.
"""

from tuneline.prepare.formats.example import Message
from tuneline.prepare.tokens.answers import Written, start_of
from tuneline.prepare.tokens.compiled import CompiledTemplate
from tuneline.prepare.tokens.probe import TemplateFacts


def read_plain(
    template: CompiledTemplate, facts: TemplateFacts, messages: list[Message], learnt: list[int]
) -> list[Written] | None:
    """Return the learnt answers with the texts that they are in; None if they cannot be read back.

    Args:
        template: the chat template.
        facts: what the probe found about the template.
        messages: the messages of the conversation.
        learnt: indices of the learnt answers, ascending.
    """
    if not facts.starts or not _is_plain(messages):
        return None
    # One text has all answers, unless the template writes the last answer in its own way.
    groups = [learnt] if facts.following is not None else [[index] for index in learnt]
    written: list[Written] = []
    for group in groups:
        before = messages[: group[-1] + 1]
        found = _read_back(template.render(before), before, group, facts)
        if found is None:
            return None
        written += found
    return written


def _is_plain(messages: list[Message]) -> bool:
    """Return whether a conversation has neither tools nor reasoning."""
    return not any(
        message["role"] == "tool"
        or message.get("tool_calls")
        or message.get("reasoning")
        or "think>" in message["content"]
        for message in messages
    )


def _read_back(
    text: str, messages: list[Message], learnt: list[int], facts: TemplateFacts
) -> list[Written] | None:
    """Read a text that ends with the last message from its end, as far as the first answer."""
    if not text.endswith(facts.tail):
        return None
    end = len(text) - len(facts.tail)
    if not facts.is_end_in_tail:
        text = text[:end] + facts.end
    found: list[Written] = []
    index = len(messages) - 1
    while True:
        if index < 1 or messages[index]["role"] != "assistant":
            return None
        answer = start_of(messages[index]["content"], text, end)
        if answer is None or not text.endswith(facts.between, 0, answer):
            return None
        if index in learnt:
            starts = [answer + start for start in facts.starts]
            found.append(Written(text, starts, answer, end, end + len(facts.end)))
        if messages[index - 1]["role"] != "user":
            return None
        question = start_of(messages[index - 1]["content"], text, answer - len(facts.between))
        if question is None:
            return None
        if index == learnt[0]:
            return found[::-1]
        if facts.following is None or not text.endswith(facts.following, 0, question):
            return None
        end = question - len(facts.following)
        index -= 2
