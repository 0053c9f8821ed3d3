"""Turn rendered rows into token ids with the loss mask, in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from tuneline.prepare.render import Piece, Rendered


@dataclass
class TokenRow:
    """One row of train.parquet before truncation."""

    input_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    """1 where the loss counts the token."""
    answers: tuple[list[int], list[int]] | None = None
    """dpo: chosen and rejected ids; `input_ids` is the prompt then, its mask is empty."""

    def __len__(self) -> int:
        """Return the tokens that the model has to hold at once."""
        if self.answers is None:
            return len(self.input_ids)
        return len(self.input_ids) + max(map(len, self.answers))


def tokenise(tokenizer: Any, rows: Sequence[Rendered], *, loss_on: str) -> Iterator[TokenRow]:
    """Yield the token rows of a batch of rendered rows; one of these may give several."""
    if not rows:
        return
    if rows[0].preference is not None:
        yield from _preferences(tokenizer, rows)
    elif rows[0].text is not None:
        yield from _texts(tokenizer, [row.text or "" for row in rows])
    else:
        pieces = [piece for row in rows for piece in row.pieces or []]
        encoded = tokenizer(
            [piece.text for piece in pieces],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for piece, ids, offsets in zip(
            pieces, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            if _reaches_into_an_answer(piece, offsets):
                yield _in_parts(tokenizer, piece, loss_on=loss_on)
            else:
                mask = [1] * len(ids) if loss_on == "all" else answer_mask(piece, offsets)
                yield TokenRow(ids, mask)


def answer_mask(piece: Piece, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Return 1 for each token that has a character of an answer or of its end of turn.

    Args:
        piece: the text and its answers.
        offsets: (first character, behind the last) of each token, in order. Byte-level tokenizers
            leave the white space in front of a word out of them: a token counts from the end of
            the token before it.
    """
    first, end = _spans(offsets)
    mask = numpy.zeros(len(offsets), dtype=bool)
    for answer in piece.answers:
        mask |= (end > answer.start) & (first < answer.end)
    return mask.astype(int).tolist()


def _spans(offsets: Sequence[tuple[int, int]]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return where tokens begin and end, white space in front of them included."""
    pairs = numpy.array(offsets, dtype=numpy.int64).reshape(-1, 2)
    first, end = pairs[:, 0], pairs[:, 1]
    before = numpy.zeros_like(end)
    numpy.maximum.accumulate(end[:-1], out=before[1:])
    return numpy.minimum(first, before), end


def _reaches_into_an_answer(piece: Piece, offsets: Sequence[tuple[int, int]]) -> bool:
    """Return whether a token has characters of a prompt and of the answer behind it.

    That happens when an answer begins with white space. The model is never given such a token:
    at inference the prompt ends where the answer begins.
    """
    first, end = _spans(offsets)
    return any(
        bool(((first < answer.start) & (answer.start < end)).any()) for answer in piece.answers
    )


def _in_parts(tokenizer: Any, piece: Piece, *, loss_on: str) -> TokenRow:
    """Tokenise prompts, answers and what follows them apart."""
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
    """Tokenise documents, each with an end, so that packed neighbours can be told apart."""
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False)
    for ids in encoded["input_ids"]:
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
        yield TokenRow(ids, [1] * len(ids))


def _preferences(tokenizer: Any, rows: Sequence[Rendered]) -> Iterator[TokenRow]:
    def ids_of(texts: list[str]) -> list[list[int]]:
        return tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]

    triples = [row.preference for row in rows if row.preference is not None]
    prompts = ids_of([prompt for prompt, _, _ in triples])
    whole = [ids_of([triple[0] + triple[which] for triple in triples]) for which in (1, 2)]
    for index, prompt_ids in enumerate(prompts):
        answers = []
        for which in (1, 2):
            ids = whole[which - 1][index]
            if ids[: len(prompt_ids)] == prompt_ids:
                answers.append(ids[len(prompt_ids) :])
            else:
                # A token would reach from the prompt into the answer. The prompt has to be the
                # same for both answers, so the two parts are tokenised apart.
                answers.append(ids_of([triples[index][which]])[0])
        yield TokenRow(prompt_ids, [], (answers[0], answers[1]))
