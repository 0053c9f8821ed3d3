"""The hash that a page or a Markdown text states of itself, so that a change of it shows.

KFP keeps a page as a single file, apart from the artifact that it describes, so the hash is in the
file: a comment in its last line, which neither a browser nor a Markdown reader shows.
"""

import hashlib
import re
from pathlib import Path

_LABEL = "tuneline: SHA-256 of the text above"
_SEAL = re.compile(rb"<!-- tuneline: SHA-256 of the text above: ([0-9a-f]{64}) -->\n\Z")
# Of a seal with one changed byte, the label or the hash is left; of a page without one, the
# generator.
_REMAINS = re.compile(rb"SHA-256 of the text above|\b[0-9a-f]{64} -->\n?\Z")
_GENERATOR = b'<meta name="generator" content="tuneline '
_HEAD_BYTES, _TAIL_BYTES = 1024, 160


def seal(text: str) -> str:
    """Return a page or a Markdown text with the hash of the text in its last line."""
    # The empty line ends a table of a Markdown text.
    text = text.rstrip("\n") + "\n\n"
    return f"{text}<!-- {_LABEL}: {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_sealed(path: Path) -> bool:
    """Return whether a file is one that `seal` made, perhaps changed since."""
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return _GENERATOR in head or _REMAINS.search(file.read()) is not None


def broken_seal(content: bytes) -> str:
    """Return how a file differs from the one that `seal` made, as the end of a sentence.

    The result is empty if the file is unchanged, byte by byte.
    """
    found = _SEAL.search(content)
    if found is None:
        return "does not end with the hash of its text, which every page of this version has"
    actual = hashlib.sha256(content[: found.start()]).hexdigest()
    stated = found[1].decode()
    if actual == stated:
        return ""
    return (
        f"was changed after it was written: the SHA-256 of its text is {actual[:12]}, but it "
        f"states {stated[:12]}"
    )
