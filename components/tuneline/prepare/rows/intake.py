"""Check rows, render them and append them to the spool; count and list the unusable rows."""

import contextlib
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import IO, Any

from tuneline.errors import DataError
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.formats import table
from tuneline.prepare.formats.example import BadRowError, Example
from tuneline.prepare.formats.reading import Reading, Row
from tuneline.prepare.parallel import batched, in_order
from tuneline.prepare.rows.spool import Spool
from tuneline.prepare.sources.row import SourceRow
from tuneline.prepare.tokens.render import Renderer
from tuneline.prepare.tokens.templates import TEMPLATES

logger = logging.getLogger(__name__)

_NUM_NAMED = 3
"""Number of reasons that an error message quotes."""
_BATCH = 256
"""Number of rows per batch."""
_MAX_ROWS_TO_DETECT = 16 * _BATCH
"""Number of readable rows after which a format must be recognised."""
_MAX_UNUSED_NAMES = 200
"""Largest number of unused columns and keys that are counted by name."""
_MAY_OMIT_KEYS = re.compile(r"\.(json|jsonl|ndjson)(\.|$)", re.IGNORECASE)
"""Matches names of files in which objects have only the keys that were written. In Parquet, and in
what `datasets` reads, all objects of a column have the same keys, and nulls fill the gaps."""
OTHER_NAMES = "(others)"
"""Name under which further unused columns and keys are counted."""

_Result = tuple[bytes | str, tuple[str, ...], str]
"""A row's line for the spool, or the reason why the row cannot be used; what it has unused; and the
first special token whose text is in its values, or ""."""


@dataclass
class Intake:
    """Counts of the rows of one source."""

    format: str
    """Format of the rows; "auto" until the format is recognised."""
    num_rows: int = 0
    num_rejected: int = 0
    reasons: dict[str, tuple[str, int]] = field(default_factory=dict)
    """The first reasons why rows are unusable -> file and line of the first row, number of rows."""
    special: tuple[str, str] | None = None
    """The first special token in a usable row's text, with file and line of the row."""
    num_special: int = 0
    """Number of usable rows with the text of a special token."""
    unused: Counter[str] = field(default_factory=Counter)
    """Column, or key of messages, that is not used -> number of usable rows with a value in it."""

    def add(self, other: "Intake") -> None:
        """Add the rejected rows and the unused columns of another source."""
        self.num_rejected += other.num_rejected
        for name, num_rows in other.unused.items():
            self.count_unused(name, num_rows)

    def count_unused(self, name: str, num_rows: int = 1) -> None:
        """Count rows with a column, or a key of messages, that is not used."""
        if name not in self.unused and len(self.unused) >= _MAX_UNUSED_NAMES:
            name = OTHER_NAMES
        self.unused[name] += num_rows


def take_in(
    rows: Iterator[SourceRow],
    config: PrepareConfig,
    *,
    source: str,
    format: str,
    renderer: Renderer,
    spool: Spool,
    rejected: IO[str],
    max_rows: int | None = None,
) -> Intake:
    """Append the usable rows of `source` to the spool, and the unusable rows to `rejected`.

    Args:
        rows: the rows to check.
        config: the `prepare` section of the recipe.
        source: name of the source, for messages.
        format: format of the rows; "auto" to recognise the format.
        renderer: renders rows with the chat template.
        spool: receives the usable rows.
        rejected: open file that receives the unusable rows, as JSON objects with the keys source,
            line, reason and row.
        max_rows: number of usable rows after which reading stops; None: read all rows.

    Raises:
        DataError: there are no rows, a mapped column is missing, or more rows are unusable than
            the config allows.
    """
    intake = Intake(format)
    reading = reading_of(config)
    first = _until_format_is_known(rows, intake, reading, config, source)
    # Columns of the first readable row, for messages; and mapped columns that no row had so far.
    columns: list[str] = []
    absent = set(config.columns)

    def lines(batch: list[SourceRow]) -> list[_Result]:
        return [_line(row, intake.format, renderer, reading) for row in batch]

    num_left = -1 if max_rows is None else max_rows
    with contextlib.closing(in_order(lines, batched(chain(first, rows), _BATCH))) as results:
        for row, (line, unused, special) in (
            pair for batch in results for pair in zip(*batch, strict=True)
        ):
            intake.num_rows += 1
            if row.values is not None:
                columns = columns or list(row.values)
                if absent:
                    absent = {ours for ours in absent if config.columns[ours] not in row.values}
            if isinstance(line, str):
                _reject(intake, row, line, config, rejected)
                continue
            for name in unused:
                intake.count_unused(name)
            if special:
                intake.special = intake.special or (special, f"{row.file} line {row.line}")
                intake.num_special += 1
            spool.append(line)
            num_left -= 1
            if num_left == 0:
                break
    if intake.num_rows == 0:
        raise DataError(f"{source} has no rows: it is empty")
    if max_rows is not None and intake.format != table.AUTO:
        # Only part of the source may have been read. Optional columns may be in other rows.
        absent &= set(table.FORMATS[intake.format].required)
    if columns:
        check_mapped(absent, columns, config, source)
    _check_share(intake, config, source)
    if intake.special is not None:
        token, place = intake.special
        logger.warning(
            "%d of %d rows of %s have the text of a special token, first %s in %s: the model sees "
            "the token itself there, as if the chat template had written it. Remove it, or write "
            "it in another way, unless that is meant",
            intake.num_special, intake.num_rows, source, token, place,
        )  # fmt: skip
    return intake


