"""Write one answer with a chat template, and find by position what of the text is learnt.

The template is rendered twice: up to the generation prompt, which the model sees at inference, and
with the answer. The text that the second rendering adds is the answer with its end. No position is
found by searching for the answer's text, because an answer such as "e" also occurs inside the end
mark <|eot_id|>.
"""

import re
from dataclasses import dataclass
from typing import Any

from tuneline.prepare.formats.example import BadRowError, Message
from tuneline.prepare.formats.reading import REASONING
from tuneline.prepare.tokens.compiled import CompiledTemplate
from tuneline.prepare.tokens.probe import (
    MARKER,
    OPEN_THINK,
    TemplateFacts,
    prompts,
)
from tuneline.prepare.tokens.thinking import split_reasoning
from tuneline.prepare.tokens.tools import check_calls

_CLOSED_THINK = re.compile(r"\s*</think>\s*")
_LAST_MARKER = re.compile(rf"(?:{MARKER.pattern})\Z")


@dataclass(frozen=True)
class Written:
    """A text that ends with an answer, and positions in it, in characters."""

    text: str
    starts: list[int]
    """Where the learnt part may begin, ascending: the ends of all generation prompts that the text
    begins with. From the last of them on, no empty block of reasoning is learnt."""
    content_start: int
    """Index of the first character of the content; without content, where it would be."""
    content_end: int
    """Index after the last character of the answer, before its end mark."""
    end: int
    """Index after the end mark, before the white space that the template puts after it."""


def shape(message: Message, facts: TemplateFacts) -> Message:
    """Return a message with its reasoning where the template reads it."""
    if message["role"] != "assistant":
        return message
    if facts.reasoning in ("inline", "verbatim") and not message.get("reasoning"):
        split_reasoning(message)  # Refuses reasoning that never ends.
        return message
    reasoning, content = split_reasoning(message)
    shaped = {key: value for key, value in message.items() if key != "reasoning"}
    shaped["content"] = content
    if not reasoning.strip():
        return shaped
    if facts.reasoning == "inline":
        return {**shaped, "content": f"<think>\n{reasoning.strip()}\n</think>\n\n{content}"}
    if facts.reasoning == "opened":
        return {**shaped, "reasoning": reasoning.strip()}
    return {**shaped, **dict.fromkeys(REASONING, reasoning)}


def write_answer(
    template: CompiledTemplate,
    facts: TemplateFacts,
    before: list[Message],
    message: Message,
    tools: list[dict[str, Any]] | None,
) -> Written:
    """Return the text that ends with an answer to `before`.

    Args:
        template: the chat template.
        facts: what the probe found about the template.
        before: the messages before the answer, as `shape` returns them.
        message: the answer, as `shape` returns it.
        tools: definitions of tools.

    Raises:
        BadRowError: the template refuses, changes or leaves out a part of the answer.
    """
    candidates = prompts(template.render(before, tools, prompt=True), facts.prompt_endings)
    text = template.render([*before, message], tools)
    text, content_end, end = _find_end(text, message, facts)
    content_start = _find_content(text, message, content_end)
    starts = {
        len(prompt)
        for prompt in candidates
        if len(prompt) <= content_start and text.startswith(prompt)
    }
    reasoning = message.get("reasoning") or message.get(REASONING[0]) or ""
    if not starts or (reasoning and facts.reasoning == "opened"):
        written = Written(text, [], content_start, content_end, end)
        return _compose(written, candidates, reasoning, message, facts)
    if facts.empty_reasoning and text.startswith(facts.empty_reasoning, max(starts)):
        starts.add(max(starts) + len(facts.empty_reasoning))
    if reasoning and reasoning.strip() not in text[min(starts) : end]:
        raise _no_reasoning()
    return Written(text, sorted(starts), content_start, content_end, end)


def check_parts(message: Message, written: Written) -> None:
    """Refuse a row if the content or a call of an answer with calls is not in its text."""
    if message.get("tool_calls"):
        learnt = written.text[written.starts[0] : written.end]
        check_calls(message, learnt)
        # The template writes calls before or after the content, or the content as reasoning.
        if message["content"].strip() not in learnt:
            raise BadRowError("the chat template leaves out the text that stands beside a call")


