"""Turn rendered rows into token IDs with a loss mask, in batches."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from tuneline.prepare.tokens.byte_level import ByteLevel, Spans
from tuneline.prepare.tokens.render import Piece, Rendered


@dataclass
class TokenRow:
    """One example: a row of train.parquet."""

    input_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    """1 for each token that the loss counts, otherwise 0."""
    answers: tuple[list[int], ...] | None = None
    """For the method dpo: the IDs of the chosen and of the rejected answer; for kto: those of the
    answer. `input_ids` is then the prompt, and `loss_mask` is empty. None for other methods."""
    is_desirable: bool | None = None
    """For the method kto: whether the answer is desirable. None for other methods."""

    def __len__(self) -> int:
        """Return the example's length in tokens, with the longer answer if there are two."""
        if self.answers is None:
            return len(self.input_ids)
        return len(self.input_ids) + max(map(len, self.answers))


def tokenise(
    tokenizer: Any, rows: Sequence[Rendered], *, loss_on: str, byte_level: ByteLevel | None = None
) -> Iterator[TokenRow]:
    """Yield the examples of a batch of rendered rows; a row may become several examples.

    Args:
        tokenizer: the model's tokenizer.
        rows: the rows.
        loss_on: which tokens the loss counts, "answers" or "all".
        byte_level: the same tokenizer, if it is a byte-level one.
    """
    if not rows:
        return
    if rows[0].preference is not None:
        triples = [row.preference for row in rows if row.preference is not None]
        for ids, *answers in _after_prompts(tokenizer, *zip(*triples, strict=True)):
            yield TokenRow(ids, [], tuple(answers))
    elif rows[0].judged is not None:
        judged = [row.judged for row in rows if row.judged is not None]
        prompts, texts, labels = zip(*judged, strict=True)
        pairs = _after_prompts(tokenizer, prompts, texts)
        for (ids, answer), label in zip(pairs, labels, strict=True):
            yield TokenRow(ids, [], (answer,), label)
    elif rows[0].text is not None:
        yield from _texts(tokenizer, [row.text or "" for row in rows])
    else:
        pieces = [piece for row in rows for piece in row.pieces or []]
        encoded: Iterator[tuple[list[int], Spans | None] | None]
        encoded = repeat(None) if byte_level is None else byte_level.encode(pieces)
        for piece, found in zip(pieces, encoded):  # noqa: B905 (the first one may be endless)
            ids, spans = found or _with_offsets(tokenizer, piece)
            if spans is None:
                yield _in_parts(tokenizer, piece, loss_on=loss_on)
            else:
                mask = [1] * len(ids) if loss_on == "all" else _mask(spans, len(ids))
                yield TokenRow(ids, mask)


def _with_offsets(tokenizer: Any, piece: Piece) -> tuple[list[int], Spans | None]:
    # Call the backend directly, because the wrapper of transformers takes 20 % more time, and text
    # by text, because the encodings of a whole batch do not fit into the CPU's caches.
    encoding = tokenizer.backend_tokenizer.encode(piece.text, add_special_tokens=False)
    ids = encoding.ids
    # A few offsets are needed; the list of all of them would take more time than these.
    return ids, answer_spans(piece, len(ids), encoding.token_to_chars)


def answer_spans(
    piece: Piece, num_tokens: int, offsets: Callable[[int], tuple[int, int]]
) -> Spans | None:
    """Return the token range of each answer, including its end of turn.

    Args:
        piece: the text and the positions of its answers.
        num_tokens: number of tokens of the text.
        offsets: returns (index of the first character, index after the last character) of a token.
            Byte-level tokenizers leave the white space in front of a word out of these offsets, so
            each token is taken to begin where the token before it ends.

    Returns:
        (index of the first token, index after the last token) of each answer. None if a token
        contains characters of both a prompt and its answer, which happens when an answer begins
        with white space. The model never sees such a token at inference, where the prompt is
        tokenised without the answer.
    """

    def first(token: int) -> int:
        return min(offsets(token)[0], offsets(token - 1)[1]) if token else 0

    tokens = range(num_tokens)
    spans = []
    for answer in piece.answers:
        start = bisect_right(tokens, answer.start, key=lambda token: offsets(token)[1])
        if start < len(tokens) and first(start) < answer.start:
            return None
        spans.append((start, max(start, bisect_left(tokens, answer.end, key=first))))
    return spans


def _mask(spans: Sequence[tuple[int, int]], num_tokens: int) -> list[int]:
    mask = [0] * num_tokens
    for start, end in spans:
        mask[start:end] = [1] * (end - start)
    return mask


def _in_parts(tokenizer: Any, piece: Piece, *, loss_on: str) -> TokenRow:
    """Tokenise prompts, answers and the text after the last answer separately."""
    row = TokenRow()
    position = 0
    spans = [(answer.start, answer.end) for answer in piece.answers]
    for start, end in [*spans, (len(piece.text), len(piece.text))]:
        for text, is_answer in ((piece.text[position:start], 0), (piece.text[start:end], 1)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            row.input_ids += ids
            row.loss_mask += [1 if loss_on == "all" else is_answer] * len(ids)
        position = end
    return row


def _texts(tokenizer: Any, texts: list[str]) -> Iterator[TokenRow]:
    """Tokenise documents; an end-of-sequence token after each one separates packed documents."""
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False)
    for ids in encoded["input_ids"]:
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
        yield TokenRow(ids, [1] * len(ids))


def _after_prompts(
    tokenizer: Any, prompts: Sequence[str], *answers: Sequence[str]
) -> Iterator[tuple[list[int], ...]]:
    """Yield the IDs of each prompt, and those of each of its answers."""

    def ids_of(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids

    whole = [
        ids_of([prompt + answer for prompt, answer in zip(prompts, column, strict=True)])
        for column in answers
    ]
    for index, prompt_ids in enumerate(ids_of(list(prompts))):
        row = [prompt_ids]
        for column, ids in zip(answers, (column[index] for column in whole), strict=True):
            if ids[: len(prompt_ids)] == prompt_ids:
                row.append(ids[len(prompt_ids) :])
            else:
                # A token spans the end of the prompt and the start of the answer. Both answers
                # must follow the same prompt tokens, so the answer is tokenised separately.
                row.append(ids_of([column[index]])[0])
        yield tuple(row)
