"""Find out how a chat template writes answers, reasoning and tool calls, by rendering sentinels.

A sentinel is a word that no template contains. What stands around a sentinel in the rendered text
is what the template adds. All rows rely on these facts, so no fact depends on the data.
"""

import datetime
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Literal

from tuneline.errors import DataError
from tuneline.prepare.formats.example import BadRowError
from tuneline.prepare.formats.reading import REASONING
from tuneline.prepare.tokens.compiled import CompiledTemplate
from tuneline.prepare.tokens.probe_tools import ToolFacts, probe_tools

logger = logging.getLogger(__name__)

MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
"""A marker of a template, such as <|im_end|>, </s> or [/INST]."""
OPEN_THINK = re.compile(r"<think>\s*\Z")
"""The end of a generation prompt that opens the model's reasoning."""
_PART_OF_MARKER = re.compile(r"[<\[][^<>\[\]\s]*\Z")

ReasoningStyle = Literal["key", "inline", "opened", "verbatim", "dropped"]
"""How reasoning reaches the text of an answer.

key       the template writes the reasoning of a key of the message, e.g. reasoning_content
inline    the template knows the tag </think> in the content and keeps the reasoning of the last
          answer
opened    the template removes reasoning from every answer, but a generation prompt opens <think>
verbatim  the template knows no reasoning and writes the content as it is
dropped   the template removes reasoning from every answer
"""

_VARIANTS: tuple[dict[str, Any], ...] = (
    {"enable_thinking": True},
    {"enable_thinking": False},
    {"thinking": True},
    {"thinking": False},
)
_QUESTION, _NEXT = "tunelinequestionone", "tunelinequestiontwo"
_ANSWER, _LAST = "tunelineansweralpha", "tunelineansweromega"
_REASON, _SYSTEM = "tunelinereasonalpha", "tunelinesystemalpha"


@dataclass(frozen=True)
class TemplateFacts:
    """What the probe of a chat template found."""

    between: str
    """Text between a question and its answer, if the answer is the last one."""
    following: str | None
    """Text between an answer and the next question; None if the template writes an earlier answer
    differently from the last one."""
    starts: tuple[int, ...]
    """Where the learnt part of an answer without reasoning may begin, relative to its content, as
    in `Written.starts`; empty if a finished turn begins with none of the generation prompts."""
    tail: str
    """Text after the content of the last answer of a conversation."""
    end: str
    """Text that ends an answer wherever it stands in a conversation, without the white space after
    it; the model learns to write this text, and generation stops there."""
    is_end_in_tail: bool
    """Whether `tail` begins with `end`. Otherwise the template marks an answer's end only by the
    beginning of the next message, and `end` has to replace `tail`."""
    prompt_endings: tuple[tuple[str, str], ...]
    """Other generation prompts of the template, with and without reasoning: (end of the default
    generation prompt, text in place of that end)."""
    reasoning: ReasoningStyle
    lead: str
    """Text between the longest generation prompt and the content of an answer without reasoning."""
    empty_reasoning: str
    """The lead if it is an empty block of reasoning, otherwise ""."""
    around_reasoning: tuple[str, str] | None
    """Texts before and after the reasoning of an answer, up to its content; None if the template
    writes no reasoning."""
    shows_system: bool
    """Whether a system message reaches the text."""
    tools: ToolFacts


def compile_template(
    tokenizer: Any, text: str, date: datetime.date | None
) -> tuple[CompiledTemplate, TemplateFacts]:
    """Compile and probe a template that reads a content as text or as a list of parts.

    Raises:
        DataError: the template is not valid, or cannot render a question with an answer.
    """
    try:
        template = CompiledTemplate(tokenizer, text, date, content_in_parts=False)
        return template, probe(template, tokenizer.eos_token)
    except DataError as error:
        try:
            template = CompiledTemplate(tokenizer, text, date, content_in_parts=True)
            return template, probe(template, tokenizer.eos_token)
        except DataError:
            raise error from None


def probe(template: CompiledTemplate, eos_token: str | None) -> TemplateFacts:
    """Probe a template.

    Args:
        template: the template.
        eos_token: the tokenizer's end-of-sequence token, which ends answers if the template
            writes nothing after them.

    Raises:
        DataError: the template cannot render a question with an answer.
    """
    between, tail, following, is_stable = _around_answers(template)
    end, is_end_in_tail = _end_of_turn(tail, following, eos_token)
    default = template.render([_user(_QUESTION)], prompt=True)
    endings = _prompt_endings(template, default)
    plain = template.render([_user(_QUESTION), _assistant(_ANSWER)])
    starts, lead = _starts(plain, prompts(default, endings))
    style, with_reasoning = _reasoning(template, default, endings)
    around = None
    if with_reasoning:
        before, _, after = _starts(with_reasoning, prompts(default, endings))[1].partition(_REASON)
        around = before, after
    empty = lead if around and _squeeze(before + after) == _squeeze(lead) else ""
    return TemplateFacts(
        between=between,
        following=following if is_stable and following.startswith(end) else None,
        starts=(*starts, 0) if empty and starts else starts,
        tail=tail,
        end=end,
        is_end_in_tail=is_end_in_tail,
        prompt_endings=endings,
        reasoning=style,
        lead=lead,
        empty_reasoning=empty,
        around_reasoning=around,
        shows_system=_shows_system(template),
        tools=probe_tools(template),
    )