def _find_end(text: str, message: Message, facts: TemplateFacts) -> tuple[str, int, int]:
    """Return the text with its end mark, the index of the end mark, and the index after it."""
    calls_tool = bool(message.get("tool_calls"))
    if text.endswith(facts.tail) and (facts.tail or not calls_tool):
        content_end = len(text) - len(facts.tail)
        if not facts.is_end_in_tail:
            text = text[:content_end] + facts.end
        return text, content_end, content_end + len(facts.end)
    if not calls_tool:
        raise BadRowError("the chat template does not end the answer as it ends other answers")
    if not facts.is_end_in_tail:
        text = text.rstrip()
        following = facts.tools.after_call
        marker = MARKER.match(following.lstrip())
        length = len(following) - len(following.lstrip()) + marker.end() if marker else 0
        return text + (following[:length] or facts.end), len(text), len(text) + length
    end = len(text.rstrip())
    marker = _LAST_MARKER.search(text, 0, end)
    return text, marker.start() if marker else end, end


def _find_content(text: str, message: Message, content_end: int) -> int:
    """Return where the content begins; a template may trim white space around the content."""
    if message.get("tool_calls"):
        return content_end  # `check_parts` looks for the content.
    start = start_of(message["content"], text, content_end)
    if start is None:
        raise BadRowError(
            "the chat template changes the text of an answer, e.g. because it contains </think>"
        )
    return start


def start_of(content: str, text: str, end: int) -> int | None:
    """Return where a content begins that ends at the index `end`, perhaps trimmed by a template."""
    if text.endswith(content, 0, end):
        return end - len(content)
    for form in (content.rstrip(), content.lstrip(), content.strip()):
        if text.endswith(form, 0, end):
            return end - len(form)
    return None


def _compose(
    written: Written,
    candidates: list[str],
    reasoning: str,
    message: Message,
    facts: TemplateFacts,
) -> Written:
    """Return the answer behind a generation prompt that the template's text does not begin with.

    Most such prompts end with an opening tag of reasoning, which the template leaves out of
    finished turns; an answer without reasoning closes the tag first. Other templates write an
    earlier turn differently once it is answered. At inference, the model sees the prompt.
    """
    text, closing = written.text, ""
    opening = _open_prompt(candidates, text)
    if opening is not None:
        prompt, tag = opening
        closing = "\n</think>\n\n" if tag.endswith("\n") else "</think>"
        turn = written.content_start
        if message.get("tool_calls"):
            base = len(prompt) - len(tag)
            closed = _CLOSED_THINK.match(text, base)
            turn = closed.end() if closed else base
    elif reasoning and (message.get("tool_calls") or facts.around_reasoning is None):
        raise _no_reasoning()
    elif message.get("tool_calls"):
        raise BadRowError("the chat template writes the messages before a call differently with it")
    else:
        prompt, lead = candidates[0], facts.lead
        if reasoning and facts.around_reasoning is not None:
            before, after = facts.around_reasoning
            lead = before + reasoning.strip() + after
        reasoning = ""
        if not text.endswith(lead, 0, written.content_start):
            raise _no_reasoning()
        turn = written.content_start - len(lead)
    composed = prompt + (reasoning + closing if opening else "") + text[turn:]
    moved = len(composed) - len(text)
    starts = [len(prompt)]
    if closing and not reasoning:
        starts.append(len(prompt) + len(closing))
    return Written(
        composed,
        starts,
        written.content_start + moved,
        written.content_end + moved,
        written.end + moved,
    )


def _open_prompt(candidates: list[str], text: str) -> tuple[str, str] | None:
    """Return the generation prompt that opens reasoning, and its opening tag."""
    for candidate in candidates:
        found = OPEN_THINK.search(candidate)
        if found is not None and text.startswith(candidate[: found.start()]):
            return candidate, found.group()
    return None


def _no_reasoning() -> BadRowError:
    return BadRowError(
        "an answer has reasoning, but the chat template has no place for it there: set "
        "prepare.thinking to strip, or use a model whose chat template writes reasoning"
    )
