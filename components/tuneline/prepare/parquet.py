"""Write token rows to Parquet in row groups, so that memory does not grow with the data."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tuneline.artifacts import CHOSEN_IDS, INPUT_IDS, LOSS_MASK, PROMPT_IDS, REJECTED_IDS
from tuneline.prepare.tokenise import TokenRow

_ROWS_A_GROUP = 512


def write(path: Path, rows: Iterable[TokenRow], *, method: str) -> int:
    """Write rows of one method; return how many."""
    import pyarrow
    import pyarrow.parquet

    ids = pyarrow.list_(pyarrow.int32())
    if method == "dpo":
        fields = {PROMPT_IDS: ids, CHOSEN_IDS: ids, REJECTED_IDS: ids}
    else:
        fields = {INPUT_IDS: ids, LOSS_MASK: pyarrow.list_(pyarrow.int8())}
    schema = pyarrow.schema(list(fields.items()))
    count = 0
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in _groups(rows):
            columns: dict[str, list[Any]] = {name: [] for name in fields}
            for row in group:
                values = (
                    (row.input_ids, row.loss_mask)
                    if row.answers is None
                    else (row.input_ids, *row.answers)
                )
                for name, value in zip(fields, values, strict=True):
                    columns[name].append(value)
            writer.write_table(pyarrow.table(columns, schema=schema))
            count += len(group)
    return count


def read(path: Path, *, method: str) -> Iterator[TokenRow]:
    """Yield the rows of a file that `write` made."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS_A_GROUP):
            for values in batch.to_pylist():
                if method == "dpo":
                    answers = (values[CHOSEN_IDS], values[REJECTED_IDS])
                    yield TokenRow(values[PROMPT_IDS], [], answers)
                else:
                    yield TokenRow(values[INPUT_IDS], values[LOSS_MASK])


def _groups(rows: Iterable[TokenRow]) -> Iterator[list[TokenRow]]:
    group: list[TokenRow] = []
    for row in rows:
        group.append(row)
        if len(group) == _ROWS_A_GROUP:
            yield group
            group = []
    if group:
        yield group
