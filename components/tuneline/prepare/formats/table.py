"""The row formats, how the format of a row is recognised, and how a row is read.

`FORMATS` is the only list of row formats. The values of `prepare.format`, their description in the
JSON Schema, detection, the check of `prepare.columns` and the messages are derived from `FORMATS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tuneline.artifacts import Method
from tuneline.errors import DataError
from tuneline.prepare.formats import readers
from tuneline.prepare.formats.example import Example
from tuneline.prepare.formats.readers import Row, Wording


@dataclass(frozen=True)
class RowFormat:
    """A row format."""

    method: Method
    """The training method that uses the format."""
    required: tuple[str, ...]
    """Columns that identify the format; a row must have all of them."""
    optional: tuple[str, ...]
    """Columns that are read if a row has them."""
    read: Callable[[Row, Wording], Example]
    """Function that turns a row with tuneline's column names into an example.

    It raises BadRowError if the row cannot be used.
    """


# Detection takes the first format whose columns a row has, so a format must come before every
# format whose required columns are a subset of its own.
FORMATS = {
    "preference": RowFormat(
        "dpo", ("chosen", "rejected"), ("prompt", "system"), readers.read_preference
    ),
    "messages": RowFormat("sft", ("messages",), ("system", "choices"), readers.read_conversation),
    "sharegpt": RowFormat("sft", ("conversations",), ("system", "choices"), readers.read_sharegpt),
    "alpaca": RowFormat(
        "sft", ("instruction", "output"), ("input", "system", "choices"), readers.read_alpaca
    ),
    "prompt-completion": RowFormat(
        "sft", ("prompt", "completion"), ("system", "choices"), readers.read_prompt_completion
    ),
    "text": RowFormat("cpt", ("text",), (), readers.read_document),
}

AUTO = "auto"
"""Value of `prepare.format` with which the columns of the first row determine the format."""

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[AUTO, *FORMATS]

DESCRIPTION = (
    f"Row format. {AUTO} recognises it by the columns of the first row. "
    + ". ".join(
        f"{name} ({entry.method}): {', '.join(entry.required)}"
        + (f"; optional {', '.join(entry.optional)}" if entry.optional else "")
        for name, entry in FORMATS.items()
    )
    + "."
)
"""Description of `prepare.format`."""


def detect(values: dict[str, Any], method: Method) -> str:
    """Return the name of the format that the columns of the first row fit.

    Raises:
        DataError: the columns fit no format that the method can use.
    """
    fitting = [
        name
        for name, entry in FORMATS.items()
        if all(column in values for column in entry.required)
    ]
    for name in fitting:
        if FORMATS[name].method == method:
            return name
    columns = ", ".join(map(str, values)) or "none"
    if fitting:
        raise DataError(
            f"the rows look like format {fitting[0]} (columns {columns}), which is for method "
            f"{FORMATS[fitting[0]].method}, but prepare.method is {method}: set prepare.method to "
            f"{FORMATS[fitting[0]].method}, or map other columns with prepare.columns"
        )
    raise DataError(
        f"the columns ({columns}) fit no known format for method {method}: "
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
        DataError: the format is for another method, or a key of the map is not a known column.
    """
    if format != AUTO and FORMATS[format].method != method:
        raise DataError(
            f"format {format} is for method {FORMATS[format].method}, but prepare.method is "
            f"{method}: change prepare.format or prepare.method"
        )
    entries = FORMATS.values() if format == AUTO else [FORMATS[format]]
    known = {column for entry in entries for column in (*entry.required, *entry.optional)}
    for name in columns:
        if name not in known:
            raise DataError(
                f"prepare.columns maps '{name}', which is not a column that tuneline reads: the "
                f"keys are {', '.join(sorted(known))}, the values are columns of the source"
            )


def rename(values: dict[str, Any], columns: dict[str, str]) -> Row:
    """Return the row with tuneline's column names; a mapped column that is absent stays absent."""
    if not columns:
        return values
    taken = set(columns.values())
    renamed = {name: value for name, value in values.items() if name not in taken}
    for ours, theirs in columns.items():
        renamed.pop(ours, None)
        if theirs in values:
            renamed[ours] = values[theirs]
    return renamed


def read_row(row: Row, format: str, wording: Wording) -> Example:
    """Check one row and return it as an `Example`.

    Raises:
        BadRowError: the row cannot be used.
    """
    return FORMATS[format].read(row, wording)
