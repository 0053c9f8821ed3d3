"""CSV and TSV: no row is read wrongly, and a wrong quote is named with its line."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuneline.errors import DataError
from tuneline.prepare.sources.kinds import read_rows
from tuneline.prepare.sources.row import Remarks


def read(
    path: Path, content: str | bytes, name: str = "rows.csv"
) -> tuple[list[dict[str, Any]], list[tuple[int, str]], list[str]]:
    """Return the rows, the lines and reasons of unusable rows, and the remarks."""
    file = path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    remarks = Remarks()
    rows = list(read_rows(str(file), remarks=remarks))
    good = [row.values for row in rows if row.values is not None]
    return good, [(row.line, row.reason) for row in rows if row.values is None], remarks.sentences()


STRAY = "prompt,completion\n" + "".join(f"Question {n}?,Answer {n}\n" for n in range(400))


@pytest.mark.parametrize(
    ("line", "row", "message"),
    [
        # The quote takes the rest of the file.
        (151, 'An "odd,1', None),
        (151, '"A monitor,yes', r"line 151 \(\"A monitor,yes\) never closes"),
        (151, '"A 27" monitor,yes', r"line 151 \(\"A 27\" monitor,yes\) closes before its field"),
        (151, 'x,"yes', r"line 151 \(\"yes\) never closes"),
        (2, '"Parasite" is a film,yes', r"line 2 .* closes before its field ends"),
        (401, 'x,"', r"line 401 \(\"\) never closes"),
    ],
)
def test_a_wrong_quote_is_named_with_its_line(
    tmp_path: Path, line: int, row: str, message: str | None
) -> None:
    lines = STRAY.splitlines()
    lines[line - 1] = row
    content = "\n".join(lines) + "\n"
    if message is None:
        # A quote inside a field that does not begin with one is a character like any other.
        good, bad, _ = read(tmp_path, content)
        assert len(good) == 400 and not bad
        assert good[149] == {"prompt": 'An "odd', "completion": "1"}
        return
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


def test_a_quote_that_closes_lines_later(tmp_path: Path) -> None:
    # The quotes of two rows make one field of eleven lines; its row has too few fields.
    lines = STRAY.splitlines()
    lines[99], lines[109] = 'Disk 5,"one', 'two",end,more'
    with pytest.raises(DataError, match=r"begins in line 100 ends in line 110.*opens in line 100"):
        read(tmp_path, "\n".join(lines))
    lines[99], lines[109] = 'Disk 5,"one', 'two"x,end'
    with pytest.raises(DataError, match=r"opens in line 100 .* closes in line 110, before a field"):
        read(tmp_path, "\n".join(lines))
    # The number of fields is right, so that the row may be meant; the lines are named.
    lines[99], lines[109] = 'Disk 5,"one', 'two"'
    good, bad, remarks = read(tmp_path, "\n".join(lines))
    assert len(good) == 390 and not bad
    assert remarks == [
        "rows.csv: a quoted field in lines 100 to 110 holds lines that look like rows; check its "
        "quotes"
    ]


def test_the_line_of_the_quote_and_not_of_the_row_is_named(tmp_path: Path) -> None:
    content = 'a,b\n"one\ntwo, ""2""","open\nthree,3\n'
    with pytest.raises(DataError, match=r"the quote that opens in line 3 \(\"open\) never closes"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "rows", "remarks"),
    [
        (
            "a;b\n1;x, y\n",
            [{"a": "1", "b": "x, y"}],
            ["rows.csv: its columns are separated by semicolons"],
        ),
        ("a\tb\n1\t2\n", [{"a": "1", "b": "2"}], ["rows.csv: its columns are separated by tabs"]),
        (
            "sep=;\r\na;b\r\n1;2\r\n",
            [{"a": "1", "b": "2"}],
            ["rows.csv: its columns are separated by semicolons"],
        ),
        ('a, b\n1, "x, y"\n', [{"a": "1", "b": "x, y"}], []),
        (
            ",a,b\n0,1,2\n",
            [{"column 1": "0", "a": "1", "b": "2"}],
            ["rows.csv: column 1 has no name in the header"],
        ),
        ("a,b\r1,2\r3,4\r", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}], []),
        ("text\none\n", [{"text": "one"}], []),
        ("a,b\n\n1,2\n\n", [{"a": "1", "b": "2"}], []),
        ("a,b\n", [], ["rows.csv: holds no rows"]),
        ("", [], ["rows.csv: holds no rows"]),
    ],
)
def test_ways_to_write_csv(
    tmp_path: Path, content: str, rows: list[dict[str, str]], remarks: list[str]
) -> None:
    good, bad, said = read(tmp_path, content)
    assert (good, bad, said) == (rows, [], remarks)