def prompts(default: str, endings: tuple[tuple[str, str], ...]) -> list[str]:
    """Return the default generation prompt and its variants."""
    found = [default]
    for ending, other in endings:
        if default.endswith(ending):
            found.append(default[: len(default) - len(ending)] + other)
    return found


def _user(content: str) -> Mapping[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str, **keys: Any) -> Mapping[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def _around_answers(template: CompiledTemplate) -> tuple[str, str, str, bool]:
    """Return the texts before the last answer, after it, and between an answer and a question.

    The last value is whether an earlier answer is written as the last one is.
    """
    turn = [_user(_QUESTION), _assistant(_ANSWER)]
    try:
        short = template.render(turn)
        template.render([_user(_QUESTION)], prompt=True)
    except BadRowError as error:
        raise DataError(
            f"the chat template cannot write a question with an answer ({error}): set "
            "prepare.template to another template"
        ) from None
    if not -1 < short.rfind(_QUESTION) < short.rfind(_ANSWER):
        raise DataError(
            "the chat template leaves the question or the answer out: set prepare.template to "
            "another template"
        )
    between = _between(short, _QUESTION, _ANSWER)
    tail = short[short.rindex(_ANSWER) + len(_ANSWER) :]
    long = template.attempt([*turn, _user(_NEXT), _assistant(_LAST)])
    if not all(long.count(word) == 1 for word in (_QUESTION, _ANSWER, _NEXT, _LAST)):
        return between, tail, tail, False
    is_stable = (
        _between(long, _QUESTION, _ANSWER) == _between(long, _NEXT, _LAST) == between
        and long[long.index(_LAST) + len(_LAST) :] == tail
    )
    return between, tail, _between(long, _ANSWER, _NEXT), is_stable


def _between(text: str, first: str, second: str) -> str:
    return text[text.rindex(first) + len(first) : text.rindex(second)]


def _end_of_turn(tail: str, following: str, eos_token: str | None) -> tuple[str, bool]:
    """Return what ends an answer, and whether the template writes it after the last answer."""
    if not tail.strip():
        # The model ends its turn with the marker of the next one, as GLM does.
        marker = MARKER.match(following.lstrip())
        if marker is not None:
            lead = len(following) - len(following.lstrip())
            return following[: lead + marker.end()], False
        if eos_token is None:
            logger.warning(
                "the chat template writes nothing after an answer and the tokenizer has no "
                "end-of-sequence token, so the model does not learn where an answer ends"
            )
            return "", True
        logger.warning(
            "the chat template writes nothing after an answer, so %r is learnt as its end",
            eos_token,
        )
        return eos_token, False
    shared = commonprefix([tail, following])
    if shared not in (tail, following):
        shared = _PART_OF_MARKER.sub("", shared)
    # Without a common beginning, the last answer ends as a generation ends, e.g. <|return|>.
    return shared.rstrip() or tail.rstrip(), True


def _prompt_endings(template: CompiledTemplate, default: str) -> tuple[tuple[str, str], ...]:
    endings: list[tuple[str, str]] = []
    for variables in _VARIANTS:
        try:
            other = template.render([_user(_QUESTION)], prompt=True, **variables)
        except BadRowError:
            continue
        shared = len(commonprefix([default, other]))
        ending = (default[shared:], other[shared:])
        # Only the end may differ: a template may also change the system message.
        if other != default and _QUESTION in default[:shared] and ending not in endings:
            endings.append(ending)
    return tuple(endings)


def _reasoning(
    template: CompiledTemplate, default: str, endings: tuple[tuple[str, str], ...]
) -> tuple[ReasoningStyle, str]:
    """Return the style, and the text of an answer with reasoning ("" if there is none)."""
    keys = dict.fromkeys(REASONING, _REASON)
    text = template.attempt([_user(_QUESTION), _assistant(_ANSWER, **keys)])
    if text.count(_REASON) == 1 and text.index(_REASON) < text.rfind(_ANSWER):
        return "key", text
    content = f"<think>\n{_REASON}\n</think>\n\n{_ANSWER}"
    text = template.attempt([_user(_QUESTION), _assistant(content)])
    if _REASON in text:
        return ("inline", text) if "</think>" in template.text else ("verbatim", "")
    if any(OPEN_THINK.search(prompt) for prompt in prompts(default, endings)):
        return "opened", ""
    return "dropped", ""


def _starts(text: str, candidates: list[str]) -> tuple[tuple[int, ...], str]:
    """Return the ends of the prompts that a text begins with, relative to its content, ascending.

    The second value is the text between the last of them and the content.
    """
    content = text.rindex(_ANSWER)
    ends = {len(prompt) for prompt in candidates if text.startswith(prompt)}
    starts = tuple(sorted(end - content for end in ends if end <= content))
    return starts, text[content + starts[-1] : content] if starts else ""


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _shows_system(template: CompiledTemplate) -> bool:
    messages = [{"role": "system", "content": _SYSTEM}, _user(_QUESTION)]
    try:
        return _SYSTEM in template.render(messages, prompt=True)
    except BadRowError:
        return True  # The template says itself why it refuses the row.
