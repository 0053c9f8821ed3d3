"""Turn rendered rows into token ids with the loss mask, in batches."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

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
        # Past transformers, whose wrapping of what comes back takes a fifth as long as the work.
        encodings = tokenizer.backend_tokenizer.encode_batch(
            [piece.text for piece in pieces], add_special_tokens=False
        )
        for piece, encoding in zip(pieces, encodings, strict=True):
            spans = answer_spans(piece, encoding.offsets)
            if spans is None:
                yield _in_parts(tokenizer, piece, loss_on=loss_on)
            else:
                ids = encoding.ids
                mask = [1] * len(ids) if loss_on == "all" else _mask(spans, len(ids))
                yield TokenRow(ids, mask)


def answer_spans(piece: Piece, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """Return from which token to which each answer goes, its end of turn included.

    Args:
        piece: the text and its answers.
        offsets: (first character, behind the last) of each token, in order. Byte-level tokenizers
            leave the white space in front of a word out of them: a token counts from the end of
            the token before it.

    Returns:
        None if a token has characters of a prompt and of the answer behind it. That happens when an
        answer begins with white space. The model is never given such a token: at inference the
        prompt ends where the answer begins.
    """

    def first(token: int) -> int:
        return min(offsets[token][0], offsets[token - 1][1]) if token else 0

    tokens = range(len(offsets))
    spans = []
    for answer in piece.answers:
        start = bisect_right(tokens, answer.start, key=lambda token: offsets[token][1])
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
