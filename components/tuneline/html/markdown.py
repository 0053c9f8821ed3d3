"""Text of others in Markdown: model answers, names, licences and reasons.

Such text must not become a heading, a link, an image, HTML or a further cell of a table.
"""

import re

# An underscore within a word, as in names, and an ampersand before no entity have no meaning.
_SPECIAL = re.compile(r"([\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w)|&(?=[#\w]+;))")
# Control characters, and the marks that change the direction of text or cannot be seen.
_HIDDEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e007f]"
)
_AT_THE_START = re.compile(r"^(?:([#+-])|(\d+)([.)])(?= ))")


def escape_markdown(text: str, *, max_length: int | None = None) -> str:
    """Return text on one line, with the characters escaped that Markdown would interpret.

    Args:
        text: the text.
        max_length: number of characters to which the text is cut before it is escaped.
    """
    line = one_line(text)
    if max_length is not None and len(line) > max_length:
        line = line[: max_length - 3] + "..."
    line = _SPECIAL.sub(r"\\\1", line)
    return _AT_THE_START.sub(_escaped_start, line)


def code(text: str) -> str:
    """Return text as a code span, on one line; it may stand in a cell of a table."""
    line = one_line(text).replace("`", "'").replace("|", "\\|")
    return f"`{line}`" if line else ""


def code_block(text: str, language: str = "") -> str:
    """Return text as a block of code, with a fence that the text cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def one_line(text: str) -> str:
    """Return text with its white space reduced to single spaces, and without hidden characters."""
    return _HIDDEN.sub("", " ".join(text.split()))


def _escaped_start(match: re.Match[str]) -> str:
    """Return the beginning of a heading or of a list without its meaning."""
    return f"\\{match[1]}" if match[1] else f"{match[2]}\\{match[3]}"
