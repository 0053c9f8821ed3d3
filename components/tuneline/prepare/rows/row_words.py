"""The words of rows, of which many have the same beginning."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tuneline.models.clusters import unified
from tuneline.prepare.rows.words import (
    hash_of,
    hash_of_lines,
    hashes_of_lines,
    joined,
    words_of_unified,
)
from tuneline.prepare.tokens.heads import Heads, Memory, Parts
from tuneline.prepare.tokens.render import Piece


@dataclass(frozen=True)
class RowWords:
    """What is kept of the words of a row."""

    words: "array[int]"
    """A hash of each word of the prompt and the answer."""
    text: int
    """Hash of the words of the prompt and the answer."""
    prompt: int
    """Hash of the words of the prompt; 0 for none."""
    question: int
    """Hash of the words of the last question; 0 for none."""


class RowReader:
    """Takes rows apart into words.

    The beginnings of prompts that `heads` finds are taken apart only once; so is what stands
    between white space in several texts, because no word goes across white space.
    """

    def __init__(self, heads: Heads):
        self._memory = Memory(heads, self._words)
        self._known: Parts[tuple[bytes, bytes]] = Parts()

    def read(self, prompt: str, answer: str, question: str) -> RowWords:
        """Return the words of a row: of its text up to the last answer, and of the answer."""
        head, rest = self._memory.split(prompt)
        before, hashes = head or (b"", b"")
        rest_of_prompt, hashes_of_prompt = self._words(rest)
        answered, hashes_of_answer = self._words(answer)
        asked, _ = self._words(question)
        prompted = _join(before, rest_of_prompt)
        text = _join(prompted, answered)
        return RowWords(
            array("I", hashes + hashes_of_prompt + hashes_of_answer),
            # Of a text without words, every character counts.
            hash_of_lines(text) if text else hash_of([prompt, answer]),
            hash_of_lines(prompted) if prompted else 0,
            hash_of_lines(asked) if asked else 0,
        )

    def beginnings(self, pieces: Sequence[Piece]) -> "array[int]":
        """Return the `RowWords.text` of the conversations that end with each answer but the last.

        Args:
            pieces: the texts of a conversation.
        """
        hashes = array("Q")
        if len(pieces) > 1 or len(pieces[0].answers) > 1:
            hashes.extend(hash for piece in pieces for hash in self._texts(piece))
            hashes.pop()
        return hashes

    def _texts(self, piece: Piece) -> Iterator[int]:
        """Yield the hash of the words up to the end of each answer."""
        lines, position = b"", 0
        for answer in piece.answers:
            head, rest = self._memory.split(piece.text[position : answer.start])
            answered, _ = self._words(piece.text[answer.start : answer.content_end])
            lines = _join(lines, head[0] if head else b"", self._words(rest)[0], answered)
            position = answer.content_end
            yield hash_of_lines(lines)

    def _words(self, text: str) -> tuple[bytes, bytes]:
        """Return the words of a text, one per line, and the hashes of all words."""
        known = self._known
        known.make_room()
        parts = unified(text).split()
        for part in parts:
            if part not in known:
                lines = joined(words_of_unified(part))
                known.add(part, (lines, hashes_of_lines(lines).tobytes()))
        words = [known[part] for part in parts]
        return b"\n".join([lines for lines, _ in words if lines]), b"".join(
            [hashes for _, hashes in words]
        )


def _join(*parts: bytes) -> bytes:
    return b"\n".join(filter(None, parts))
