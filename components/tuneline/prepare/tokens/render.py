"""Render checked rows as text with the chat template, and locate the answers in the text.

The template does not need a {% generation %} block, which would mark the answers but is missing in
most templates.
"""

import datetime
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tuneline.prepare.formats.example import BadRowError, Example, Message
from tuneline.prepare.tokens.answers import Written, check_parts, shape, write_answer
from tuneline.prepare.tokens.context import check_context
from tuneline.prepare.tokens.plain import read_plain
from tuneline.prepare.tokens.probe import compile_template
from tuneline.prepare.tokens.templates import read_templates
from tuneline.prepare.tokens.thinking import (
    Thinking,
    require_reasoning,
    split_reasoning,
    strip_reasoning,
)
from tuneline.prepare.tokens.tools import check_tools, shape_calls, shape_tools


@dataclass(frozen=True)
class Answer:
    """Position of an answer in a text, in characters."""

    start: int
    """Index of the answer's first character."""
    content_end: int
    """Index after the last character of the answer's content, before the end-of-turn token."""
    end: int
    """Index after the end-of-turn token, before the white space that the template puts after it."""


@dataclass(frozen=True)
class Piece:
    """A text to tokenise as one example, and the positions of the answers in it, in order."""

    text: str
    answers: list[Answer]


@dataclass(frozen=True)
class Rendered:
    """A row as text: `pieces` for sft, `preference` for dpo, `judged` for kto, `text` for cpt."""

    pieces: list[Piece] | None = None
    """One text with all answers, or one text per answer if the template rewrites earlier turns."""
    preference: tuple[str, str, str] | None = None
    """Prompt, chosen answer and rejected answer; each answer includes its end of turn."""
    judged: tuple[str, str, bool] | None = None
    """Prompt, answer with its end of turn, and whether the answer is desirable."""
    text: str | None = None
    """A document for continued pre-training."""
    heldout: dict[str, Any] | None = None
    """Values of this row in heldout.jsonl; `heldout_row` adds prompt and answer from `pieces`."""

    def to_line(self) -> bytes:
        """Return a line of JSON for the spool."""
        values = {
            "pieces": None
            if self.pieces is None
            else [
                {"text": piece.text, "answers": [vars(answer) for answer in piece.answers]}
                for piece in self.pieces
            ],
            "preference": self.preference,
            "judged": self.judged,
            "text": self.text,
            "heldout": self.heldout,
        }
        return json.dumps(values, ensure_ascii=False).encode("utf-8") + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "Rendered":
        """Return the row that `to_line` wrote."""
        values = json.loads(line)
        if values["pieces"] is not None:
            values["pieces"] = [
                Piece(piece["text"], [Answer(**answer) for answer in piece["answers"]])
                for piece in values["pieces"]
            ]
        return cls(**values)

    def heldout_row(self) -> dict[str, Any]:
        """Return the row for heldout.jsonl, with the last answer if it is a conversation."""
        row = dict(self.heldout or {})
        if self.pieces is not None:
            text, answer = self.pieces[-1].text, self.pieces[-1].answers[-1]
            row["prompt"] = text[: answer.start]
            row["answer"] = text[answer.start : answer.content_end]
            row["end"] = text[answer.content_end : answer.end]
        return row


