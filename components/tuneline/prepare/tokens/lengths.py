"""Length statistics, and the truncation of one example."""

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy
from numpy.typing import NDArray

from tuneline.artifacts import LengthStatistics
from tuneline.prepare.tokens.tokenise import TokenRow

# The recommended length is a multiple of this number, which suits tensor cores and packing.
_MULTIPLE = 64
_NUM_BINS = 40

NEVER = 2**31 - 1
"""Length in tokens that stands for none: no maximum length is enough."""


def statistics(lengths: Sequence[int] | NDArray[numpy.int64]) -> LengthStatistics:
    """Return statistics of lengths in tokens; `lengths` must not be empty."""
    values = numpy.asarray(lengths)
    shortest, longest = int(values.min()), int(values.max())
    width = max(1, math.ceil((longest - shortest + 1) / _NUM_BINS))
    first = shortest // width
    counts = numpy.bincount(values // width - first)
    return LengthStatistics(
        mean=round(float(values.mean()), 2),
        median=float(numpy.median(values)),
        p95=round(float(numpy.percentile(values, 95)), 2),
        p99=round(float(numpy.percentile(values, 99)), 2),
        max=longest,
        histogram=[
            (index * width, (index + 1) * width, int(count))
            for index, count in enumerate(counts, first)
        ],
    )


def recommend(lengths: LengthStatistics, longest_allowed: int) -> int:
    """Return the length that 99 % of the rows fit in, rounded up to a multiple of 64.

    The result is never above `longest_allowed`.
    """
    return min(_MULTIPLE * math.ceil(lengths.p99 / _MULTIPLE), longest_allowed)


def fit(row: TokenRow, max_seq_length: int, *, is_document: bool) -> Iterator[TokenRow]:
    """Yield what remains of an example after truncation.

    Of a conversation or preference, the first `max_seq_length` tokens remain, or nothing if they
    contain no token that the loss counts. A document is cut into pieces of that length. A last
    piece of one token is dropped, because its token has no context to be predicted from.

    Args:
        row: the example.
        max_seq_length: maximum length in tokens.
        is_document: whether the example is a document.
    """
    if is_document:
        for start in range(0, len(row.input_ids), max_seq_length):
            end = start + max_seq_length
            if len(row.input_ids[start:end]) > 1:
                yield TokenRow(row.input_ids[start:end], row.loss_mask[start:end])
    elif row.answers is not None:
        room = max_seq_length - len(row.input_ids)
        if room > 0:
            answers = tuple(answer[:room] for answer in row.answers)
            yield TokenRow(row.input_ids, [], answers, row.is_desirable)
    elif any(row.loss_mask[:max_seq_length]) and len(row.input_ids) > 1:
        yield TokenRow(row.input_ids[:max_seq_length], row.loss_mask[:max_seq_length])


def num_tokens(row: TokenRow) -> int:
    """Return the number of tokens that an example stores."""
    return len(row.input_ids) + sum(map(len, row.answers or ()))


def num_loss_tokens(row: TokenRow) -> int:
    """Return the number of tokens that the loss counts; a preference counts both answers."""
    return sum(row.loss_mask) + sum(map(len, row.answers or ()))


def num_tokens_needed(row: TokenRow) -> int:
    """Return the smallest maximum length at which a token that the loss counts remains.

    It is NEVER if the loss counts no token, or only the first one, which has no context.
    """
    if row.answers is not None:
        return len(row.input_ids) + 1
    if 1 not in row.loss_mask:
        return NEVER
    # The first token has no context to be predicted from.
    return max(2, row.loss_mask.index(1) + 1) if len(row.loss_mask) > 1 else NEVER


def num_tokens_apart(row: TokenRow) -> int:
    """Return the smallest maximum length at which the two answers of a preference differ.

    It is NEVER if the answers are equal, and 0 if the example is not a preference.
    """
    if row.answers is None or len(row.answers) == 1:
        return 0
    for place, (chosen, rejected) in enumerate(zip_longest(*row.answers)):
        if chosen != rejected:
            return len(row.input_ids) + place + 1
    return NEVER
