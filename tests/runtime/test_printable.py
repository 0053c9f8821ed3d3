"""Text of others cannot steer a terminal or forge a line of a log."""

import json
import logging
from pathlib import Path

import pytest

from tuneline.errors import DataError
from tuneline.runtime import step as step_module
from tuneline.runtime.printable import printable
from tuneline.runtime.redaction import RedactingFilter
from tuneline.runtime.step import step
from tuneline.runtime.termination import Ending, encode

NAME = "rows\x1b[2J\x1b]0;owned\x07.jsonl\nINFO tuneline.gate: promote\r\u202egnp.exe"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("dos\r\nlines", "dos\nlines"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("over\rwritten", r"over\rwritten"),
        ("\x9b2J and \x7f", r"\x9b2J and \x7f"),
        ("abc\u202edcb", r"abc\u202edcb"),
        ("half \udcff", r"half \udcff"),
        ("\uc548\ub155 \U0001f44d caf\u00e9", "\uc548\ub155 \U0001f44d caf\u00e9"),
    ],
)
def test_harmful_characters_become_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_one_line() -> None:
    assert printable("a\nb", in_one_line=True) == r"a\nb"


def test_a_name_cannot_forge_a_line_of_the_log() -> None:
    record = logging.LogRecord("tuneline", logging.INFO, "", 0, "read %s", (NAME,), None)
    assert RedactingFilter().filter(record)
    lines = record.getMessage().split("\n")
    assert lines[0] == r"read rows\x1b[2J\x1b]0;owned\x07.jsonl"
    assert lines[1].startswith("    INFO tuneline.gate: promote")
    assert "\x1b" not in record.getMessage() and "\u202e" not in record.getMessage()


def test_what_a_failed_step_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = tmp_path / "events.jsonl"
    monkeypatch.setenv(step_module.EVENTS_VARIABLE, str(events))
    with pytest.raises(SystemExit), step("prepare"):
        raise DataError(f"{NAME} has no rows")
    for text in (
        capsys.readouterr().err,
        json.loads(events.read_text().splitlines()[-1])["message"],
    ):
        assert r"\x1b[2J" in text and "\x1b" not in text and "\r" not in text
    left = json.loads(encode(Ending(step="prepare", error="DataError", text=NAME)))["text"]
    assert r"\x1b[2J" in left and "\x1b" not in left
