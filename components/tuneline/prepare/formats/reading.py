"""What readers need besides the row, and what they report: the names of what they did not use."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which datasets, and the messages that chat templates read, have the reasoning."""


@dataclass
class Reading:
    """How the rows of one source are read; and, after a row was read, what it has in vain."""

    system_prompt: str | None = None
    """System message to add to rows that have none; "" adds an empty message, None adds none."""
    input_heading: str = "\n\n"
    """Text between the instruction and the input of the alpaca format."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column that tuneline reads -> column of the source."""
    ignored: frozenset[str] = frozenset()
    """Columns of the source, and message keys written as `messages[].name`, to read nothing
    from."""
    nulls_are_padding: bool = False
    """Whether a null in an object may stand for a missing key, as in Parquet, where every object
    of a column has the same keys."""
    unused: set[str] = field(default_factory=set)
    """Columns and message keys of the row read last that have a value but were not used."""

    def leave(self, name: str, reason: str = "") -> None:
        """Note that a column or a message key of the row is not used.

        Args:
            name: the name of a column as tuneline reads it, or of a key, e.g. `messages[].name`.
            reason: why it is not used; "" if tuneline never uses it.
        """
        name = self.source_name(name)
        self.unused.add(f"{name} ({reason})" if reason else name)

    def source_name(self, name: str) -> str:
        """Return the name that the source has for a column or for a key of messages."""
        column, bracket, key = name.partition("[]")
        return self.columns.get(column, column) + bracket + key

    def is_ignored(self, name: str) -> bool:
        """Return whether the recipe ignores a key of messages, e.g. `messages[].name`."""
        return bool(self.ignored) and self.source_name(name) in self.ignored
