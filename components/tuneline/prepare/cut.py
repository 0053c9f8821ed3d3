"""Truncate the tokenised examples: what is left of each one, and the files of the parts."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import pyarrow
from numpy.typing import NDArray

from tuneline.artifacts import Method
from tuneline.prepare.encode import Encoded, read_tokens, token_hashes
from tuneline.prepare.parallel import in_order
from tuneline.prepare.rows.words import Hashes
from tuneline.prepare.tokens import lengths, parquet
from tuneline.prepare.tokens.truncation import Cut, cut_batch

Mask = NDArray[numpy.bool_]


@dataclass(frozen=True)
class Remains:
    """What truncation leaves of the examples."""

    kept: Mask
    """Whether something of an example is left to learn."""
    is_overlong: Mask
    """Whether no token that the loss counts is left of an example."""
    has_same_answers: Mask
    """Whether no difference is left between the answers of a preference."""
    hashes: Hashes
    """Hash of the tokens of each example that is left; of documents, of each piece."""
    owners: NDArray[numpy.int64]
    """The row of each hash."""

    def rows(self, num_rows: int) -> Mask:
        """Return whether at least one example of each of `num_rows` rows is left."""
        return numpy.bincount(self.owners, minlength=num_rows) > 0


def measure(encoded: Encoded, max_seq_length: int, method: Method) -> Remains:
    """Return what truncation to `max_seq_length` leaves of the examples."""
    is_overlong = numpy.array(encoded.needed) > max_seq_length
    has_same_answers = (numpy.array(encoded.apart) > max_seq_length) & ~is_overlong
    kept = ~is_overlong & ~has_same_answers
    is_cut = kept & (numpy.array(encoded.sizes) > max_seq_length)
    ends = numpy.cumsum(numpy.array(encoded.batches, numpy.int64))

    def hashes_of(number: int) -> tuple["array[int]", list[int]]:
        """Return the hashes of the cut examples of a batch, and the number of the example."""
        batch, first = read_tokens(encoded, number), int(ends[number]) - encoded.batches[number]
        pieces, owners = [], []
        for place in numpy.flatnonzero(is_cut[first : ends[number]]).tolist():
            for row in parquet.rows_of(batch.slice(place, 1), method=method):
                for piece in lengths.fit(row, max_seq_length, is_document=method == "cpt"):
                    pieces.append(piece)
                    owners.append(first + place)
        return token_hashes(parquet.to_batch(pieces, method=method)), owners

    hashes, examples = array("Q"), array("q")
    with_cut = numpy.unique(numpy.searchsorted(ends, numpy.flatnonzero(is_cut), side="right"))
    for _, (found, owners) in in_order(hashes_of, with_cut.tolist()):
        hashes.extend(found)
        examples.extend(owners)
    whole = numpy.flatnonzero(kept & ~is_cut)
    every = numpy.concatenate([whole, numpy.array(examples, numpy.int64)])
    order = numpy.argsort(every, kind="stable")
    values = numpy.concatenate(
        [numpy.array(encoded.hashes, numpy.uint64)[whole], numpy.array(hashes, numpy.uint64)]
    )
    return Remains(kept, is_overlong, has_same_answers, values[order], encoded.owners[every[order]])


def write(
    encoded: Encoded,
    uses: NDArray[numpy.int64],
    target: Path,
    *,
    max_seq_length: int,
    method: Method,
) -> Cut:
    """Write examples to a Parquet file, truncated, and return their counts.

    Examples that are used several times follow in further passes over all rows, so that two uses
    of one example are far apart.

    Args:
        encoded: the tokenised examples.
        uses: how often to write each example; 0 leaves it out.
        target: the file to write.
        max_seq_length: maximum length in tokens.
        method: the training method.
    """
    ends = numpy.cumsum(numpy.array(encoded.batches, numpy.int64))
    total = Cut()

    def cut(task: tuple[int, int]) -> tuple[pyarrow.RecordBatch, Cut]:
        number, turn = task
        mask = uses[int(ends[number]) - encoded.batches[number] : ends[number]] > turn
        batch = read_tokens(encoded, number)
        if not mask.all():
            batch = batch.filter(pyarrow.array(mask))
        return cut_batch(batch, max_seq_length, method)

    def batches() -> Iterator[pyarrow.RecordBatch]:
        tasks = [
            (int(number), turn)
            for turn in range(int(uses.max(initial=0)))
            for number in numpy.unique(
                numpy.searchsorted(ends, numpy.flatnonzero(uses > turn), side="right")
            )
        ]
        for _, (batch, counts) in in_order(cut, tasks):
            total.add(counts)
            yield batch

    parquet.write(target, batches(), method=method)
    return total
