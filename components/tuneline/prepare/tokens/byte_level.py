"""Tokenise with a byte-level tokenizer, and find the answers by the number of bytes of each token.

Every token of such a tokenizer stands for certain bytes of the text. Counting them takes less time
than having the tokenizer keep the offsets of every token. Where the bytes do not add up, e.g. since
a special token takes the white space beside it, the offsets are needed after all.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray
from tokenizers import decoders, normalizers

from tuneline.prepare.parallel import batched
from tuneline.prepare.tokens.heads import Heads, Memory
from tuneline.prepare.tokens.render import Piece

Spans = list[tuple[int, int]]
"""(Index of the first token, index after the last token) of each answer."""

_BATCH = 16
"""Number of texts per call. The encodings of more do not fit into the CPU's caches."""


class ByteLevel:
    """A byte-level tokenizer, and the number of bytes of each of its tokens."""

    def __init__(self, tokenizer: Any, heads: Heads):
        backend = tokenizer.backend_tokenizer
        self._encode = backend.encode_batch_fast
        self._composes = backend.normalizer is not None
        sizes = {number: len(token) for token, number in backend.get_vocab().items()}
        # Other tokens have one character per byte; these are written as they are.
        for number, token in backend.get_added_tokens_decoder().items():
            sizes[number] = len(token.content.encode())
        self._sizes = numpy.zeros(max(sizes) + 1, numpy.int64)
        self._sizes[list(sizes)] = list(sizes.values())
        self._memory = Memory(heads, lambda head: self._ids([head])[0])

    def encode(self, pieces: Sequence[Piece]) -> Iterator[tuple[list[int], Spans | None] | None]:
        """Yield the token IDs of each text, and the tokens of its answers.

        The tokens of the answers are None if a token contains characters of both a prompt and its
        answer; there is None for a text if the bytes of its tokens do not add up.
        """
        for batch in batched(pieces, _BATCH):
            split = [self._memory.split(piece.text) for piece in batch]
            for piece, (head, _), rest in zip(
                batch, split, self._ids([rest for _, rest in split]), strict=True
            ):
                ids = rest if head is None else head + rest
                yield self._with_spans(piece, ids)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encode(texts, add_special_tokens=False)]

    def _with_spans(self, piece: Piece, ids: list[int]) -> tuple[list[int], Spans | None] | None:
        text = piece.text
        is_ascii = text.isascii()
        if self._composes and not is_ascii and not unicodedata.is_normalized("NFC", text):
            return None
        ends = self._sizes[ids].cumsum()
        if not ids or ends[-1] != (len(text) if is_ascii else _num_bytes(text)):
            return None
        positions = [place for answer in piece.answers for place in (answer.start, answer.end)]
        if not is_ascii:
            positions = [_num_bytes(text[:place]) for place in positions]
        return ids, _spans(ends, positions)


def find_byte_level(tokenizer: Any, heads: Heads) -> ByteLevel | None:
    """Return the tokenizer as a byte-level one; None if it is of another kind."""
    backend = tokenizer.backend_tokenizer
    is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
    if not is_byte_level or not isinstance(backend.normalizer, normalizers.NFC | None):
        return None
    return ByteLevel(tokenizer, heads)


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _spans(ends: NDArray[numpy.int64], positions: Sequence[int]) -> Spans | None:
    """Return the tokens of the answers.

    Args:
        ends: number of bytes of the text up to the end of each token.
        positions: number of bytes up to the beginning and up to the end of each answer.
    """
    spans = []
    for start, end in zip(positions[::2], positions[1::2], strict=True):
        first = int(ends.searchsorted(start, "right"))
        if start != (ends[first - 1] if first else 0):
            return None
        last = min(len(ends), int(ends.searchsorted(end)) + 1) if end else 0
        spans.append((first, max(first, last)))
    return spans
