"""Tokenise all rows once, and note for each row and each example what the split needs."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy
import pyarrow
from numpy.typing import NDArray

from tuneline.artifacts import LOSS_MASK, Method
from tuneline.prepare.parallel import batched, in_order
from tuneline.prepare.rows.row_words import RowReader
from tuneline.prepare.rows.spool import Spool
from tuneline.prepare.rows.words import WordFile
from tuneline.prepare.tokens import lengths, parquet
from tuneline.prepare.tokens.byte_level import find_byte_level
from tuneline.prepare.tokens.heads import Heads
from tuneline.prepare.tokens.render import Rendered
from tuneline.prepare.tokens.tokenise import tokenise
from tuneline.prepare.tokens.vocabulary import Vocabulary


@dataclass
class Encoded:
    """What is known of each row and of each example, in the order in which they were tokenised."""

    tokens: Path
    """Arrow file with the examples before truncation."""
    words: WordFile
    """The words of each row's text."""
    texts: "array[int]" = field(default_factory=lambda: array("Q"))
    """Hash of the words of each row's prompt and answer."""
    prompts: "array[int]" = field(default_factory=lambda: array("Q"))
    """Hash of the words of each row's prompt, i.e. of all text before its last answer; 0 for
    none."""
    questions: "array[int]" = field(default_factory=lambda: array("Q"))
    """Hash of the words of each row's last question; 0 for none."""
    beginnings: "array[int]" = field(default_factory=lambda: array("Q"))
    """Hash of the words of each row up to each of its answers but the last, as in `texts`."""
    num_beginnings: "array[int]" = field(default_factory=lambda: array("i"))
    """Number of `beginnings` of each row."""
    num_examples: "array[int]" = field(default_factory=lambda: array("i"))
    """Number of examples of each row."""
    batches: "array[int]" = field(default_factory=lambda: array("i"))
    """Number of examples of each batch of the file."""
    sizes: "array[int]" = field(default_factory=lambda: array("i"))
    """Length of each example in tokens."""
    needed: "array[int]" = field(default_factory=lambda: array("i"))
    """Smallest maximum length at which something of an example is learnt."""
    apart: "array[int]" = field(default_factory=lambda: array("i"))
    """Smallest maximum length at which the two answers of a preference differ; 0 for others."""
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    """Hash of the tokens of each example."""

    @property
    def owners(self) -> NDArray[numpy.int64]:
        """The row of each example."""
        return numpy.repeat(numpy.arange(len(self.num_examples)), self.num_examples)


@dataclass
class Batch:
    """What a worker returns for a batch of rows."""

    examples: pyarrow.RecordBatch
    words: bytes
    num_words: "array[int]"
    values: dict[str, "array[int]"]
    """Values to append to the fields of `Encoded` with the same names."""


def encode(
    spool: Spool,
    rows: Sequence[int],
    tokenizer: Any,
    work: Path,
    *,
    vocabulary: Vocabulary,
    method: Method,
    loss_on: str,
    digest: Any,
) -> Encoded:
    """Tokenise the given rows of the spool.

    Args:
        spool: the rendered rows.
        rows: indices of the rows, in the order in which to store them.
        tokenizer: the model's tokenizer.
        work: directory for the files with tokens and words.
        vocabulary: checks that the model has an embedding for every token.
        method: the training method.
        loss_on: which tokens the loss counts, "answers" or "all".
        digest: hash that is updated with the rows.

    Raises:
        DataError: the model has no embedding for a token.
    """
    encoded = Encoded(work / "tokens.arrow", WordFile(work / "words"))
    encoder = Encoder(tokenizer, method=method, loss_on=loss_on)
    with pyarrow.OSFile(str(encoded.tokens), "w") as file:
        writer = None
        batches = batched(spool.read(rows), parquet.BATCH)
        for lines, batch in in_order(encoder.encode, batches, num_alone=1):
            for line in lines:
                digest.update(line)
            vocabulary.check(batch.examples)
            if writer is None:
                writer = pyarrow.ipc.new_file(file, batch.examples.schema)
            writer.write_batch(batch.examples)
            encoded.words.append(batch.words, batch.num_words)
            encoded.batches.append(batch.examples.num_rows)
            for name, values in batch.values.items():
                getattr(encoded, name).extend(values)
        if writer is not None:
            writer.close()
    return encoded


def read_tokens(encoded: Encoded, number: int) -> pyarrow.RecordBatch:
    """Return a batch of the file of examples; workers may call this too."""
    with pyarrow.OSFile(str(encoded.tokens)) as file:
        return pyarrow.ipc.open_file(file).get_batch(number)


class Encoder:
    """Tokenises batches of rows, and takes their texts apart into words.

    Args:
        tokenizer: the model's tokenizer.
        method: the training method.
        loss_on: which tokens the loss counts.
    """

    def __init__(self, tokenizer: Any, *, method: Method, loss_on: str):
        heads = Heads(tokenizer)
        self._tokenizer, self._byte_level = tokenizer, find_byte_level(tokenizer, heads)
        self._words = RowReader(heads)
        self._method, self._loss_on = method, loss_on

    def encode(self, lines: list[bytes]) -> Batch:
        """Return the examples and the words of rows in the spool."""
        rendered = [Rendered.from_line(line) for line in lines]
        rows = list(
            tokenise(self._tokenizer, rendered, loss_on=self._loss_on, byte_level=self._byte_level)
        )
        examples = parquet.to_batch(rows, method=self._method)
        words = [
            self._words.read(values["prompt"], values["answer"], values.get("question", ""))
            for values in (row.heldout_row() for row in rendered)
        ]
        beginnings = [self._words.beginnings(row.pieces) for row in rendered if row.pieces]
        columns = {
            "beginnings": sum(beginnings, array("Q")),
            "num_beginnings": array("i", map(len, beginnings)),
            "texts": array("Q", (row.text for row in words)),
            "prompts": array("Q", (row.prompt for row in words)),
            "questions": array("Q", (row.question for row in words)),
            "num_examples": array("i", (len(row.pieces or [row]) for row in rendered)),
            "sizes": array("i", map(len, rows)),
            "needed": array("i", (lengths.num_tokens_needed(row) for row in rows)),
            "apart": array("i", map(lengths.num_tokens_apart, rows)),
            "hashes": token_hashes(examples),
        }
        return Batch(
            examples,
            b"".join(row.words.tobytes() for row in words),
            array("i", (len(row.words) for row in words)),
            columns,
        )


def token_hashes(batch: pyarrow.RecordBatch) -> "array[int]":
    """Return a hash of the tokens of each example."""
    columns = []
    for field_, column in zip(batch.schema, batch.columns, strict=True):
        if pyarrow.types.is_list(field_.type) and field_.name != LOSS_MASK:
            offsets = column.offsets.to_numpy()
            values = column.values.to_numpy().view(numpy.uint8)
            columns.append((4 * offsets, values.data))
    hashes = array("Q")
    for number in range(batch.num_rows):
        hashed = blake2b(digest_size=8)
        for offsets, data in columns:
            first, stop = offsets[number], offsets[number + 1]
            hashed.update(int(stop - first).to_bytes(4, "little"))
            hashed.update(data[first:stop])
        hashes.append(int.from_bytes(hashed.digest(), "little"))
    return hashes