class Renderer:
    """Renders rows with the chat template of a tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        thinking: Thinking = "keep",
        learn_empty_thinking: bool = False,
        loss_on: str = "answers",
        date: datetime.date | None = None,
    ):
        """Compile and probe the tokenizer's chat templates; without one, only texts are rendered.

        Args:
            tokenizer: the tokenizer of the model.
            thinking: what to do with the reasoning of answers.
            learn_empty_thinking: whether an empty block of reasoning is learnt.
            loss_on: "answers" or "all" tokens.
            date: the date that the template shows; None: the current date.
        """
        self._thinking = thinking
        self._learn_empty_thinking = learn_empty_thinking
        self._loss_on = loss_on
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        # The longest first, because one token may begin with another.
        special.sort(key=len, reverse=True)
        self._special_tokens = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._templates = {
            name: compile_template(tokenizer, text, date)
            for name, text in read_templates(tokenizer).items()
        }

    @property
    def end_of_turn(self) -> str:
        """Text that the template puts after an answer; "" without a template."""
        return self._templates["default"][1].end if self._templates else ""

    @property
    def shows_date(self) -> bool:
        """Whether a template shows the date."""
        return any(template.shows_date for template, _ in self._templates.values())

    def special_token_in(self, example: Example) -> str:
        """Return the first special token whose text a row's values have; "" if there is none.

        The tokenizer turns such text into the token. Tags around the reasoning of an answer do not
        count: they were recognised, and the token is what they mean.
        """
        for text in self._texts(example):
            if found := self._special_tokens.search(text):
                return found[0]
        return ""

    def _texts(self, example: Example) -> Iterator[str]:
        """Yield the texts of a row that the model sees."""
        messages = example.messages or []
        if example.text is not None:
            yield example.text
        elif example.preference is not None:
            messages = [*example.preference[0], *example.preference[1:]]
        elif example.judged is not None:
            messages = [*example.judged[0], example.judged[1]]
        for message in messages:
            content, reasoning = message["content"], ""
            if message["role"] == "assistant":
                reasoning, content = split_reasoning(message)
            yield content
            if self._thinking != "strip":
                yield reasoning
            # The values of calls and definitions are JSON, so their text is searched as a whole.
            yield repr([message.get(key) for key in ("tool_calls", "name")])
        yield repr([example.tools, example.choices])

    def render(self, example: Example) -> Rendered:
        """Return the row as text.

        Raises:
            BadRowError: the template refuses the row, or changes or leaves out a part of it.
        """
        if example.text is not None:
            document = {"prompt": "", "answer": example.text, "end": "", "question": ""}
            return Rendered(text=example.text, heldout=document)
        if example.preference is not None:
            return self._preference(example)
        if example.judged is not None:
            return self._judged(example)
        assert example.messages is not None
        messages = example.messages
        learnt = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and index not in example.not_learnt
        ]
        self._check_loss(example)
        written = self._write(messages, learnt, example.tools)
        last = written[-1]
        heldout: dict[str, Any] = {"question": _last_question(messages[: learnt[-1]])}
        if example.choices is not None:
            # What the template puts before an answer is put before each choice too.
            lead = last.text[self._start(last) : last.content_start]
            heldout |= {
                "choices": [lead + choice for choice in example.choices],
                "label": example.choices.index(messages[learnt[-1]]["content"]),
            }
        return Rendered(pieces=self._pieces(written), heldout=heldout)

    def _check_loss(self, example: Example) -> None:
        """Refuse a row of which loss_on all would learn a part that is not to be learnt."""
        if self._loss_on != "all":
            return
        if example.not_learnt:
            raise BadRowError(
                "the row excludes an answer from the loss, but prepare.loss_on is all: set it to "
                "answers"
            )
        if any(message["role"] == "tool" for message in example.messages or []):
            raise BadRowError(
                "the row has results of tools, which a model must not learn to write, but "
                "prepare.loss_on is all: set it to answers"
            )

    def _write(
        self, messages: list[Message], learnt: list[int], tools: list[dict[str, Any]] | None
    ) -> list[Written]:
        """Return the text that ends with each of the learnt answers."""
        template, facts = self._templates[
            "tool_use" if tools and "tool_use" in self._templates else "default"
        ]
        check_tools(messages, bool(tools), facts.tools)
        if self._thinking == "strip":
            messages = [
                strip_reasoning(message) if message["role"] == "assistant" else message
                for message in messages
            ]
        elif self._thinking == "require":
            require_reasoning(messages, learnt)
        shaped = [shape(message, facts) for message in messages]
        if tools or any(message["role"] == "tool" for message in messages):
            shaped = shape_calls(shaped, facts.tools)
        definitions = shape_tools(tools, facts.tools) if tools else None
        written = read_plain(template, facts, shaped, learnt) if definitions is None else None
        if written is None:
            written = [
                write_answer(template, facts, shaped[:index], shaped[index], definitions)
                for index in learnt
            ]
            for index, answer in zip(learnt, written, strict=True):
                check_parts(shaped[index], answer)
        check_context(shaped[: learnt[-1]], definitions, written[-1].text, facts)
        return written

    def _start(self, written: Written) -> int:
        return written.starts[0 if self._learn_empty_thinking else -1]

    def _pieces(self, written: list[Written]) -> list[Piece]:
        """Return the fewest texts with all answers, each as the model sees it at inference.

        Usually the text up to each answer is the beginning of the whole conversation's text, so
        one example can contain all answers. Some templates rewrite earlier turns: they drop their
        reasoning, move the system message, or end them with another mark.
        """
        pieces: list[Piece] = []
        while written:
            text = written[-1].text
            fits = [text.startswith(answer.text[: answer.end]) for answer in written]
            answers = [
                Answer(self._start(answer), answer.content_end, answer.end)
                for answer, is_part in zip(written, fits, strict=True)
                if is_part
            ]
            pieces.insert(0, Piece(text, answers))
            written = [answer for answer, is_part in zip(written, fits, strict=True) if not is_part]
        return pieces

    def _preference(self, example: Example) -> Rendered:
        assert example.preference is not None
        prompt, *answers = example.preference
        chosen, rejected = (
            self._write([*prompt, answer], [len(prompt)], example.tools)[0] for answer in answers
        )
        # Both answers have to follow the same prompt, e.g. if only one of them has reasoning.
        shared = [
            start
            for start in chosen.starts
            if start in rejected.starts and chosen.text[:start] == rejected.text[:start]
        ]
        if not shared:
            raise BadRowError(
                "the chat template opens the chosen and the rejected answer differently, because "
                "only one of them has reasoning: set prepare.thinking to strip"
            )
        start = shared[0 if self._learn_empty_thinking else -1]
        contents = [answer.text[start : answer.content_end] for answer in (chosen, rejected)]
        before = chosen.text[:start]
        heldout = {
            "prompt": before,
            "answer": contents[0],
            "end": chosen.text[chosen.content_end : chosen.end],
            "choices": contents,
            "label": 0,
            "question": _last_question(prompt),
        }
        texts = [answer.text[start : answer.end] for answer in (chosen, rejected)]
        return Rendered(preference=(before, texts[0], texts[1]), heldout=heldout)

    def _judged(self, example: Example) -> Rendered:
        assert example.judged is not None
        prompt, answer, is_desirable = example.judged
        written = self._write([*prompt, answer], [len(prompt)], example.tools)[0]
        text, start = written.text, self._start(written)
        heldout = {
            "prompt": text[:start],
            "answer": text[start : written.content_end],
            "end": text[written.content_end : written.end],
            "question": _last_question(prompt),
        }
        return Rendered(
            judged=(text[:start], text[start : written.end], is_desirable), heldout=heldout
        )


def _last_question(messages: list[Message]) -> str:
    questions = [message["content"] for message in messages if message["role"] == "user"]
    return questions[-1] if questions else ""
