"""What Ollama reads in a Modelfile is what was meant: quotes, backslashes, lines."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from tuneline.artifacts import MODELFILE
from tuneline.quantize.gguf import modelfile
from tuneline.quantize.proof.reference import Reference, measure


def closed(value: str) -> str | None:
    """Return what a value means, None while its quotes are open."""
    if value.startswith('"""'):
        return value[3:-3] if len(value) >= 6 and value.endswith('"""') else None
    if value.startswith('"'):
        return value[1:-1] if len(value) >= 2 and value.endswith('"') else None
    return value


def read(text: str) -> list[tuple[str, str]]:
    """Read a Modelfile as Ollama does (github.com/ollama/ollama, parser/parser.go, 2026-08).

    A command is a word, a parameter's name where it is PARAMETER, and a value. At each end of a
    line the value so far, stripped, is complete unless its quotes are open: three that begin it are
    closed by three at its end, one by one. Nothing is an escape. Characters that Go does not print
    are dropped, but for white space within a value.
    """
    found, lines = [], re.split(r"(?<=[\n\r])", text)
    while lines:
        line = lines.pop(0)
        if not line.strip():
            continue
        name, _, value = line.partition(" ")
        if name == "PARAMETER":
            name, _, value = value.partition(" ")
        while (meant := closed(value.strip(" \t\r\n"))) is None:
            if not lines:
                raise ValueError(f"the quotes of {name} are open to the end")
            value += lines.pop(0)
        kept = "".join(letter for letter in meant if letter.isprintable() or letter in "\t\r\n")
        found.append((name, kept))
    return found


def test_the_reader_reads_what_ollamas_own_tests_have() -> None:
    for written, meant in (
        ("### User:", "### User:"),
        ("### User: ", "### User:"),
        ('"### User: "', "### User: "),
        ('"""### User:"""', "### User:"),
        ('"""### User:\n"""', "### User:\n"),
    ):
        assert read(f"FROM x\nPARAMETER stop {written}\n") == [("FROM", "x"), ("stop", meant)]


STOPS = [
    "<|im_end|>",
    "</s>",
    'a "word"',
    '"quoted"',
    '"',
    '""',
    '"""',
    '""" three """',
    "back\\slash",
    "\\n",
    'both \\" of them',
    "ends in \\",
    " spaces ",
    "\t",
    "\n",
    "\n\n",
    "two\nlines",
    '"one"\n"two"',
    '"\n',
    '""\n',
    "# Question",
    "PARAMETER stop x\nFROM y",
    "\uc544\ub2c8\uc694 \u2581 \uff5c \U0001f914",
]


@pytest.mark.parametrize("text", STOPS)
def test_a_value_is_read_back(text: str) -> None:
    written = modelfile.quoted(text)
    assert written is not None
    lines = f"FROM x\nPARAMETER stop {written}\nPARAMETER num_ctx 8\n"
    assert read(lines) == [("FROM", "x"), ("stop", text), ("num_ctx", "8")]


# Three quotes that end a line end the value; a zero-width space and a private letter are dropped.
CANNOT = ['"""\n', 'x""" \ny', "a\u200bb", "a\u00a0b", "\ue000", "\x00"]


@pytest.mark.parametrize("text", CANNOT)
def test_a_value_that_cannot_be_said(text: str) -> None:
    assert modelfile.quoted(text) is None
    for quotes in ("", '"', '"""'):
        try:
            found = read(f"stop {quotes}{text}{quotes}\n")
        except ValueError:
            continue
        assert found != [("stop", text)]


@pytest.fixture
def reference(merged_dir: Path, dataset_dir: Path) -> Reference:
    return measure(merged_dir, dataset_dir=dataset_dir, num_rows=1, num_tokens=1)


def written(file: Path, reference: Reference) -> tuple[list[tuple[str, str]], list[str]]:
    notes = modelfile.write(file, reference=reference, adds_bos=False)
    return read((file.parent / MODELFILE).read_text(encoding="utf-8")), notes


def test_stop_texts_in_a_modelfile(reference: Reference, f16_dir: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(f16_dir / "model-F16.gguf", tmp_path))
    (newline,) = reference.tokenise("\n")
    for end in (text.strip() for text in STOPS if text.strip()):
        ends = dataclasses.replace(reference, end=end, stop_ids=[*reference.stop_ids, newline])
        found, notes = written(file, ends)
        assert not notes
        # A stop token as the text that it is, not as the vocabulary spells it.
        wanted = dict.fromkeys([end, "<|im_end|>", "\n"])
        assert [value for name, value in found if name == "stop"] == list(wanted)
        assert ("TEMPLATE", modelfile.pieces(reference, bos="").go_template()) in found


def test_what_a_modelfile_cannot_say_is_noted(
    reference: Reference, f16_dir: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(f16_dir / "model-F16.gguf", tmp_path))
    found, notes = written(file, dataclasses.replace(reference, end="a\u200bb"))
    assert [value for name, value in found if name == "stop"] == ["<|im_end|>"]
    assert len(notes) == 1 and notes[0].startswith(r"no Ollama stop for 'a\u200bb': ")
    reference.tokenizer.chat_template = reference.tokenizer.chat_template.replace(
        "<|im_start|>", "<|im_start|>\u00a0"
    )
    found, notes = written(file, reference)
    assert "TEMPLATE" not in dict(found)
    assert len(notes) == 1 and notes[0].startswith("no Ollama template: the chat template contains")
