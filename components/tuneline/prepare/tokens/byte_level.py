"""Tokenise with a byte-level tokenizer, and find the answers by the number of bytes of each token.

Every token of such a tokenizer stands for certain bytes of the text. Counting them takes less time
than having the tokenizer keep the offsets of every token. Where the bytes do not add up, e.g. since
a special token takes the white space beside it, the offsets are needed after all.

The pre-tokenizer of most byte-level tokenizers begins a new word at a space between two other
characters, and at both ends of a number, so no token goes across. There, texts are cut into parts,
and the tokens of parts that occurred before are taken from memory.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray
from tokenizers import decoders, normalizers

from tuneline.prepare.parallel import batched
from tuneline.prepare.tokens.heads import Heads, Memory, Parts
from tuneline.prepare.tokens.render import Piece

Spans = list[tuple[int, int]]
"""(Index of the first token, index after the last token) of each answer."""

_BATCH = 16
"""Number of texts per call. The encodings of more do not fit into the CPU's caches."""

# A character that no version of Unicode counts as white space.
_SOLID = "[^\x00-\x20\x7f-\xa0\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff]"
_MARK = "[!-/:-~]"
_SEAM = re.compile(rf"(?<={_SOLID})(?= {_SOLID})|(?<={_MARK})(?=[0-9])|(?<=[0-9])(?={_MARK})")
"""Matches where a text is cut."""
_CONTRACTION = re.compile(re.escape(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)") + r"\??")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NUMBERS, _WHITE_SPACE = {r"\p{N}", r"\p{N}{1,3}"}, r"\s+"
_ALTERNATIVES = {
    "",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
    *_NUMBERS,
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    _WHITE_SPACE,
}
"""Alternatives of the patterns of Llama 3, Qwen 2 to 3.5 and gpt-oss, without `_CONTRACTION`. None
matches a space behind another character, or a digit beside a character that is not a digit, and
only white space depends on what follows it."""


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
        self._has_seams = has_seams(tokenizer)
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        cut = [re.escape(text) for text in added if len(_SEAM.split(text)) > 1]
        self._would_be_cut = re.compile("|".join(cut) or "(?!)")
        self._known: Parts[bytes] = Parts()

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
                yield self._with_spans(piece, rest if head is None else head + rest)

    def _ids(self, texts: list[str]) -> list[bytes]:
        """Return the token IDs of each text, four bytes each."""
        known = self._known
        known.make_room()
        rows = [_SEAM.split(text) if self._may_cut(text) else [text] for text in texts]
        unknown = list({part: None for parts in rows for part in parts if part not in known})
        encodings = self._encode(unknown, add_special_tokens=False)
        for part, encoding in zip(unknown, encodings, strict=True):
            known.add(part, numpy.array(encoding.ids, numpy.int32).tobytes())
        return [b"".join(map(known.__getitem__, parts)) for parts in rows]

    def _may_cut(self, text: str) -> bool:
        return (
            self._has_seams and not self._would_be_cut.search(text) and not self._is_changed(text)
        )

    def _is_changed(self, text: str) -> bool:
        """Return whether the normalizer changes the text."""
        return self._composes and not text.isascii() and not unicodedata.is_normalized("NFC", text)

    def _with_spans(self, piece: Piece, data: bytes) -> tuple[list[int], Spans | None] | None:
        text = piece.text
        if self._is_changed(text):
            return None
        ids = numpy.frombuffer(data, numpy.int32)
        ends = self._sizes[ids].cumsum()
        if not data or ends[-1] != _num_bytes(text):
            return None
        positions = [place for answer in piece.answers for place in (answer.start, answer.end)]
        if not text.isascii():
            positions = [_num_bytes(text[:place]) for place in positions]
        return ids.tolist(), _spans(ends, positions)


def find_byte_level(tokenizer: Any, heads: Heads) -> ByteLevel | None:
    """Return the tokenizer as a byte-level one; None if it is of another kind."""
    backend = tokenizer.backend_tokenizer
    is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
    if not is_byte_level or not isinstance(backend.normalizer, normalizers.NFC | None):
        return None
    return ByteLevel(tokenizer, heads)


def has_seams(tokenizer: Any) -> bool:
    """Return whether no token goes across a place that `_SEAM` matches."""
    backend = tokenizer.backend_tokenizer
    if any(
        token.lstrip or token.rstrip or token.single_word or re.search(r"\s", token.content)
        for token in backend.get_added_tokens_decoder().values()
    ):
        return False
    if getattr(backend.model, "dropout", None) or backend.pre_tokenizer is None:
        return False
    state = json.loads(backend.pre_tokenizer.__getstate__())
    finds_words = False
    for step in state.get("pretokenizers", [state]):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            finds_words |= step["use_regex"]
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            pattern = step["pattern"].get("Regex", "")
            alternatives = set(_CONTRACTION.sub("", pattern).split("|"))
            if not alternatives <= _ALTERNATIVES:
                return False
            if _WHITE_SPACE not in alternatives or alternatives.isdisjoint(_NUMBERS):
                return False
            finds_words = True
        elif step["type"] != "Digits":
            return False
    return finds_words


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


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
