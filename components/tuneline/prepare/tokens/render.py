"""Render checked rows as text with the chat template, and locate the answers in the text.

The template is rendered twice for each answer: once up to the generation prompt, which is what the
model sees at inference, and once with the answer. The text that the second rendering adds is the
answer with its end of turn. The template does not need a {% generation %} block, which would mark
the answers but is missing in most templates.
"""

import json
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from tuneline.prepare.formats.example import BadRowError, Example, Message


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
    """A row as text: `pieces` for sft, `preference` for dpo, `text` for cpt."""

    pieces: list[Piece] | None = None
    """One text with all answers, or one text per answer if the template rewrites earlier turns."""
    preference: tuple[str, str, str] | None = None
    """Prompt, chosen answer and rejected answer; each answer includes its end of turn."""
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

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def render(self, example: Example) -> Rendered:
        """Return the row as text.

        Raises:
            BadRowError: the template refuses the row, e.g. because of a system message.
        """
        if example.text is not None:
            document = {"prompt": "", "answer": example.text, "end": "", "question": ""}
            return Rendered(text=example.text, heldout=document)
        if example.preference is not None:
            prompt, chosen, rejected = example.preference
            return self._preference(prompt, chosen["content"], rejected["content"])
        assert example.messages is not None
        messages = example.messages
        pieces = self._conversation(messages)
        heldout: dict[str, Any] = {"question": _last_question(messages[:-1])}
        if example.choices is not None:
            answer, last = messages[-1]["content"], pieces[-1].answers[-1]
            written = pieces[-1].text[last.start : last.content_end]
            # The template may put white space before an answer. Put it before each choice too.
            lead = written[: len(written) - len(written.lstrip())] if written != answer else ""
            heldout |= {
                "choices": [lead + choice for choice in example.choices],
                "label": example.choices.index(answer),
            }
        return Rendered(pieces=pieces, heldout=heldout)

    def _preference(self, prompt: list[Message], chosen: str, rejected: str) -> Rendered:
        before = self._apply(prompt, add_generation_prompt=True)
        answers, contents, end = [], [], ""
        for content in (chosen, rejected):
            text, answer = self._answer(prompt, content)
            answers.append(text[answer.start : answer.end])
            contents.append(text[answer.start : answer.content_end])
            end = text[answer.content_end : answer.end]
        heldout = {
            "prompt": before,
            "answer": contents[0],
            "end": end,
            "choices": contents,
            "label": 0,
            "question": _last_question(prompt),
        }
        return Rendered(preference=(before, answers[0], answers[1]), heldout=heldout)

    def _conversation(self, messages: list[Message]) -> list[Piece]:
        pieces = [
            self._answer(messages[:index], message["content"])
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        whole = pieces[-1][0]
        # Usually the text up to each answer is the beginning of the whole conversation's text, so
        # one example can contain all answers. Some templates rewrite earlier turns (drop their
        # reasoning, move the system message). Then each answer becomes an example of its own, with
        # the earlier turns as the model would see them at inference.
        if all(whole.startswith(text[: answer.end]) for text, answer in pieces):
            return [Piece(whole, [answer for _, answer in pieces])]
        return [Piece(text, [answer]) for text, answer in pieces]

    def _answer(self, before: list[Message], content: str) -> tuple[str, Answer]:
        """Return the text that ends with an answer to `before`, and the position of the answer."""
        prompt = self._apply(before, add_generation_prompt=True)
        text = self._apply(
            [*before, {"role": "assistant", "content": content}], add_generation_prompt=False
        )
        # A template may strip white space from an answer, or drop the answer's reasoning.
        written = content if content in text[-len(content) - 256 :] else content.strip()
        position = text.rfind(written)
        if position < 0:
            raise BadRowError("the chat template changes the text of the answer")
        content_end = position + len(written)
        if not text.startswith(prompt):
            # The generation prompt ends with text that a finished turn does not have, e.g. an
            # opening <think>. Train on the generation prompt, because the model sees it at
            # inference, followed by the answer and its end of turn.
            tail = text[content_end:]
            text, content_end = prompt + written + tail, len(prompt) + len(written)
        if content_end - len(written) < len(prompt):
            raise BadRowError("the chat template puts the answer inside the prompt")
        end = max(content_end, len(text.rstrip()))
        return text, Answer(start=len(prompt), content_end=content_end, end=end)

    def _apply(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise BadRowError(f"the chat template refuses the row: {error}") from None
        return text


def _last_question(messages: list[Message]) -> str:
    questions = [message["content"] for message in messages if message["role"] == "user"]
    return questions[-1] if questions else ""
