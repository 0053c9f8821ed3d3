"""Read the rows of Parquet, Arrow and Feather files."""

from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from tuneline.errors import DataError
from tuneline.prepare.sources.row import SourceRow
from tuneline.prepare.sources.stored import StoredFile

_BATCH = 256
_FILE_MARK = b"ARROW1"


def read_parquet(file: StoredFile) -> Iterator[SourceRow]:
    """Yield the rows of a Parquet file."""
    with file.open_seekable() as opened:
        yield from _rows(file, "Parquet", _parquet_batches(opened))


def read_arrow(file: StoredFile) -> Iterator[SourceRow]:
    """Yield the rows of an Arrow stream, which `datasets` writes, or of an Arrow file."""
    with file.open_seekable() as opened:
        yield from _rows(file, "Arrow", _arrow_batches(opened))


def _parquet_batches(opened: Any) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(opened) as parquet:
        yield from parquet.iter_batches(batch_size=_BATCH)


def _arrow_batches(opened: Any) -> Iterator[Any]:
    is_file = opened.read(len(_FILE_MARK)) == _FILE_MARK
    opened.seek(0)
    if is_file:
        reader = pyarrow.ipc.open_file(opened)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        batches = iter(pyarrow.ipc.open_stream(opened))
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            yield batch.slice(start, _BATCH)


def _rows(file: StoredFile, kind: str, batches: Iterator[Any]) -> Iterator[SourceRow]:
    number = 0
    try:
        for batch in batches:
            for values in batch.to_pylist():
                number += 1
                yield SourceRow(file.name, number, values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file.name} is not a complete {kind} file: row {number + 1} cannot be read "
            f"({' '.join(str(error).split())[:200]}). Create or download it again"
        ) from None
