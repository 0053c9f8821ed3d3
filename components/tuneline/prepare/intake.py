"""Read, check and render rows into the spool; count and list those that cannot be used."""

import collections
import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import IO

from tuneline.errors import DataError
from tuneline.prepare import formats
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.parallel import batched, in_order
from tuneline.prepare.render import Renderer
from tuneline.prepare.source import SourceRow
from tuneline.prepare.spool import Spool

logger = logging.getLogger(__name__)

_NUM_NAMED = 3
_BATCH = 256


@dataclass
class Intake:
    """What came of the rows of one source."""

    format: str
    num_rows: int = 0
    num_rejected: int = 0
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)
    first_rejected: list[str] = field(default_factory=list)


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
    """Append the usable rows of `source` to the spool and the others to `rejected`.

    Args:
        rows: what was read.
        config: the recipe's part.
        source: the name of the source in messages.
        format: the rows' format, or auto.
        renderer: the chat template.
        spool: where usable rows go.
        rejected: an open file for lines {"source", "line", "reason", "row"}.
        max_rows: stop after so many usable rows.

    Raises:
        DataError: no rows, unknown columns, or more unusable rows than the config allows.
    """
    intake = Intake(format)
    first = _until_format_is_known(rows, intake, config, source)

    def lines(batch: list[SourceRow]) -> list[bytes | str]:
        return [_line(row, config, intake.format, renderer) for row in batch]

    room = -1 if max_rows is None else max_rows
    with contextlib.closing(in_order(lines, batched(chain(first, rows), _BATCH))) as results:
        for row, line in (pair for batch in results for pair in zip(*batch, strict=True)):
            intake.num_rows += 1
            if isinstance(line, str):
                _reject(intake, row, line, config, rejected)
                continue
            spool.append(line)
            room -= 1
            if room == 0:
                break
    if intake.num_rows == 0:
        raise DataError(f"{source} has no rows: it is empty")
    _check_share(intake, config, source)
    return intake


def _until_format_is_known(
    rows: Iterator[SourceRow], intake: Intake, config: PrepareConfig, source: str
) -> list[SourceRow]:
    """Return the rows up to the first that has columns, and note the format that they tell."""
    read = []
    while intake.format == "auto" and (row := next(rows, None)) is not None:
        read.append(row)
        if row.values is not None:
            _check_columns(row, config, source)
            values = formats.rename(row.values, config.columns)
            intake.format = formats.detect(values, config.method)
    return read


def _line(row: SourceRow, config: PrepareConfig, format: str, renderer: Renderer) -> bytes | str:
    """Return a row's line for the spool, or why it cannot be used."""
    if row.values is None:
        return row.reason
    try:
        example = formats.convert(
            formats.rename(row.values, config.columns),
            format,
            system_prompt=config.system_prompt,
            alpaca_wording=config.template == "alpaca",
        )
        return renderer.render(example).to_line()
    except formats.BadRowError as reason:
        return str(reason)


def _check_columns(row: SourceRow, config: PrepareConfig, source: str) -> None:
    assert row.values is not None
    for ours, theirs in config.columns.items():
        if theirs not in row.values:
            raise DataError(
                f"prepare.columns maps {ours} to '{theirs}', which {source} does not have: "
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
    intake.reasons[reason.split(" (")[0]] += 1
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
    said = f"{intake.num_rejected} of {intake.num_rows} rows of {source} cannot be used ({named})"
    if share > config.max_rejected_share or intake.num_rejected == intake.num_rows:
        raise DataError(
            f"{said}: that is {share:.1%}, and max_rejected_share allows "
            f"{config.max_rejected_share:.1%}; mend the rows, or raise prepare.max_rejected_share"
        )
    logger.warning("%s", said)
