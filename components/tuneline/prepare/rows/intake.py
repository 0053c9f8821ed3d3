"""Check rows, render them and append them to the spool; count and list the unusable rows."""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import IO

from tuneline.errors import DataError
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.formats import table
from tuneline.prepare.formats.example import BadRowError
from tuneline.prepare.formats.readers import Wording
from tuneline.prepare.parallel import batched, in_order
from tuneline.prepare.rows.spool import Spool
from tuneline.prepare.sources.row import SourceRow
from tuneline.prepare.tokens.render import Renderer
from tuneline.prepare.tokens.templates import TEMPLATES

logger = logging.getLogger(__name__)

_NUM_NAMED = 3
"""Number of unusable rows whose reasons an error message quotes."""
_BATCH = 256
"""Number of rows per batch."""


@dataclass
class Intake:
    """Counts of the rows of one source."""

    format: str
    """Format of the rows; "auto" until the format is recognised."""
    num_rows: int = 0
    num_rejected: int = 0
    first_rejected: list[str] = field(default_factory=list)
    """The first unusable rows: file, line and reason."""


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
    first = _until_format_is_known(rows, intake, config, source)

    wording = _wording(config)

    def lines(batch: list[SourceRow]) -> list[bytes | str]:
        return [_line(row, config, intake.format, renderer, wording) for row in batch]

    num_left = -1 if max_rows is None else max_rows
    with contextlib.closing(in_order(lines, batched(chain(first, rows), _BATCH))) as results:
        for row, line in (pair for batch in results for pair in zip(*batch, strict=True)):
            intake.num_rows += 1
            if isinstance(line, str):
                _reject(intake, row, line, config, rejected)
                continue
            spool.append(line)
            num_left -= 1
            if num_left == 0:
                break
    if intake.num_rows == 0:
        raise DataError(f"{source} has no rows: it is empty")
    _check_share(intake, config, source)
    return intake


def _until_format_is_known(
    rows: Iterator[SourceRow], intake: Intake, config: PrepareConfig, source: str
) -> list[SourceRow]:
    """Read rows up to the first readable one, set the format from its columns, return the rows."""
    read = []
    while intake.format == table.AUTO and (row := next(rows, None)) is not None:
        read.append(row)
        if row.values is not None:
            _check_columns(row, config, source)
            values = table.rename(row.values, config.columns)
            intake.format = table.detect(values, config.method)
    return read


def _wording(config: PrepareConfig) -> Wording:
    template = TEMPLATES.get(config.template)
    if template is None:
        return Wording(config.system_prompt)
    return Wording(config.system_prompt, input_heading=template.input_heading)


def _line(
    row: SourceRow, config: PrepareConfig, format: str, renderer: Renderer, wording: Wording
) -> bytes | str:
    """Return a row's line for the spool, or the reason why the row cannot be used."""
    if row.values is None:
        return row.reason
    try:
        example = table.read_row(table.rename(row.values, config.columns), format, wording)
        return renderer.render(example).to_line()
    except BadRowError as reason:
        return str(reason)


def _check_columns(row: SourceRow, config: PrepareConfig, source: str) -> None:
    assert row.values is not None
    for ours, theirs in config.columns.items():
        if theirs not in row.values:
            raise DataError(
                f"prepare.columns maps {ours} to '{theirs}', but {source} has no such column: "
                f"its columns are {', '.join(map(str, row.values))}"
            )


def _reject(
    intake: Intake, row: SourceRow, reason: str, config: PrepareConfig, rejected: IO[str]
) -> None:
    for ours, theirs in config.columns.items():
        if reason.startswith(f"{ours} "):
            reason = f"{theirs} ({ours}){reason.removeprefix(ours)}"
            break
    intake.num_rejected += 1
    if len(intake.first_rejected) < _NUM_NAMED:
        intake.first_rejected.append(f"{row.file} line {row.line}: {reason}")
    excerpt = "" if row.values is None else json.dumps(row.values, default=str)[:300]
    entry = {"source": row.file, "line": row.line, "reason": reason, "row": excerpt}
    rejected.write(json.dumps(entry) + "\n")


def _check_share(intake: Intake, config: PrepareConfig, source: str) -> None:
    if not intake.num_rejected:
        return
    share = intake.num_rejected / intake.num_rows
    named = "; ".join(intake.first_rejected)
    more = intake.num_rejected - len(intake.first_rejected)
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
