"""Make text of others harmless to terminals and logs.

Names and messages come from data, models and servers. An escape sequence in one of them could clear
a terminal or hide a line, a carriage return could overwrite one, and a mark for right-to-left text
could reorder one.
"""

import re

_HARMFUL = re.compile(
    # Control characters but tab and line feed, half surrogates, and marks of direction.
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
    "\ud800-\udfff]"
)


def printable(text: str, *, in_one_line: bool = False) -> str:
    r"""Return the text with each harmful character written as an escape, e.g. \x1b.

    Args:
        text: the text.
        in_one_line: whether line feeds are written as escapes too.
    """
    if text.isascii() and text.isprintable():
        return text
    text = _HARMFUL.sub(_escape, text.replace("\r\n", "\n"))
    return text.replace("\n", r"\n") if in_one_line else text


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode()
