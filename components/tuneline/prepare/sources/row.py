"""One row of a source, and its position in the source."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SourceRow:
    """One row of a source, or the reason why it cannot be read."""

    file: str
    """Name of the row's file, or the source as the recipe names it if it is not a file."""
    line: int
    """Number, from 1, of the line on which the row ends; for Parquet and the Hub, of the row."""
    values: dict[str, Any] | None = None
    """Column name -> value; None: the row cannot be read."""
    reason: str = ""
    """Why the row cannot be read; "" if it can."""


@dataclass(frozen=True)
class Selection:
    """The part of a Hub dataset to read; sources of other kinds are always read as a whole."""

    split: str = "train"
    """The split's name."""
    subset: str | None = None
    """The subset's name; None: the only subset, or the default subset if there are several."""
    revision: str | None = None
    """Branch, tag or commit; None: the default branch."""
