"""The hash that a JSON document or a page states of its own text, so that a change of it shows.

A JSON document has the hash in its `record_sha256`. A page or a Markdown text, which KFP keeps as a
single file apart from the artifact that it describes, has the hash in a comment in its last line,
which neither a browser nor a Markdown reader shows.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SEAL = re.compile(r'^(  "record_sha256": ")([0-9a-f]*)(",?)$', re.MULTILINE)
"""The line of a record, indented by two spaces, that holds the SHA-256 of the whole text."""

_LABEL = "tuneline: SHA-256 of the text above"
_PAGE_SEAL = re.compile(rb"<!-- tuneline: SHA-256 of the text above: ([0-9a-f]{64}) -->\n\Z")
# Of a seal with one changed byte, the label or the hash is left; of a page without one, the
# generator.
_REMAINS = re.compile(rb"SHA-256 of the text above|\b[0-9a-f]{64} -->\n?\Z")
_GENERATOR = b'<meta name="generator" content="tuneline '
_HEAD_BYTES, _TAIL_BYTES = 1024, 160


def seal(text: str) -> str:
    """Return the text of a JSON document with the SHA-256 of the text in its `record_sha256`.

    The document is indented by two spaces and has the key `record_sha256` with an empty value.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()
    return _SEAL.sub(rf"\g<1>{digest}\g<3>", text, count=1)


def sealed_json(document: Mapping[str, Any]) -> str:
    """Return a document as JSON with the SHA-256 of the text in its `record_sha256`."""
    return seal(json.dumps({**document, "record_sha256": ""}, indent=2) + "\n")


def is_sealed(text: str) -> bool:
    """Return whether a document states its own SHA-256, as `seal` writes it."""
    found = _SEAL.search(text)
    return found is not None and found[2] != ""


def broken_seal(text: str) -> str:
    """Return how a document differs from the one that `seal` made, as the end of a sentence.

    The result is empty if the document is unchanged, byte by byte.
    """
    found = _SEAL.search(text)
    if found is None or not found[2]:
        return "has no hash of its own fields, which every record of this version has"
    actual = hashlib.sha256((text[: found.start(2)] + text[found.end(2) :]).encode()).hexdigest()
    if actual == found[2]:
        return ""
    return (
        f"was changed after it was written: the SHA-256 of its fields is {actual[:12]}, but it "
        f"states {found[2][:12]}"
    )


def seal_page(text: str) -> str:
    """Return a page or a Markdown text with the hash of the text in its last line."""
    # The empty line ends a table of a Markdown text.
    text = text.rstrip("\n") + "\n\n"
    return f"{text}<!-- {_LABEL}: {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_sealed_page(path: Path) -> bool:
    """Return whether a file is one that `seal_page` made, perhaps changed since."""
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return _GENERATOR in head or _REMAINS.search(file.read()) is not None


def broken_page_seal(content: bytes) -> str:
    """Return how a file differs from the one that `seal_page` made, as the end of a sentence.

    The result is empty if the file is unchanged, byte by byte.
    """
    found = _PAGE_SEAL.search(content)
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
