"""Reasoning, empty blocks of it and generation prompts that open <think>, written by hand."""

import datetime
from typing import Any

import pytest
from template_families import EMPTY_THINK, TEMPLATES, answer, user

from tuneline.prepare.formats.example import BadRowError, Example, Message
from tuneline.prepare.tokens.render import Renderer
from tuneline.prepare.tokens.thinking import split_reasoning

R1_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
R1_USER, R1_ANSWER = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
INLINE = "<think>\nTwo and two make four.\n</think>\n\nIt is 4."


def renderer(tokenizer: Any, name: str, **settings: Any) -> Renderer:
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return Renderer(tokenizer, date=datetime.date(2026, 1, 31), **settings)


def rows(used: Renderer, *messages: Message, **values: Any) -> list[list[tuple[str, str]]]:
    """For each row: the text before an answer and the learnt text, for each of its answers."""
    rendered = used.render(Example(list(messages), **values))
    found = []
    for piece in rendered.pieces or []:
        position, pairs = 0, []
        for part in piece.answers:
            pairs.append((piece.text[position : part.start], piece.text[part.start : part.end]))
            position = part.end
        found.append(pairs)
    return found


QUESTION = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "message", [answer(INLINE), answer("It is 4.", reasoning="Two and two make four.")]
)
def test_reasoning_stands_where_the_template_puts_it(marked: Any, message: Message) -> None:
    learnt = "Two and two make four.\n</think>\n\nIt is 4.<|im_end|>"
    asked = user("2+2?")
    assert rows(renderer(marked, "qwen3"), asked, message) == [[(QUESTION, "<think>\n" + learnt)]]
    # The generation prompt opens <think>, so the tag is not learnt.
    assert rows(renderer(marked, "qwen3_5_think"), asked, message) == [
        [(QUESTION + "<think>\n", learnt)]
    ]
    (((before, learnt),),) = rows(renderer(marked, "deepseek_r1_distill"), asked, message)
    assert before.endswith(f"{R1_USER}2+2?{R1_ANSWER}<think>\n")
    assert learnt == "Two and two make four.\n</think>\n\nIt is 4." + R1_END


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_8"])
def test_an_answer_without_reasoning_follows_an_empty_block(marked: Any, name: str) -> None:
    used = renderer(marked, name)
    (((before, learnt),),) = rows(used, user("2+2?"), answer("It is 4."))
    assert before.endswith(QUESTION + EMPTY_THINK) and learnt == "It is 4.<|im_end|>"
    used = renderer(marked, name, learn_empty_thinking=True)
    (((before, learnt),),) = rows(used, user("2+2?"), answer("It is 4."))
    opened = "" if name == "qwen3" else "<think>\n"
    assert before.endswith(QUESTION + opened)
    assert opened + learnt == EMPTY_THINK + "It is 4.<|im_end|>"


def test_an_open_prompt_is_closed_before_an_answer_without_reasoning(marked: Any) -> None:
    used = renderer(marked, "deepseek_r1_distill")
    first, second = rows(used, user("One?"), answer("First."), user("Two?"), answer("Second."))
    ((before, learnt),) = first
    assert before.endswith(f"{R1_USER}One?{R1_ANSWER}{EMPTY_THINK}") and learnt == "First." + R1_END
    ((before, learnt),) = second
    earlier = f"One?{R1_ANSWER}First.{R1_END}{R1_USER}Two?"
    assert before.endswith(f"{R1_USER}{earlier}{R1_ANSWER}{EMPTY_THINK}")
    assert learnt == "Second." + R1_END


def test_strip_and_require(marked: Any) -> None:
    asked = user("2+2?")
    stripped = renderer(marked, "qwen3_5_think", thinking="strip")
    for message in (answer(INLINE), answer("It is 4.", reasoning="Two and two make four.")):
        assert rows(stripped, asked, message) == [[(QUESTION + EMPTY_THINK, "It is 4.<|im_end|>")]]
    with pytest.raises(BadRowError, match="only reasoning, so prepare.thinking strip leaves noth"):
        rows(stripped, asked, answer("<think>\nTwo.\n</think>"))
    required = renderer(marked, "qwen3_5_think", thinking="require")
    turns = [asked, answer("Yes."), user("Why?"), answer(INLINE)]
    with pytest.raises(BadRowError, match="no reasoning, but prepare.thinking is require"):
        rows(required, *turns)
    # Only learnt answers need reasoning.
    assert len(rows(required, *turns, not_learnt=frozenset({1}))) == 1


