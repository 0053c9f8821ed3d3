"""Counting bytes and reusing beginnings give the tokens and words that a whole text has."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from tuneline.prepare.rows.row_words import RowReader
from tuneline.prepare.rows.words import hash_of, word_hashes, words_of
from tuneline.prepare.tokens.byte_level import ByteLevel, find_byte_level
from tuneline.prepare.tokens.heads import Heads
from tuneline.prepare.tokens.render import Answer, Piece, Rendered
from tuneline.prepare.tokens.tokenise import tokenise

_SYSTEM = "<|im_start|>system\nEvery row of this dataset begins with these words.<|im_end|>"
# Marks that compose, white space that merges with its neighbours, digits, markers, wide letters.
_TEXTS = st.text(
    "ab 1\n\t\u00e9e\u0301\u0338\ud55c\u1112\u1161\u6f22_-<|", max_size=12
) | st.sampled_from(["<|im_end|>", "\U0001f600", " \u0301", "\u0338", "\n\n"])


def _pieces(texts: list[str]) -> list[Piece]:
    """Return texts of which each part with an odd index is an answer, behind a shared beginning."""
    pieces = []
    for system in ("", _SYSTEM, _SYSTEM):
        text, answers = system, []
        for number, part in enumerate(texts):
            if number % 2:
                end = len(text) + len(part)
                answers.append(Answer(len(text), end, end))
            text += part
        pieces.append(Piece(text, answers))
    return pieces


@pytest.fixture(scope="module", params=[None, normalizers.NFC()], ids=["plain", "nfc"])
def fast(request: pytest.FixtureRequest, tokenizer: Any) -> tuple[Any, ByteLevel]:
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.normalizer = request.param
    found = find_byte_level(changed, Heads(changed))
    assert found is not None
    return changed, found


@given(st.lists(_TEXTS, min_size=2, max_size=6))
def test_tokens_and_masks_are_those_of_the_offsets(
    fast: tuple[Any, ByteLevel], texts: list[str]
) -> None:
    changed, byte_level = fast
    rows = [Rendered(pieces=[piece]) for piece in _pieces(texts)]
    expected = list(tokenise(changed, rows, loss_on="answers"))
    assert list(tokenise(changed, rows, loss_on="answers", byte_level=byte_level)) == expected


def test_where_bytes_do_not_add_up_offsets_are_used(tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    fast = find_byte_level(changed, Heads(changed))
    assert fast is not None
    (piece, *_) = _pieces(["Question", " Answer"])
    assert list(fast.encode([piece])) == [None]
    rows = [Rendered(pieces=[piece])]
    (row,) = tokenise(changed, rows, loss_on="answers", byte_level=fast)
    answer = [token for token, mask in zip(row.input_ids, row.loss_mask, strict=True) if mask]
    assert changed.decode(answer) == " Answer"


@pytest.mark.parametrize("change", ["decoder", "normalizer"])
def test_other_tokenizers_are_not_taken_for_byte_level(tokenizer: Any, change: str) -> None:
    changed = copy.deepcopy(tokenizer)
    setattr(
        changed.backend_tokenizer,
        change,
        None if change == "decoder" else normalizers.Lowercase(),
    )
    assert find_byte_level(changed, Heads(changed)) is None


@pytest.fixture(scope="module")
def reader(tokenizer: Any) -> RowReader:
    return RowReader(Heads(tokenizer))


@given(_TEXTS, _TEXTS, _TEXTS)
def test_words_are_those_of_the_whole_text(
    reader: RowReader, before: str, prompt: str, answer: str
) -> None:
    for text in (before + prompt, _SYSTEM + prompt, _SYSTEM + before + prompt):
        words = reader.read(text, answer, prompt)
        every = [*words_of(text), *words_of(answer)]
        assert words.words == word_hashes(every)
        assert words.text == hash_of(every or [text, answer])
        assert words.prompt == (hash_of(words_of(text)) if words_of(text) else 0)
        assert words.question == (hash_of(words_of(prompt)) if words_of(prompt) else 0)


def test_a_marker_that_may_hide_in_another_token_does_not_split(tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    assert Heads(changed).end(_SYSTEM + "x") == len(_SYSTEM)
    changed.add_tokens(["words.<|im_end|>", ".<"])
    assert Heads(changed).end(_SYSTEM + "x") == 0
