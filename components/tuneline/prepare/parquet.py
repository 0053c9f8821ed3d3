"""Token rows in Parquet, a batch a row group, so that memory does not grow with the data."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneline.artifacts import CHOSEN_IDS, INPUT_IDS, LOSS_MASK, PROMPT_IDS, REJECTED_IDS
from tuneline.prepare.tokenise import TokenRow

if TYPE_CHECKING:
    import pyarrow

BATCH = 512
"""Rows of a batch, as a rule."""


def to_batch(rows: Sequence[TokenRow], *, method: str) -> "pyarrow.RecordBatch":
    """Return rows of one method as columns."""
    import pyarrow

    schema = _schema(method)
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for row in rows:
        values = (
            (row.input_ids, row.loss_mask) if row.answers is None else (row.input_ids, *row.answers)
        )
        for name, value in zip(schema.names, values, strict=True):
            columns[name].append(value)
    return pyarrow.RecordBatch.from_pydict(columns, schema=schema)


def rows_of(batch: "pyarrow.RecordBatch", *, method: str) -> Iterator[TokenRow]:
    """Yield the rows of a batch."""
    for values in batch.to_pylist():
        if method == "dpo":
            answers = (values[CHOSEN_IDS], values[REJECTED_IDS])
            yield TokenRow(values[PROMPT_IDS], [], answers)
        else:
            yield TokenRow(values[INPUT_IDS], values[LOSS_MASK])


def write(path: Path, batches: "Iterable[pyarrow.RecordBatch]", *, method: str) -> int:
    """Write batches; return the number of rows."""
    import pyarrow.parquet

    count = 0
    with pyarrow.parquet.ParquetWriter(path, _schema(method), compression="zstd") as writer:
        for batch in batches:
            if batch.num_rows:
                writer.write_batch(batch)
            count += batch.num_rows
    return count


def read_batches(path: Path) -> "Iterator[pyarrow.RecordBatch]":
    """Yield the batches of a file that `write` made."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=BATCH)


def read(path: Path, *, method: str) -> Iterator[TokenRow]:
    """Yield the rows of a file that `write` made."""
    for batch in read_batches(path):
        yield from rows_of(batch, method=method)


def _schema(method: str) -> "pyarrow.Schema":
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    if method == "dpo":
        return pyarrow.schema([(name, ids) for name in (PROMPT_IDS, CHOSEN_IDS, REJECTED_IDS)])
    return pyarrow.schema([(INPUT_IDS, ids), (LOSS_MASK, pyarrow.list_(pyarrow.int8()))])
