"""Lay checked rows out as text through the chat template, and mark where the answers stand.

The template is asked twice for each answer: for what the model sees before it (with the
generation prompt) and for the same with the answer. What the second has more is the answer with
its end of turn. This needs no {% generation %} in the template, which few have.
"""

import json
from dataclasses import dataclass
from typing import Any

from tuneline.prepare.formats import BadRowError, Example, Message


@dataclass(frozen=True)
class Answer:
    """Where an answer stands in a text, in characters."""

    start: int
    content_end: int
    """Behind the answer itself."""
    end: int
    """Behind its end-of-turn token; white space that the template puts after it is not in."""


@dataclass(frozen=True)
class Piece:
    """A text to be tokenised as one row, and its answers in order."""

    text: str
    answers: list[Answer]


@dataclass(frozen=True)
class Rendered:
    """A row as text: `pieces` for sft, `preference` for dpo, `text` for cpt."""

    pieces: list[Piece] | None = None
    preference: tuple[str, str, str] | None = None
    """Prompt, chosen and rejected; the answers with their end of turn."""
    text: str | None = None
    heldout: dict[str, Any] | None = None
    """The row of heldout.jsonl that it would be, prompt and answer left out for `pieces`."""

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
        """Make it from what `to_line` returned."""
        values = json.loads(line)
        if values["pieces"] is not None:
            values["pieces"] = [
                Piece(piece["text"], [Answer(**answer) for answer in piece["answers"]])
                for piece in values["pieces"]
            ]
        return cls(**values)

    def heldout_row(self) -> dict[str, Any]:
        """Return the row for heldout.jsonl; of a conversation the last answer is asked for."""
        row = dict(self.heldout or {})
        if self.pieces is not None:
            text, answer = self.pieces[-1].text, self.pieces[-1].answers[-1]
            row["prompt"] = text[: answer.start]
            row["answer"] = text[answer.start : answer.content_end]
            row["end"] = text[answer.content_end : answer.end]
        return row


class Renderer:
    """Renders rows with one tokenizer's chat template."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def render(self, example: Example) -> Rendered:
        """Return the row as text.

        Raises:
            BadRowError: the template refuses it, e.g. a system message or two turns in a row.
        """
        if example.text is not None:
            document = {"prompt": "", "answer": example.text, "end": "", "question": ""}
            return Rendered(text=example.text, heldout=document)
        if example.preference is not None:
            return self._preference(*example.preference)
        assert example.messages is not None
        messages = example.messages
        pieces = self._conversation(messages)
        heldout: dict[str, Any] = {"question": _last_question(messages[:-1])}
        if example.choices is not None:
            answer, last = messages[-1]["content"], pieces[-1].answers[-1]
            written = pieces[-1].text[last.start : last.content_end]
            # What the template writes before an answer ("" or a space) stands before choices too.
            lead = written[: len(written) - len(written.lstrip())] if written != answer else ""
            heldout |= {
                "choices": [lead + choice for choice in example.choices],
                "label": example.choices.index(answer),
            }
        return Rendered(pieces=pieces, heldout=heldout)

    def _preference(self, prompt: list[Message], chosen: str, rejected: str) -> Rendered:
        before = self._template(prompt, True)
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
        # As a rule each text is the beginning of the next, and one row holds all answers. Some
        # templates write earlier turns differently (leave their reasoning out, move the system
        # message): there each answer gets a row of its own, as the model would have seen it.
        if all(whole.startswith(text[: answer.end]) for text, answer in pieces):
            return [Piece(whole, [answer for _, answer in pieces])]
        return [Piece(text, [answer]) for text, answer in pieces]

    def _answer(self, before: list[Message], content: str) -> tuple[str, Answer]:
        """Return the text that ends with an answer to `before`, and where the answer stands."""
        prompt = self._template(before, True)
        text = self._template([*before, {"role": "assistant", "content": content}], False)
        # Templates may trim an answer, or write it without its reasoning.
        written = content if content in text[-len(content) - 256 :] else content.strip()
        position = text.rfind(written)
        if position < 0:
            raise BadRowError("the chat template does not write the answer as it stands")
        content_end = position + len(written)
        if not text.startswith(prompt):
            # The generation prompt has more than a finished turn, e.g. an opened <think>: what
            # the model sees at inference counts, then the answer and its end.
            tail = text[content_end:]
            text, content_end = prompt + written + tail, len(prompt) + len(written)
        if content_end - len(written) < len(prompt):
            raise BadRowError("the chat template writes the answer into the prompt")
        end = max(content_end, len(text.rstrip()))
        return text, Answer(start=len(prompt), content_end=content_end, end=end)

    def _template(self, messages: list[Message], ask: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask
            )
        except TemplateError as error:
            raise BadRowError(f"the chat template refuses it: {error}") from None


def _last_question(messages: list[Message]) -> str:
    questions = [message["content"] for message in messages if message["role"] == "user"]
    return questions[-1] if questions else ""