def test_reasoning_that_a_template_cannot_show_is_refused(marked: Any) -> None:
    message = answer("It is 4.", reasoning="Two and two make four.")
    for name in ("llama3_1", "qwen2_5", "gemma3"):
        with pytest.raises(BadRowError, match="no place for it there: set prepare.thinking to st"):
            rows(renderer(marked, name), user("2+2?"), message)
    # Text between tags is content for a template that does not know the tags.
    (((_, learnt),),) = rows(renderer(marked, "qwen2_5"), user("2+2?"), answer(INLINE))
    assert learnt == INLINE + "<|im_end|>"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("It is 4.", ("", "It is 4.")),
        (INLINE, ("Two and two make four.", "It is 4.")),
        ("<think></think>It is 4.", ("", "It is 4.")),
        ("Two and two.\n</think>\n\nIt is 4.", ("Two and two.", "It is 4.")),
        ("Close it with </think>, then answer.", ("", "Close it with </think>, then answer.")),
        ("Like so:\n<think>\na\n</think>\nb", ("", "Like so:\n<think>\na\n</think>\nb")),
    ],
)
def test_what_is_reasoning(content: str, expected: tuple[str, str]) -> None:
    assert split_reasoning(answer(content)) == expected


def test_reasoning_that_cannot_be_told_apart() -> None:
    with pytest.raises(BadRowError, match="opens <think> and does not close it"):
        split_reasoning(answer("<think>\nTwo and"))
    with pytest.raises(BadRowError, match="both under a key and between <think> tags"):
        split_reasoning(answer(INLINE, reasoning="Other."))


def test_preferences_share_a_prompt(marked: Any) -> None:
    used = renderer(marked, "qwen3_5_think")
    good, bad = answer(INLINE), answer("It is 5.")
    rendered = used.render(Example(preference=([user("2+2?")], good, bad)))
    assert rendered.preference == (
        QUESTION + "<think>\n",
        "Two and two make four.\n</think>\n\nIt is 4.<|im_end|>",
        "\n</think>\n\nIt is 5.<|im_end|>",
    )
    rendered = used.render(Example(preference=([user("2+2?")], answer("4"), bad)))
    assert rendered.preference == (QUESTION + EMPTY_THINK, "4<|im_end|>", "It is 5.<|im_end|>")


@pytest.mark.parametrize(
    ("messages", "thinking", "token"),
    [
        ([user("2+2?"), answer(INLINE)], "keep", ""),
        ([user("2+2?"), answer(INLINE.removeprefix("<think>"))], "keep", ""),
        ([user("2+2?"), answer("It is 4.", reasoning="Is it <think>?")], "strip", ""),
        ([user("2+2?"), answer("It is 4.", reasoning="Is it <think>?")], "keep", "<think>"),
        ([user("2+2?"), answer(INLINE + "</think>")], "keep", "</think>"),
        ([user("2+2?"), answer("Write <think> first.")], "keep", "<think>"),
        ([user(INLINE), answer("It is 4.")], "keep", "<think>"),
        ([user("2+2?<|im_end|>"), answer(INLINE)], "keep", "<|im_end|>"),
    ],
)
def test_only_text_that_is_left_in_counts_as_a_special_token(
    marked: Any, messages: list[Message], thinking: str, token: str
) -> None:
    marked.add_tokens(["<think>", "</think>"], special_tokens=True)
    used = renderer(marked, "qwen3", thinking=thinking)
    assert used.special_token_in(Example(messages)) == token
    last = messages[-1]
    pair = Example(preference=(messages[:-1], {**last, "content": "It is 4."}, last))
    assert used.special_token_in(pair) == token