def _until_format_is_known(
    rows: Iterator[SourceRow],
    intake: Intake,
    reading: Reading,
    config: PrepareConfig,
    source: str,
) -> list[SourceRow]:
    """Read rows until some fit a format, set the format, and return the rows."""
    read: list[SourceRow] = []
    values: list[Row] = []
    while intake.format == table.AUTO and (batch := list(islice(rows, _BATCH))):
        read += batch
        values += [table.rename(row.values, reading) for row in batch if row.values is not None]
        intake.format = table.detect(values, config.method) or table.AUTO
        if len(values) >= _MAX_ROWS_TO_DETECT:
            break
    if intake.format == table.AUTO and values:
        given = [row.values for row in read if row.values is not None]
        absent = {
            ours
            for ours, theirs in config.columns.items()
            if not any(theirs in row for row in given)
        }
        check_mapped(absent, list(given[0]), config, source)
        raise table.unknown_format(values, config.method)
    return read


def reading_of(config: PrepareConfig) -> Reading:
    """Return how the rows of a source are read."""
    reading = Reading(
        config.system_prompt,
        columns=config.columns,
        ignored=frozenset(config.ignore_columns),
    )
    if config.template in TEMPLATES:
        reading.input_heading = TEMPLATES[config.template].input_heading
    return reading


def _line(row: SourceRow, format: str, renderer: Renderer, reading: Reading) -> _Result:
    """Return the result of a row."""
    if row.values is None:
        return row.reason, (), ""
    try:
        example = read_values(row, format, reading)
        line = renderer.render(example).to_line()
    except BadRowError as reason:
        return str(reason), (), ""
    # A name that is one object in memory is pickled once for all rows of a batch.
    unused = tuple(map(_printable, reading.unused))
    return line, unused, sys.intern(renderer.special_token_in(example))


def read_values(row: SourceRow, format: str, reading: Reading) -> Example:
    """Return the values of a readable row as an example.

    Raises:
        BadRowError: the row cannot be used.
    """
    assert row.values is not None
    reading.nulls_are_padding = not _MAY_OMIT_KEYS.search(row.file)
    return table.read_row(row.values, format, reading)


def _printable(name: str) -> str:
    return sys.intern(name[:200].encode("utf-8", "backslashreplace").decode())


def check_mapped(absent: set[str], columns: list[str], config: PrepareConfig, source: str) -> None:
    """Check that no mapped column is absent.

    Args:
        absent: mapped columns that a source lacks, by tuneline's names.
        columns: the columns of the source, for messages.
        config: the `prepare` section of the recipe.
        source: name of the source, for messages.

    Raises:
        DataError: a mapped column is absent.
    """
    for ours in sorted(absent):
        raise DataError(
            f"prepare.columns maps {ours} to '{config.columns[ours]}', but {source} has no such "
            f"column: its columns are {', '.join(columns)}"
        )


def _reject(
    intake: Intake, row: SourceRow, reason: str, config: PrepareConfig, rejected: IO[str]
) -> None:
    for ours, theirs in config.columns.items():
        if reason.startswith(f"{ours} "):
            reason = f"{theirs} ({ours}){reason.removeprefix(ours)}"
            break
    intake.num_rejected += 1
    place, num_rows = intake.reasons.get(reason, (f"{row.file} line {row.line}", 0))
    if num_rows or len(intake.reasons) < _NUM_NAMED:
        intake.reasons[reason] = place, num_rows + 1
    excerpt = "" if row.values is None else _excerpt(row.values)
    entry = {"source": row.file, "line": row.line, "reason": reason, "row": excerpt}
    rejected.write(json.dumps(entry) + "\n")


def _excerpt(values: dict[str, Any]) -> str:
    try:
        return json.dumps(values, default=str)[:300]
    except RecursionError:
        return f"columns {', '.join(values)}"[:300]


def _check_share(intake: Intake, config: PrepareConfig, source: str) -> None:
    if not intake.num_rejected:
        return
    share = intake.num_rejected / intake.num_rows
    named = "; ".join(
        f"{place}{f' and {num_rows - 1} more' if num_rows > 1 else ''}: {reason}"
        for reason, (place, num_rows) in intake.reasons.items()
    )
    more = intake.num_rejected - sum(num_rows for _, num_rows in intake.reasons.values())
    named += f"; and {more} more" if more else ""
    message = (
        f"{intake.num_rejected} of {intake.num_rows} rows of {source} cannot be used ({named})"
    )
    if share > config.max_rejected_share or intake.num_rejected == intake.num_rows:
        raise DataError(
            f"{message}: that is {share:.1%}, but max_rejected_share allows "
            f"{config.max_rejected_share:.1%}. Fix the rows, or raise prepare.max_rejected_share"
        )
    logger.warning("%s", message)
