"""The row formats, how the format of rows is recognised, and how a row is read.

`FORMATS` is the only list of row formats. The values of `prepare.format`, their description in the
JSON Schema, detection, the check of `prepare.columns` and the messages are derived from `FORMATS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from tuneline.artifacts import Method
from tuneline.errors import DataError
from tuneline.prepare.formats import judged, preferences, readers, tools
from tuneline.prepare.formats.checks import has_value
from tuneline.prepare.formats.example import BadRowError, Example
from tuneline.prepare.formats.reading import REASONING, Reading, Row
from tuneline.prepare.formats.refusals import check_columns


@dataclass(frozen=True)
class RowFormat:
    """A row format."""

    method: Method
    """The training method that uses the format."""
    required: tuple[str, ...]
    """Columns that identify the format; a row must have all of them."""
    optional: tuple[str, ...]
    """Columns that are read if a row has them."""
    read: Callable[[Row, Reading], Example]
    """Function that turns a row with tuneline's column names into an example.

    It raises BadRowError if the row cannot be used.
    """

    @cached_property
    def known(self) -> frozenset[str]:
        """All columns of the format."""
        return frozenset((*self.required, *self.optional))


_AROUND = ("system", *tools.COLUMNS)
"""Optional columns of every format with a conversation."""

# Detection takes the first format whose columns a row has, so a format must come before every
# format whose required columns are a subset of its own.
FORMATS = {
    "preference": RowFormat(
        "dpo",
        ("chosen", "rejected"),
        (*preferences.PROMPTS, "input", "history", *_AROUND),
        preferences.read_preference,
    ),
    "messages": RowFormat("sft", ("messages",), (*_AROUND, "choices"), readers.read_conversation),
    "sharegpt": RowFormat("sft", ("conversations",), (*_AROUND, "choices"), readers.read_sharegpt),
    "alpaca": RowFormat(
        "sft",
        ("instruction", "output"),
        ("input", "history", *_AROUND, "choices", *REASONING),
        readers.read_alpaca,
    ),
    "prompt-completion": RowFormat(
        "sft",
        ("prompt", "completion"),
        ("history", *_AROUND, "choices", *REASONING),
        readers.read_prompt_completion,
    ),
    "text": RowFormat("cpt", ("text",), (), readers.read_document),
    **{
        name: RowFormat(
            "kto",
            (label,),
            ("prompt", "completion", "messages", "conversations", "instruction", "output")
            + ("input", "history", *_AROUND, *REASONING),
            judged.read_judged,
        )
        for name, label in zip(("kto", "kto-tag"), judged.LABELS, strict=True)
    },
}

AUTO = "auto"
"""Value of `prepare.format` with which the columns of the first rows determine the format."""

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[AUTO, *FORMATS]

DESCRIPTION = (
    f"Row format. {AUTO} recognises it by the columns that the first rows have values in. "
    + ". ".join(
        f"{name} ({entry.method}): {', '.join(entry.required)}"
        + (f"; optional {', '.join(entry.optional)}" if entry.optional else "")
        for name, entry in FORMATS.items()
    )
    + "."
)
"""Description of `prepare.format`."""


def detect(rows: Sequence[Row], method: Method) -> str | None:
    """Return the name of the format that most of the rows fit; None if no row fits one.

    A row fits a format if it has a value in each required column. Null values do not count, since a
    table made of several datasets has the columns of all. If no row has values in all the required
    columns of a format, it is enough that the columns exist.
    """
    entries = {name: entry for name, entry in FORMATS.items() if entry.method == method}
    for fits in (_has_values, _has_columns):
        counts = {
            name: sum(fits(row, entry.required) for row in rows) for name, entry in entries.items()
        }
        best = max(counts, key=lambda name: counts[name])
        if counts[best]:
            return best
    return None


def _has_values(row: Row, columns: tuple[str, ...]) -> bool:
    return all(has_value(row.get(column)) for column in columns)


def _has_columns(row: Row, columns: tuple[str, ...]) -> bool:
    return all(column in row for column in columns)


def unknown_format(rows: Sequence[Row], method: Method) -> DataError:
    """Return the error for rows that fit no format of the method."""
    columns = ", ".join(map(str, list(dict.fromkeys(name for row in rows for name in row))[:50]))
    for name, entry in FORMATS.items():
        if any(_has_columns(row, entry.required) for row in rows):
            return DataError(
                f"the rows look like format {name} (columns {columns}), which is for method "
                f"{entry.method}, but prepare.method is {method}: set prepare.method to "
                f"{entry.method}, or map other columns with prepare.columns"
            )
    return DataError(
        f"the columns ({columns or 'none'}) fit no known format for method {method}: "
        + "; ".join(
            f"{name} has {', '.join(entry.required)}"
            for name, entry in FORMATS.items()
            if entry.method == method
        )
        + ". Map them with prepare.columns, e.g. {prompt: question, completion: answer}"
    )


def check_names(format: str, columns: dict[str, str], method: Method) -> None:
    """Check the format that the recipe names, and the keys of the recipe's column map.

    Raises:
        DataError: the format is for another method, a key of the map is not a known column, or two
            keys have the same column.
    """
    if format != AUTO and FORMATS[format].method != method:
        raise DataError(
            f"format {format} is for method {FORMATS[format].method}, but prepare.method is "
            f"{method}: change prepare.format or prepare.method"
        )
    entries = FORMATS.values() if format == AUTO else [FORMATS[format]]
    known = {column for entry in entries for column in entry.known}
    for name in columns:
        if name not in known:
            raise DataError(
                f"prepare.columns maps '{name}', which is not a column that tuneline reads: the "
                f"keys are {', '.join(sorted(known))}, the values are columns of the source"
            )
    fields: dict[str, str] = {}
    for ours, theirs in columns.items():
        if theirs in fields:
            raise DataError(
                f"prepare.columns maps {fields[theirs]} and {ours} to the same column '{theirs}', "
                "so both would have the same value: name another column for one of them, or "
                "remove it"
            )
        fields[theirs] = ours


def rename(values: Row, reading: Reading) -> Row:
    """Return the row with tuneline's column names and without the columns that are ignored.

    A mapped column that is absent stays absent. A column that has the name of a mapped column is
    hidden by it, and noted as unused if it has a value.
    """
    columns, ignored = reading.columns, reading.ignored
    if not columns and not ignored:
        return values
    taken = set(columns.values())
    renamed = {}
    for name, value in values.items():
        if name in columns and name not in taken and has_value(value) and name not in ignored:
            reading.unused.add(name)
        elif name not in columns and name not in taken and name not in ignored:
            renamed[name] = value
    for ours, theirs in columns.items():
        if theirs in values and theirs not in ignored:
            renamed[ours] = values[theirs]
    return renamed


def read_row(values: Row, format: str, reading: Reading) -> Example:
    """Check one row and return it as an `Example`; `reading.unused` then has what is not used.

    Raises:
        BadRowError: the row cannot be used.
    """
    reading.unused = set()
    entry = FORMATS[format]
    try:
        row = rename(values, reading)
        check_columns(row, entry.known, entry.method, reading)
        return entry.read(row, reading)
    except RecursionError:
        raise BadRowError("a value is nested too deeply") from None
