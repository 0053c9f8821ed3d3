"""One row of a source; the part of a source to read; remarks on how it was read."""

from dataclasses import dataclass, field
from typing import Any

DEFAULT_SPLIT = "train"
"""Split to read if the recipe names none."""


@dataclass(frozen=True)
class SourceRow:
    """One row of a source, or the reason why it cannot be read."""

    file: str
    """Name of the row's file, within the source if that is a directory; or the source as the recipe
    names it if it is not a file."""
    line: int
    """Number, from 1, of the line on which the row ends; for Parquet, Arrow and the Hub, of the
    row."""
    values: dict[str, Any] | None = None
    """Column name -> value; None: the row cannot be read."""
    reason: str = ""
    """Why the row cannot be read; "" if it can."""


@dataclass(frozen=True)
class Selection:
    """The part of a source to read."""

    split: str | None = None
    """The split's name, if the recipe names it; a source without that split is then refused."""
    subset: str | None = None
    """The subset's name; None: the only subset, or the default subset if there are several."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; None: the default branch."""
    default_split: str = DEFAULT_SPLIT
    """Split to read if `split` is None and the source has several."""
    takes_only_split: bool = False
    """Whether to read the only split of a source whatever its name, if `split` is None."""
    encoding: str | None = None
    """Encoding of text files; None: guess the encoding of each file."""


@dataclass
class Remarks:
    """What a user should know about how a source was read; the same remark on many files is one."""

    _files: dict[str, list[str]] = field(default_factory=dict)

    def add(self, remark: str, file: str) -> None:
        """Add a remark on a file; the remark continues a sentence that begins with the file."""
        self._files.setdefault(remark, []).append(file)

    def sentences(self) -> list[str]:
        """Return one sentence per remark; it names the first files and counts the others."""
        return [f"{_listed(files)}: {remark}" for remark, files in self._files.items()]


def _listed(files: list[str]) -> str:
    named = ", ".join(files[:3])
    return f"{named} and {len(files) - 3} more files" if len(files) > 3 else named
