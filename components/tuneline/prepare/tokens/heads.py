"""Find the beginning that many texts share: the system message, often with definitions of tools.

Work on such a beginning is done once per process, so that a row costs as much as its own part. So
is work on parts between white space, most of which are words that many texts have.
"""

import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

_MIN_LENGTH = 64
"""Smallest length of a beginning, in characters; the markers of the first turn are shorter."""
_MAX_LENGTH = 1 << 16
"""Largest length of a beginning, in characters."""
_MAX_HEADS = 256
"""Largest number of beginnings that are remembered; texts with another one are not split."""


_MAX_CHARACTERS = 1 << 19
"""Number of characters of remembered parts at which all are forgotten; they take about 20 MB."""


class Parts(dict[str, Value]):
    """What is known of parts of texts."""

    def __init__(self) -> None:
        super().__init__()
        self._num_characters = 0

    def make_room(self) -> None:
        """Forget all parts if they take too much memory."""
        if self._num_characters > _MAX_CHARACTERS:
            self.clear()
            self._num_characters = 0

    def add(self, part: str, value: Value) -> None:
        """Remember a part."""
        self[part] = value
        self._num_characters += len(part)


class Heads:
    """Splits texts behind a special token, where neither words nor tokens go across.

    Args:
        tokenizer: the tokenizer of the texts.
    """

    def __init__(self, tokenizer: Any):
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        texts = [token.content for token in added]
        markers = [
            token.content
            for token in added
            if token.special
            and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
            and not re.match(r"\w", token.content[-1])
            and not any(_may_hide(text, token.content) for text in texts)
        ]
        # Of two markers that begin at the same place, the tokenizer takes the longer one.
        markers.sort(key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, markers))) if markers else None

    def end(self, text: str) -> int:
        """Return the length of the beginning of a text; 0 if the text is not to be split."""
        found = self._pattern.search(text, _MIN_LENGTH, _MAX_LENGTH) if self._pattern else None
        # A combining mark behind the marker could become one character with it.
        if found is None or not text[found.end() : found.end() + 1].isascii():
            return 0
        return found.end()


def _may_hide(text: str, marker: str) -> bool:
    """Return whether the token `text` may cover a part of the marker, so that it is not found."""
    if text == marker:
        return False
    return marker in text or any(text.endswith(marker[:length]) for length in range(1, len(marker)))


class Memory(Generic[Value]):
    """What a function returns for beginnings of texts.

    Args:
        heads: splits the texts.
        function: the function to apply to a beginning.
    """

    def __init__(self, heads: Heads, function: Callable[[str], Value]):
        self._heads = heads
        self._function = function
        self._values: dict[str, Value] = {}

    def split(self, text: str) -> tuple[Value | None, str]:
        """Return the function's value for the beginning of a text, and the rest of the text.

        If the text is not split, the value is None and the rest is the whole text.
        """
        end = self._heads.end(text)
        if not end:
            return None, text
        head = text[:end]
        value = self._values.get(head)
        if value is None:
            if len(self._values) == _MAX_HEADS:
                return None, text
            value = self._values[head] = self._function(head)
        return value, text[end:]
