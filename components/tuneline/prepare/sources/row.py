"""One row of a source, with its place in it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SourceRow:
    """One row of a source, or the reason why it cannot be read."""

    file: str
    """The file's name, or the source itself if it is not a file."""
    line: int
    """From 1: the line on which the row ends; for Parquet and the Hub the row's number."""
    values: dict[str, Any] | None = None
    """Column name -> value; None: the row cannot be read."""
    reason: str = ""
    """Why the row cannot be read."""


@dataclass(frozen=True)
class Selection:
    """The part of a dataset on the Hub to read; sources elsewhere have no such parts."""

    split: str = "train"
    """The split's name."""
    subset: str | None = None
    """The subset's name; None: the only one, or the default."""
    revision: str | None = None
    """Branch, tag or commit; None: the default branch."""