def test_lines_are_counted_behind_a_line_that_names_the_delimiter(tmp_path: Path) -> None:
    assert read(tmp_path, "sep=;\na;b\n1;2;3\n")[1] == [(3, "3 fields, but the header has 2")]
    with pytest.raises(DataError, match="opens in line 3 "):
        read(tmp_path, 'sep=;\na;b\n"1;2\n')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,a\n1,2\n", "columns 1 and 2 are both named 'a'"),
        (f"{'word ' * 30},b\n", "its first line is not a header"),
    ],
)
def test_headers_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    content = b"a,b\n1\n1,2,3\nx\0y,2\n\xb0,2\n3,4\n"
    good, bad, _ = read(tmp_path, content)
    assert good == [{"a": "3", "b": "4"}]
    assert [line for line, _ in bad] == [2, 3, 4, 5]
    assert bad[0][1] == "1 fields, but the header has 2"
    assert bad[2][1] == "a field holds a NUL character"


def test_a_tsv_field_cannot_continue_on_the_next_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="field that begins in line 3 seems to continue"):
        read(tmp_path, 'a\tb\n1\t2\nx\t"one\ntwo"\n', "rows.tsv")
    with pytest.raises(DataError, match="field that begins in line 2 seems to continue"):
        read(tmp_path, 'a\tb\n"one\ntwo"\t2\n', "rows.tsv")
    # A stray quote alone is a character.
    good, bad, _ = read(tmp_path, 'a\tb\n1\t"x\n2\ty\n', "rows.tsv")
    assert good == [{"a": "1", "b": '"x'}, {"a": "2", "b": "y"}] and not bad


CELL = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12
) | st.sampled_from(['"', 'a "b" c', "line\nbreak", "x, y", "'", "", "\ud55c\uad6d"])


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    st.sampled_from([",", ";"]),
)
def test_what_the_csv_module_writes_is_read(
    tmp_path: Path, rows: list[tuple[str, str]], quoting: Any, delimiter: str
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, quoting=quoting, delimiter=delimiter, lineterminator="\n")
    writer.writerows([("prompt", "completion"), *rows])
    good, bad, _ = read(tmp_path, text.getvalue())
    assert [(row["prompt"], row["completion"]) for row in good] == rows
    assert not bad


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.text('ab",\n ', max_size=8), max_size=12))
def test_no_line_of_any_csv_is_lost(tmp_path: Path, lines: list[str]) -> None:
    """Each line that holds something is in a row, or in a named one; or the file is refused."""
    content = "prompt,completion\n" + "".join(f"{line}\n" for line in lines)
    try:
        good, bad, _ = read(tmp_path, content)
    except DataError as error:
        assert '"' in content and "line " in str(error)
        return
    expected = [cells for cells in csv.reader(io.StringIO(content), strict=True) if cells][1:]
    assert len(good) + len(bad) == len(expected)
    assert [list(row.values()) for row in good] == [row for row in expected if len(row) == 2]


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.text('ab"\t ', min_size=1, max_size=8), max_size=12))
def test_no_line_of_any_tsv_is_lost(tmp_path: Path, lines: list[str]) -> None:
    try:
        good, bad, _ = read(tmp_path, "a\tb\n" + "".join(f"{line}\n" for line in lines), "rows.tsv")
    except DataError as error:
        assert "line " in str(error)
        return
    assert len(good) + len(bad) == sum(bool(line.strip()) for line in lines)
