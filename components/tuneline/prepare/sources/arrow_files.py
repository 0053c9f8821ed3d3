"""Read the rows of Parquet, Arrow and Feather files.

These files can hold far more than their size: many rows share one value, and runs of equal values
take no space. Therefore what a file states is checked before it is read, and the size of each row
before the row is made.
"""

import io
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from tuneline.errors import DataError
from tuneline.prepare.sources.arrow_messages import Messages
from tuneline.prepare.sources.arrow_sizes import OTHER_BYTES, check_size, sizes
from tuneline.prepare.sources.proportion import MAX_ROW_BYTES, TOO_LARGE
from tuneline.prepare.sources.row import SourceRow
from tuneline.prepare.sources.stored import StoredFile

_BATCH = 256
_BYTES_OF_A_ROW = 64
"""Size that is counted for a row beside its values."""


def read_parquet(file: StoredFile) -> Iterator[SourceRow]:
    """Yield the rows of a Parquet file.

    Raises:
        DataError: the file is damaged, or its content is out of proportion to its size.
    """
    with file.open_seekable() as opened:
        yield from _rows(file, "Parquet", opened, _parquet_batches(file, opened))


def read_arrow(file: StoredFile) -> Iterator[SourceRow]:
    """Yield the rows of an Arrow stream, which `datasets` writes, or of an Arrow file.

    Raises:
        DataError: the file is damaged, or its content is out of proportion to its size.
    """
    with file.open_seekable() as opened:
        yield from _rows(file, "Arrow", opened, _arrow_batches(file, opened))


def _parquet_batches(file: StoredFile, opened: Any) -> Iterator[Any]:
    metadata = pyarrow.parquet.read_metadata(opened)
    num_bytes = 0
    texts = set()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            num_bytes += max(column.total_uncompressed_size, column.num_values * OTHER_BYTES)
            if column.has_dictionary_page and column.physical_type == "BYTE_ARRAY":
                texts.add(column.path_in_schema)
    check_size(file.name, num_bytes, _size_of(opened))
    # A text that many rows share stays one text until the size of the rows is known.
    with pyarrow.parquet.ParquetFile(
        opened, metadata=metadata, read_dictionary=sorted(texts)
    ) as parquet:
        yield from parquet.iter_batches(batch_size=_BATCH)


def _arrow_batches(file: StoredFile, opened: Any) -> Iterator[Any]:
    # An Arrow file is a stream between a mark and a list of its batches, which is not needed.
    messages = Messages(file.name, opened)
    messages.check_next()
    reader = pyarrow.ipc.open_stream(opened)
    while True:
        messages.check_next()
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        batch.validate(full=True)
        yield batch


def _rows(file: StoredFile, kind: str, opened: Any, batches: Iterator[Any]) -> Iterator[SourceRow]:
    number = num_bytes = 0
    num_stored = _size_of(opened)
    try:
        for batch in batches:
            least = num_bytes + batch.num_rows * _BYTES_OF_A_ROW
            check_size(file.name, least, num_stored)
            for rows, size in _parts(batch):
                num_bytes += size + rows.num_rows * _BYTES_OF_A_ROW
                check_size(file.name, num_bytes, num_stored)
                if size > MAX_ROW_BYTES:
                    number += 1
                    yield SourceRow(file.name, number, reason=TOO_LARGE)
                    continue
                for values in rows.to_pylist():
                    number += 1
                    yield SourceRow(file.name, number, values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file.name} is not a complete {kind} file: row {number + 1} cannot be read "
            f"({' '.join(str(error).split())[:200]}). Create or download it again"
        ) from None


def _parts(batch: Any) -> Iterator[tuple[Any, int]]:
    """Yield consecutive rows that are at most MAX_ROW_BYTES together, or one row, with the size."""
    of_rows = sum(sizes(column) for column in batch.columns) if batch.num_columns else []
    start = total = 0
    for number, size in enumerate(map(int, of_rows)):
        if number > start and (total + size > MAX_ROW_BYTES or number - start == _BATCH):
            yield batch.slice(start, number - start), total
            start, total = number, 0
        total += size
    if batch.num_rows > start:
        yield batch.slice(start), total


def _size_of(opened: Any) -> int:
    size = int(opened.seek(0, io.SEEK_END))
    opened.seek(0)
    return size
