"""Counting bytes and reusing beginnings give the tokens and words that a whole text has."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN35

from tuneline.prepare.rows.row_words import RowReader
from tuneline.prepare.rows.words import hash_of, word_hashes, words_of
from tuneline.prepare.tokens import heads
from tuneline.prepare.tokens.byte_level import ByteLevel, find_byte_level, has_seams
from tuneline.prepare.tokens.heads import Heads
from tuneline.prepare.tokens.render import Answer, Piece, Rendered
from tuneline.prepare.tokens.tokenise import tokenise

_SYSTEM = "<|im_start|>system\nEvery row of this dataset begins with these words.<|im_end|>"
# Marks that compose, white space that merges with its neighbours, digits, markers, wide letters.
_TEXTS = st.text(
    "ab 1\n\t\u00e9e\u0301\u0338\ud55c\u1112\u1161\u6f22_-<|", max_size=12
) | st.sampled_from(
    [
        "<|im_end|>",
        "\U0001f600",
        " \u0301",
        "\u0338",
        "\n\n",
        " 12 345 a's /b",
        "a b\u00a0c \u3000d ",
    ]
)


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


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_SPLITS = {
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "qwen2": _split(QWEN2),
    "qwen3.5": _split(QWEN35),
    **{name: _split(GGUF_PRE_TOKENIZER_SPLITS[name]) for name in ("llama3", "tekken", "gpt-4o")},
}


def _small(pre_tokenizer: Any, normalizer: Any) -> Any:
    """Return a tokenizer with few merges, so that it is made in little time."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.normalizer = pre_tokenizer, normalizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|part_2|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        [_SYSTEM, "a b ab aab 1 12 345's \ud55c\u6f22 /b a\n\nb"] * 3, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(
    scope="module", params=[(name, form) for name in _SPLITS for form in (None, normalizers.NFC())]
)
def fast(request: pytest.FixtureRequest) -> Iterator[tuple[Any, ByteLevel]]:
    name, normalizer = request.param
    changed = _small(_SPLITS[name], normalizer)
    assert has_seams(changed)
    found = find_byte_level(changed, Heads(changed))
    assert found is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "_MAX_CHARACTERS", 40)
        yield changed, found


@settings(max_examples=40)
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


def test_a_text_is_not_cut_where_a_token_may_go_across() -> None:
    pattern = r"\p{L}+ \p{L}+|" + GGUF_PRE_TOKENIZER_SPLITS["llama3"]
    for change in (_split(pattern), _split(r"\S+| "), pre_tokenizers.ByteLevel(use_regex=False)):
        assert not has_seams(_small(change, None))
    for token in (AddedToken("of the"), AddedToken("<pad>", lstrip=True)):
        changed = _small(_SPLITS["qwen2"], None)
        changed.add_tokens([token])
        assert not has_seams(changed)


def test_parts_that_are_known_are_not_tokenised_again() -> None:
    changed = _small(_SPLITS["llama3"], None)
    found = find_byte_level(changed, Heads(changed))
    assert found is not None
    tokenised: list[str] = []
    encode = found._encode

    def watch(texts: list[str], **options: Any) -> Any:
        tokenised.extend(texts)
        return encode(texts, **options)

    found._encode = watch
    for text in ("The cat sat.", "The  dog sat. The cat\n sat.", "cat sat. 48/2=24"):
        ((ids, _),) = found.encode([Piece(text, [])])
        assert ids == changed(text)["input_ids"]
    first, second = ["The", " cat", " sat."], ["The  dog", " The", " cat\n sat."]
    assert tokenised == [*first, *second, "cat", " 48", "/", "2", "=", "24"]
    # A special token with a number is not cut.
    ((ids, _),) = found.encode([Piece("1 2 <|part_2|> 3", [])])
    assert ids == changed("1 2 <|part_2|> 3")["input_ids"]
    assert tokenised[-1] == "1 2 <|part_2|> 3"


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
